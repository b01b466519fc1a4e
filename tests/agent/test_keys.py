"""Agents whose channels have keys: transfers between those that fit, and an error that says why between others."""

import contextlib
import time
from collections.abc import Iterator

import pytest

from pdkv.errors import FailureCode, KeyRefusal
from pdkv.metric_table import CONTROL_REFUSED, HANDSHAKES
from pdkv.metrics import Series
from pdkv.schema import TransferId
from pdkv.wire.admission import ChannelSecurity, NoSecurity
from pdkv.wire.curve import CurveSecurity, Keys, PublicKey, SecretKey
from tests.agent.test_agents import transfer_works
from tests.agent.workers import PATIENCE_S, AgentSide, DecodeSide, PrefillSide

A, B = SecretKey.new(), SecretKey.new()
ONE, TWO = TransferId(b"\x01" * 16), TransferId(b"\x02" * 16)


def keyed(secret: SecretKey, *others: PublicKey) -> CurveSecurity:
    return CurveSecurity(Keys.of(secret, others))


@contextlib.contextmanager
def sides(of_p: ChannelSecurity, of_d: ChannelSecurity) -> Iterator[tuple[PrefillSide, DecodeSide]]:
    prefill, decode = PrefillSide(security=of_p), DecodeSide(security=of_d)
    with contextlib.closing(prefill), contextlib.closing(decode):
        yield prefill, decode


def counted(side: AgentSide, name: str, *labels: str) -> float:
    found: list[Series] = [s for s in side.statistics().series if s.name == name and s.labels == labels]
    return sum(series.value for series in found)


def test_transfers_go_on_as_ever_between_workers_with_keys() -> None:
    with sides(keyed(A), keyed(A)) as (prefill, decode):
        transfer_works(prefill, decode, ONE)
        transfer_works(prefill, decode, TWO)
        for side in (prefill, decode):
            assert sum(counted(side, CONTROL_REFUSED.name, reason.value) for reason in KeyRefusal) == 0


@pytest.mark.parametrize(
    ("of_p", "of_d", "reason", "told"),
    [
        (keyed(A), keyed(B, A.public()), KeyRefusal.REFUSED_BY_PEER, "refused our key"),
        (keyed(A), keyed(B), KeyRefusal.UNKNOWN_KEY, "put that public key as a *.public file into this worker's"),
        (keyed(A), NoSecurity(), KeyRefusal.WITHOUT_KEYS, "start this worker with --control-keys too"),
        (NoSecurity(), keyed(A), KeyRefusal.PEER_WITHOUT_KEYS, "start the peer with --control-keys too"),
    ],
)
def test_a_request_between_workers_whose_keys_do_not_fit_is_told_why_and_how_to_mend_it(
    of_p: ChannelSecurity, of_d: ChannelSecurity, reason: KeyRefusal, told: str
) -> None:
    with sides(of_p, of_d) as (prefill, decode):
        for transfer in (ONE, TWO):  # the second makes a new connection, and learns the same
            decode.fetch(transfer, prefill, (3, 4, 5))
            failed = decode.expect_failure(transfer)
            assert failed.code is FailureCode.KEYS
            assert told in failed.message
        assert counted(decode, CONTROL_REFUSED.name, reason.value) == 2
        assert counted(decode, HANDSHAKES.name, "error", "keys") == 2
        deadline = time.monotonic() + PATIENCE_S
        while not any(counted(prefill, CONTROL_REFUSED.name, each.value) for each in KeyRefusal):
            assert time.monotonic() < deadline, "prefill has counted nothing"
            time.sleep(0.01)
        assert decode.statistics().peers == ()


def test_a_worker_that_comes_again_with_other_keys_ends_what_was_under_way() -> None:
    """A link that stood is no longer tried for ever: its transfers learn why it will not stand again."""
    decode = DecodeSide(security=keyed(A))
    with contextlib.closing(decode):
        prefill = PrefillSide(security=keyed(A))
        transfer_works(prefill, decode, ONE)
        port = int(prefill.control.partition("#")[0].rpartition(":")[2])
        decode.fetch(TWO, prefill, (6, 7, 8))  # P knows nothing of it yet, and waits
        prefill.expect_transfer(TWO)
        prefill.loop.channel.send = lambda *_: None  # type: ignore[method-assign]  # as if killed: no farewell
        prefill.close()
        with contextlib.closing(PrefillSide(port=port, security=keyed(B, A.public()))):
            failed = decode.expect_failure(TWO)
            assert failed.code in (FailureCode.PEER_LOST, FailureCode.LEASE_EXPIRED)
            assert decode.statistics().peers == ()
        assert counted(decode, CONTROL_REFUSED.name, KeyRefusal.OTHER_KEY.value) == 1
