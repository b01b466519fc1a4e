"""Whether two workers may exchange state: every difference between their manifests, in words."""

import hashlib
from collections.abc import Iterable, Sequence, Set

import msgspec

from pdkv.errors import FailureCode, HandshakeError
from pdkv.schema import Manifest, Region, RegionKey, Shard

_MUST_MATCH = (
    "protocol",
    "model_fingerprint",
    "block_size",
    "num_layers",
    "num_kv_heads",
    "kv_dtype",
    "index_dtype",
    "scale_convention",
    "index_schedule",
)


class RegionFacts(msgspec.Struct, frozen=True, order=True):
    """What must be equal of a region on both sides, wherever it lies."""

    dtype: str
    bytes_per_page: int
    shard: str

    def told(self) -> str:
        """In words."""
        return f"{self.dtype} {self.shard} {self.bytes_per_page} bytes a page"


class ManifestDifference(msgspec.Struct, frozen=True):
    """One thing on which two workers disagree. ``subject`` is a manifest field or a region's name."""

    subject: str
    prefill: str
    decode: str
    message: str


def region_keys(region: Region) -> Iterable[RegionKey]:
    """One key a head; a single one, with head 0, for a replicated region."""
    if region.shard is Shard.REPLICATED:
        return (RegionKey(region.name, region.layer, 0),)
    heads = range(region.head_start, region.head_start + region.num_heads)
    return (RegionKey(region.name, region.layer, head) for head in heads)


def facts_by_key(ranks: Sequence[Manifest]) -> dict[RegionKey, RegionFacts]:
    """Every region of every head that the ranks of one worker hold together."""
    facts = {}
    for manifest in ranks:
        for region in manifest.regions:
            per_head = region.bytes_per_page // region.num_heads
            for key in region_keys(region):
                facts[key] = RegionFacts(region.dtype, per_head, region.shard.value)
    return facts


def pairing_digest(ranks: Sequence[Manifest]) -> str:
    """Equal on two workers exactly when they may be paired; blind to ranks, page counts and where things lie."""
    fixed = [str(getattr(ranks[0], field)) for field in _MUST_MATCH]
    held = [(key.name, key.layer, key.head, *msgspec.structs.astuple(f)) for key, f in facts_by_key(ranks).items()]
    return hashlib.blake2b(msgspec.json.encode([fixed, sorted(held)]), digest_size=16).hexdigest()


def differences(prefill: Sequence[Manifest], decode: Sequence[Manifest]) -> tuple[ManifestDifference, ...]:
    """All that keeps decode from reading prefill's pages; empty when they fit. Neither side may be empty."""
    found = [
        _field_difference(field, getattr(prefill[0], field), getattr(decode[0], field))
        for field in _MUST_MATCH
        if getattr(prefill[0], field) != getattr(decode[0], field)
    ]
    offered, needed = facts_by_key(prefill), facts_by_key(decode)
    for name, where in _absences(needed.keys(), offered.keys()):
        message = f"decode needs {name} for {where}; prefill offers none"
        found.append(ManifestDifference(name, "none", where, message))
    for name, where in _absences(offered.keys(), needed.keys()):
        message = f"prefill holds {name} for {where}; decode has no room for it"
        found.append(ManifestDifference(name, where, "none", message))
    for key in sorted(needed.keys() & offered.keys()):
        if offered[key] != needed[key]:
            found.append(_fact_difference(key, offered[key], needed[key]))
    return tuple(found)


def check_pairing(prefill: Sequence[Manifest], decode: Sequence[Manifest]) -> None:
    """Raise ``HandshakeError`` naming every difference, the first few in full. Both sides: all ranks, in order."""
    check_ranks("prefill", prefill)
    check_ranks("decode", decode)
    found = differences(prefill, decode)
    if found:
        listed = "; ".join(d.message for d in found[:6])
        more = f"; and {len(found) - 6} more" if len(found) > 6 else ""
        raise HandshakeError(FailureCode.MANIFEST, f"manifests differ: {listed}{more}")


def check_ranks(side: str, ranks: Sequence[Manifest]) -> None:
    """Raise ``HandshakeError`` unless these are all ranks of one worker, in order, of one mind, with every head held.

    ``side`` is "prefill" or "decode", for the message.
    """
    problem = _rank_problem(ranks)
    if problem:
        raise HandshakeError(FailureCode.MANIFEST, f"the {side} worker's ranks are no whole: {problem}")


def _rank_problem(ranks: Sequence[Manifest]) -> str:
    if not ranks:
        return "it offers none"
    size = ranks[0].tp_size
    found = [(manifest.tp_rank, manifest.tp_size) for manifest in ranks]
    if found != [(rank, size) for rank in range(size)]:
        listed = ", ".join(f"{rank} of {of}" for rank, of in found)
        return f"ranks 0..{size - 1} of {size} are wanted in this order, it offers {listed}"
    for field in (*_MUST_MATCH, "num_pages"):
        for manifest in ranks:
            if (theirs := getattr(manifest, field)) != (first := getattr(ranks[0], field)):
                return f"{field.replace('_', ' ')} is {first} on rank 0, {theirs} on rank {manifest.tp_rank}"
    return _region_problem(ranks)


def _region_problem(ranks: Sequence[Manifest]) -> str:
    """Heads that nobody holds, and regions that two ranks describe in two ways."""
    seen: dict[RegionKey, tuple[int, RegionFacts]] = {}
    for manifest in ranks:
        for key, facts in facts_by_key([manifest]).items():
            rank, first = seen.setdefault(key, (manifest.tp_rank, facts))
            if first != facts:
                where = f"{key.name} of layer {key.layer} head {key.head}"
                return f"{where} is {first.told()} on rank {rank}, {facts.told()} on rank {manifest.tp_rank}"
    heads: dict[tuple[str, int], set[int]] = {}
    for key, (_, facts) in seen.items():
        if facts.shard == Shard.BY_HEAD.value:
            heads.setdefault((key.name, key.layer), set()).add(key.head)
    for (name, layer), held in sorted(heads.items()):
        if missing := sorted(set(range(ranks[0].num_kv_heads)) - held):
            return f"{name} of layer {layer} lacks head{'s' if len(missing) > 1 else ''} {ranges(missing)}"
    return ""


def _field_difference(field: str, prefill: object, decode: object) -> ManifestDifference:
    words = field.replace("_", " ")
    return ManifestDifference(field, str(prefill), str(decode), f"{words}: prefill has {prefill}, decode has {decode}")


def _fact_difference(key: RegionKey, prefill: RegionFacts, decode: RegionFacts) -> ManifestDifference:
    where = f"{key.name} of layer {key.layer} head {key.head}"
    told = f"{where}: prefill has {prefill.told()}, decode has {decode.told()}"
    return ManifestDifference(key.name, prefill.told(), decode.told(), told)


def _absences(keys: Set[RegionKey], others: Set[RegionKey]) -> list[tuple[str, str]]:
    """Region names of which ``others`` lacks something, each with its layers, and its heads unless all are gone."""
    missing: dict[str, dict[int, list[int]]] = {}
    for key in sorted(keys - others):
        missing.setdefault(key.name, {}).setdefault(key.layer, []).append(key.head)
    found = []
    for name, layers in missing.items():
        where = f"layer{'s' if len(layers) > 1 else ''} {ranges(layers)}"
        partly = {key.head for key in keys & others if key.name == name and key.layer in layers}
        if partly:
            where += f" (heads {ranges(sorted({head for heads in layers.values() for head in heads}))})"
        found.append((name, where))
    return found


def ranges(numbers: Iterable[int]) -> str:
    """Sorted numbers in words: [3, 4, 5, 9] is "3..5, 9"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}..{b}" for a, b in runs)
