"""What a checkpoint directory holds, what it lacks, and what it would cost: told without reading a weight."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import msgspec

from pdkv.errors import CheckpointError
from pdkv.m3.checkpoint import WeightFiles, find_weight_files
from pdkv.m3.config import M3Config, kv_layout, load_config
from pdkv.m3.sharding import ModelShare, model_share
from pdkv.m3.tensor_check import misfits, skipped
from pdkv.m3.tensor_files import Catalogue, read_catalogue
from pdkv.m3.tensor_names import choose_naming, unused
from pdkv.m3.weights import weight_bytes
from pdkv.memory.row import RowLayout

SCHEMA = "pdkv.checkpoint/v1"
_WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}


class InspectionOptions(msgspec.Struct, frozen=True, kw_only=True):
    """For whom the bytes are counted."""

    tp_size: int = 1
    expert_parallel: bool = False
    kv_dtype: str = "auto"
    index_dtype: str = "auto"


class Tally(msgspec.Struct, frozen=True):
    name: str
    """Of a dtype, or of what tensors are for."""
    num_tensors: int
    num_bytes: int


class Layers(msgspec.Struct, frozen=True):
    """Global ids of the layers of each kind."""

    full_attention: tuple[int, ...]
    sparse_attention: tuple[int, ...]
    reusing: tuple[int, ...]
    """Sparse ones that attend to what the last one before them selected."""
    dense_mlp: tuple[int, ...]
    experts: tuple[int, ...]


class RankWeights(msgspec.Struct, frozen=True):
    rank: int
    float32_bytes: int
    """As held on a CPU."""
    native_bytes: int
    """As held on a GPU: matrices in the model's dtype. Quantised ones are dequantised at load."""


class CacheRegion(msgspec.Struct, frozen=True):
    """All layers of one kind of payload, on one rank."""

    name: str
    dtype: str
    num_layers: int
    num_heads: int
    bytes_per_token: int
    bytes_per_page: int


class CacheBytes(msgspec.Struct, frozen=True):
    """What one rank keeps; every rank keeps as much."""

    block_size: int
    regions: tuple[CacheRegion, ...]
    bytes_per_token: int
    bytes_per_page: int
    row_pitch: int
    """Bytes from one page to the next: with padding."""
    index_schedule: str


class Inspection(msgspec.Struct, frozen=True, kw_only=True):
    """``problems`` is empty where the checkpoint can be served."""

    schema: str = SCHEMA
    model_dir: str
    fits: bool
    naming: str
    quantisation: str
    dtype: str
    num_files: int
    file_bytes: int
    absent_files: tuple[str, ...]
    damaged_files: dict[str, str]
    """File name to what is wrong with it."""
    num_tensors: int
    """Of the text model."""
    dtypes: tuple[Tally, ...]
    skipped: tuple[Tally, ...]
    layers: Layers
    options: InspectionOptions
    weights: tuple[RankWeights, ...]
    cache: CacheBytes
    problems: tuple[str, ...]
    """Every tensor that is missing, extra, mis-shaped or mis-typed, and every contradiction of the index."""


def inspect_checkpoint(model_dir: Path, options: InspectionOptions) -> Inspection:
    """Look at a checkpoint whose files may be absent in part. Raises ``ModelError`` where its config cannot be served
    or be divided as asked: nothing else could be told then."""
    config = load_config(model_dir)
    problems: list[str] = []
    try:
        found = find_weight_files(model_dir)
    except CheckpointError as error:
        problems.append(str(error))
        found = WeightFiles((), None, {})
    catalogue = read_catalogue(model_dir, found)
    expected = [name for name in found.shard_of if unused(name) is None]
    naming = choose_naming(catalogue.names.union(expected), config)
    if not problems:  # without any file, the names of all tensors would say no more
        problems += misfits(catalogue, naming, config)
    size = options.tp_size
    shares = [model_share(config, rank, size, options.expert_parallel) for rank in range(max(1, size))]
    return Inspection(
        model_dir=str(model_dir),
        fits=not problems and not found.absent and not catalogue.damaged,
        naming=naming.title,
        quantisation=config.quantisation,
        dtype=config.dtype,
        num_files=len(found.paths),
        file_bytes=sum(path.stat().st_size for path in found.paths),
        absent_files=found.absent,
        damaged_files=catalogue.damaged,
        num_tensors=len(catalogue.names),
        dtypes=_dtypes(catalogue),
        skipped=tuple(Tally(purpose, *told) for purpose, told in skipped(catalogue).items()),
        layers=_layers(config),
        options=options,
        weights=tuple(_weights(config, shares)),
        cache=_cache(config, options),
        problems=tuple(problems),
    )


def _dtypes(catalogue: Catalogue) -> tuple[Tally, ...]:
    counts: dict[str, list[int]] = defaultdict(list)
    for name in catalogue.names:
        counts[catalogue.tensors[name].dtype].append(catalogue.tensors[name].num_bytes)
    return tuple(Tally(dtype, len(sizes), sum(sizes)) for dtype, sizes in sorted(counts.items()))


def _layers(config: M3Config) -> Layers:
    def which(flags: tuple[bool, ...], wanted: bool) -> tuple[int, ...]:
        return tuple(layer for layer, flag in enumerate(flags) if flag == wanted)

    return Layers(
        full_attention=which(config.sparse_layers, False),
        sparse_attention=which(config.sparse_layers, True),
        reusing=config.reusing_layers,
        dense_mlp=which(config.moe_layers, False),
        experts=which(config.moe_layers, True),
    )


def _weights(config: M3Config, shares: list[ModelShare]) -> Iterator[RankWeights]:
    """Ranks differ in nothing but the number of experts that they hold whole."""
    counted: dict[int, tuple[int, int]] = {}
    for share in shares:
        num_experts = len(share.experts)
        if num_experts not in counted:
            native = _WIDTH[config.dtype]
            counted[num_experts] = weight_bytes(config, share, 4), weight_bytes(config, share, native)
        yield RankWeights(share.rank, *counted[num_experts])


def _cache(config: M3Config, options: InspectionOptions) -> CacheBytes:
    row = RowLayout.of(kv_layout(config, options.kv_dtype, options.index_dtype), 0, options.tp_size)
    block = row.kv.block_size
    regions = []
    for name in dict.fromkeys(slot.spec.name for slot in row.slots):
        slots = [slot for slot in row.slots if slot.spec.name == name]
        num_bytes = sum(slot.num_bytes for slot in slots)
        regions.append(
            CacheRegion(
                name=name,
                dtype=slots[0].spec.dtype,
                num_layers=len({slot.spec.layer for slot in slots}),
                num_heads=len({slot.head for slot in slots}),
                bytes_per_token=num_bytes // block,
                bytes_per_page=num_bytes,
            )
        )
    return CacheBytes(
        block_size=block,
        regions=tuple(regions),
        bytes_per_token=row.num_bytes // block,
        bytes_per_page=row.num_bytes,
        row_pitch=row.pitch,
        index_schedule=row.kv.index_schedule,
    )
