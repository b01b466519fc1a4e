"""Both agents over real channels and threads: transfers, refusals, restarts, faults, and what must come back."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import msgspec
import pytest
import zmq

from pdkv.agent import events as e
from pdkv.agent import peer_links, prefill_agent
from pdkv.errors import FailureCode
from pdkv.schema import Manifest, TransferId
from pdkv.transport.inproc import Faults, InprocTransport
from pdkv.transport.ucx import UcxOptions, UcxTransport
from pdkv.wire import messages
from tests.agent.workers import PATIENCE_S, AgentSide, DecodeSide, PrefillSide, same_bytes

ONE, TWO = TransferId(b"\x01" * 16), TransferId(b"\x02" * 16)
Side = TypeVar("Side", bound=AgentSide)
Make = Callable[[Callable[[], Side]], Side]


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes sides that are closed, and checked for crashes, when the test ends."""
    with contextlib.ExitStack() as stack:

        def made(maker: Callable[[], Side]) -> Side:
            side = maker()
            stack.callback(side.close)
            return side

        yield made


def transfer_works(prefill: PrefillSide, decode: DecodeSide, transfer: TransferId, seed: int = 1) -> e.TransferFacts:
    theirs, ours = (3, 4, 9), (7, 2, 3)
    prefill.write(theirs, seed)
    decode.fetch(transfer, prefill, ours)
    prefill.serve(transfer, theirs)
    arrived = decode.expect(e.TransferArrived, transfer)
    assert (arrived.token, arrived.logprob, arrived.attachment) == (42, -0.5, b"more")
    assert same_bytes(prefill, theirs, decode, ours)
    assert prefill.expect(e.TransferEnded, transfer).code is None
    prefill.expect(e.PagesFreed, transfer)
    return arrived.facts


def test_a_transfer_brings_every_byte_and_gives_the_pages_back(make: Make) -> None:
    prefill, decode = make(PrefillSide), make(DecodeSide)
    facts = transfer_works(prefill, decode, ONE)
    assert facts.num_pages == 3
    assert facts.num_spans == 3
    assert sum(facts.bytes_by_region.values()) == facts.num_bytes
    assert facts.path == "inproc"
    assert prefill.statistics().leases_active == 0
    assert decode.statistics().transfers_open == 0


def test_the_request_may_come_before_the_acquire(make: Make) -> None:
    prefill, decode = make(PrefillSide), make(DecodeSide)
    prefill.expect_transfer(ONE)
    decode.fetch(ONE, prefill, (1, 2, 3))
    prefill.expect(e.PrefillWanted, ONE)


def without_index_of_layer_two(manifest: Manifest) -> Manifest:
    kept = tuple(r for r in manifest.regions if (r.name, r.layer) != ("index_k", 2))
    return msgspec.structs.replace(manifest, regions=kept)


def swapped(manifest: Manifest) -> Manifest:
    """K of layers 1 and 2 of head 0 declared at each other's place: nothing in the manifest looks wrong."""
    regions = list(manifest.regions)
    one, two = (
        next(i for i, r in enumerate(regions) if (r.name, r.layer, r.head_start) == ("k", layer, 0)) for layer in (1, 2)
    )
    regions[one], regions[two] = (
        msgspec.structs.replace(regions[one], offset=regions[two].offset),
        msgspec.structs.replace(regions[two], offset=regions[one].offset),
    )
    return msgspec.structs.replace(manifest, regions=tuple(regions))


def wrong_stride(manifest: Manifest) -> Manifest:
    """Half the pages at twice the stride: page 0 is right, every other is not."""
    regions = tuple(msgspec.structs.replace(r, page_stride=2 * r.page_stride) for r in manifest.regions)
    return msgspec.structs.replace(manifest, regions=regions, num_pages=manifest.num_pages // 2)


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_forgotten_index_keys_are_refused_by_name(side: str, make: Make) -> None:
    prefill = make(lambda: PrefillSide(**({"change": without_index_of_layer_two} if side == "prefill" else {})))
    decode = make(lambda: DecodeSide(**({"change": without_index_of_layer_two} if side == "decode" else {})))
    decode.fetch(ONE, prefill, (1, 2, 3))
    failed = decode.expect_failure(ONE)
    assert failed.code is FailureCode.MANIFEST
    assert "index_k for layer 2" in failed.message


@pytest.mark.parametrize("older", ["prefill", "decode"])
def test_another_protocol_version_is_told_at_once(older: str, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    prefill, decode = make(PrefillSide), make(DecodeSide)
    module = prefill_agent if older == "prefill" else peer_links
    original = messages.make_envelope

    def of_another_version(*args: object) -> messages.Envelope:
        return msgspec.structs.replace(original(*args), version=99)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "make_envelope", of_another_version)
    decode.fetch(ONE, prefill, (1, 2, 3))
    failed = decode.expect_failure(ONE)
    assert failed.code is FailureCode.MANIFEST
    assert "protocol" in failed.message
    assert "99" in failed.message


@pytest.mark.parametrize("change", [swapped, wrong_stride])
def test_a_manifest_that_lies_is_found_by_the_probe(change: Callable[[Manifest], Manifest], make: Make) -> None:
    prefill, decode = make(lambda: PrefillSide(change=change)), make(DecodeSide)
    decode.fetch(ONE, prefill, (1, 2, 3))
    failed = decode.expect_failure(ONE)
    assert failed.code is FailureCode.PROBE
    assert "came over wrong" in failed.message


def test_a_prefill_worker_without_its_pattern_is_found_by_the_probe(make: Make) -> None:
    prefill, decode = make(lambda: PrefillSide(fill_probe=False)), make(DecodeSide)
    decode.fetch(ONE, prefill, (1, 2, 3))
    assert decode.expect_failure(ONE).code is FailureCode.PROBE


def test_a_lesser_path_than_required_is_refused(make: Make) -> None:
    over_tcp = UcxOptions(tls="tcp")
    prefill = make(lambda: PrefillSide(transport=UcxTransport(over_tcp)))
    decode = make(lambda: DecodeSide(transport=UcxTransport(over_tcp), least_path="shm"))
    decode.fetch(ONE, prefill, (1, 2, 3))
    failed = decode.expect_failure(ONE)
    assert failed.code is FailureCode.PROBE
    assert "is tcp, but shm is required" in failed.message


def test_transfers_over_ucx_in_one_process(make: Make) -> None:
    over_tcp = UcxOptions(tls="tcp")
    prefill = make(lambda: PrefillSide(transport=UcxTransport(over_tcp)))
    decode = make(lambda: DecodeSide(transport=UcxTransport(over_tcp), least_path="tcp"))
    assert transfer_works(prefill, decode, ONE).path == "tcp"


def test_two_decode_workers_read_from_one_prefill_worker(make: Make) -> None:
    prefill, one, two = make(PrefillSide), make(DecodeSide), make(DecodeSide)
    transfer_works(prefill, one, ONE, seed=1)
    transfer_works(prefill, two, TWO, seed=2)


def test_a_transfer_of_another_decode_worker_cannot_be_touched(make: Make) -> None:
    prefill, one, two = make(PrefillSide), make(DecodeSide), make(DecodeSide)
    transfer_works(prefill, two, TWO)
    one.fetch(ONE, prefill, (1, 2, 3))
    prefill.expect_transfer(ONE)
    prefill.expect(e.PrefillWanted, ONE)
    dropped = prefill.statistics().messages_dropped
    two.fetch(ONE, prefill, (1, 2, 3), deadline_s=1.0)
    two.expect_failure(ONE)
    assert prefill.statistics().messages_dropped > dropped
    assert prefill.statistics().transfers_open == 1


def test_an_older_life_of_a_prefill_worker_is_gone_at_once(make: Make) -> None:
    first = PrefillSide()
    decode = make(DecodeSide)
    transfer_works(first, decode, ONE)
    port = int(first.control.rpartition(":")[2])
    decode.fetch(TWO, first, (1, 2, 3))
    first.close()
    second = make(lambda: PrefillSide(port=port))
    failed = decode.expect_failure(TWO)
    assert failed.code in (FailureCode.SHUTDOWN, FailureCode.PEER_LOST)
    stale = TransferId(b"\x03" * 16)
    decode.fetch(stale, second, (1, 2, 3), incarnation=first.incarnation)
    assert decode.expect_failure(stale).code is FailureCode.PEER_LOST
    transfer_works(second, decode, TransferId(b"\x04" * 16))
    assert [peer.incarnation for peer in decode.statistics().peers] == [second.incarnation]


def test_a_new_life_of_a_decode_worker_ends_the_old_ones_transfers(make: Make) -> None:
    prefill = make(PrefillSide)
    first = make(lambda: DecodeSide(name="decode-0"))
    first.fetch(ONE, prefill, (1, 2, 3))
    prefill.expect_transfer(ONE)
    prefill.expect(e.PrefillWanted, ONE)
    prefill.loop.post(e.GrantPages(ONE, (3, 4, 9), 0))
    second = make(lambda: DecodeSide(name="decode-0"))
    transfer_works(prefill, second, TWO)
    assert prefill.expect(e.TransferEnded, ONE).code is FailureCode.PEER_LOST
    prefill.expect(e.PagesFreed, ONE)


def test_a_decode_worker_that_ends_is_forgotten_and_its_pages_come_back(make: Make) -> None:
    prefill, decode = make(PrefillSide), DecodeSide()
    decode.fetch(ONE, prefill, (1, 2, 3))
    prefill.expect_transfer(ONE)
    prefill.expect(e.PrefillWanted, ONE)
    prefill.loop.post(e.GrantPages(ONE, (3, 4, 9), 0))
    assert len(prefill.statistics().peers) == 1
    decode.close()
    assert prefill.expect(e.TransferEnded, ONE).code is not None
    prefill.expect(e.PagesFreed, ONE)
    deadline = time.monotonic() + PATIENCE_S
    while prefill.statistics().peers:
        assert time.monotonic() < deadline, "prefill still remembers a decode worker that said goodbye"
        time.sleep(0.01)


def test_a_request_given_up_gives_back_everything(make: Make) -> None:
    prefill, decode = make(PrefillSide), make(DecodeSide)
    decode.fetch(ONE, prefill, (1, 2, 3))
    prefill.expect_transfer(ONE)
    prefill.expect(e.PrefillWanted, ONE)
    prefill.loop.post(e.GrantPages(ONE, (3, 4, 9), 0))
    decode.loop.post(e.AbandonTransfer(ONE, FailureCode.CANCELLED, "client gone"))
    assert decode.expect_failure(ONE).code is FailureCode.CANCELLED
    assert prefill.expect(e.TransferEnded, ONE).code is FailureCode.CANCELLED
    prefill.expect(e.PagesFreed, ONE)


def test_a_refusal_of_prefills_engine_reaches_decode(make: Make) -> None:
    prefill, decode = make(PrefillSide), make(DecodeSide)
    decode.fetch(ONE, prefill, (1, 2, 3))
    prefill.expect_transfer(ONE)
    prefill.expect(e.PrefillWanted, ONE)
    prefill.loop.post(e.AbandonTransfer(ONE, FailureCode.NO_CAPACITY, "no pages"))
    failed = decode.expect_failure(ONE)
    assert (failed.code, failed.message) == (FailureCode.NO_CAPACITY, "prefill: no pages")


def test_an_acquire_whose_request_never_comes_is_refused(make: Make) -> None:
    prefill, decode = make(PrefillSide), make(DecodeSide)
    decode.fetch(ONE, prefill, (1, 2, 3))
    assert decode.expect_failure(ONE).code is FailureCode.UNKNOWN_TRANSFER
    prefill.expect_transfer(ONE)
    assert prefill.expect(e.TransferEnded, ONE).code is FailureCode.UNKNOWN_TRANSFER


def test_a_silent_prefill_worker_is_given_up(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_links, "HANDSHAKE_S", 0.5)
    prefill, decode = PrefillSide(), make(DecodeSide)
    prefill.close()
    decode.fetch(ONE, prefill, (1, 2, 3))
    failed = decode.expect_failure(ONE)
    assert failed.code is FailureCode.PEER_LOST
    assert prefill.control in failed.message


def test_a_prefill_worker_that_stops_answering_loses_its_lease(make: Make) -> None:
    prefill, decode = PrefillSide(), make(DecodeSide)
    transfer_works(prefill, decode, ONE)
    decode.fetch(TWO, prefill, (1, 2, 3))
    prefill.expect_transfer(TWO)
    prefill.expect(e.PrefillWanted, TWO)
    prefill.loop.post(e.GrantPages(TWO, (3, 4, 9), 0))
    prefill.statistics()  # answered when Granted has left, and the lease with it
    prefill.channel.send = lambda *_: None  # type: ignore[method-assign]  # deaf and dumb from here on
    assert decode.expect_failure(TWO).code is FailureCode.LEASE_EXPIRED
    prefill.close()


def test_a_limited_transfer_is_read_in_slices(make: Make) -> None:
    prefill, decode = make(PrefillSide), make(lambda: DecodeSide(pull_bytes_per_s=2e7))
    transfer_works(prefill, decode, ONE)
    assert transfer_works(prefill, decode, TWO, seed=2).num_spans == 3
    series = {s.name: s for s in decode.statistics().series if s.name == "pdkv_kv_transfer_descriptors"}
    assert sum(series["pdkv_kv_transfer_descriptors"].counts) == 6, "a page at a time"


def begun_slowly(prefill: PrefillSide, decode: DecodeSide) -> None:
    """A transfer whose first page has been read, with the next one due in 20 s."""
    decode.fetch(ONE, prefill, (1, 2, 3))
    prefill.expect_transfer(ONE)
    prefill.expect(e.PrefillWanted, ONE)
    prefill.loop.post(e.GrantPages(ONE, (3, 4, 9), 0))
    prefill.loop.post(e.FinishPrefill(ONE, 42, -0.5))
    deadline = time.monotonic() + PATIENCE_S
    while not any(s.name == "pdkv_kv_transfer_descriptors" for s in decode.statistics().series):
        assert time.monotonic() < deadline, "no page was read"
        time.sleep(0.01)


def test_a_limited_transfer_given_up_leaves_its_link_alone(make: Make) -> None:
    prefill, decode = make(PrefillSide), make(lambda: DecodeSide(pull_bytes_per_s=1e4))
    begun_slowly(prefill, decode)
    decode.loop.post(e.AbandonTransfer(ONE, FailureCode.CANCELLED, "client gone"))
    assert [type(decode.events.get(timeout=PATIENCE_S)) for _ in range(2)] == [e.TransferFailed, e.PagesReturned]
    assert prefill.expect(e.TransferEnded, ONE).code is FailureCode.CANCELLED
    prefill.expect(e.PagesFreed, ONE)
    assert [peer.state for peer in decode.statistics().peers] == ["ready"]


def test_a_limited_transfer_posts_nothing_beyond_its_lease(make: Make) -> None:
    prefill, decode = make(PrefillSide), make(lambda: DecodeSide(pull_bytes_per_s=1e4))
    begun_slowly(prefill, decode)
    prefill.channel.send = lambda *_: None  # type: ignore[method-assign]  # deaf and dumb from here on
    assert decode.expect_failure(ONE).code is FailureCode.LEASE_EXPIRED
    assert decode.statistics().reads_outstanding == 0


@pytest.mark.parametrize("seed", range(6))
def test_under_transport_faults_bytes_are_right_or_the_transfer_fails(seed: int, make: Make) -> None:
    faults = Faults(seed=seed, max_delay_polls=3, reorder=0.3, fail=0.15, truncate=0.15)
    prefill, decode = make(PrefillSide), make(lambda: DecodeSide(transport=InprocTransport(faults)))
    outcomes = set()
    for number in range(10):
        transfer = TransferId(bytes([number]) * 16)
        theirs, ours = (3, 4, 9), (7, 2, 3)
        prefill.write(theirs, 100 * seed + number)
        decode.fetch(transfer, prefill, ours)
        prefill.expect_transfer(transfer)
        outcome = decode_outcome(prefill, decode, transfer, theirs)
        if outcome is None:
            assert same_bytes(prefill, theirs, decode, ours)
        outcomes.add(outcome)
    assert None in outcomes, "some transfers must get through"
    assert outcomes - {None}, "some faults must have struck"
    assert outcomes <= {None, FailureCode.READ_FAILED, FailureCode.PROBE, FailureCode.PEER_LOST}


def decode_outcome(
    prefill: PrefillSide, decode: DecodeSide, transfer: TransferId, theirs: tuple[int, ...]
) -> FailureCode | None:
    """Play the prefill engine until D has the state or has given up, and P has its pages back."""
    while True:
        for side in (prefill, decode):
            while not side.events.empty():
                side.seen.append(side.events.get())
        for event in list(prefill.seen):
            if isinstance(event, e.PrefillWanted) and event.transfer == transfer:
                prefill.seen.remove(event)
                prefill.loop.post(e.GrantPages(transfer, theirs, 0))
                prefill.loop.post(e.RaiseWatermark(transfer, 128))
                prefill.loop.post(e.FinishPrefill(transfer, 42, -0.5))
        for event in list(decode.seen):
            if isinstance(event, e.TransferArrived) and event.transfer == transfer:
                prefill.expect(e.PagesFreed, transfer)
                return None
            if isinstance(event, e.TransferFailed) and event.transfer == transfer:
                decode.expect(e.PagesReturned, transfer)
                return event.code
        decode.statistics()  # a turn of the agent, so that this loop does not spin


def test_noise_on_the_control_port_harms_no_transfer(make: Make) -> None:
    prefill, decode = make(PrefillSide), make(DecodeSide)
    context = zmq.Context()
    noise = context.socket(zmq.DEALER)
    noise.set(zmq.LINGER, 0)
    noise.set(zmq.IDENTITY, b"\x09" * 8)
    noise.connect(prefill.control)
    for frames in ([b""], [b"\xff", b"\x00"], [bytes(5000), b""], [b"x", bytes(9 << 20)]):
        noise.send_multipart(frames)
    transfer_works(prefill, decode, ONE)
    while prefill.statistics().messages_dropped < 4:
        pass
    transfer_works(prefill, decode, TWO)
    noise.close(0)
    context.term()


def test_the_agent_needs_no_torch() -> None:
    code = "import pdkv.agent.decode_agent, pdkv.agent.prefill_agent, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
