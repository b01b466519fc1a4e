"""``pdkv manifest``: what a worker holds of a token, region by region, and on what two workers disagree."""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import msgspec

from pdkv.core.manifest import check_ranks, differences, ranges
from pdkv.daemons.daemon_client import ask
from pdkv.daemons.worker_api import MANIFEST_PATH, ManifestDocument
from pdkv.errors import ConfigError
from pdkv.schema import Manifest, Region

DIFF_SCHEMA = "pdkv.manifest-diff/v1"


class Side(msgspec.Struct, frozen=True):
    source: str
    role: str
    manifest_digest: str


class Difference(msgspec.Struct, frozen=True):
    """``subject`` is a manifest's field or a region's name; "none" is told of a side that has no such region."""

    subject: str
    a: str
    b: str


class Comparison(msgspec.Struct, frozen=True):
    schema: str
    a: Side
    b: Side
    compatible: bool
    differences: list[Difference]


def load(source: str) -> ManifestDocument:
    """From a worker's HTTP address, or from a file that holds what ``pdkv manifest show --json`` printed.

    Raises ``PdkvError`` where no worker answers, ``ConfigError`` for a file that is none.
    """
    if "://" in source:
        return ask("GET", source, MANIFEST_PATH, ManifestDocument)
    try:
        return msgspec.json.decode(Path(source).read_bytes(), type=ManifestDocument)
    except OSError as exc:
        raise ConfigError(f"{source} is no URL, and no file that can be read: {exc.strerror}") from exc
    except msgspec.MsgspecError as exc:
        told = f"{source} holds no manifest ({exc}); pdkv manifest show URL --json > {source} writes one"
        raise ConfigError(told) from exc


def compare(source_a: str, source_b: str) -> Comparison:
    """What a handshake would compare, and the tokenizer, which the router compares.

    Raises what ``load`` raises, and ``HandshakeError`` for a worker whose own ranks are no whole.
    """
    a, b = load(source_a), load(source_b)
    for source, document in ((source_a, a), (source_b, b)):
        check_ranks(f"{document.role} ({source})", document.ranks)
    found = [Difference(each.subject, each.prefill, each.decode) for each in differences(a.ranks, b.ranks)]
    if a.prompt_digest != b.prompt_digest:
        found.append(Difference("tokenizer and chat templates", a.prompt_digest, b.prompt_digest))
    side_a = Side(source_a, a.role, a.manifest_digest)
    side_b = Side(source_b, b.role, b.manifest_digest)
    return Comparison(DIFF_SCHEMA, side_a, side_b, compatible=not found, differences=found)


def told_of(document: ManifestDocument) -> str:
    """For people."""
    first = document.ranks[0]
    lines = [
        f"{document.role} worker {document.incarnation}, model {document.model}, manifest {document.manifest_digest}",
        f"protocol     {first.protocol}",
        f"fingerprint  {first.model_fingerprint}",
        f"cache        K/V {first.kv_dtype}, index keys {first.index_dtype}, scales {first.scale_convention}",
        f"schedule     {first.index_schedule}",
        f"layers       {first.num_layers}, {first.num_kv_heads} kv heads, {first.block_size} tokens a block",
    ]
    for manifest in document.ranks:
        per_token = sum(region.bytes_per_page for region in manifest.regions) // manifest.block_size
        held = f"{manifest.num_pages:,} pages, {len(manifest.regions)} regions, {per_token:,} bytes a token"
        lines += [f"rank {manifest.tp_rank} of {manifest.tp_size}  {held}", *_told_regions(manifest)]
    return "\n".join(lines)


def told_difference(found: Comparison) -> str:
    """For people."""
    if found.compatible:
        return f"{found.a.source} and {found.b.source} fit together (manifest {found.a.manifest_digest})"
    lines = [f"a: {found.a.role} {found.a.source}", f"b: {found.b.role} {found.b.source}"]
    return "\n".join([*lines, *(f"{each.subject}: a has {each.a}, b has {each.b}" for each in found.differences)])


def _told_regions(manifest: Manifest) -> Iterator[str]:
    """A line for all layers in which a region is the same."""

    def same(region: Region) -> tuple[str, str, str, int]:
        return region.name, region.dtype, _heads(region), region.bytes_per_page

    for (name, dtype, heads, size), regions in groupby(sorted(manifest.regions, key=same), key=same):
        layers = ranges(sorted({region.layer for region in regions}))
        yield f"  {name:<9}  {dtype}, layers {layers}, {heads}, {size:,} bytes a page and layer"


def _heads(region: Region) -> str:
    if region.shard.value != "by_head":
        return region.shard.value
    return f"heads {ranges(range(region.head_start, region.head_start + region.num_heads))}"
