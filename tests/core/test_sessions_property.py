"""Under any loss, repetition, reordering, sleep, crash and timing no page is reused while read, and nothing leaks."""

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdkv.core.decode_session import DecodeSession
from pdkv.core.events import MessageArrived, PagesReserved, RequestArrived, SessionPolicy, Tick
from pdkv.core.prefill_session import PrefillSession, PrefillState
from pdkv.core.residency import Residency, WantedBlocks
from pdkv.errors import FailureCode
from pdkv.schema import VerifyPages
from pdkv.wire.messages import Acquire, Digests, Granted
from tests.core.simulation import BLOCK, NUM_LAYERS, Simulation, World

times = st.one_of(st.none(), st.floats(0, 15, allow_nan=False))
sleeps = st.one_of(st.none(), st.tuples(st.floats(0, 3), st.floats(0.1, 25)))

layer_groups = st.sampled_from([(0,), (0, 6), (0, 5, 9, 11), tuple(range(NUM_LAYERS))])

worlds = st.builds(
    World,
    seed=st.integers(0, 2**32),
    num_tokens=st.sampled_from([1, 127, 128, 129, 1000, 5000]),
    resident=st.sampled_from([0.0, 0.4, 1.0]),
    cached=st.sampled_from([0.0, 0.6, 1.0]),
    chunk=st.sampled_from([100, 256, 512]),
    loss=st.sampled_from([0.0, 0.1, 0.5]),
    duplicates=st.sampled_from([0.0, 0.3]),
    longest_delay=st.sampled_from([0.001, 0.3, 12.0]),
    longest_read=st.sampled_from([0.001, 0.5, 12.0]),
    chunk_time=st.sampled_from([0.01, 0.5]),
    layer_groups=layer_groups,
    all_chunks=st.booleans(),
    early=st.booleans(),
    sampling_time=st.sampled_from([0.0, 0.3]),
    deadline=st.sampled_from([5.0, 40.0]),
    request_at=st.one_of(st.just(0.0), times),
    cancel_at=times,
    abort_at=times,
    engine_fails_at=times,
    decode_sleeps=sleeps,
    prefill_sleeps=sleeps,
    partition=sleeps,
    reads_hang=st.sampled_from([False, False, False, True]),
    verify=st.sampled_from([VerifyPages.OFF, VerifyPages.FULL]),
    damage=st.sampled_from([0.0, 0.0, 0.3]),
    longest_digest=st.sampled_from([0.001, 0.3, 12.0]),
    blocks_a_digest=st.sampled_from([1, 3, 100]),
    prefill_dies_at=times,
    death_is_noticed=st.booleans(),
)


@given(worlds)
@settings(max_examples=400)
def test_any_world_ends_well_on_both_sides(world: World) -> None:
    simulation = Simulation(world)
    simulation.run(400)
    simulation.validate()
    assert simulation.decode.forgettable(simulation.now)


@given(
    st.builds(
        World,
        seed=st.integers(0, 2**32),
        num_tokens=st.integers(1, 4000) | st.integers(1, 31).map(lambda blocks: 128 * blocks),
        sampling_time=st.sampled_from([0.0, 0.3]),
        resident=st.floats(0, 1),
        cached=st.floats(0, 1),
        chunk=st.sampled_from([64, 100, 512]),
        loss=st.sampled_from([0.0, 0.1]),
        duplicates=st.sampled_from([0.0, 0.5]),
        longest_delay=st.sampled_from([0.001, 0.2]),
        longest_read=st.sampled_from([0.001, 0.5]),
        layer_groups=layer_groups,
        all_chunks=st.booleans(),
        early=st.booleans(),
        verify=st.sampled_from([VerifyPages.OFF, VerifyPages.FULL]),
        longest_digest=st.sampled_from([0.001, 0.3]),
        blocks_a_digest=st.sampled_from([1, 100]),
    )
)
@settings(max_examples=120)
def test_a_world_without_faults_beyond_the_network_always_delivers(world: World) -> None:
    simulation = Simulation(world)
    simulation.run(200)
    simulation.validate()
    assert simulation.resumed == 1
    assert simulation.prefill_reports[0].code is None


@pytest.mark.parametrize("num_tokens", [1, 1000, 5000])
@pytest.mark.parametrize("seed", range(4))
def test_damage_on_the_way_is_found_by_digests_and_by_nothing_else(num_tokens: int, seed: int) -> None:
    world = World(seed=seed, num_tokens=num_tokens, damage=1.0, layer_groups=(0, 5, 9))
    for verify, ends in ((VerifyPages.OFF, None), (VerifyPages.FULL, FailureCode.DIGEST_MISMATCH)):
        simulation = Simulation(dataclasses.replace(world, verify=verify))
        simulation.run(200)
        simulation.validate()
        assert simulation.decode_reports[0].code is ends
        assert simulation.prefill_reports[0].code is ends, "P is told why"


def test_digests_are_compared_while_prefill_computes() -> None:
    simulation = Simulation(World(seed=1, num_tokens=6000, chunk=512, chunk_time=0.5, verify=VerifyPages.FULL))
    simulation.run(3.0)
    assert 0 < len(simulation.checked) < 47
    simulation.run(200)
    simulation.validate()
    assert simulation.resumed == 1


@pytest.mark.parametrize(
    ("told", "complaint"),
    [
        ([(0, 1)], "digests of blocks 0 to 0, wanted are 1 to 3"),
        ([(2, 5)], "digests of blocks 2 to 4, wanted are 1 to 3"),
        ([(2, 2)], "digests of blocks 2 to 1, wanted are 1 to 3"),
        ([(1, 3), (2, 4)], "a block twice"),
        ([(1, 3), (1, 3), (3, 4)], ""),
    ],
)
def test_digests_of_other_blocks_than_are_wanted_fail_the_transfer(told: list[tuple[int, int]], complaint: str) -> None:
    session = DecodeSession(SessionPolicy(), WantedBlocks(512, BLOCK, 1), 30.0, 0.0, VerifyPages.FULL)
    session.start(0.0)
    session.handle(MessageArrived(1, Granted((1, 2, 3, 4), 512, 0)), 0.0)
    for seq, (start, stop) in enumerate(told):
        session.handle(MessageArrived(2 + seq, Digests(start, stop, (b"",))), 0.0)
    assert (session.outcome is None) == (not complaint)
    if session.outcome is not None:
        assert session.outcome.code is FailureCode.INTERNAL
        assert complaint in session.outcome.message


def test_a_prefill_worker_that_cannot_digest_refuses_by_name() -> None:
    session = PrefillSession(SessionPolicy())
    session.handle(RequestArrived(300, 30.0), 0.0)
    session.handle(MessageArrived(1, Acquire(10.0, VerifyPages.FULL)), 0.0)
    assert session.outcome is not None
    assert session.outcome.code is FailureCode.MANIFEST
    assert "decode wants digests of pages (full)" in session.outcome.message
    assert "--verify-pages off" in session.outcome.message


def test_digests_that_begin_behind_the_prompt_fail_the_transfer_and_not_the_worker() -> None:
    session = PrefillSession(SessionPolicy(), BLOCK)
    session.handle(RequestArrived(300, 30.0), 0.0)
    session.handle(MessageArrived(1, Acquire(10.0, VerifyPages.FULL, 3)), 0.0)
    session.handle(PagesReserved((1, 2, 3), 0), 0.0)
    assert session.outcome is not None
    assert session.outcome.code is FailureCode.INTERNAL
    assert "from block 3 on, of a prompt of 300 tokens" in session.outcome.message


def test_lossless_network_reads_while_prefill_computes() -> None:
    simulation = Simulation(World(seed=1, num_tokens=6000, chunk=512, chunk_time=0.5))
    simulation.run(3.0)
    assert 0 < len(simulation.read_parts) < 47
    simulation.run(200)
    simulation.validate()
    assert simulation.resumed == 1


def test_cached_blocks_are_read_before_anything_is_computed() -> None:
    simulation = Simulation(World(seed=1, num_tokens=6000, cached=0.5, resident=0.25, chunk_time=50.0))
    simulation.run(3.0)
    assert sorted(simulation.read_parts) == [(block, 0) for block in range(11, 23)]


def test_what_is_resident_must_leave_a_block_to_read() -> None:
    with pytest.raises(ValueError, match="block 2 is not one of 2"):
        WantedBlocks(num_tokens=256, block_size=BLOCK, first=2)


def test_a_prompt_of_whole_blocks_that_landed_before_done_resumes_at_once() -> None:
    simulation = Simulation(World(seed=1, num_tokens=256, chunk=512, longest_read=0.01, sampling_time=0.5))
    simulation.run(1.0)
    assert simulation.resumed == 1
    simulation.run(200)
    simulation.validate()


def test_layer_groups_of_the_last_chunk_are_read_while_later_layers_compute() -> None:
    world = World(seed=1, num_tokens=1000, chunk=512, chunk_time=4.0, layer_groups=(0, 5, 9), longest_read=0.01)
    simulation = Simulation(world)
    simulation.run(8.5)
    assert sorted(simulation.read_parts) == [(b, g) for b in range(8) for g in range(3) if b < 4 or g == 0]
    simulation.run(10.0)
    assert sorted(simulation.read_parts) == [(b, g) for b in range(8) for g in range(3) if b < 4 or g < 2]
    assert simulation.resumed == 0
    simulation.run(200)
    simulation.validate()
    assert simulation.resumed == 1


def test_whole_chunks_are_read_as_whole_rows() -> None:
    """Groups cost spans, so what all groups have is one part."""
    world = World(seed=1, num_tokens=1000, chunk=512, chunk_time=1.0, layer_groups=(0, 5, 9), all_chunks=False)
    simulation = Simulation(world)
    simulation.run(200)
    simulation.validate()
    assert sorted(len(read.parts) for read in simulation.reads.values()) == [4, 4, 4, 12]


@given(
    st.integers(1, 9),
    st.integers(0, 8),
    st.integers(1, 5),
    st.lists(st.lists(st.integers(0, 10), min_size=5, max_size=5), max_size=6),
)
def test_residency_takes_every_part_once_whatever_the_watermarks(
    num_blocks: int, first: int, num_groups: int, marks: list[list[int]]
) -> None:
    first = min(first, num_blocks - 1)
    starts = tuple(3 * group for group in range(num_groups))
    residency = Residency(num_blocks, first, starts)
    taken: list[tuple[int, int]] = []
    allowed = [first] * num_groups
    reads = itertools.count()
    for mark in [*marks, [num_blocks] * 5]:
        allowed = [max(a, min(m, num_blocks)) for a, m in zip(allowed, mark, strict=False)]
        for part in residency.take(mark[:num_groups]):
            cells = [
                (block, group)
                for group in range(num_groups)
                if starts[group] in part.layers
                for block in range(part.blocks.start, part.blocks.stop)
            ]
            assert len(cells) == part.size > 0
            assert all(block < allowed[group] for block, group in cells)
            taken += cells
            read = next(reads)
            residency.posted(read, part)
            assert not residency.complete
            assert residency.ended(read, valid=True) == part
    assert sorted(taken) == list(itertools.product(range(first, num_blocks), range(num_groups)))
    assert residency.complete


@pytest.mark.parametrize("groups", [(1, 5), (0, 5, 5), (0, 7, 3)])
def test_layer_groups_that_leave_layers_out_are_refused(groups: tuple[int, ...]) -> None:
    session = DecodeSession(SessionPolicy(), WantedBlocks(256, BLOCK), 30.0, 0.0)
    session.start(0.0)
    session.handle(MessageArrived(1, Granted(pages=(1, 2), num_tokens=256, cached_tokens=0, layer_groups=groups)), 0.1)
    assert session.outcome is not None
    assert session.outcome.code is FailureCode.INTERNAL


def test_a_failing_prefill_is_not_woken_by_a_deadline_that_has_passed() -> None:
    session = PrefillSession(SessionPolicy())
    session.handle(RequestArrived(300, 2.0), 0.0)
    session.handle(MessageArrived(1, Acquire(ttl_s=10.0)), 0.0)
    session.handle(PagesReserved((1, 2, 3), 0), 0.1)
    session.handle(Tick(), 2.5)
    assert session.state is PrefillState.FAILING
    wakeup = session.next_wakeup()
    assert wakeup is not None
    assert wakeup > 2.5
