"""What keys cost the control channel: messages there and back between two threads, and new connections.

    python scripts/bench_channel.py

Microseconds: median, and the fastest tenth in brackets. Plain and encrypted take turns, so that what else the machine
does meets both. *short* is an acknowledgement both ways; *digests* is one message of a mebibyte that is acknowledged;
*connect* is from a new socket to the first answer over it.
"""

import argparse
import statistics
import threading
import time
from collections.abc import Callable

import zmq

from pdkv.schema import Incarnation, TransferId
from pdkv.wire.admission import ChannelSecurity, NoSecurity
from pdkv.wire.channel import Channel, Route
from pdkv.wire.curve import CurveSecurity, Keys, SecretKey
from pdkv.wire.messages import Ack, Body, Digests, make_envelope

_P, _D = Incarnation(1 << 56 | 1), Incarnation(1 << 56 | 2)
_TRANSFER = TransferId(bytes(16))
_LONG = Digests(0, 1, (bytes(1 << 20),))
_PATIENCE_MS = 10_000


class _Answering(threading.Thread):
    """P: acknowledges whatever comes."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(daemon=True)
        self._channel = channel
        self.stop = threading.Event()

    def run(self) -> None:
        while not self.stop.is_set():
            for received in self._channel.receive(_wait(self._channel, 50)):
                self._channel.send(received.route, make_envelope(_P, _D, _TRANSFER, 1), Ack(1))
        self._channel.close()


def _wait(channel: Channel, timeout_ms: int) -> dict[object, int]:
    poller = zmq.Poller()
    for socket in channel.sockets():
        poller.register(socket, zmq.POLLIN)
    return dict(poller.poll(timeout_ms))


class _Pair:
    def __init__(self, security: ChannelSecurity) -> None:
        prefill = Channel(_P, security)
        self._address = prefill.bind("tcp://127.0.0.1:0")
        self._answering = _Answering(prefill)
        self._answering.start()
        self._decode = Channel(_D, security)
        self._route = self._decode.connect(self._address)
        self.ask(Ack(0))

    def ask(self, body: Body, route: Route | None = None) -> None:
        self._decode.send(route or self._route, make_envelope(_D, _P, _TRANSFER, 1), body)
        ready = _wait(self._decode, _PATIENCE_MS)
        while not list(self._decode.receive(ready)):
            if not ready:
                raise SystemExit(f"no answer within {_PATIENCE_MS} ms")
            ready = _wait(self._decode, _PATIENCE_MS)

    def connect(self) -> None:
        route = self._decode.connect(self._address)
        self.ask(Ack(0), route)
        self._decode.disconnect(route)

    def close(self) -> None:
        self._decode.close()
        self._answering.stop.set()
        self._answering.join()


def _seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=2000)
    repeat = parser.parse_args().repeat
    pairs = {"plain": _Pair(NoSecurity()), "keys": _Pair(CurveSecurity(Keys.of(SecretKey.new())))}
    asked: dict[str, tuple[Callable[[_Pair], None], int]] = {
        "short": (lambda pair: pair.ask(Ack(7)), repeat),
        "digests": (lambda pair: pair.ask(_LONG), repeat // 20),
        "connect": (lambda pair: pair.connect(), repeat // 20),
    }
    print(f"{'':<8}" + "".join(f"{name:>22}" for name in pairs))
    for what, (work, times) in asked.items():
        taken: dict[str, list[float]] = {name: [] for name in pairs}
        for _ in range(times):
            for name, pair in pairs.items():
                taken[name].append(_seconds(lambda work=work, pair=pair: work(pair)))  # type: ignore[misc]
        cells = ""
        for seconds in taken.values():
            fastest = sorted(seconds)[: max(1, len(seconds) // 10)]
            cells += f"{statistics.median(seconds) * 1e6:>12,.0f} ({statistics.mean(fastest) * 1e6:,.0f})".rjust(22)
        print(f"{what:<8}{cells}")
    for pair in pairs.values():
        pair.close()


if __name__ == "__main__":
    main()
