"""The agent thread: sleeps on the channel, the transport and a queue of commands, and lets its agent act on each."""

import logging
import os
import select
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Container, Sequence
from typing import Generic, TypeVar

import zmq

from pdkv.transport.base import Completion, Transport
from pdkv.wire.admission import Refused
from pdkv.wire.channel import Channel, Received

_LOG = logging.getLogger("pdkv.agent")
_LONGEST_SLEEP_S = 5.0

Command = TypeVar("Command")
CrashHandler = Callable[[BaseException], None]


def now() -> float:
    """Seconds of CLOCK_BOOTTIME: it goes on while the machine sleeps, as the leases of peers do."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Agent(ABC, Generic[Command]):
    """What one role does in the agent thread. Every method is called from that thread only and returns at once."""

    @abstractmethod
    def on_command(self, command: Command, at: float) -> None: ...

    @abstractmethod
    def on_message(self, received: Received, at: float) -> None: ...

    @abstractmethod
    def on_refused(self, refused: Refused, at: float) -> None:
        """Keys have kept a connection from standing."""

    @abstractmethod
    def on_completions(self, completions: Sequence[Completion], at: float) -> None: ...

    @abstractmethod
    def on_time(self, at: float) -> None:
        """Act on everything whose time has come."""

    @abstractmethod
    def next_wakeup(self) -> float | None:
        """When ``on_time`` is wanted next."""

    @abstractmethod
    def close(self, at: float) -> None:
        """Tell peers, then drop everything; the last call."""


class AgentLoop(Generic[Command]):
    """Owns the thread, and in it the channel and the transport, until ``stop``.

    ``post`` may be called from any thread. ``on_crash`` is called, from the agent thread, if it dies of a defect: the
    worker must end then, for its leases are kept by nobody.
    """

    def __init__(self, channel: Channel, transport: Transport) -> None:
        self.channel = channel
        self.transport = transport
        self.crashed: BaseException | None = None
        self.turned_at = time.monotonic()
        """When the thread last came round; written by it, read by anybody. Asleep it comes round every 5 s."""
        self._commands: deque[Command] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, agent: Agent[Command], on_crash: CrashHandler) -> None:
        self._thread = threading.Thread(target=self._run, args=(agent, on_crash), name="pdkv-agent", daemon=True)
        self._thread.start()

    def post(self, command: Command) -> None:
        self._commands.append(command)
        os.eventfd_write(self._wake, 1)

    def stop(self, timeout_s: float = 5.0) -> None:
        """End the thread after the agent has closed; closes channel and transport. Idempotent."""
        if self._thread is None:
            return
        self._stopping.set()
        os.eventfd_write(self._wake, 1)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            _LOG.error("agent thread did not end within %.1f s", timeout_s)
            return
        self._thread = None
        os.close(self._wake)

    def _run(self, agent: Agent[Command], on_crash: CrashHandler) -> None:
        try:
            while not self._stopping.is_set():
                self._turn(agent, self._sleep(agent))
            agent.close(now())
        except BaseException as exc:  # noqa: BLE001 - the outermost frame of this thread: nothing above could report it
            self.crashed = exc
            _LOG.exception("agent thread died")
            on_crash(exc)
        finally:
            self.transport.close()
            self.channel.close()

    def _turn(self, agent: Agent[Command], ready: Container[object]) -> None:
        """``ready``: sockets that have something, as of when it woke."""
        self.turned_at = time.monotonic()
        while self._commands:
            agent.on_command(self._commands.popleft(), now())
        for received in self.channel.receive(ready):
            agent.on_message(received, now())
        for refused in self.channel.take_refused():
            agent.on_refused(refused, now())
        completions = self.transport.poll()
        if completions:
            agent.on_completions(completions, now())
        agent.on_time(now())

    def _sleep(self, agent: Agent[Command]) -> Container[object]:
        poller = zmq.Poller()
        for socket in self.channel.sockets():
            poller.register(socket, zmq.POLLIN)
        poller.register(self._wake, select.POLLIN)
        poller.register(self.transport.fileno(), select.POLLIN)
        wakeup = agent.next_wakeup()
        wait_s = _LONGEST_SLEEP_S if wakeup is None else min(max(0.0, wakeup - now()), _LONGEST_SLEEP_S)
        ready = dict(poller.poll(int(wait_s * 1000) + 1))
        if self._wake in ready:
            os.eventfd_read(self._wake)
        return ready
