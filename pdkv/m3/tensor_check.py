"""What a checkpoint's files hold against what its config asks for: every misfit, or what was found."""

import logging
from collections import defaultdict
from collections.abc import Mapping

from pdkv.errors import CheckpointError
from pdkv.m3.model_config import M3Config
from pdkv.m3.quantisation import SCALE_SUFFIX, scale_columns
from pdkv.m3.tensor_files import QUANTISED, Catalogue
from pdkv.m3.tensor_names import Naming, Part, Shape, all_parts, choose_naming, unused

_LOG = logging.getLogger("pdkv.m3")

_FLOATS = ("BF16", "F16", "F32")
"""Names that safetensors gives to the dtypes that plain weights may be stored in."""
_SCALES = ("F8_E8M0", "U8")


def check(catalogue: Catalogue, config: M3Config) -> Naming:
    """The naming of a checkpoint that fits its config, and one line in the log about it. Raises one
    ``CheckpointError`` that lists whatever is missing, extra, mis-shaped or mis-typed."""
    if catalogue.damaged:
        raise CheckpointError("; ".join(f"{catalogue.model_dir / f} {why}" for f, why in catalogue.damaged.items()))
    naming = choose_naming(catalogue.names, config)
    problems = misfits(catalogue, naming, config)
    if problems:
        listed = "\n  ".join(problems)
        raise CheckpointError(
            f"the tensors in {catalogue.model_dir} do not fit its config.json, {len(problems)} problems "
            f"(expected are the names of {naming.title}):\n  {listed}"
        )
    _log(catalogue, naming)
    return naming


def misfits(catalogue: Catalogue, naming: Naming, config: M3Config) -> list[str]:
    """Everything that keeps these files from being this model, one entry each."""
    wanted, names = all_parts(naming, config), catalogue.names
    scales = _scales(catalogue, wanted) if config.quantisation == "mxfp8" else {}
    shapes = {name: part.shape for name, part in wanted.items()} | scales
    problems = [
        f"missing: {name} {list(shape)}{catalogue.hint(name)}" for name, shape in shapes.items() if name not in names
    ]
    problems += [f"extra: {name}" for name in sorted(names - shapes.keys())]
    for name in sorted(shapes.keys() & names):
        stored = catalogue.tensors[name]
        if stored.shape != shapes[name]:
            problems.append(f"mis-shaped: {name} is {list(stored.shape)}, the config asks for {list(shapes[name])}")
        served = _SCALES if name in scales else _FLOATS
        if stored.dtype not in served and name + SCALE_SUFFIX not in scales:
            problems.append(f"mis-typed: {name} is {stored.dtype}, served are {', '.join(served)}" + _why(stored.dtype))
    return problems + list(catalogue.problems)


def skipped(catalogue: Catalogue) -> dict[str, tuple[int, int]]:
    """Tensors that are passed over, by what they are for: how many, and their bytes."""
    counts: dict[str, int] = defaultdict(int)
    sizes: dict[str, int] = defaultdict(int)
    for name in catalogue.tensors.keys() - catalogue.names:
        purpose = unused(name)
        assert purpose is not None, "all others are the text model's"
        counts[purpose] += 1
        sizes[purpose] += catalogue.tensors[name].num_bytes
    return {purpose: (counts[purpose], sizes[purpose]) for purpose in sorted(counts)}


def _scales(catalogue: Catalogue, wanted: Mapping[str, Part]) -> dict[str, Shape]:
    """The scales that quantised tensors need. Norms and routers are never quantised."""
    return {
        name + SCALE_SUFFIX: (*part.shape[:-1], len(scale_columns(range(part.shape[-1]))))
        for name, part in wanted.items()
        if not part.exact and name in catalogue.tensors and catalogue.tensors[name].dtype == QUANTISED
    }


def _why(dtype: str) -> str:
    return " (quantized ones need a quantization_config, and norms and routers never are)" if dtype == QUANTISED else ""


def _log(catalogue: Catalogue, naming: Naming) -> None:
    num_files = len(catalogue.found.paths)
    _LOG.info("%d tensors in %d files, in the names of %s", len(catalogue.names), num_files, naming.title)
    for purpose, (count, num_bytes) in skipped(catalogue).items():
        _LOG.info("skipped %d tensors of %s, %d bytes", count, purpose, num_bytes)
