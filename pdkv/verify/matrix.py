"""``pdkv matrix``: every pair of rank counts, cache dtype and index schedule, with real workers.

For each kind of cache one prefill and one decode worker of every rank count are started; then each pair of them moves a
prompt with a known answer, longer than the blind window, and generates a whole cycle of it.
"""

import asyncio
import contextlib
import os
import secrets
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

import httpx
import msgspec

from pdkv.daemons import worker_api
from pdkv.daemons.config import Address, child_environment
from pdkv.daemons.http_server import bound_address
from pdkv.daemons.local import reserve_port
from pdkv.daemons.openai_api import ApiError, Completion
from pdkv.daemons.supervisor import ChildSpec, Supervisor
from pdkv.errors import PdkvError
from pdkv.verify.link_chasing import LinkChasingPrompt, make_prompt
from pdkv.verify.link_chasing_checkpoint import write_checkpoint
from pdkv.verify.process_memory import tree_peaks

SCHEMA = "pdkv.matrix/v1"
STEPS = 64
_START_S = 300.0
_REQUEST_S = 300.0
_POLL_S = 0.2
_GPU_SHARE = 0.8
"""Of a GPU's memory, for all workers together."""


class CacheKind(msgspec.Struct, frozen=True):
    """How state is stored, and which sparse layers select."""

    kv_dtype: str
    index_dtype: str
    topk_freq: int = 1
    """Every so many-th sparse layer selects; the others reuse its choice."""

    @property
    def flags(self) -> tuple[str, ...]:
        freq = ("--index-topk-freq", str(self.topk_freq))
        return ("--kv-dtype", self.kv_dtype, "--index-dtype", self.index_dtype, *freq)


DEFAULT_KINDS = (
    CacheKind("float32", "float32"),
    CacheKind("bfloat16", "bfloat16"),
    CacheKind("float16", "float16"),
    CacheKind("fp8", "fp8"),
    CacheKind("fp8", "bfloat16"),
    CacheKind("fp8_unit", "fp8"),
    CacheKind("fp8_e5m2", "fp8"),
    CacheKind("fp8", "fp8", topk_freq=2),
)


class MatrixOptions(msgspec.Struct, frozen=True):
    ranks: tuple[int, ...] = (1, 2, 4, 8)
    kinds: tuple[CacheKind, ...] = DEFAULT_KINDS
    num_tokens: int = 3072
    seed: int = 1
    device: str = "cpu"
    """cpu or cuda. Rank r of every worker takes the r-th GPU, so there must be as many as the most ranks."""

    @property
    def device_flags(self) -> tuple[str, ...]:
        if self.device == "cpu":
            return ()
        share = _GPU_SHARE / (2 * len(self.ranks))  # first ranks of all workers stand side by side
        return ("--device", self.device, "--gpu-memory-utilization", f"{share:.3f}")


class Cell(msgspec.Struct, frozen=True):
    """One pair of workers with one kind of cache."""

    prefill_tp: int
    decode_tp: int
    kind: CacheKind
    bytes_per_page: int
    """Moved for one page, over all ranks of D."""
    spans_per_page: float
    """Reads posted for one page, over all ranks of D; below 1 where runs of pages are one span."""
    num_pages: int
    path: str
    first_wrong_step: int | None
    prefill_peak_rss: int
    """Bytes, of the largest process of the worker."""
    decode_peak_rss: int
    seconds: float

    @property
    def right(self) -> bool:
        return self.first_wrong_step is None


class MatrixReport(msgspec.Struct, frozen=True):
    schema: str
    num_tokens: int
    steps: int
    cells: tuple[Cell, ...]
    seconds: float

    @property
    def right(self) -> bool:
        return all(cell.right for cell in self.cells)


class _Worker(msgspec.Struct, frozen=True):
    name: str
    role: str
    tp: int
    url: str


def run_matrix(options: MatrixOptions, tell: Callable[[str], None], print_line: Callable[[str], None]) -> MatrixReport:
    """Run every cell; ``tell`` gets a line as each ends, ``print_line`` what the workers log.

    Raises ``PdkvError`` when a worker cannot start or a request fails.
    """
    return asyncio.run(_run(options, tell, print_line))


async def _run(options: MatrixOptions, tell: Callable[[str], None], print_line: Callable[[str], None]) -> MatrixReport:
    started = time.perf_counter()
    cells = []
    with tempfile.TemporaryDirectory(prefix="pdkv-matrix-") as folder:
        for kind in options.kinds:
            model = Path(folder) / f"link-chasing-{kind.topk_freq}"
            if not model.exists():
                write_checkpoint(model, index_topk_freq=kind.topk_freq)
            tell(f"starting {2 * len(options.ranks)} workers, {told(kind)} ...")
            async for cell in _cells(options, kind, model, print_line):
                tell(_line(cell))
                cells.append(cell)
    return MatrixReport(SCHEMA, options.num_tokens, STEPS, tuple(cells), time.perf_counter() - started)


async def _cells(
    options: MatrixOptions, kind: CacheKind, model: Path, print_line: Callable[[str], None]
) -> AsyncIterator[Cell]:
    prompts = (make_prompt(options.seed + i, options.num_tokens) for i in range(len(options.ranks) ** 2))
    async with (
        _workers(options, kind, model, print_line) as (supervisor, workers),
        httpx.AsyncClient(trust_env=False, timeout=_REQUEST_S) as client,
    ):
        prefills, decodes = ([w for w in workers if w.role == role] for role in ("prefill", "decode"))
        for prefill in prefills:
            for decode in decodes:
                yield await _cell(client, supervisor, (prefill, decode), kind, next(prompts))


@contextlib.asynccontextmanager
async def _workers(
    options: MatrixOptions, kind: CacheKind, model: Path, print_line: Callable[[str], None]
) -> AsyncIterator[tuple[Supervisor, list[_Worker]]]:
    shared = (
        *("--model", str(model), "--max-model-len", str(options.num_tokens + STEPS), "--max-batch", "1"),
        *("--log-level", "warning", "--no-prefix-cache", *kind.flags, *options.device_flags),
    )
    with contextlib.ExitStack() as stack:

        def port() -> Address:
            return bound_address(stack.enter_context(reserve_port("127.0.0.1", 0)))

        workers, specs = [], []
        for role, tp in _roles(options.ranks):
            data, admin = port(), port()
            listen = ("--listen", str(data), "--admin-listen", str(admin), "--reuse-port")
            worker = _Worker(f"{role}-tp{tp}", role, tp, f"http://{data}")
            # Whole rows, so that spans a page are what the layouts make them.
            groups = ("--layer-groups", "1") if role == "prefill" else ()
            specs.append(ChildSpec(worker.name, (role, *listen, "--tp", str(tp), *groups, *shared)))
            workers.append(worker)
        environment = child_environment(OMP_WAIT_POLICY="PASSIVE")
        supervisor = Supervisor(specs, environment, restart=False, drain_s=1.0, print_line=print_line)
        async with supervisor.running():
            await supervisor.settled_after(_until_ready(workers))
            yield supervisor, workers


def _roles(ranks: Sequence[int]) -> Iterator[tuple[str, int]]:
    return ((role, tp) for role in ("prefill", "decode") for tp in ranks)


async def _until_ready(workers: Sequence[_Worker]) -> None:
    try:
        async with asyncio.timeout(_START_S), httpx.AsyncClient(trust_env=False, timeout=5.0) as client:
            for worker in workers:
                while not await _is_ready(client, worker):
                    await asyncio.sleep(_POLL_S)
    except TimeoutError:
        raise PdkvError(f"the workers were not ready within {_START_S:.0f} s") from None


async def _is_ready(client: httpx.AsyncClient, worker: _Worker) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return (await _info(client, worker)).ready
    return False


async def _info(client: httpx.AsyncClient, worker: _Worker) -> worker_api.WorkerInfo:
    answer = await client.get(worker.url + worker_api.INFO_PATH)
    return msgspec.json.decode(answer.content, type=worker_api.WorkerInfo)


async def _cell(
    client: httpx.AsyncClient,
    supervisor: Supervisor,
    pair: tuple[_Worker, _Worker],
    kind: CacheKind,
    prompt: LinkChasingPrompt,
) -> Cell:
    prefill, decode = pair
    started = time.perf_counter()
    completion = await _ask(client, prefill, decode, prompt)
    seconds = time.perf_counter() - started
    ids, block = completion.choices[0].token_ids, completion.pdkv
    assert ids is not msgspec.UNSET, "the request asked for them"
    if block is msgspec.UNSET or block.transfer is None:
        raise PdkvError(f"{decode.name} reported no transfer")
    moved, expected = block.transfer, prompt.expected(STEPS)
    wrong = (step for step, (got, want) in enumerate(zip(ids, expected, strict=True)) if got != want)
    return Cell(
        prefill_tp=prefill.tp,
        decode_tp=decode.tp,
        kind=kind,
        bytes_per_page=moved.num_bytes // moved.num_pages,
        spans_per_page=moved.num_spans / moved.num_pages,
        num_pages=moved.num_pages,
        path=moved.path,
        first_wrong_step=next(wrong, None),
        prefill_peak_rss=tree_peaks(supervisor.pid(prefill.name))[0],
        decode_peak_rss=tree_peaks(supervisor.pid(decode.name))[0],
        seconds=seconds,
    )


async def _ask(client: httpx.AsyncClient, prefill: _Worker, decode: _Worker, prompt: LinkChasingPrompt) -> Completion:
    """Ask both workers at once, as the router does, and no other pair."""
    info = await _info(client, prefill)
    headers = {
        worker_api.TRANSFER: secrets.token_hex(16),
        worker_api.DEADLINE: f"{_REQUEST_S:.3f}",
        worker_api.PREFILL_CONTROL: info.control,
        worker_api.PREFILL_INCARNATION: info.incarnation,
        worker_api.DEBUG: "1",
    }
    body = {
        "prompt": list(prompt.token_ids),
        "max_tokens": STEPS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    computing = asyncio.create_task(client.post(prefill.url + worker_api.PREFILL_PATH, json=body, headers=headers))
    try:
        answer = await client.post(decode.url + worker_api.COMPLETIONS_PATH, json=body, headers=headers)
        if answer.status_code != 200:
            error = ApiError.decode(answer.status_code, answer.content, None)
            raise PdkvError(f"{prefill.name} -> {decode.name}: {error} (HTTP {answer.status_code})")
        return msgspec.json.decode(answer.content, type=Completion)
    except httpx.HTTPError as exc:
        raise PdkvError(f"{prefill.name} -> {decode.name}: {type(exc).__name__}: {exc}") from exc
    finally:
        computing.cancel()
        await asyncio.gather(computing, return_exceptions=True)


def told(kind: CacheKind) -> str:
    """For people."""
    schedule = "every sparse layer selects" if kind.topk_freq == 1 else f"1 of {kind.topk_freq} sparse layers selects"
    return f"K/V {kind.kv_dtype}, index {kind.index_dtype}, {schedule}"


_HEADER = "  tp P -> D    bytes/page  spans/page  answer   MiB peak RSS P / D (largest rank)"


def _line(cell: Cell) -> str:
    answer = "right" if cell.right else f"WRONG from step {cell.first_wrong_step}"
    rss = f"{cell.prefill_peak_rss >> 20} / {cell.decode_peak_rss >> 20}"
    pair = f"{cell.prefill_tp} -> {cell.decode_tp}"
    return f"  {pair:<10} {cell.bytes_per_page:>12,}  {cell.spans_per_page:>10.2f}  {answer:<7}  {rss}"


def table(report: MatrixReport) -> str:
    """The whole table, one part a kind of cache."""
    lines = [f"{report.num_tokens:,} tokens through P -> D, {report.steps} steps, {os.cpu_count()} cores"]
    for kind in dict.fromkeys(cell.kind for cell in report.cells):
        mine = [cell for cell in report.cells if cell.kind == kind]
        lines += ["", f"{told(kind)}; path {', '.join(sorted({cell.path for cell in mine}))}", _HEADER]
        lines += [_line(cell) for cell in mine]
    num_right = sum(cell.right for cell in report.cells)
    lines += ["", f"{num_right} of {len(report.cells)} right, {report.seconds:.0f} s"]
    return "\n".join(lines)
