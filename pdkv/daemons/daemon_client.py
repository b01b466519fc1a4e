"""One question to a running daemon, from a command: its answer, or an error that says what to do."""

from typing import TypeVar

import httpx
import msgspec

from pdkv.daemons.openai_api import ApiError
from pdkv.errors import PdkvError

_TIMEOUT_S = 10.0
Answer = TypeVar("Answer")


class RefusedError(PdkvError):
    """A daemon answered, with a status other than 200."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def ask(method: str, url: str, path: str, kind: type[Answer], body: msgspec.Struct | None = None) -> Answer:
    """The answer, as ``kind``. Raises ``RefusedError`` for another status than 200, ``PdkvError`` where no daemon
    answers."""
    content = b"" if body is None else msgspec.json.encode(body)
    try:
        answer = httpx.request(method, url.rstrip("/") + path, content=content, timeout=_TIMEOUT_S, trust_env=False)
    except (httpx.HTTPError, httpx.InvalidURL) as exc:
        raise PdkvError(f"no daemon answers at {url}: {exc}") from exc
    if answer.status_code != 200:
        told = ApiError.decode(answer.status_code, answer.content, None)
        raise RefusedError(f"{url} answers {answer.status_code}: {told}", answer.status_code)
    try:
        return msgspec.json.decode(answer.content, type=kind)
    except msgspec.MsgspecError as exc:
        raise PdkvError(f"what answers {method} {path} at {url} is no pdkv daemon: {exc}") from exc
