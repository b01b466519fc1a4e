"""What the engine launches for M3: every operation in production's shapes, dtypes, strides and plans, on empty memory.

Nothing is computed by it: tensors are only there to be described to a compiler.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from pdkv_kernels.cast_store import cast_store
from pdkv_kernels.decode_batch import DecodeBatch
from pdkv_kernels.decode_rows import begin_rows, end_rows, retell_rows
from pdkv_kernels.decode_rows_ref import PAGES, TOKENS, RowBuffers
from pdkv_kernels.draw import draw
from pdkv_kernels.draw_ref import ASKED
from pdkv_kernels.greedy import greedy
from pdkv_kernels.kv_store_ref import HeadNorms, PackedHeads, TokenRows
from pdkv_kernels.moe_combine import moe_combine
from pdkv_kernels.page_digest import page_digest
from pdkv_kernels.page_digest_ref import DigestPages, DigestRegions
from pdkv_kernels.paged import BLOCK, LayerPages, PagedKv, RaggedQueries
from torch import Tensor

from pdkv.m3.operations import StepQueries
from pdkv.m3.triton_operations import TritonOperations, lacks_room

HIDDEN, DIM, ROTARY = 6144, 128, 64
TOPK, INIT, LOCAL = 16, 0, 1
EXPERTS, CHOSEN = 128, 4
MOST_TOP = 20
LAYERS = 60
ARENA_BYTES = 3 << 30  # more than 32 bits of a signed offset reach; no byte of it is touched
SCALE = DIM**-0.5

BF16, FLOAT32 = torch.bfloat16, torch.float32
E4M3, E5M2, FNUZ = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz


@dataclass(frozen=True)
class Kind:
    """What is kept of a token, and what is computed in."""

    name: str
    kv: torch.dtype
    index: torch.dtype
    scaled: bool = False
    compute: torch.dtype = BF16


BFLOAT16 = Kind("bf16", BF16, BF16)
FP8 = Kind("fp8", E4M3, E4M3, scaled=True)
FP8_UNIT = Kind("fp8_unit", E4M3, E4M3)
FP8_E5M2 = Kind("fp8_e5m2", E5M2, E5M2)
FP8_FNUZ = Kind("fp8_fnuz", FNUZ, FNUZ, scaled=True)
EXACT = Kind("float32", FLOAT32, FLOAT32, compute=FLOAT32)
KINDS = (BFLOAT16, FP8, FP8_UNIT, FP8_E5M2, FP8_FNUZ, EXACT)


@dataclass(frozen=True)
class Case:
    name: str
    launch: Callable[[], object]


@dataclass(frozen=True)
class Layer:
    """One layer of an arena's rows, on a rank of a worker of ``tp`` ranks."""

    kind: Kind
    tp: int

    @property
    def heads(self) -> PackedHeads:
        kv = max(1, 4 // self.tp)
        return PackedHeads(64 // self.tp, kv, kv)

    def pages(self) -> LayerPages:
        """Views as an arena's: head by head K, V and scales, in rows of all layers' bytes."""
        size, scales = BLOCK * DIM * self.kind.kv.itemsize, 8 * BLOCK * self.kind.scaled
        index_size = BLOCK * DIM * self.kind.index.itemsize
        kv_heads, head_bytes = self.heads.kv, 2 * size + scales
        pitch = -(-LAYERS * (kv_heads * head_bytes + index_size) // 512) * 512
        rows = torch.empty(ARENA_BYTES // pitch, pitch, dtype=torch.uint8)
        index_k = rows[:, :index_size].view(self.kind.index).unflatten(1, (BLOCK, DIM))
        block = rows[:, index_size : index_size + kv_heads * head_bytes].unflatten(1, (kv_heads, head_bytes))
        k, v = (block[..., i * size : (i + 1) * size].view(self.kind.kv).unflatten(2, (BLOCK, DIM)) for i in range(2))
        if not scales:
            return LayerPages(PagedKv(k, v), index_k)
        both = block[..., 2 * size :].view(FLOAT32)
        return LayerPages(PagedKv(k, v, both[..., :BLOCK], both[..., BLOCK:]), index_k)

    @property
    def name(self) -> str:
        return f"TP{self.tp} {self.kind.name}"


def cases() -> Iterator[Case]:
    """All of them; cheap to list."""
    yield from _token_cases()
    for kind in KINDS:
        for tp in (1, 4) if kind in (BFLOAT16, FP8) else (4,):
            layer = Layer(kind, tp)
            yield Case(f"kv_store {layer.name} 4096 rows", partial(_store, layer, 4096))
            yield Case(f"kv_store {layer.name} 8 rows, no index", partial(_store, layer, 8, index=False))
            yield Case(f"cast_store {layer.name}", partial(_cast, layer))
            for num_seqs, max_blocks in ((1, 4096), (8, 1024), (64, 256), (256, 64)):
                for query_len in (1, 4):
                    name = f"{layer.name} decode of {num_seqs}, {query_len} rows each"
                    yield Case(name, partial(_decode, layer, num_seqs, query_len, max_blocks))
            for groups in (128, 512, 768, 2048) if kind is BFLOAT16 else ():
                yield Case(f"{layer.name} attention of {groups} groups", partial(_attend_groups, layer, groups))
            yield Case(f"{layer.name} unsettled decode", partial(_decode, layer, 8, 1, 1024, settled=False))
            for num_rows in (512, 8192):
                yield Case(f"{layer.name} prefill of {num_rows}", partial(_prefill, layer, num_rows))


def _operations(dtype: torch.dtype) -> TritonOperations:
    return TritonOperations(dtype)


def _token_cases() -> Iterator[Case]:
    for dtype in (BF16, FLOAT32):
        kind = str(dtype).removeprefix("torch.")
        for width in (HIDDEN, 4096):
            yield Case(f"norm {kind} {width}", partial(_norms, dtype, width))
        for size in (12288, 3072, 768):
            yield Case(f"swigluoai {kind} {size}", partial(_activate, dtype, size))
        for rows in (1, 64, 6144):
            yield Case(f"router {kind} {rows} rows", partial(_route, dtype, rows))
        yield Case(f"moe_combine {kind}", partial(_combine, dtype))
    yield Case("page_digest", _digest)
    yield Case("greedy", _greedy)
    for dtype in (BF16, FLOAT32):
        yield Case(f"draw {str(dtype).removeprefix('torch.')}", partial(_draw, dtype))
    for query_len in (1, 2, 4, 8):
        yield Case(f"decode rows, {query_len} each", partial(_rows, query_len))


def _norms(dtype: torch.dtype, width: int) -> None:
    x, weight = torch.empty(2, width, dtype=dtype), torch.empty(width, dtype=dtype)
    _operations(dtype).norm(x, weight, 1e-6)
    _operations(dtype).add_norm(x, torch.empty_like(x), weight, 1e-6)


def _activate(dtype: torch.dtype, size: int) -> None:
    _operations(dtype).activate(torch.empty(2, 2 * size, dtype=dtype), (1.702, 7.0, 1.0))


def _route(dtype: torch.dtype, rows: int) -> None:
    x, weight = torch.empty(rows, HIDDEN, dtype=dtype), torch.empty(EXPERTS, HIDDEN)
    _operations(dtype).route(x, weight, torch.empty(EXPERTS), CHOSEN, 2.0)


def _combine(dtype: torch.dtype) -> None:
    rows = 2
    results, places = torch.empty(rows * CHOSEN, HIDDEN, dtype=dtype), torch.empty(rows * CHOSEN, dtype=torch.int64)
    moe_combine(results, places, torch.empty(rows, CHOSEN), torch.empty(1, dtype=torch.int32))


def _digest() -> None:
    regions, pages = (torch.empty(n, dtype=torch.int64) for n in (237, 64))
    rows = torch.empty(ARENA_BYTES // 2_961_408, 2_961_408, dtype=torch.uint8)
    page_digest(rows, DigestRegions(regions, regions, regions, regions), DigestPages(pages, pages, pages))


def _greedy() -> None:
    greedy(torch.empty(3, 64, dtype=torch.int64), torch.empty(64, 200_064, dtype=BF16))


def _draw(dtype: torch.dtype) -> None:
    chosen, tops, asked, positions = (
        torch.empty(*shape, dtype=torch.int64) for shape in ((3, 64), (64, 2, MOST_TOP), (64, ASKED), (64,))
    )
    draw(chosen, tops, torch.empty(64, 200_064, dtype=dtype), asked, positions)


def _rows(query_len: int) -> None:
    most, long, int_ = 256, torch.int64, torch.int32
    buffers = RowBuffers(
        said_at=torch.empty(2, most, dtype=long),
        said=torch.empty(2, most, TOKENS + query_len, dtype=int_),
        said_pages=torch.empty(2, most, 4096, dtype=int_),
        said_asked=torch.empty(2, most, ASKED, dtype=long),
        step=torch.empty(1, dtype=long),
        numbers=torch.empty(2, most, PAGES, dtype=int_),
        asked=torch.empty(2, most, ASKED, dtype=long),
        tables=torch.empty(most, 4096, dtype=int_),
        last=torch.empty(most, dtype=long),
        told=torch.empty(2, 2, most * query_len, dtype=long),
        told_tops=torch.empty(2, most, 2, MOST_TOP, dtype=long),
    )
    begin_rows(buffers, most, query_len)
    chosen = torch.empty(3, most * query_len, dtype=long)
    end_rows(buffers, chosen, most, query_len)
    if query_len == 1:
        retell_rows(buffers, chosen, buffers.told_tops[0], buffers.asked[0])


def _store(layer: Layer, num_rows: int, *, index: bool = True) -> None:
    heads, dtype, pages = layer.heads, layer.kind.compute, layer.pages()
    norms = HeadNorms(*(torch.empty(DIM, dtype=dtype) for _ in range(4)), eps=1e-6)
    table = torch.empty(num_rows, ROTARY // 2)
    rows = TokenRows(torch.empty(num_rows, dtype=torch.int64), table, table)
    packed = torch.empty(num_rows, heads.total, DIM, dtype=dtype)
    _operations(dtype).kv_store(packed, heads, norms, rows, pages if index else LayerPages(pages.kv))


def _cast(layer: Layer) -> None:
    pages, slots = layer.pages(), torch.empty(64, dtype=torch.int64)
    assert pages.index_k is not None
    values = torch.empty(64, layer.heads.kv, DIM, dtype=layer.kind.compute)
    cast_store(values, pages.kv.k, slots, pages.kv.k_scale)
    cast_store(values[:, 0], pages.index_k, slots)


def _index_q(layer: Layer, num_rows: int) -> Tensor:
    """In fp8 where index keys are, as ``kv_store`` leaves it."""
    dtype = layer.kind.index if layer.kind.index.itemsize == 1 else layer.kind.compute
    return torch.empty(num_rows, layer.heads.index_q, DIM, dtype=dtype)


def _attend(layer: Layer, num_rows: int, queries: StepQueries) -> None:
    pages, operations = layer.pages(), _operations(layer.kind.compute)
    assert pages.index_k is not None
    q = torch.empty(num_rows, layer.heads.q, DIM, dtype=layer.kind.compute)
    if queries.decode is None and lacks_room(q):
        return  # no kernel is launched
    chosen = operations.select(_index_q(layer, num_rows), pages.index_k, queries, (TOPK, INIT, LOCAL))
    operations.attend_to_chosen(q, pages.kv, chosen, queries, SCALE)
    if queries.decode or layer.kind.compute != FLOAT32:  # there dense layers prefill without a kernel
        operations.attend_to_all(q, pages.kv, queries, SCALE)


def _attend_groups(layer: Layer, groups: int) -> None:
    """To chosen blocks alone: so many rows times kv heads."""
    num_seqs = groups // layer.heads.kv
    q = torch.empty(num_seqs, layer.heads.q, DIM, dtype=layer.kind.compute)
    chosen = torch.empty(num_seqs, layer.heads.kv, TOPK, dtype=torch.int32)
    lens, table = torch.empty(num_seqs, dtype=torch.int32), torch.empty(num_seqs, 64, dtype=torch.int32)
    ragged = RaggedQueries(torch.empty(num_seqs + 1, dtype=torch.int32), lens, table)
    queries = StepQueries(ragged, DecodeBatch(lens, table, 1, settled=True))
    _operations(layer.kind.compute).attend_to_chosen(q, layer.pages().kv, chosen, queries, SCALE)


def _decode(layer: Layer, num_seqs: int, query_len: int, max_blocks: int, *, settled: bool = True) -> None:
    lens = torch.empty(num_seqs, dtype=torch.int32)
    table = torch.empty(num_seqs, max_blocks, dtype=torch.int32)
    ragged = RaggedQueries(torch.empty(num_seqs + 1, dtype=torch.int32), lens, table)
    _attend(layer, num_seqs * query_len, StepQueries(ragged, DecodeBatch(lens, table, query_len, settled)))


def _prefill(layer: Layer, num_rows: int) -> None:
    starts, lens = torch.empty(2, dtype=torch.int32), torch.empty(1, dtype=torch.int32)
    ragged = RaggedQueries(starts, lens, torch.empty(1, 1024, dtype=torch.int32))
    _attend(layer, num_rows, StepQueries(ragged, None))


BRIEF = (
    Case("norm", partial(_norms, BF16, HIDDEN)),
    Case("swigluoai", partial(_activate, BF16, 3072)),
    Case("router of few", partial(_route, BF16, 1)),
    Case("router of many", partial(_route, BF16, 6144)),
    Case("moe_combine", partial(_combine, BF16)),
    Case("page_digest", _digest),
    Case("greedy", _greedy),
    Case("draw", partial(_draw, BF16)),
    Case("decode rows", partial(_rows, 1)),
    Case("kv_store", partial(_store, Layer(FP8, 4), 8)),
    Case("cast_store", partial(_cast, Layer(FP8, 4))),
    Case("decode", partial(_decode, Layer(FP8, 4), 256, 1, 64)),
    Case("unsettled decode of few, and of many blocks", partial(_decode, Layer(FP8, 4), 8, 1, 4096, settled=False)),
    Case("attention by a ring", partial(_attend_groups, Layer(BFLOAT16, 1), 1024)),
    Case("prefill", partial(_prefill, Layer(BFLOAT16, 1), 8192)),
)
"""What reaches every kernel in the least time: attention's prefill over fp8 takes three times as long to compile."""
