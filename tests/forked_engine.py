"""Engine processes that are forked off their front, where that itself was forked off what has loaded all they need."""

import asyncio
import contextlib
import importlib
import os
import signal
import sys
import traceback
from asyncio.subprocess import Process
from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn

from pdkv.daemons import lifeline

_start = asyncio.create_subprocess_exec


def fork_engines() -> None:
    """From now on, in this process: what its front starts by ``lifeline.command`` is a fork, not a new interpreter."""
    asyncio.create_subprocess_exec = _start_or_fork  # type: ignore[assignment]


async def _start_or_fork(*args: str, **options: Any) -> Process:
    """``subprocess`` forks in either case, and does all it is asked for; a fork then goes on without ``exec``."""
    plain = lifeline.command("")
    if list(args[: len(plain) - 1]) != plain[:-1]:
        return await _start(*args, **options)
    module, *arguments = args[len(plain) - 1 :]
    become = partial(_become, module, arguments, os.getpid(), frozenset(options["pass_fds"]))
    return await _start(*args, **options, preexec_fn=become)


def _become(module: str, arguments: Sequence[str], parent_pid: int, kept: frozenset[int]) -> NoReturn:
    """In the child. What an ``exec`` takes away goes: other descriptors, handlers of signals, the event loop."""
    code = 1
    try:
        lifeline.die_with_parent(parent_pid)
        signal.set_wakeup_fd(-1)
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # as an interpreter does at its start
            signal.signal(number, signal.SIG_IGN)
        for fd in map(int, os.listdir("/proc/self/fd")):
            if fd > 2 and fd not in kept:
                with contextlib.suppress(OSError):  # that of the listing itself
                    os.close(fd)
        asyncio._set_running_loop(None)
        asyncio.set_event_loop(None)
        sys.argv = [module, *arguments]
        code = importlib.import_module(module).main() or 0
    except BaseException:  # noqa: BLE001 - the outermost frame: nothing may come back into the front's code
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
