"""Groups of ranks, as threads and as processes: sums, gathered columns, and what a lost rank does to the others."""

import multiprocessing
import os
import threading
from collections.abc import Callable

import pytest
import torch

from pdkv.errors import ConfigError, RankLostError
from pdkv.m3.parallel import SOLO, DistributedGroup, Group, find_store, join_group, open_store, run_ranks, thread_groups


def ones(rank: int, columns: int = 3) -> torch.Tensor:
    return torch.full((2, columns), float(rank + 1))


def both(group: Group) -> tuple[torch.Tensor, torch.Tensor | None]:
    return group.sum(ones(group.rank)), group.gather_columns(ones(group.rank))


def test_one_rank_alone_has_nothing_to_wait_for():
    total, columns = both(SOLO)
    assert torch.equal(total, ones(0))
    assert columns is not None
    assert torch.equal(columns, ones(0))


def test_threads_sum_and_gather_in_the_order_of_ranks():
    results = run_ranks(3, both)
    for rank, (total, columns) in enumerate(results):
        assert torch.equal(total, torch.full((2, 3), 6.0))
        assert (columns is None) == (rank > 0)
    assert torch.equal(results[0][1], torch.cat([ones(rank) for rank in range(3)], dim=1))


def test_threads_sums_are_equal_bit_for_bit_whoever_comes_last():
    parts = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 4)[:, None]
    expected = ((parts[0] + parts[1]) + parts[2]) + parts[3]
    for _ in range(20):
        for total in run_ranks(4, lambda group: group.sum(parts[group.rank].clone())):
            assert torch.equal(total, expected)


def test_a_rank_that_fails_stops_the_others_and_is_the_one_that_is_named():
    ended: list[int] = []

    def work(group: Group) -> None:
        if group.rank == 1:
            raise ValueError("rank 1 broke")
        try:
            group.sum(ones(group.rank))
        except RankLostError:
            ended.append(group.rank)
            raise

    with pytest.raises(ValueError, match="rank 1 broke"):
        run_ranks(3, work)
    assert sorted(ended) == [0, 2]


def test_a_thread_that_never_comes_is_not_waited_for_forever():
    present, _ = thread_groups(2, timeout_s=0.05)
    with pytest.raises(RankLostError, match="rank 0 of 2"):
        present.sum(ones(0))


def test_threads_that_call_different_collectives_are_told():
    with pytest.raises(AssertionError, match="different collectives"):
        run_ranks(2, lambda group: group.sum(ones(group.rank, 3 + group.rank)))


def second_rank(port: int) -> None:
    """The other process: once through everything, then gone without a word."""
    group = join_group(find_store("127.0.0.1", port), 1, 2, timeout_s=30)
    both(group)
    group.sum(torch.ones(3, dtype=torch.bfloat16))
    os._exit(7)


def test_two_processes_over_gloo_and_one_that_dies():
    store = open_store()
    child = multiprocessing.get_context("spawn").Process(target=second_rank, args=(store.port,))
    child.start()
    try:
        group = join_group(store, 0, 2, timeout_s=60)
        total, columns = both(group)
        assert torch.equal(total, torch.full((2, 3), 3.0))
        assert columns is not None
        assert torch.equal(columns, torch.cat([ones(0), ones(1)], dim=1))
        assert torch.equal(group.sum(torch.ones(3, dtype=torch.bfloat16)), torch.full((3,), 2.0, dtype=torch.bfloat16))
        child.join(30)
        assert child.exitcode == 7
        with pytest.raises(RankLostError, match="rank 0 of 2 lost another rank in a sum"):
            group.sum(ones(0))
        with pytest.raises(RankLostError, match="while logits were gathered"):
            group.gather_columns(ones(0))
        group.close()
        group.close()
        with pytest.raises(RankLostError, match="has left its group"):
            group.sum(ones(0))
    finally:
        child.kill()
        child.join()


def second_gpu(port: int) -> None:
    group = join_group(find_store("127.0.0.1", port), 1, 2, "cuda:1")
    group.sum(ones(1).cuda(1))
    group.gather_columns(ones(1).cuda(1))
    torch.cuda.synchronize(1)
    group.close()


@pytest.mark.multi_gpu(2)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs on one host")
def test_two_gpus_over_nccl():
    store = open_store()
    child = multiprocessing.get_context("spawn").Process(target=second_gpu, args=(store.port,))
    child.start()
    try:
        group = join_group(store, 0, 2, "cuda:0")
        assert torch.equal(group.sum(ones(0).cuda(0)).cpu(), torch.full((2, 3), 3.0))
        columns = group.gather_columns(ones(0).cuda(0))
        assert columns is not None
        assert torch.equal(columns.cpu(), torch.cat([ones(0), ones(1)], dim=1))
        child.join(60)
        assert child.exitcode == 0
        group.close()
    finally:
        child.kill()
        child.join()


def joined(size: int) -> list[DistributedGroup]:
    """Ranks over gloo in threads of this process: nothing global is in the way."""
    store = open_store()
    groups: dict[int, DistributedGroup] = {}

    def join(rank: int) -> None:
        groups[rank] = join_group(find_store("127.0.0.1", store.port), rank, size, timeout_s=30)

    on_each(join, size)
    return [groups[rank] for rank in range(size)]


def on_each(work: Callable[[int], None], size: int) -> None:
    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_gloo_gives_every_rank_the_same_bits():
    """Ranks route each for itself by what a sum gave them, so it must be the same on all."""
    groups = joined(4)
    parts = (
        torch.randn(4, 37, 129, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 6, 4)[:, None, None]
    )
    sums: dict[int, torch.Tensor] = {}
    on_each(lambda rank: sums.update({rank: groups[rank].sum(parts[rank].clone())}), 4)
    assert all(torch.equal(sums[rank], sums[0]) for rank in range(4))
    torch.testing.assert_close(sums[0], parts.sum(dim=0))
    for group in groups:
        group.close()


def test_closing_tells_the_others():
    first, second = joined(2)
    second.close()
    with pytest.raises(RankLostError):
        first.sum(ones(0))
    first.close()


def test_ranks_that_do_not_come_are_named():
    store = open_store(timeout_s=0.2)
    with pytest.raises(RankLostError, match=r"not all of 2 ranks came in 0\.2 s \(this is rank 0\)"):
        join_group(store, 0, 2, timeout_s=0.2)
    with pytest.raises(ConfigError, match="rank 2 is not below the size 2"):
        join_group(store, 2, 2)
    with pytest.raises(ConfigError, match="ranks on meta cannot be joined"):
        join_group(store, 0, 2, "meta")
