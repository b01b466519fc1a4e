"""A way to a worker over which its answers to POSTs can be held up, and which counts what its caller drops."""

import contextlib
import socket
import threading
from collections.abc import Iterator


class HeldWay:
    """Connections to one worker, passed on byte by byte. Asked by the test's thread, at work in threads of its own."""

    def __init__(self, host: str, port: int) -> None:
        self._worker = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = "http://{}:{}".format(*self._listener.getsockname())
        self.let_go = threading.Event()
        """While it is not set, answers to POSTs wait."""
        self.num_posts = 0
        self.num_dropped = 0
        """Connections that the caller ended."""
        self._sockets: list[socket.socket] = [self._listener]
        self._threads: list[threading.Thread] = []
        self._run(self._accept)

    def close(self) -> None:
        self.let_go.set()
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for sock in self._sockets:
            sock.close()

    def _run(self, work, *args: object) -> None:
        self._threads.append(threading.Thread(target=work, args=args))
        self._threads[-1].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                caller, _ = self._listener.accept()
                worker = socket.create_connection(self._worker)
                self._sockets += [caller, worker]
                holds = threading.Event()
                self._run(self._asks, caller, worker, holds)
                self._run(self._answers, caller, worker, holds)

    def _asks(self, caller: socket.socket, worker: socket.socket, holds: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := caller.recv(1 << 16):
                if data.startswith(b"POST "):
                    self.num_posts += 1
                    holds.set()
                worker.sendall(data)
            self.num_dropped += 1
            worker.shutdown(socket.SHUT_RDWR)

    def _answers(self, caller: socket.socket, worker: socket.socket, holds: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := worker.recv(1 << 16):
                if holds.is_set():
                    self.let_go.wait()
                caller.sendall(data)


@contextlib.contextmanager
def held_way(url: str) -> Iterator[HeldWay]:
    """To the worker at ``url``."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    way = HeldWay(host, int(port))
    try:
        yield way
    finally:
        way.close()
