"""The choice by counting against a plain sort: its text on an emulator, and both kernels on a GPU."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pdkv_kernels.index_choice as index_choice_module
import pdkv_kernels.index_selection as index_selection_module
import pytest
import torch
from pdkv_kernels.choice_text import choice_cut, choice_ptx
from pdkv_kernels.decode_batch import DecodeBatch
from pdkv_kernels.index_choice import choice_fits
from pdkv_kernels.index_selection import Successor, select_blocks
from pdkv_kernels.paged import BLOCK
from torch import Tensor

from tests.kernels.ptx_emulator import Program
from tests.kernels.test_index_topk_decode_triton import in_a_graph, on_hopper

INT = torch.int32
SENTINELS = torch.tensor([0x7FFFFFFF, 0x7FFFFFFE, -0x7FFFFFFF, 0x7F800000, -0x7F800000, 0, 1, -1], dtype=INT)
"""First and last blocks that are chosen whatever they score, NaN, infinities, and what is near zero."""


def _scores(shape: tuple[int, int]) -> Tensor:
    bits = torch.randn(shape).view(INT)
    return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def _ties(shape: tuple[int, int]) -> Tensor:
    rare = SENTINELS[torch.randint(len(SENTINELS), shape)]
    return torch.where(torch.rand(shape) < 0.02, rare, torch.randint(-9, 30, shape, dtype=INT))


KEYS: dict[str, Callable[[tuple[int, int]], Tensor]] = {
    "scores": _scores,
    "ties": _ties,
    "sentinels": lambda shape: SENTINELS[torch.randint(len(SENTINELS), shape)],
    "nan": lambda shape: torch.full(shape, -0x7FFFFFFF, dtype=INT),
    "equal": lambda shape: torch.full(shape, -7, dtype=INT),
    "rising": lambda shape: torch.arange(shape[1], dtype=INT).repeat(shape[0], 1) // 3,
    "falling": lambda shape: -torch.arange(shape[1], dtype=INT).repeat(shape[0], 1) // 3,
}


@dataclass(frozen=True)
class Choice:
    """What a selection is asked, and the answer."""

    keys: Tensor  # [num_rows * heads, max_blocks or more]; behind what a row sees there is anything
    lens: Tensor  # [num_seqs]
    max_blocks: int
    query_len: int
    heads: int
    topk: int = 16

    def expected(self) -> Tensor:
        """By a plain sort: [num_rows, heads, topk]."""
        seen = self.lens[:, None] + torch.arange(self.query_len) - self.query_len + 1
        num_blocks = ((seen.clamp(min=0) + BLOCK - 1) // BLOCK).flatten().repeat_interleave(self.heads)[:, None]
        block = torch.arange(self.max_blocks)
        wide = (self.keys[:, : self.max_blocks].long() << 32) | (0x7FFFFFFF - block)
        best = torch.where(block < num_blocks, wide, torch.iinfo(torch.int64).min).sort(1, descending=True).indices
        best = torch.nn.functional.pad(best, (0, self.topk))[:, : self.topk]
        chosen = torch.where(torch.arange(self.topk) < num_blocks, best, -1)
        return chosen.to(INT).view(-1, self.heads, self.topk)


def _choice(kind: str, max_blocks: int, lengths: list[int], query_len: int = 1, heads: int = 1) -> Choice:
    lens = torch.tensor([min(n, max_blocks * BLOCK) for n in lengths], dtype=INT)
    keys = KEYS[kind]((lens.numel() * query_len * heads, -(-max_blocks // 16) * 16))
    return Choice(keys, lens, max_blocks, query_len, heads)


def _lengths(max_blocks: int) -> list[int]:
    borders = [0, 1, 127, 128, 129, 3, 2047, 2048, 2049, 2051, 5000, 8192, 8193, 8200, 1 << 20, (1 << 20) - 1]
    return [*borders, *torch.randint(0, max_blocks * BLOCK + 1, (8,)).tolist(), max_blocks * BLOCK - 130]


# ---- the text of the kernel, on any machine


def _emulated(asked: Choice, row: int) -> list[int]:
    """What the kernel's text makes of a row of one head. Its places are two words apart, the rest is left alone."""
    cut = choice_cut(asked.max_blocks, asked.topk, Successor.BEHIND)
    out_at, keys_at = 16, 16 + 256
    memory = np.full(keys_at // 4 + cut.loaded, 0xABCDABCD, np.uint32)
    memory[keys_at // 4 :] = asked.keys[row, : cut.loaded].numpy().view(np.uint32)
    memory[2] = asked.lens[row // asked.query_len].item()
    unseen = row % asked.query_len + 1 - asked.query_len
    operands = {"$1": keys_at, "$2": 8, "$3": unseen, "$4": out_at, "$5": 8}
    Program(choice_ptx(cut)).run(cut.warps, memory, operands, random.Random(row))
    places = memory[out_at // 4 : keys_at // 4].reshape(-1, 2)
    assert (places[asked.topk :] == 0xABCDABCD).all()
    assert (places[:, 1] == 0xABCDABCD).all()
    return places[: asked.topk, 0].view(np.int32).tolist()


@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize("max_blocks", [1, 15, 32, 33, 63, 64, 65, 100, 257, 512, 1000, 1024])
def test_the_text_chooses_as_a_sort_does(kind: str, max_blocks: int):
    longest = max_blocks * BLOCK if kind in ("scores", "rising", "falling") else 80 * BLOCK
    asked = _choice(kind, max_blocks, [longest, 20 * BLOCK + 2], query_len=2)
    for row, expected in enumerate(asked.expected()[:, 0].tolist()):
        assert _emulated(asked, row) == expected, row


@pytest.mark.parametrize("length", [0, 1, 2, BLOCK + 1, 15 * BLOCK, 16 * BLOCK, 17 * BLOCK + 1, 24 * BLOCK, 25 * BLOCK])
@pytest.mark.parametrize("max_blocks", [30, 60, 1024])
def test_the_text_chooses_from_few_blocks(length: int, max_blocks: int):
    asked = _choice("ties", max_blocks, [length], query_len=2)
    for row, expected in enumerate(asked.expected()[:, 0].tolist()):
        assert _emulated(asked, row) == expected


@pytest.mark.parametrize("topk", [1, 5, 16])
@pytest.mark.parametrize("max_blocks", [8, 50, 300])
def test_the_text_fills_so_many_places(topk: int, max_blocks: int):
    asked = replace(_choice("ties", max_blocks, [300 * BLOCK, 3 * BLOCK]), topk=topk)
    for row, expected in enumerate(asked.expected()[:, 0].tolist()):
        assert _emulated(asked, row) == expected


@pytest.mark.parametrize("max_blocks", [200, 512, 1024])
def test_more_keys_reach_the_threshold_than_the_list_has_room_for(max_blocks: int):
    """Ever more of them equal, the lowest first; a few higher ones anywhere."""
    for kind in (_scores, _ties):
        keys = kind((5, -(-max_blocks // 16) * 16))
        for row, share in enumerate((0.5, 0.8, 0.99, 1.0, 1.0)):
            keys[row, torch.rand(keys.shape[1]) < share] = keys[row].sort().values[keys.shape[1] // 2 - row]
        asked = Choice(keys, torch.full((5,), max_blocks * BLOCK, dtype=INT), max_blocks, 1, 1)
        for row, expected in enumerate(asked.expected()[:, 0].tolist()):
            assert _emulated(asked, row) == expected, row


def test_the_text_lets_its_successor_start_where_it_is_told():
    texts = {successor: choice_ptx(choice_cut(1024, 16, successor)) for successor in Successor}
    start, wait = "griddepcontrol.launch_dependents;", "griddepcontrol.wait;"
    assert all(text.count(wait) == 1 for text in texts.values())
    assert texts[Successor.AT_ONCE].index(start) < texts[Successor.AT_ONCE].index(wait)
    assert texts[Successor.IN_TURN].index(start) > texts[Successor.IN_TURN].index(wait)
    assert start not in texts[Successor.BEHIND]


def test_what_counting_is_made_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(index_choice_module, "chained", lambda: True)
    keys, out = torch.empty(4, 1024, dtype=INT), torch.empty(4, 1, 16, dtype=INT)
    assert choice_fits(out, keys, 1)
    assert choice_fits(torch.empty(66, 4, 16, dtype=INT), keys, 64)
    assert not choice_fits(torch.empty(67, 4, 16, dtype=INT), keys, 64), "more programs than find room"
    assert choice_fits(torch.empty(67, 4, 16, dtype=INT), keys, 65)
    assert choice_fits(out[..., :5], keys, 1024)
    assert not choice_fits(out, keys, 1025)
    assert not choice_fits(torch.empty(4, 1, 17, dtype=INT), keys, 1024)
    assert not choice_fits(out, keys.as_strided((3, 1023), (1023, 1)), 1023), "four keys lie across a border"
    assert not choice_fits(out, keys[:, 1:], 1023), "the first four do"
    monkeypatch.setattr(index_choice_module, "chained", lambda: False)
    assert not choice_fits(out, keys, 1024), "launches do not overlap"


# ---- both kernels, on a GPU


class _Launch:
    """A selection's tensors on the GPU, and its launch: by counting, or by sorting."""

    def __init__(self, asked: Choice, successor: Successor, strided: bool = False) -> None:
        rows = asked.lens.numel() * asked.query_len
        self.lens = asked.lens.cuda()
        table = torch.empty(asked.lens.numel(), asked.max_blocks, dtype=INT, device="cuda")
        self._batch = DecodeBatch(self.lens, table, asked.query_len)
        self._keys = asked.keys.cuda()
        self._leaders = torch.empty(asked.keys.shape[0], 0, dtype=torch.int64, device="cuda")
        self._successor = successor
        shape = (asked.heads, rows, asked.topk, 3) if strided else (rows, asked.heads, asked.topk)
        self.memory = torch.full(shape, 123456789, dtype=INT, device="cuda")
        self.out = self.memory[..., 1].transpose(0, 1) if strided else self.memory
        assert choice_fits(self.out, self._keys, asked.max_blocks)

    def __call__(self) -> None:
        select_blocks(self.out, self._keys, self._leaders, self._batch, 66, self._successor)

    def chosen(self) -> Tensor:
        self.out.fill_(123456789)
        torch.cuda.synchronize()
        for _ in range(3):
            self()
        return self.out.cpu()


def _sorting(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, all selections sort."""
    monkeypatch.setattr(index_selection_module, "choice_fits", lambda *_: False)


@on_hopper
@pytest.mark.parametrize("successor", Successor)
@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize(
    ("max_blocks", "query_len", "heads"),
    [
        (1024, 1, 1),
        (1024, 4, 4),
        (1024, 1, 4),
        (1000, 4, 1),
        (512, 4, 4),
        (256, 4, 4),
        (72, 4, 4),
        (65, 1, 3),
        (64, 1, 4),
        (33, 1, 2),
        (5, 2, 1),
    ],
)
def test_both_kernels_choose_as_a_sort_does(
    kind: str, max_blocks: int, query_len: int, heads: int, successor: Successor, monkeypatch: pytest.MonkeyPatch
):
    asked = _choice(kind, max_blocks, _lengths(max_blocks), query_len, heads)
    launch = _Launch(asked, successor)
    expected = asked.expected()
    assert torch.equal(launch.chosen(), expected)
    _sorting(monkeypatch)
    assert torch.equal(launch.chosen(), expected)


@on_hopper
@pytest.mark.parametrize("topk", [1, 5, 16])
@pytest.mark.parametrize("sorts", [False, True])
def test_places_lie_anywhere(topk: int, sorts: bool, monkeypatch: pytest.MonkeyPatch):
    asked = replace(_choice("ties", 1024, _lengths(1024), query_len=4, heads=4), topk=topk)
    if sorts:
        _sorting(monkeypatch)
    launch = _Launch(asked, Successor.IN_TURN, strided=True)
    assert torch.equal(launch.chosen(), asked.expected())
    assert (launch.memory[..., ::2] == 123456789).all()


@on_hopper
@pytest.mark.parametrize("successor", Successor)
def test_a_graph_is_replayed_with_other_lengths(successor: Successor):
    """In the graph, calls follow each other as closely as they may."""
    asked = _choice("ties", 1024, _lengths(1024), query_len=4, heads=4)
    launch = _Launch(asked, successor)
    graph = in_a_graph(*[launch] * 20)
    for _ in range(5):
        lens = torch.randint(0, 1024 * BLOCK + 1, asked.lens.shape, dtype=INT)
        lens[:3] = torch.tensor([0, 1, 2049], dtype=INT)
        launch.lens.copy_(lens)
        launch.out.fill_(123456789)
        torch.cuda.synchronize()
        graph.replay()
        assert torch.equal(launch.out.cpu(), replace(asked, lens=lens).expected())
