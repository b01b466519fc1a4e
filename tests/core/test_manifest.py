"""Manifests: what must match is named when it does not, what may differ does not matter."""

import re

import msgspec
import pytest

from pdkv.core.manifest import check_pairing, differences, pairing_digest, ranges
from pdkv.errors import FailureCode, HandshakeError
from pdkv.schema import Manifest
from tests.layouts import make_layout, make_manifest

KV = make_layout()


def without(manifest: Manifest, name: str, layers: range) -> Manifest:
    kept = tuple(r for r in manifest.regions if not (r.name == name and r.layer in layers))
    return msgspec.structs.replace(manifest, regions=kept)


def test_equal_workers_fit_whatever_their_ranks_pages_and_layouts() -> None:
    tp1 = [make_manifest(KV, num_pages=8)]
    tp4 = [make_manifest(KV, r, 4, num_pages=99, rows=False) for r in range(4)]
    assert differences(tp1, tp4) == ()
    assert pairing_digest(tp1) == pairing_digest(tp4)
    check_pairing(tp4, tp1)


def test_forgotten_index_keys_are_refused_by_name() -> None:
    decode = make_manifest(KV)
    with pytest.raises(HandshakeError, match=r"decode needs index_k for layers 3\.\.59; prefill offers none") as caught:
        check_pairing([without(decode, "index_k", range(60))], [decode])
    assert caught.value.code is FailureCode.MANIFEST
    assert caught.value.exit_code == 6


def test_index_keys_of_one_layer_missing_are_refused_by_name() -> None:
    decode = make_manifest(KV)
    lacking = without(decode, "index_k", range(17, 18))
    with pytest.raises(HandshakeError, match="decode needs index_k for layer 17; prefill offers none"):
        check_pairing([lacking], [decode])
    with pytest.raises(HandshakeError, match="prefill holds index_k for layer 17; decode has no room for it"):
        check_pairing([decode], [lacking])
    assert pairing_digest([lacking]) != pairing_digest([decode])


def test_a_missing_head_is_named() -> None:
    decode = [make_manifest(KV, r, 2) for r in range(2)]
    (found, _) = differences([make_manifest(KV, 0, 2)], decode)
    assert "k for layers 0..59 (heads 2..3)" in found.message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_fingerprint", "other"),
        ("block_size", 64),
        ("scale_convention", "per-tensor"),
        ("index_schedule", "freq4"),
        ("protocol", 99),
    ],
)
def test_each_field_that_matters_is_named(field: str, value: object) -> None:
    one = make_manifest(KV)
    other = msgspec.structs.replace(one, **{field: value})
    (found,) = differences([one], [other])
    assert found.subject == field
    assert str(value) in found.message
    assert pairing_digest([one]) != pairing_digest([other])


def test_another_dtype_of_one_region_is_named_with_both_sides() -> None:
    one = make_manifest(KV)
    regions = list(one.regions)
    regions[0] = msgspec.structs.replace(
        regions[0], dtype="float8_e4m3fn", bytes_per_page=regions[0].bytes_per_page // 2
    )
    (found,) = differences([one], [msgspec.structs.replace(one, regions=tuple(regions))])
    assert found.message.startswith("index_k of layer 3 head 0: prefill has bfloat16")


def test_the_report_stays_short() -> None:
    one = make_manifest(KV)
    regions = tuple(msgspec.structs.replace(r, dtype="int8") for r in one.regions)
    with pytest.raises(HandshakeError, match="and 531 more"):
        check_pairing([one], [msgspec.structs.replace(one, regions=regions)])


def test_ranges_reads_well() -> None:
    assert ranges([3, 4, 5, 9, 11, 12]) == "3..5, 9, 11..12"
    assert ranges([]) == ""


def ranks(size: int = 2) -> list[Manifest]:
    return [make_manifest(KV, rank, size) for rank in range(size)]


def with_field(manifest: Manifest, **fields: object) -> Manifest:
    return msgspec.structs.replace(manifest, **fields)


@pytest.mark.parametrize(
    ("offered", "told"),
    [
        ([], "it offers none"),
        (ranks()[:1], "ranks 0..1 of 2 are wanted in this order, it offers 0 of 2"),
        (ranks()[::-1], "it offers 1 of 2, 0 of 2"),
        ([ranks()[0], ranks()[0]], "it offers 0 of 2, 0 of 2"),
        ([*ranks(), ranks(4)[2]], "it offers 0 of 2, 1 of 2, 2 of 4"),
        ([ranks()[0], with_field(ranks()[1], num_pages=17)], "num pages is 16 on rank 0, 17 on rank 1"),
        (
            [ranks()[0], with_field(ranks()[1], model_fingerprint="x")],
            "model fingerprint is model on rank 0, x on rank",
        ),
        ([ranks()[0], without(ranks()[1], "v", range(7, 8))], "v of layer 7 lacks heads 2..3"),
    ],
    ids=str,
)
@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_ranks_that_are_no_whole_worker_are_refused(offered: list[Manifest], told: str, side: str) -> None:
    pair = (offered, ranks()) if side == "prefill" else (ranks(), offered)
    with pytest.raises(HandshakeError, match=f"the {side} worker's ranks are no whole: .*{re.escape(told)}") as caught:
        check_pairing(*pair)
    assert caught.value.code is FailureCode.MANIFEST


def test_two_ranks_that_describe_one_region_in_two_ways_are_refused() -> None:
    first, second = ranks()
    regions = tuple(
        with_field(region, dtype="int8") if (region.name, region.layer) == ("index_k", 9) else region
        for region in second.regions
    )
    with pytest.raises(HandshakeError, match=r"index_k of layer 9 head 0 is bfloat16 .* on rank 0, int8 .* on rank 1"):
        check_pairing([first, with_field(second, regions=regions)], ranks())


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_ranks_of_every_size_are_a_whole_worker(size: int) -> None:
    check_pairing(ranks(size), ranks(4))
    check_pairing(ranks(2), ranks(size))
