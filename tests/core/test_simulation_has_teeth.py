"""The property test must be able to fail: sessions broken on purpose are caught within a bounded number of worlds."""

from collections.abc import Callable, Sequence

import pytest

from pdkv.core.decode_session import DecodeSession, DecodeState
from pdkv.core.events import Checked, FreePages, ReturnPages
from pdkv.core.lease import GrantedLease, HeldLease
from pdkv.core.prefill_session import PrefillSession, PrefillState
from pdkv.core.residency import Residency
from pdkv.core.verification import Verification
from pdkv.schema import VerifyPages
from tests.core.simulation import Simulation, World


def never_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    """D believes reads whatever time has passed."""
    monkeypatch.setattr(HeldLease, "expired", lambda _self, _now: False)


def counts_from_the_acknowledgement(monkeypatch: pytest.MonkeyPatch) -> None:
    """D counts its lease from when the acknowledgement came."""
    original = HeldLease.acknowledged
    monkeypatch.setattr(HeldLease, "acknowledged", lambda self, sent_at: original(self, sent_at + 8.0))


def prefill_counts_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """P's lease ends before D's."""
    original = GrantedLease.extend
    monkeypatch.setattr(GrantedLease, "extend", lambda self, at, ttl: original(self, at, ttl / 2))


def frees_at_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """P frees granted pages as soon as it fails, although D may be reading, and D does not notice the failure."""
    original = PrefillSession._fail

    def fail(self: PrefillSession, code: object, message: str, now: float) -> None:
        granted = self.state in (PrefillState.PREFILLING, PrefillState.DONE)
        original(self, code, message, now)  # type: ignore[arg-type]
        if granted:
            self._outbox.clear()
            self._out = [FreePages()]
            self.state = PrefillState.ENDED

    monkeypatch.setattr(PrefillSession, "_fail", fail)


def returns_pages_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """D gives pages back while reads still write into them."""
    original = DecodeSession._drain

    def drain(self: DecodeSession, now: float) -> None:
        if self.state is DecodeState.FAILING and self._residency.num_outstanding:
            self._end(now)
            self._out.append(ReturnPages())
            return
        original(self, now)

    monkeypatch.setattr(DecodeSession, "_drain", drain)


def reads_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch begins one block early."""
    original = Residency.take

    def take(self: Residency, complete: Sequence[int]) -> object:
        self._next = [
            max(0, n - 1) if n < min(c, self.num_blocks) else n for n, c in zip(self._next, complete, strict=True)
        ]
        return original(self, complete)

    monkeypatch.setattr(Residency, "take", take)


def reads_all_groups_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """D takes the first layer group's watermark for that of all."""
    original = Residency.take
    monkeypatch.setattr(Residency, "take", lambda self, complete: original(self, [complete[0]] * len(complete)))


def tells_a_group_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """P tells of the group that it has only begun to write."""
    original = PrefillSession._on_progress

    def progress(self: PrefillSession, tokens: int, num_groups: int | None, now: float) -> None:
        original(self, tokens, None if num_groups is None else num_groups + 1, now)

    monkeypatch.setattr(PrefillSession, "_on_progress", progress)


def forgets_the_last_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """D believes that all has landed when the last layer group has not been asked for."""
    original = Residency.take

    def take(self: Residency, complete: Sequence[int]) -> object:
        parts = original(self, complete)
        last = [part for part in parts if part.layers.stop is None and part.layers.start]
        self._missing -= sum(part.size for part in last)
        return [part for part in parts if part not in last]

    monkeypatch.setattr(Residency, "take", take)


def forgets_to_cancel(monkeypatch: pytest.MonkeyPatch) -> None:
    """P's lease never ends and D tells nobody."""
    monkeypatch.setattr(GrantedLease, "expired", lambda _self, _now: False)
    original = DecodeSession._drain

    def drain(self: DecodeSession, now: float) -> None:
        self._peer_lost = True
        original(self, now)

    monkeypatch.setattr(DecodeSession, "_drain", drain)


def believes_what_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """D does not wait for the comparison of the last blocks."""
    monkeypatch.setattr(Verification, "complete", property(lambda _self: True))


def compares_before_all_has_landed(monkeypatch: pytest.MonkeyPatch) -> None:
    """D takes a block for landed when one layer group of it is there."""
    original = Verification.granted
    monkeypatch.setattr(Verification, "granted", lambda self, _num_groups: original(self, 1))
    monkeypatch.setattr(Verification, "_all_landed", lambda self, d: all(self._landed[d.start : d.stop]))


def forgets_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """D counts a block as equal whatever came of the comparison."""
    original = DecodeSession._on_checked
    monkeypatch.setattr(
        DecodeSession, "_on_checked", lambda self, checked, now: original(self, Checked(checked.blocks), now)
    )


def digests_half_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """P digests what the first layer group has."""
    original = PrefillSession._digest_what_is_complete

    def digest(self: PrefillSession) -> None:
        kept, self._watermark = self._watermark, [self._watermark[0]] * len(self._watermark)
        original(self)
        self._watermark = kept

    monkeypatch.setattr(PrefillSession, "_digest_what_is_complete", digest)


MUTANTS = [
    believes_what_is_not_compared,
    compares_before_all_has_landed,
    forgets_a_difference,
    digests_half_a_block,
    never_expires,
    counts_from_the_acknowledgement,
    prefill_counts_short,
    frees_at_failure,
    returns_pages_early,
    reads_twice,
    reads_all_groups_of_the_first,
    tells_a_group_early,
    forgets_the_last_group,
    forgets_to_cancel,
]


def hostile_worlds() -> list[World]:
    worlds = []
    for seed in range(16):
        common = {"seed": seed, "num_tokens": 5000, "longest_delay": (0.01, 2.0)[seed % 2], "chunk_time": 0.02}
        worlds += [
            World(**common, longest_read=14.0, partition=(2.0, 30.0)),
            World(**{**common, "num_tokens": 200}, longest_read=14.0, partition=(2.5, 30.0)),
            World(**common, longest_read=14.0, decode_sleeps=(0.5, 14.0)),
            World(**common, longest_read=14.0, prefill_sleeps=(1.0, 15.0)),
            World(**common, longest_read=3.0, abort_at=0.3),
            World(**common, longest_read=3.0, cancel_at=0.3),
            World(**common, longest_read=12.0, loss=0.6),
            World(**{**common, "chunk_time": 0.5}, layer_groups=(0, 5, 9, 11), all_chunks=bool(seed % 2)),
            World(**common, layer_groups=(0, 5, 9, 11), all_chunks=True, verify=VerifyPages.FULL),
            World(**common, verify=VerifyPages.FULL, damage=0.2),
        ]
    return worlds


def run_hostile_worlds() -> None:
    for world in hostile_worlds():
        simulation = Simulation(world)
        simulation.run(200)
        simulation.validate()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.__name__)
def test_a_broken_session_is_caught(mutant: Callable[[pytest.MonkeyPatch], None], monkeypatch) -> None:
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        run_hostile_worlds()


def test_the_same_worlds_pass_unbroken() -> None:
    run_hostile_worlds()
