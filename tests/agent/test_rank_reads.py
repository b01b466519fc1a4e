"""Reads of every rank over real transports: each element of each region comes to where its name says, and once."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import numpy as np
import pytest

from pdkv.agent.rank_reads import (
    CloseLink,
    ConnectLink,
    LinkConnected,
    LinkProbed,
    PagesRead,
    ProbeLink,
    RankReads,
    RankReport,
    ReadPages,
)
from pdkv.core.manifest import check_pairing, region_keys
from pdkv.schema import KvLayout, LocalMemory, Manifest, Region, RegionKey, Shard
from pdkv.transport.base import Transport
from pdkv.transport.inproc import Faults, InprocTransport
from pdkv.transport.ucx import UcxOptions, UcxTransport
from pdkv.wire.messages import RankOffer
from tests.layouts import make_layout, make_manifest, memory_length

SIZES = (1, 2, 4, 8)
BLOCK, DIM, PAGES = 4, 8, 7
POISON = 0xA5
LINK = 1
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}
_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float8_e4m3fn": 1}

Bytes = np.ndarray


def small_layout(kv_dtype: str, index_dtype: str) -> KvLayout:
    """One dense and three sparse layers of four kv heads."""
    return make_layout(4, 1, 4, kv_dtype, index_dtype, block_size=BLOCK, head_dim=DIM)


def elements(key: RegionKey, page: int, dim: int, itemsize: int) -> Bytes:
    """What belongs there: [BLOCK, dim] numbers made from region, layer, page, global head, token and dimension."""
    token, column = np.meshgrid(np.arange(BLOCK, dtype=np.uint64), np.arange(dim, dtype=np.uint64), indexing="ij")
    mixed = np.full((BLOCK, dim), sum(map(ord, key.name)), dtype=np.uint64)
    for part in (key.layer, page, key.head, token, column):
        mixed = (mixed ^ np.uint64(part) if isinstance(part, int) else mixed ^ part) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return mixed.astype(_UNSIGNED[itemsize])


def places(region: Region, page: int) -> Iterator[tuple[RegionKey, slice, int, int]]:
    """Every head of a region in one page: its key, where it lies, its width and itemsize."""
    per_head = region.bytes_per_page // region.num_heads
    itemsize = _ITEMSIZE[region.dtype]
    for i, key in enumerate(region_keys(region)):
        start = region.offset + page * region.page_stride + i * per_head
        yield key, slice(start, start + per_head), per_head // BLOCK // itemsize, itemsize


def room(manifest: Manifest) -> Bytes:
    return np.full(memory_length(manifest) + manifest.row_padding, POISON, dtype=np.uint8)


def written(manifest: Manifest) -> Bytes:
    memory = room(manifest)
    for region, page in itertools.product(manifest.regions, range(manifest.num_pages)):
        for key, where, dim, itemsize in places(region, page):
            memory[where] = elements(key, page, dim, itemsize).reshape(-1).view(np.uint8)
    return memory


class NoProbe:
    """For ranks whose links are not probed."""

    pages = (0, PAGES - 1)

    def poison(self) -> None:
        raise AssertionError("nobody ordered a probe")

    def mismatches(self, peer: int, source_page: int, page: int) -> list[RegionKey]:
        raise AssertionError("nobody ordered a probe")


class Rank:
    """One rank with memory of its own."""

    def __init__(self, manifest: Manifest, memory: Bytes, transport: Transport, probe: object = None) -> None:
        self.manifest = manifest
        self.memory = memory
        self.transport = transport
        local = LocalMemory(memory.ctypes.data, memory.nbytes)
        transport.register(local)
        self.offer = RankOffer(manifest, transport.address())
        self.reads = RankReads(transport, manifest, probe or NoProbe(), (local.address,))  # type: ignore[arg-type]

    def until_reported(self, order: ReadPages | ProbeLink) -> RankReport:
        reports = self.reads.obey(order)
        while not reports:
            reports = self.reads.on_completions(self.transport.poll())
        (report,) = reports
        return report

    def expect_right(self, source_pages: Sequence[int], local_pages: Sequence[int]) -> None:
        """Every element of every region of ``local_pages`` is P's, and nothing else has changed."""
        wanted = np.full(self.memory.size, POISON, dtype=np.uint8)
        regions = np.zeros(self.memory.size, dtype=bool)
        for region, page in itertools.product(self.manifest.regions, range(self.manifest.num_pages)):
            for key, where, dim, itemsize in places(region, page):
                regions[where] = True
                if page in local_pages:
                    theirs = source_pages[local_pages.index(page)]
                    wanted[where] = elements(key, theirs, dim, itemsize).reshape(-1).view(np.uint8)
        wrong = np.flatnonzero((self.memory != wanted) & regions)
        assert wrong.size == 0, f"rank {self.manifest.tp_rank}: {wrong.size} bytes, first at {wrong[:4]}"


def manifests(kv: KvLayout, size: int, num_pages: int, *, rows: bool) -> list[Manifest]:
    return [make_manifest(kv, rank, size, num_pages, rows=rows) for rank in range(size)]


def transfer(stack: ExitStack, prefill: list[Manifest], decode: list[Manifest], make: type[Transport] | object) -> None:
    """Read permuted pages on every rank of D, and look at each element."""
    check_pairing(prefill, decode)

    def transport() -> Transport:
        made: Transport = make()  # type: ignore[operator]
        stack.callback(made.close)
        return made

    sources = [Rank(manifest, written(manifest), transport()) for manifest in prefill]
    offers = tuple(source.offer for source in sources)
    theirs, ours = (5, 0, 3, 4, 6), (2, 7, 5, 6, 1)  # one run of two, the rest scattered
    for manifest in decode:
        rank = Rank(manifest, room(manifest), transport())
        (connected,) = rank.reads.obey(ConnectLink(LINK, 7, offers))
        assert isinstance(connected, LinkConnected)
        assert connected.error == ""
        report = rank.until_reported(ReadPages(LINK, 1, theirs, ours))
        assert isinstance(report, PagesRead)
        assert report.error == ""
        assert report.num_bytes >= len(ours) * sum(connected.bytes_by_region.values())
        assert connected.num_regions == sum(region.num_heads for region in manifest.regions)
        rank.expect_right(theirs, ours)


@pytest.mark.parametrize("scales", [False, True], ids=["plain", "scales"])
@pytest.mark.parametrize("rows", [(True, True), (True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize(("prefill", "decode"), list(itertools.product(SIZES, SIZES)))
def test_every_element_arrives_whatever_the_ranks_and_layouts(
    prefill: int, decode: int, rows: tuple[bool, bool], scales: bool
) -> None:
    dtype = "float8_e4m3fn" if scales else "bfloat16"
    kv = small_layout(dtype, dtype)
    with ExitStack() as stack:
        source = manifests(kv, prefill, PAGES, rows=rows[0])
        target = manifests(kv, decode, PAGES + 1, rows=rows[1])
        transfer(stack, source, target, InprocTransport)


def test_k_v_and_index_keys_of_equal_length_are_not_confused() -> None:
    """In the released model at TP4 a block of each has the same number of bytes; so it has here."""
    kv = small_layout("bfloat16", "bfloat16")
    lengths = {(r.name, r.bytes_per_page) for r in make_manifest(kv, 0, 4, PAGES).regions}
    assert lengths == {(name, BLOCK * DIM * 2) for name in ("k", "v", "index_k")}
    with ExitStack() as stack:
        transfer(stack, manifests(kv, 4, PAGES, rows=True), manifests(kv, 4, PAGES + 1, rows=False), InprocTransport)


def test_regions_of_mixed_dtypes_and_layers_that_reuse_a_selection_arrive() -> None:
    """fp8 K/V beside bfloat16 index keys, of which two sparse layers write none: only two of four layers select."""
    kv = small_layout("float8_e4m3fn", "bfloat16")
    kept = tuple(spec for spec in kv.specs if (spec.name, spec.layer) not in {("index_k", 2)})
    fewer = KvLayout(**{name: getattr(kv, name) for name in kv.__struct_fields__} | {"specs": kept})
    source = manifests(fewer, 2, PAGES, rows=True)
    for manifest in source:
        index = [region.layer for region in manifest.regions if region.shard is Shard.REPLICATED]
        assert index == [1, 3]
    with ExitStack() as stack:
        transfer(stack, source, manifests(fewer, 4, PAGES + 1, rows=True), InprocTransport)


def test_the_same_over_ucx() -> None:
    kv = small_layout("float8_e4m3fn", "bfloat16")
    with ExitStack() as stack:
        over_tcp = UcxOptions(tls="tcp")
        source, target = manifests(kv, 2, PAGES, rows=True), manifests(kv, 4, PAGES + 1, rows=True)
        transfer(stack, source, target, lambda: UcxTransport(over_tcp))


# ---- orders that cannot be carried out


@pytest.fixture
def pair() -> Iterator[tuple[Rank, Rank]]:
    kv = small_layout("bfloat16", "bfloat16")
    prefill, decode = make_manifest(kv, 0, 1, PAGES), make_manifest(kv, 0, 1, PAGES)
    faults = Faults(max_delay_polls=0)
    source = Rank(prefill, written(prefill), InprocTransport())
    rank = Rank(decode, room(decode), InprocTransport(faults))
    yield source, rank
    source.transport.close()
    rank.transport.close()


def test_a_read_of_a_link_that_is_closed_fails_and_writes_nothing(pair: tuple[Rank, Rank]) -> None:
    source, rank = pair
    rank.reads.obey(ConnectLink(LINK, 7, (source.offer,)))
    assert rank.reads.obey(ReadPages(LINK, 1, (1,), (1,))) == []
    assert rank.reads.obey(CloseLink(LINK)) == []
    (report,) = rank.reads.on_completions(rank.transport.poll())
    assert isinstance(report, PagesRead)
    assert "closed" in report.error
    (report,) = rank.reads.obey(ReadPages(LINK, 2, (1,), (1,)))
    assert (report.read, report.error) == (2, "the link is closed")  # type: ignore[union-attr]
    assert (rank.memory == POISON).all()


def test_pages_that_prefill_does_not_have_are_not_read(pair: tuple[Rank, Rank]) -> None:
    source, rank = pair
    rank.reads.obey(ConnectLink(LINK, 7, (source.offer,)))
    (report,) = rank.reads.obey(ReadPages(LINK, 1, (PAGES,), (1,)))
    assert isinstance(report, PagesRead)
    assert f"page {PAGES} is outside" in report.error
    assert report.batches == ()


def test_a_peer_that_cannot_be_reached_is_told() -> None:
    kv = small_layout("bfloat16", "bfloat16")
    manifest = make_manifest(kv, 0, 1, PAGES)
    rank = Rank(manifest, room(manifest), InprocTransport())
    foreign = RankOffer(manifest, rank.offer.address.__class__("ucx", b"", ()))
    (report,) = rank.reads.obey(ConnectLink(LINK, 7, (foreign,)))
    assert isinstance(report, LinkConnected)
    assert "cannot reach" in report.error
    rank.transport.close()


def test_a_probe_of_a_link_that_is_closed_is_answered(pair: tuple[Rank, Rank]) -> None:
    source, rank = pair

    class Probe(NoProbe):
        def poison(self) -> None:
            pass

    rank = Rank(rank.manifest, rank.memory, InprocTransport(), Probe())
    rank.reads.obey(ConnectLink(LINK, 7, (source.offer,)))
    assert rank.reads.obey(ProbeLink(LINK)) == []
    rank.reads.obey(CloseLink(LINK))
    (report,) = rank.reads.on_completions(rank.transport.poll())
    assert isinstance(report, LinkProbed)
    assert "closed" in report.error
    rank.transport.close()
