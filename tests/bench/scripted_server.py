"""A server of completions that answers as it is told: the tokens of a script, an error, or half an answer."""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Script = Callable[[dict[str, object]], Iterator[bytes] | int]
"""Of a request's body: the lines of a stream, or a status to refuse with."""


def tokens(
    *groups: list[int], transfer: dict[str, object] | None = None, logprobs: Sequence[float] = ()
) -> Iterator[bytes]:
    """A whole stream, one event a group; ``logprobs``, where they are told, of all tokens in order."""
    untold = iter(logprobs)
    for number, group in enumerate(groups):
        last = number == len(groups) - 1
        event = {"choices": [{"text": "x", "index": 0, "token_ids": group, "finish_reason": None}]}
        if logprobs:
            event["choices"][0]["logprobs"] = {"token_logprobs": [next(untold) for _ in group]}
        if last and transfer is not None:
            event["pdkv"] = {"request_id": "r", "transfer_id": "t", "prefill_control": "c", "transfer": transfer}
        yield b"data: " + json.dumps(event).encode()
    yield b"data: [DONE]"


class _Handler(BaseHTTPRequestHandler):
    script: Script
    api_key: str

    def do_GET(self) -> None:
        if self._is_refused():
            return
        self._send(200, json.dumps({"object": "list", "data": [{"id": "scripted"}]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._is_refused():
            return
        found = self.script(body)
        if isinstance(found, int):
            self._send(found, json.dumps({"error": {"message": "as told", "type": "t", "code": "scripted"}}).encode())
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for line in found:
            self.wfile.write(line + b"\n\n")

    def _is_refused(self) -> bool:
        refused = bool(self.api_key) and self.headers["Authorization"] != f"Bearer {self.api_key}"
        if refused:
            self._send(401, json.dumps({"error": {"message": "no key", "type": "t", "code": "scripted"}}).encode())
        return refused

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def served(script: Script, api_key: str = "") -> Iterator[str]:
    """The URL of a server that is there until the context is left. It asks for the key, if there is one."""
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), type("Handler", (_Handler,), {"script": staticmethod(script), "api_key": api_key})
    )
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
