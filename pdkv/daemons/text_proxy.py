"""Passes questions about text and token ids on to whichever worker answers: every worker has the tokenizer."""

from starlette.requests import Request
from starlette.responses import Response

from pdkv.daemons import http_server
from pdkv.daemons.openai_api import ApiError
from pdkv.daemons.worker_api import REQUEST_ID
from pdkv.daemons.worker_client import WorkerClient, WorkerLostError
from pdkv.daemons.worker_pool import WorkerPool

_TIMEOUT_S = 30.0


class TextProxy:
    """Handler of a router for paths that workers serve under the same name. Belongs to the event loop's thread."""

    def __init__(self, client: WorkerClient, pool: WorkerPool) -> None:
        self._client = client
        self._pool = pool

    async def pass_on(self, request: Request) -> Response:
        """The first answer of a ready worker, decode workers last: they are the ones that are waited for."""
        body = await http_server.read_body(request) if request.method == "POST" else b""
        headers = {
            **http_server.trace_headers(request),
            REQUEST_ID: http_server.request_id(request),
            "content-type": "application/json",
        }
        problem = "no worker is ready"
        for worker in [worker for worker in self._pool.workers() if worker.info is not None]:
            try:
                answer = await self._client.ask(
                    request.method, worker.url + request.url.path, _TIMEOUT_S, body=body, headers=headers
                )
            except WorkerLostError as exc:
                problem = f"{worker.url} did not answer ({exc})"
                continue
            return http_server.json_response(answer.body, answer.status)
        raise ApiError.of(503, problem, code="not_ready", retry_after_s=1)
