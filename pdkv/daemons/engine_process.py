"""The engine process of a worker: its engine side, fed by the link to the front, for as long as the front lives.

Three threads: the main one owns the engine, the agent thread owns channel and transport, a third reads the link. They
meet only at queues. Where the worker has several ranks this process is rank 0 and the parent of the others. It ends
when the front goes, when the agent dies, when a rank is lost, or when it cannot start.
"""

import gc

if __name__ == "__main__":
    gc.disable()  # while modules load: nothing of theirs is garbage, and looking for it is an eighth of torch's loading

import argparse
import logging
import os
import signal
import socket
import sys
import threading

import msgspec

from pdkv.daemons.engine_side import EngineSide
from pdkv.daemons.link import BeatQuery, BlockingLink, EngineFatal, ToEngine, WorkerSettings
from pdkv.daemons.logs import configure_logging
from pdkv.daemons.rank_process import fork_ranks
from pdkv.errors import PdkvError, RankLostError

_LOG = logging.getLogger("pdkv.engine")
_LONGEST_WAIT_S = 0.5
"""How late an idle engine may notice a deadline, or that its front has gone."""
_SWITCH_S = 0.0005
"""A thread that wants to run gets its turn after so long. Python's own 5 ms is what a message of a transfer would wait
while the engine lays out a step or launches kernels."""


def serve(settings: WorkerSettings, link: BlockingLink) -> None:
    """Run a worker's engine side until the front closes the link."""

    def end(error: RankLostError) -> None:
        link.send(EngineFatal(message=str(error), exit_code=error.exit_code))
        os._exit(error.exit_code)

    others = fork_ranks(settings, link, at_worst=end)
    side = EngineSide(settings, link.send, others=others)
    front_gone = threading.Event()

    def read_front() -> None:
        decoder = msgspec.msgpack.Decoder(ToEngine)
        while (body := link.receive_bytes()) is not None:
            message = decoder.decode(body)
            if isinstance(message, BeatQuery):  # answered from here, whatever the other threads are at
                link.send(side.beat(message.query))
            else:
                side.hear(message)
        front_gone.set()

    threading.Thread(target=read_front, name="pdkv-front-link", daemon=True).start()
    link.send(side.ready())
    try:
        while not front_gone.is_set():
            side.turn(_LONGEST_WAIT_S)
    finally:
        side.close()


def main() -> int:
    """Entry point: ``--fd`` names the inherited end of the link."""
    parser = argparse.ArgumentParser(prog="pdkv.daemons.engine_process")
    parser.add_argument("--fd", type=int, required=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the front ends us in order
    link = BlockingLink(socket.socket(fileno=parser.parse_args().fd))
    body = link.receive_bytes()
    if body is None:
        return 1
    settings = msgspec.msgpack.decode(body, type=WorkerSettings)
    configure_logging(settings.log_level, settings.role)
    sys.setswitchinterval(_SWITCH_S)
    gc.freeze()  # what has been loaded stays: a look at all of it is 0.1 s in which nobody else of this process runs
    gc.enable()
    try:
        serve(settings, link)
    except PdkvError as exc:
        link.send(EngineFatal(message=str(exc), exit_code=exc.exit_code))
        return exc.exit_code
    except Exception as exc:  # noqa: BLE001 - the outermost frame: the front must learn why its engine went
        _LOG.exception("engine process died")
        link.send(EngineFatal(message=f"{type(exc).__name__}: {exc}", exit_code=1))
        return 1
    return 0


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # daemon threads may still hold native locks: nothing is left to be done in order
