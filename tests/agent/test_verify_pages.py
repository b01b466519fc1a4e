"""Digests of pages between real agents: what is damaged on the way fails the transfer, whatever way, rank and dtype."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest

from pdkv.agent import events as e
from pdkv.agent.rank_digests import PageDigests
from pdkv.errors import FailureCode
from pdkv.memory.arena import Arena
from pdkv.memory.page_digests import ArenaDigests
from pdkv.metric_table import DIGEST_CHECKS, DIGEST_SECONDS
from pdkv.schema import DigestPart, TransferId, VerifyPages
from pdkv.transport.base import Completion
from pdkv.transport.inproc import InprocTransport
from tests.agent.workers import PATIENCE_S, AgentSide, DecodeSide, PrefillSide, same_bytes

ONE, TWO = TransferId(b"\x01" * 16), TransferId(b"\x02" * 16)
THEIRS, OURS = (3, 4, 9), (7, 2, 3)
Make = Callable[[AgentSide], AgentSide]
Damage = Callable[[Arena], None]


@pytest.fixture
def make() -> Iterator[Callable[..., object]]:
    """Closes sides, and looks whether they crashed, when the test ends."""
    with contextlib.ExitStack() as stack:

        def made(side: AgentSide) -> AgentSide:
            stack.callback(side.close)
            return side

        yield made


class DamagingTransport(InprocTransport):
    """Changes D's pages behind everybody's back whenever a read has ended."""

    def __init__(self) -> None:
        super().__init__()
        self.arena: Arena | None = None
        self.damage: Damage | None = None

    def poll(self) -> list[Completion]:
        completions = super().poll()
        if completions and self.damage is not None:
            assert self.arena is not None
            self.damage(self.arena)
        return completions


def counted(side: AgentSide, metric: str) -> dict[tuple[str, ...], float]:
    return {series.labels: series.value for series in side.statistics().series if series.name == metric}


def moved(prefill: PrefillSide, decode: DecodeSide, transfer: TransferId = ONE, num_tokens: int = 300) -> None:
    prefill.write(THEIRS, 1)
    decode.fetch(transfer, prefill, OURS, num_tokens=num_tokens)
    prefill.serve(transfer, THEIRS, num_tokens)


@pytest.mark.parametrize("verify", [VerifyPages.SAMPLE, VerifyPages.FULL])
@pytest.mark.parametrize(("p", "d"), [(1, 1), (1, 2), (2, 1), (2, 4), (4, 2), (8, 1), (4, 8)])
def test_what_came_whole_passes_on_every_rank(verify: VerifyPages, p: int, d: int, make: Make) -> None:
    prefill = make(PrefillSide(other_transports=[None] * (p - 1)))
    decode = make(DecodeSide(other_transports=[None] * (d - 1), verify=verify))
    moved(prefill, decode)
    decode.expect(e.TransferArrived, ONE)
    assert same_bytes(prefill, THEIRS, decode, OURS)
    assert prefill.expect(e.TransferEnded, ONE).code is None
    prefill.expect(e.PagesFreed, ONE)
    checks = counted(decode, DIGEST_CHECKS.name)
    of_page = dict.fromkeys(("k", "v", "index_k"), 0)
    for arena in decode.arenas:
        for slot in arena.layout.slots:
            of_page[slot.spec.name] += 1
    for name, each in of_page.items():
        checked = checks[name, "ok"]
        assert checked == 3 * each if verify is VerifyPages.FULL else each <= checked < 3 * each
        assert checks[name, "mismatch"] == 0
    assert DIGEST_SECONDS.name in {series.name for series in prefill.statistics().series}


def test_nothing_is_digested_unless_it_is_asked_for(make: Make) -> None:
    prefill, decode = make(PrefillSide()), make(DecodeSide())
    moved(prefill, decode)
    decode.expect(e.TransferArrived, ONE)
    for side in (prefill, decode):
        names = {series.name for series in side.statistics().series}
        assert not names & {DIGEST_CHECKS.name, DIGEST_SECONDS.name}


def flipped_bit(arena: Arena) -> None:
    arena.page_bytes("v", 1, 0, OURS[1])[77] ^= 4


def index_of_another_layer(arena: Arena) -> None:
    for page in OURS:
        one, two = arena.page_bytes("index_k", 1, 0, page), arena.page_bytes("index_k", 2, 0, page)
        kept = one.clone()
        one.copy_(two)
        two.copy_(kept)


def keys_for_values(arena: Arena) -> None:
    one, two = (arena.page_bytes(name, 2, 3, OURS[0]) for name in ("k", "v"))
    kept = one.clone()
    one.copy_(two)
    two.copy_(kept)


def blocks_in_each_others_places(arena: Arena) -> None:
    rows = arena.rows()
    rows[list(OURS[:2])] = rows[list(reversed(OURS[:2]))]


def page_of_another_request(arena: Arena) -> None:
    arena.rows()[OURS[1]] = arena.rows()[11]


DAMAGES = [flipped_bit, index_of_another_layer, keys_for_values, blocks_in_each_others_places, page_of_another_request]


def damaged_pair(
    damage: Damage, verify: VerifyPages, make: Make, num_tokens: int = 300
) -> tuple[PrefillSide, DecodeSide]:
    """A pair whose link is proved, and then a transfer of which all is read at once and damaged."""
    transport = DamagingTransport()
    prefill, decode = make(PrefillSide()), make(DecodeSide(transport=transport, verify=verify))
    transport.arena = decode.arena
    prefill.write((11,), 5)
    moved(prefill, decode, TWO)
    decode.expect(e.TransferArrived, TWO)
    prefill.expect(e.TransferEnded, TWO)
    decode.arena.page_bytes("k", 0, 0, 11).fill_(9)  # what another request left there
    transport.damage = damage
    prefill.write(THEIRS, 1)
    decode.fetch(ONE, prefill, OURS, num_tokens=num_tokens)
    prefill.expect_transfer(ONE, num_tokens)
    prefill.expect(e.PrefillWanted, ONE)
    prefill.loop.post(e.GrantPages(ONE, THEIRS, 0))
    prefill.loop.post(e.FinishPrefill(ONE, 42, -0.5, b""))  # all is read at once, so damage happens once
    return prefill, decode


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_by_full_digests_and_by_nothing_else(damage: Damage, make: Make) -> None:
    _, blind = damaged_pair(damage, VerifyPages.OFF, make)
    blind.expect(e.TransferArrived, ONE)
    prefill, decode = damaged_pair(damage, VerifyPages.FULL, make)
    failed = decode.expect_failure(ONE)
    assert failed.code is FailureCode.DIGEST_MISMATCH
    assert ONE.hex() in failed.message
    assert prefill.identity.name in failed.message
    ended = prefill.expect(e.TransferEnded, ONE)
    assert ended.code is FailureCode.DIGEST_MISMATCH, "P is told why"
    prefill.expect(e.PagesFreed, ONE)
    assert prefill.statistics().leases_active == 0
    assert decode.statistics().transfers_open == 0
    checks = counted(decode, DIGEST_CHECKS.name)
    assert sum(value for (_, result), value in checks.items() if result == "mismatch") > 0


def test_the_message_names_what_is_wrong_and_where(make: Make) -> None:
    _, decode = damaged_pair(flipped_bit, VerifyPages.FULL, make)
    message = decode.expect_failure(ONE).message
    assert "block 1 of v of layer 1 head 0 is not what prefill worker" in message
    num_checked = 3 * len(decode.arena.layout.slots)
    assert f"(1 of {num_checked} digests differ" in message
    assert "over inproc" in message


def last_bytes(index: int) -> Damage:
    def damage(arena: Arena) -> None:
        arena.page_bytes("index_k", 2, 0, OURS[2])[index] ^= 1

    return damage


def test_bytes_behind_the_prompt_are_no_part_of_it(make: Make) -> None:
    """300 tokens are 44 in the third page; an index key has 64 bytes here."""
    _, decode = damaged_pair(last_bytes(44 * 64), VerifyPages.FULL, make)
    decode.expect(e.TransferArrived, ONE)
    _, decode = damaged_pair(last_bytes(44 * 64 - 1), VerifyPages.FULL, make)
    assert "block 2 of index_k of layer 2 head 0" in decode.expect_failure(ONE).message


def test_a_sample_always_has_all_of_the_last_page(make: Make) -> None:
    _, decode = damaged_pair(last_bytes(0), VerifyPages.SAMPLE, make)
    assert decode.expect_failure(ONE).code is FailureCode.DIGEST_MISMATCH


def test_damage_on_one_rank_of_several_is_found(make: Make) -> None:
    transport = DamagingTransport()
    prefill = make(PrefillSide(other_transports=[None]))
    decode = make(DecodeSide(other_transports=[None, transport, None], verify=VerifyPages.FULL))
    transport.arena = decode.others[1].arena

    def damage(arena: Arena) -> None:
        arena.page_bytes("k", 2, 2, OURS[0])[5] = 1
        arena.page_bytes("k", 2, 2, OURS[0])[6] = 2

    transport.damage = damage
    moved(prefill, decode)
    assert "block 0 of k of layer 2 head 2 is not" in decode.expect_failure(ONE).message


def test_replicated_keys_are_compared_with_the_rank_they_were_read_from(make: Make) -> None:
    """Ranks may differ in the last bit of what each computes for itself; that is no damage."""
    prefill = make(PrefillSide(other_transports=[None]))
    decode = make(DecodeSide(other_transports=[None], verify=VerifyPages.FULL))
    prefill.write(THEIRS, 1)
    prefill.others[0].arena.page_bytes("index_k", 1, 0, THEIRS[0])[0] ^= 1
    decode.fetch(ONE, prefill, OURS)
    prefill.serve(ONE, THEIRS)
    decode.expect(e.TransferArrived, ONE)


def test_a_prefill_worker_without_digests_refuses_by_name(make: Make) -> None:
    prefill = make(PrefillSide(can_digest=False))
    decode = make(DecodeSide(verify=VerifyPages.SAMPLE))
    decode.fetch(ONE, prefill, OURS)
    prefill.expect_transfer(ONE)
    failed = decode.expect_failure(ONE)
    assert failed.code is FailureCode.MANIFEST
    assert "decode wants digests of pages (sample)" in failed.message
    assert prefill.expect(e.TransferEnded, ONE).code is FailureCode.MANIFEST


class Gated:
    """Digests that are computed when the gate is opened."""

    def __init__(self, inner: PageDigests) -> None:
        self._inner = inner
        self.asked, self.gate = threading.Event(), threading.Event()

    def digest(self, parts: Sequence[DigestPart]) -> bytes:
        self.asked.set()
        assert self.gate.wait(PATIENCE_S)
        return self._inner.digest(parts)


def test_pages_that_were_given_back_meanwhile_are_no_damage(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A transfer that is given up while it is compared: its pages are others' by the time its digests are there."""
    gated: list[Gated] = []

    def page_digests(side: DecodeSide) -> PageDigests:
        gated.append(Gated(ArenaDigests(side.arena)))
        return gated[0]

    monkeypatch.setattr(DecodeSide, "page_digests", page_digests)
    prefill, decode = make(PrefillSide()), make(DecodeSide(verify=VerifyPages.FULL))
    moved(prefill, decode)
    assert gated[0].asked.wait(PATIENCE_S)
    decode.loop.post(e.AbandonTransfer(ONE, FailureCode.CANCELLED, "the client has gone"))
    assert decode.expect_failure(ONE).code is FailureCode.CANCELLED
    decode.arena.rows()[list(OURS)] = 7
    gated[0].gate.set()
    moved(prefill, decode, TWO)  # whose digests come behind
    decode.expect(e.TransferArrived, TWO)
    assert all(not count for (_, result), count in counted(decode, DIGEST_CHECKS.name).items() if result == "mismatch")


class Broken:
    """Digests that cannot be computed."""

    def digest(self, parts: Sequence[DigestPart]) -> bytes:
        raise RuntimeError("no such kernel")


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_digests_that_cannot_be_computed_fail_the_transfer(
    side: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = PrefillSide if side == "prefill" else DecodeSide
    monkeypatch.setattr(kind, "page_digests", lambda _self: Broken())
    prefill, decode = make(PrefillSide()), make(DecodeSide(verify=VerifyPages.FULL))
    moved(prefill, decode)
    failed = decode.expect_failure(ONE)
    assert failed.code is FailureCode.INTERNAL
    assert "rank 0: RuntimeError: no such kernel" in failed.message
