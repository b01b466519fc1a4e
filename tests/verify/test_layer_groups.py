"""Layers of a chunk travel while later ones are computed; a word too early about them shows in bytes and answer."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdkv.agent.account import Account
from pdkv.agent.rank_reads import PagesRead
from pdkv.m3.layer_progress import LayerProgress
from pdkv.m3.requests import RequestId
from pdkv.verify.link_chasing import make_prompt
from pdkv.verify.link_chasing_checkpoint import write_checkpoint
from pdkv.verify.pair import DividedPair
from pdkv.verify.tampering import differing_blocks

LENGTH = 600
PATIENCE_S = 30.0
NUM_GROUPS = 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "link-chasing"
    write_checkpoint(directory)
    return directory


class Landings:
    """Reads that have ended on D, and prefill that waits for them between two layers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, told: dict[int, int]) -> None:
        """``told``: by the number of layer groups that are stored, how many P says there are."""
        self.sizes: list[int] = []
        self._more = threading.Condition()
        ended, tell_all = Account.read_ended, LayerProgress._tell_all

        def read_ended(account: Account, answer: PagesRead, at: float) -> None:
            ended(account, answer, at)
            with self._more:
                self.sizes.append(answer.num_bytes)
                self._more.notify()

        def tell(progress: LayerProgress, ends: list[tuple[RequestId, int]], groups: int) -> None:
            if groups in told:
                count = len(self.sizes)
                tell_all(progress, ends, told[groups])
                with self._more:
                    assert self._more.wait_for(lambda: len(self.sizes) > count, PATIENCE_S), "nothing was read"

        monkeypatch.setattr(Account, "read_ended", read_ended)
        monkeypatch.setattr(LayerProgress, "_tell_all", tell)


@pytest.fixture
def pairs(checkpoint: Path) -> Iterator[DividedPair]:
    with DividedPair(checkpoint, LENGTH + 16, prefill_chunk=1024) as pair:
        pair.ask(make_prompt(8, LENGTH).token_ids, 1)  # another prompt's bytes in the same pages
        pair.witness.watch(None)
        yield pair


def test_every_group_lands_while_later_layers_wait(pairs: DividedPair, monkeypatch: pytest.MonkeyPatch) -> None:
    landings = Landings(monkeypatch, {group: group for group in range(1, NUM_GROUPS + 1)})
    prompt = make_prompt(7, LENGTH)
    answer = pairs.ask(prompt.token_ids, 16)
    assert len(landings.sizes) == NUM_GROUPS
    assert (answer.report.exposed_s, answer.report.hidden_fraction) == (0.0, 1.0)
    assert answer.report.bytes_before_done == answer.report.num_bytes == sum(answer.report.bytes_by_region.values())
    assert answer.token_ids == prompt.expected(16)
    assert differing_blocks(pairs.prefill_arena, pairs.decode_arena, pairs.witness.rows, LENGTH) == {}


def test_groups_told_too_early_show_in_bytes_and_answer(pairs: DividedPair, monkeypatch: pytest.MonkeyPatch) -> None:
    """P's first group is stored, and it says so of all."""
    Landings(monkeypatch, {1: NUM_GROUPS})
    prompt = make_prompt(7, LENGTH)
    answer = pairs.ask(prompt.token_ids, 16)
    assert answer.token_ids != prompt.expected(16)
    differing = differing_blocks(pairs.prefill_arena, pairs.decode_arena, pairs.witness.rows, LENGTH)
    assert {key.layer for key in differing} == {1, 2, 3}


@pytest.mark.parametrize(("prefill", "decode"), [(2, 1), (1, 2), (2, 4)])
def test_groups_of_several_ranks_land_while_later_layers_wait(
    prefill: int, decode: int, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    landings = Landings(monkeypatch, {group: group for group in range(1, NUM_GROUPS + 1)})
    prompt = make_prompt(7, 300)
    with DividedPair(checkpoint, 400, prefill_chunk=512, prefill_tp=prefill, decode_tp=decode) as pair:
        answer = pair.ask(prompt.token_ids, 16)
    assert len(landings.sizes) == NUM_GROUPS
    assert (answer.report.exposed_s, answer.report.hidden_fraction) == (0.0, 1.0)
    assert answer.token_ids == prompt.expected(16)
