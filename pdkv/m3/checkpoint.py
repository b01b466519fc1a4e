"""A checkpoint directory's weight files, and a digest that tells two of them apart without reading all bytes."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import msgspec

from pdkv.errors import CheckpointError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SAMPLES = 256
_SAMPLE_BYTES = 4096


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


@dataclass(frozen=True)
class WeightFiles:
    """The safetensors files of a checkpoint, whole or in shards."""

    paths: tuple[Path, ...]
    """Sorted by name; those that exist."""
    index: Path | None
    """The file that says which shard holds a tensor, where there are shards."""
    shard_of: dict[str, str]
    """What it says: tensor name to file name. Empty without it."""
    absent: tuple[str, ...] = ()
    """Names of files that it names and that are not there."""


def weight_files(model_dir: Path) -> WeightFiles:
    """Find all weights. Raises ``CheckpointError``, also for every file that the index names and that is not there."""
    found = find_weight_files(model_dir)
    if found.absent:
        raise CheckpointError(f"{found.index} names files that are not there: {', '.join(found.absent)}")
    return found


def find_weight_files(model_dir: Path) -> WeightFiles:
    """Find what there is of the weights. Raises ``CheckpointError`` where nothing says what there should be."""
    model_dir = Path(model_dir)
    index = model_dir / _INDEX
    if (model_dir / _SINGLE).is_file() and not index.is_file():
        return WeightFiles((model_dir / _SINGLE,), None, {})
    try:
        shard_of = msgspec.json.decode(index.read_bytes(), type=_Index).weight_map
    except FileNotFoundError as error:
        raise CheckpointError(f"{model_dir} holds neither {_SINGLE} nor {_INDEX}") from error
    except (OSError, msgspec.DecodeError) as error:
        raise CheckpointError(f"{index} cannot be read: {error}") from error
    names = sorted(set(shard_of.values()))
    strange = [name for name in names if Path(name).name != name]
    if strange:
        raise CheckpointError(f"{index} names files outside its directory: {', '.join(strange)}")
    absent = tuple(name for name in names if not (model_dir / name).is_file())
    there = tuple(model_dir / name for name in names if name not in absent)
    return WeightFiles(there, index, shard_of, absent)


def digest_weights(model_dir: Path, digest: "hashlib._Hash") -> None:
    """Feed a digest with what tells the weights of two checkpoints apart.

    Of each weight file: name, size, the whole header (tensor names, shapes, dtypes, offsets) and samples of the data
    spread evenly, about 1 MiB a file. So it knows fine-tunes from one another and costs little, but is no proof of
    equality. Raises ``CheckpointError``.
    """
    for path in weight_files(model_dir).paths:
        try:
            _digest_file(path, digest)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error


def _digest_file(path: Path, digest: "hashlib._Hash") -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        header_bytes = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or header_bytes > size - 8:
            raise CheckpointError(
                f"{path} is not a whole safetensors file: {size} bytes with a header of {header_bytes}"
            )
        digest.update(f"\0{path.name}\0{size}\0".encode())
        digest.update(file.read(header_bytes))
        start = 8 + header_bytes
        step = max(_SAMPLE_BYTES, (size - start) // _SAMPLES)
        for offset in range(start, size, step):
            file.seek(offset)
            digest.update(file.read(_SAMPLE_BYTES))
