"""The indexer's decode kernels: scores against the reference, and the choice exactly as the scores order it."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pdkv_kernels.index_scan as index_scan_module
import pdkv_kernels.index_selection as index_selection_module
import pdkv_kernels.index_topk_decode as index_topk_decode_module
import pytest
import torch
import triton
import triton.language as tl
from pdkv_kernels.index_scan import ScanPlan, group_count, group_length
from pdkv_kernels.index_topk_decode import (
    IndexWorkspace,
    SelectionRule,
    index_topk_decode,
    index_topk_decode_into,
    scan_plan,
)
from pdkv_kernels.index_topk_ref import block_scores_ref, index_topk_ref, select_blocks_ref
from pdkv_kernels.paged import BLOCK
from torch import Tensor

from tests.kernels.decode_case import DecodeCase, make_decode, on

CPU = on("cpu", torch.float32)
CUDA = [on("cuda", torch.bfloat16), on("cuda", torch.float8_e4m3fn)]
SOFT = [on("cpu", torch.float8_e4m3fn), on("cpu", torch.float8_e4m3fnuz), on("cpu", torch.float8_e5m2)]
HARD = [on("cuda", torch.float8_e4m3fnuz), on("cuda", torch.float8_e5m2)]
ANY = [CPU, *CUDA]
HAS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)

SHORT = [1, 127, 128, 129, 0, 257]
LENGTHS = [*SHORT, 700, 2047, 2048, 2049]
LONG = [2176, 2177, 4095, 4097, 0, 65_537, 131_072]


def on_hopper(test: Callable[..., None]) -> Callable[..., None]:
    """A test of launches that overlap."""
    return pytest.mark.gpu(pytest.mark.skipif(not HAS_HOPPER, reason="needs a Hopper GPU or a later one")(test))


def choose(case: DecodeCase, rule: SelectionRule, splits: int | None = None, plan: ScanPlan | None = None) -> Tensor:
    """The choice."""
    return choice_and_keys(case, rule, splits, plan)[0]


def choice_and_keys(
    case: DecodeCase, rule: SelectionRule, splits: int | None = None, plan: ScanPlan | None = None
) -> tuple[Tensor, Tensor]:
    """Run the kernels over poisoned outputs: the choice, and the keys between the launches in the order of blocks."""
    rows, heads, _ = case.index_q.shape
    device = case.index_q.device
    max_blocks = case.batch.page_table.shape[1]
    workspace = IndexWorkspace(rows, heads, max_blocks, device)
    workspace.keys.fill_(0x7FFFFFF0)
    workspace.leaders.fill_(0x7FFFFFFF_00000000)
    out = torch.full((rows, heads, rule.topk), 123456789, dtype=torch.int32, device=device)
    if plan is None:
        told = splits or device.type == "cpu"
        plan = ScanPlan(splits or 2, 4, 2) if told else scan_plan(case.batch, case.index_q, case.index_k)
    index_topk_decode_into(out, case.index_q, case.index_k, case.batch, rule, workspace, plan)
    block, length = torch.arange(max_blocks), group_length(max_blocks, plan.splits)
    turn, split = block // plan.splits, block % plan.splits
    place = block if length == 1 else (turn // length * plan.splits + split) * length + turn % length
    return out.cpu(), workspace.keys.cpu()[:, place]


def floats(keys: Tensor) -> Tensor:
    """What the ordered integers stand for; forced blocks come out as NaN."""
    bits = torch.where(keys < 0, -keys.long() | 0x80000000, keys.long())
    return torch.where(bits > 0x7FFFFFFF, bits - (1 << 32), bits).int().view(torch.float32)


def told_settled(case: DecodeCase) -> DecodeCase:
    """With the promise, which is kept once all that made the case is done."""
    if case.index_k.is_cuda:
        torch.cuda.synchronize()
    return replace(case, batch=replace(case.batch, settled=True))


def check(
    case: DecodeCase,
    rule: SelectionRule,
    splits: int | None = None,
    tolerance: float = 1e-4,
    plan: ScanPlan | None = None,
) -> None:
    out, keys = choice_and_keys(case, rule, splits, plan)
    rows, heads, _ = case.index_q.shape
    assert out.shape == (rows, heads, rule.topk)
    scores = floats(keys).view(-1, heads, keys.shape[1])
    live = case.live_rows()
    index_k, index_q, table = case.index_k.cpu(), case.index_q.cpu().float(), case.batch.page_table.cpu()
    for row, seq, position in live:
        blocks = position // BLOCK + 1
        mine = scores[row, :, :blocks]
        pages = table[seq, :blocks].long()
        expected = block_scores_ref(index_q[row : row + 1], index_k, pages, torch.tensor([position]))[0]
        free = slice(min(rule.init_blocks, blocks), max(blocks - rule.local_blocks, 0))
        torch.testing.assert_close(mine[:, free], expected[:, free], atol=tolerance, rtol=tolerance, equal_nan=True)
        visible = torch.full((heads,), blocks)
        chosen = select_blocks_ref(mine, visible, rule.topk, rule.init_blocks, rule.local_blocks)
        assert out[row].tolist() == chosen.tolist(), (row, seq, position)
    padded = sorted(set(range(rows)) - {row for row, _, _ in live})
    assert (out[padded] == -1).all()


@pytest.mark.parametrize(("device", "dtype"), ANY)
@pytest.mark.parametrize("query_len", [1, 2, 4])
def test_lengths_around_every_border(device: str, dtype: torch.dtype, query_len: int):
    lengths = [n for n in (SHORT if query_len > 1 else [2047, 2048, 2049]) if n == 0 or n >= query_len]
    check(make_decode(device, dtype, lengths, query_len=query_len, dim=32), SelectionRule(2, 0, 1), splits=2)


@pytest.mark.parametrize(("device", "dtype"), [*CUDA, *HARD])
@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("query_len", [1, 3, 4, 8])
def test_real_dimensions(device: str, dtype: torch.dtype, heads: int, query_len: int):
    lengths = [n for n in LENGTHS + LONG if n == 0 or n >= query_len]
    case = make_decode(device, dtype, lengths, query_len=query_len, heads=(heads, heads), dim=128)
    rule = SelectionRule(16, 0, 1)
    check(case, rule, tolerance=2e-3)
    assert torch.equal(choose(told_settled(case), rule), choose(case, rule))


@pytest.mark.parametrize(("device", "dtype"), CUDA)
@pytest.mark.parametrize("settled", [False, True])
@pytest.mark.parametrize(
    "plan",
    [
        ScanPlan(3, 4, 3, ahead=2),
        ScanPlan(1, 4, 4, ahead=16),
        ScanPlan(1, 4, 2),
        ScanPlan(2, 8, 4, ahead=4),
        ScanPlan(1, 4, 8),
        ScanPlan(3, 4, 3, ahead=2, in_advance=False, early_tiles=2),
        ScanPlan(4, 4, 3, in_advance=False, early_tiles=0),
    ],
)
def test_every_way_to_scan_chooses_the_same(device: str, dtype: torch.dtype, settled: bool, plan: ScanPlan):
    case = make_decode(device, dtype, [1500, 300, 0, 127, 513, 2176], query_len=2, dim=32)
    rule = SelectionRule(4, 0, 1)
    expected = choose(case, rule)
    assert torch.equal(choose(told_settled(case) if settled else case, rule, plan=plan), expected)


@pytest.mark.parametrize(("device", "dtype"), [CPU])
def test_pages_looked_up_a_few_at_a_time(device: str, dtype: torch.dtype):
    case = told_settled(make_decode(device, dtype, [1500, 0, 127], heads=(1, 1), dim=32))
    check(case, SelectionRule(4, 0, 1), plan=ScanPlan(3, 4, 3, ahead=2))


@pytest.mark.parametrize(("device", "dtype"), [*SOFT, *HARD])
def test_formats_that_the_hardware_has_not(device: str, dtype: torch.dtype):
    check(make_decode(device, dtype, [129, 640, 0], dim=32), SelectionRule(4, 0, 1), splits=2, tolerance=2e-3)


@pytest.mark.parametrize(("device", "dtype"), ANY)
@pytest.mark.parametrize("init", [0, 1, 2])
@pytest.mark.parametrize("local", [0, 1, 2])
def test_forced_blocks(device: str, dtype: torch.dtype, init: int, local: int):
    check(make_decode(device, dtype, [700, 200, 0], query_len=2, dim=32), SelectionRule(4, init, local), splits=1)


@pytest.mark.parametrize(("device", "dtype"), ANY)
def test_three_heads_and_places_that_are_no_power_of_two(device: str, dtype: torch.dtype):
    check(make_decode(device, dtype, [1400, 300], query_len=3, heads=(6, 3), dim=32), SelectionRule(5, 1, 1))


@pytest.mark.parametrize(("device", "dtype"), ANY)
def test_more_places_than_blocks(device: str, dtype: torch.dtype):
    check(make_decode(device, dtype, [300, 1], dim=32, spare_blocks=0), SelectionRule(64, 0, 1))


@pytest.mark.parametrize(("device", "dtype"), ANY)
def test_ties_go_to_the_lowest_blocks(device: str, dtype: torch.dtype):
    case = make_decode(device, dtype, [20 * BLOCK + 5], dim=32)
    case.index_k[case.batch.page_table[0, :21].long()] = torch.zeros((), device=device).to(dtype)
    out = choose(case, SelectionRule(5, 0, 1))
    assert (out == torch.tensor([20, 0, 1, 2, 3])).all()


@pytest.mark.parametrize(("device", "dtype"), ANY)
def test_each_head_finds_its_own_needle(device: str, dtype: torch.dtype):
    case = make_decode(device, dtype, [30 * BLOCK], dim=32)
    unit = torch.eye(32, device=device)[:4]
    pages = case.batch.page_table[0, :30].long()
    case.index_k[pages] = torch.zeros((), device=device).to(dtype)
    for head, block in enumerate([5, 28, 17, 0]):
        case.index_k[pages[block], 17 + head] = (unit[head] * 3).to(dtype)
    out = choose(replace(case, index_q=unit[None].to(case.index_q.dtype)), SelectionRule(2, 0, 1))
    assert out[0].tolist() == [[29, 5], [29, 28], [29, 17], [29, 0]]


@pytest.mark.parametrize(("device", "dtype"), ANY)
def test_nan_keys_come_last_but_count(device: str, dtype: torch.dtype):
    case = make_decode(device, dtype, [6 * BLOCK + 1], dim=32)
    case.index_k[case.batch.page_table[0, 2].long(), 5] = torch.full((32,), torch.nan, device=device).to(dtype)
    out = choose(case, SelectionRule(8, 0, 1))
    assert (out[0, :, 6] == 2).all()
    assert (out[0, :, 7] == -1).all()
    assert (choose(case, SelectionRule(6, 0, 1)) != 2).all()


@pytest.mark.parametrize(("device", "dtype"), [CPU, on("cuda", torch.bfloat16)])
def test_infinities_keep_their_order(device: str, dtype: torch.dtype):
    case = make_decode(device, dtype, [8 * BLOCK], dim=32)
    pages = case.batch.page_table[0, :8].long()
    case.index_k[pages] = 0.0
    first = torch.zeros_like(case.index_q)
    first[..., 0] = 1.0
    case.index_k[pages[1], :, 0] = -torch.inf
    case.index_k[pages[4], 9, 0] = torch.inf
    case.index_k[pages[6], 3, 0] = 3e38
    case.index_k[pages[3], :, 0] = -3e38
    case.index_k[pages[0], :, 0] = -0.0
    out = choose(replace(case, index_q=first), SelectionRule(8, 0, 0))
    assert (out[0] == torch.tensor([4, 6, 0, 2, 5, 7, 3, 1])).all()


@pytest.mark.parametrize(("device", "dtype"), ANY)
def test_shared_pages_give_the_same_choice(device: str, dtype: torch.dtype):
    case = make_decode(device, dtype, [900, 900], dim=32)
    table = case.batch.page_table.clone()
    table[1] = table[0]
    shared = replace(case, batch=replace(case.batch, page_table=table), index_q=case.index_q[:1].expand(2, -1, -1))
    out = choose(shared, SelectionRule(3, 0, 1))
    assert torch.equal(out[0], out[1])


@pytest.mark.parametrize(("device", "dtype"), ANY)
def test_ragged_queries_as_the_reference_takes_them(device: str, dtype: torch.dtype):
    case = make_decode(device, dtype, [900, 500], query_len=2, dim=32)
    ragged = case.ragged()
    there = replace(ragged, **{name: getattr(ragged, name).to(device) for name in ragged.__dataclass_fields__})
    chosen = index_topk_decode(case.index_q, case.index_k, there, 3, 0, 1).cpu()
    expected = index_topk_ref(case.index_q.cpu().float(), case.index_k.cpu(), ragged, 3, 0, 1)
    same = (chosen.sort().values == expected.sort().values).all(-1).float().mean()
    assert same == 1.0 if device == "cpu" else same > 0.9


@pytest.mark.parametrize(("device", "dtype"), ANY)
@pytest.mark.parametrize("splits", [1, 3, 7])
@pytest.mark.parametrize("query_len", [1, 3])
def test_groups_whose_best_the_scan_notes(
    device: str, dtype: torch.dtype, splits: int, query_len: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(index_scan_module, "MOST_WITHOUT_GROUPS", 8)
    monkeypatch.setattr(index_topk_decode_module, "MOST_WITHOUT_GROUPS", 8)
    lengths = [40 * BLOCK + 1, 0, 23 * BLOCK + 2, 9 * BLOCK, 3]
    case = make_decode(device, dtype, lengths, query_len=query_len, heads=(2, 2), dim=32)
    case.index_k[case.batch.page_table[0, 17].long(), 5] = torch.full((32,), torch.nan, device=device).to(dtype)
    rule = SelectionRule(4, 1, 1)
    check(case, rule, splits=splits)
    plan = ScanPlan(splits, 4, 3, ahead=4)
    assert torch.equal(choose(told_settled(case), rule, plan=plan), choose(case, rule, splits))


@pytest.mark.parametrize("splits", [2, 48, 264, 396, 512, 528])
def test_groups_fit_into_a_workspace(splits: int):
    for max_blocks in (1, 64, 1024, 1025, 1056, 1057, 2048, 4096, 8192, 20_000):
        length, count = group_length(max_blocks, splits), group_count(max_blocks, splits)
        space = IndexWorkspace(1, 1, max_blocks, "cpu")
        first = [g // splits * length * splits + g % splits for g in range(count)]
        assert length == 1 or (max(first) < max_blocks and count <= space.leaders.shape[1])
        assert length == 1 or count * length <= space.keys.shape[1]
        blocks = sorted(b + i * splits for b in first for i in range(length))
        assert [b for b in blocks if b < max_blocks] == list(range(max_blocks))


@pytest.mark.parametrize(("device", "dtype"), ANY)
@pytest.mark.parametrize("at_once", [16, 2048])
def test_more_groups_than_the_selection_ranks_at_once(
    device: str, dtype: torch.dtype, at_once: int, monkeypatch: pytest.MonkeyPatch
):
    """Nearly all blocks of the table share one page, so nearly all of them tie."""
    monkeypatch.setattr(index_scan_module, "MOST_WITHOUT_GROUPS", 32)
    monkeypatch.setattr(index_topk_decode_module, "MOST_WITHOUT_GROUPS", 32)
    monkeypatch.setattr(index_selection_module, "MOST_LEADERS_AT_ONCE", at_once)
    case = make_decode(device, dtype, [BLOCK * 3], heads=(1, 1), dim=32)
    blocks = 81
    table = case.batch.page_table[:, :1].repeat(1, blocks)
    table[0, blocks - 7], table[0, 5] = case.batch.page_table[0, 1], case.batch.page_table[0, 2]
    lens = torch.tensor([blocks * BLOCK], dtype=torch.int32, device=device)
    many = replace(case, batch=replace(case.batch, page_table=table, seq_lens=lens))
    check(many, SelectionRule(16, 0, 1), splits=40, tolerance=2e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_a_graph_replayed_after_the_lengths_have_changed(dtype: torch.dtype):
    case = make_decode("cuda", dtype, [6000, 3000, 131_072, 5], query_len=4, dim=128)
    rule = SelectionRule(16, 0, 1)
    workspace = IndexWorkspace(16, 4, case.batch.page_table.shape[1], "cuda")
    out = torch.empty(16, 4, 16, dtype=torch.int32, device="cuda")

    def run() -> None:
        index_topk_decode_into(out, case.index_q, case.index_k, case.batch, rule, workspace)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for lengths in ([6000, 3000, 131_072, 5], [5999, 0, 4, 5], [0, 0, 0, 0], [2049, 2999, 70_000, 4]):
        case.batch.seq_lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        out.fill_(123456789)
        graph.replay()
        replayed = out.clone()
        out.fill_(123456789)
        run()
        assert torch.equal(replayed, out)
        check(case, rule, tolerance=2e-3)


@triton.jit
def _write_late(to, source, offsets, size, nanoseconds, SIZE: tl.constexpr):
    """Program p: ``size`` bytes from source[p] to ``to + offsets[p]``, long after its successor may have started."""
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()
    begun = tl.extra.cuda.globaltimer()
    now = begun
    while now - begun < nanoseconds:
        now = tl.extra.cuda.globaltimer()
    program, byte = tl.program_id(0), tl.arange(0, SIZE)
    there = byte < size
    content = tl.load(source + program * size + byte, mask=there)
    tl.store(to + tl.load(offsets + program) + byte, content, mask=there)


def write_late(to: Tensor, source: Tensor, offsets: list[int]) -> Callable[[], object]:
    """A kernel that triggers at once and then takes its time to copy the rows of ``source`` to bytes of ``to``."""
    rows = source.contiguous().view(len(offsets), -1).view(torch.uint8)
    where = torch.tensor(offsets, device="cuda")
    size = rows.shape[1]
    flat = torch.as_strided(to, (1,), (1,), to.storage_offset()).view(torch.uint8)
    return lambda: _write_late[(len(offsets),)](
        flat, rows, where, size, 30_000, SIZE=triton.next_power_of_2(size), num_warps=8, launch_pdl=True
    )


def in_a_graph(*calls: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Of calls that have been made once."""
    graph = torch.cuda.CUDAGraph()
    for call in calls:
        call()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


@on_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("query_len", [1, 4])
def test_the_steps_own_keys_and_queries_may_come_from_the_kernel_in_front(dtype: torch.dtype, query_len: int):
    """All else is settled. Sequences end around blocks' borders, and are short and long for a program."""
    lengths = [64 * BLOCK + 3, 2048, 2049, 5 * BLOCK + 1, 130, 129, 4, 131_072]
    case = make_decode("cuda", dtype, lengths, query_len=query_len, dim=128)
    # The newest block is chosen whatever it scores where one is local; here it must earn its place.
    rule = SelectionRule(16, 0, 0)
    expected = choose(case, rule)
    keys, table, page_bytes = case.index_k, case.batch.page_table.tolist(), case.index_k.stride(0) * dtype.itemsize
    newest = [(seq, n - query_len + i) for seq, n in enumerate(lengths) for i in range(query_len)]
    offsets = [table[s][at // BLOCK] * page_bytes + at % BLOCK * 128 * dtype.itemsize for s, at in newest]
    pages = torch.tensor([table[s][at // BLOCK] for s, at in newest], device="cuda")
    tokens = torch.tensor([at % BLOCK for _, at in newest], device="cuda")
    bits = keys.view(torch.int16 if dtype.itemsize == 2 else torch.uint8)
    kept, kept_q = bits[pages, tokens].clone(), case.index_q.clone()
    settled, out = told_settled(case), torch.empty_like(expected, device="cuda")
    space = IndexWorkspace(*case.index_q.shape[:2], case.batch.page_table.shape[1], "cuda")
    calls = [  # kept: they own what the graph reads
        write_late(keys, kept, offsets),
        write_late(case.index_q, kept_q, [0]),
        lambda: index_topk_decode_into(out, case.index_q, keys, settled.batch, rule, space),
    ]
    graph = in_a_graph(*calls)
    for _ in range(5):
        bits[pages, tokens] = 0
        case.index_q.view(torch.uint8).zero_()
        out.fill_(123456789)
        torch.cuda.synchronize()
        graph.replay()
        assert out.tolist() == expected.tolist()


@on_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("sorts", [False, True])
def test_without_the_promise_lengths_tables_and_keys_may_come_from_the_kernel_in_front(
    dtype: torch.dtype, sorts: bool, monkeypatch: pytest.MonkeyPatch
):
    """Sequences are so long that blocks are chosen by a threshold, unless they are to be sorted."""
    if sorts:
        monkeypatch.setattr(index_selection_module, "choice_fits", lambda *_: False)
    case = make_decode("cuda", dtype, [6000, 3000, 70_000, 5], dim=128)
    rule = SelectionRule(16, 0, 1)
    expected = choose(case, rule)
    table, lens, keys = case.batch.page_table, case.batch.seq_lens, case.index_k
    out = torch.empty_like(expected, device="cuda")
    space = IndexWorkspace(4, 4, table.shape[1], "cuda")
    pages = table[table >= 0].long()
    bits = keys.view(torch.int16 if dtype.itemsize == 2 else torch.uint8)
    kept = bits[pages].clone()
    assert not case.batch.settled
    calls = [  # kept: they own what the graph reads
        write_late(keys, kept, (pages * keys.stride(0) * dtype.itemsize).tolist()),
        write_late(table, table.clone(), [0]),
        write_late(lens, lens.clone(), [0]),
        lambda: index_topk_decode_into(out, case.index_q, keys, case.batch, rule, space),
    ]
    graph = in_a_graph(*calls)
    for _ in range(5):
        bits[pages] = 0
        table.fill_(pages[0])
        lens.fill_(17)
        out.fill_(123456789)
        torch.cuda.synchronize()
        graph.replay()
        assert out.tolist() == expected.tolist()


@on_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("follows", [False, True])
@pytest.mark.parametrize("lengths", [[16_384] * 8, [2048] * 64, [131_072], [2048, 0, 3, 9000] * 8], ids=str)
def test_calls_that_overlap_choose_as_calls_alone(dtype: torch.dtype, lengths: list[int], follows: bool):
    """One workspace, as layers share it; keys and queries of each call are others."""
    cases = [make_decode("cuda", dtype, lengths, dim=128, heads=(8, 1), seed=seed) for seed in range(2)]
    rule = SelectionRule(16, 0, 1)
    expected = [choose(case, rule) for case in cases]
    outs = [torch.empty_like(expected[0], device="cuda") for _ in range(12)]
    space = IndexWorkspace(len(lengths), 1, cases[0].batch.page_table.shape[1], "cuda")
    settled = [told_settled(case) for case in cases]
    calls = [
        partial(index_topk_decode_into, out, one.index_q, one.index_k, one.batch, rule, space, scan_follows=follows)
        for out, one in zip(outs, settled * 6, strict=True)
    ]
    graph = in_a_graph(*calls)
    for _ in range(5):
        for out in outs:
            out.fill_(123456789)
        graph.replay()
        for nth, out in enumerate(outs):
            assert torch.equal(out.cpu(), expected[nth % 2]), nth
