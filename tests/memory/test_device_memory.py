"""Arenas on a GPU: plain allocations, zeroed, exportable, freed with their last view, refused by how much they lack."""

import gc

import pytest
import torch

from pdkv.errors import CapacityError
from pdkv.memory.arena import Arena
from pdkv.memory.device_memory import allocate_on
from pdkv.memory.probe import ProbePages
from pdkv.memory.row import RowLayout
from pdkv.schema import Incarnation
from tests.layouts import make_layout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: torch sees none"),
]

GPU = torch.device("cuda", 0)
MIB = 1 << 20


def test_is_zeroed_and_freed_with_its_last_view() -> None:
    torch.cuda.synchronize()
    before = torch.cuda.mem_get_info(GPU)[0]
    for _ in range(2):  # the second finds what the first left
        memory = allocate_on(GPU, 64 * MIB)
        assert memory.is_cuda
        assert not memory.any()
        memory.fill_(0xA5)
        view = memory[:1].view(torch.int8)
        del memory
        gc.collect()
        assert before - torch.cuda.mem_get_info(GPU)[0] >= 64 * MIB
        del view
        gc.collect()
        assert before - torch.cuda.mem_get_info(GPU)[0] < 64 * MIB


def test_says_by_how_much_it_does_not_fit() -> None:
    with pytest.raises(CapacityError, match=r"1,099,511,627,776 bytes on cuda:0: .* too few; use fewer"):
        allocate_on(GPU, 1 << 40)
    assert torch.ones(3, device=GPU).sum().item() == 3  # torch does not trip over the error afterwards


def test_probe_pages_work_on_a_gpu() -> None:
    ours, theirs = (
        Arena.allocate(RowLayout.of(make_layout(num_layers=3, num_dense=1, head_dim=16)), 4, GPU) for _ in range(2)
    )
    assert ours.memory.device == "cuda:0"
    peer = Incarnation(7)
    ProbePages(theirs).fill(peer)
    mine = ProbePages(ours)
    mine.poison()
    assert len(mine.mismatches(peer, 0, 3)) == len(list(ours.regions()))
    ours.rows()[3].copy_(theirs.rows()[0])
    assert mine.mismatches(peer, 0, 3) == []
