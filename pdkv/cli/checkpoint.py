"""``pdkv checkpoint inspect``: what a checkpoint holds and lacks, and what each rank would need."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from pdkv.cli.lazy import CONTEXT, command_module, ending, keep_lines

if TYPE_CHECKING:
    from pdkv.m3.inspection import CacheBytes, Inspection, RankWeights

UNFIT = 3
"""Exit code: the checkpoint cannot be loaded as it is."""

_EXAMPLES = """
Examples:

  pdkv checkpoint inspect ./checkpoint
  pdkv checkpoint inspect ./MiniMax-M3-MXFP8 --tp 8 --ep --kv-dtype fp8 --index-dtype fp8 --json

Exit code 3 when tensors are missing, extra, or not as the config wants them, 2 when the config cannot be served.
"""

app = command_module()
_checkpoint = typer.Typer(
    help="Look at a checkpoint, without loading it.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings=CONTEXT,
)
app.add_typer(_checkpoint, name="checkpoint")


@_checkpoint.callback()
def _group() -> None:
    """Look at a checkpoint, without loading it."""


@_checkpoint.command("inspect", epilog=keep_lines(_EXAMPLES), context_settings=CONTEXT)
def inspect(
    model_dir: Annotated[Path, typer.Argument(metavar="DIR", help="Folder with config.json and safetensors files.")],
    tp: Annotated[int, typer.Option("--tp", metavar="N", min=1, help="Ranks that share the model.")] = 1,
    ep: Annotated[bool, typer.Option("--ep", help="Ranks hold whole experts, not columns of all.")] = False,
    kv_dtype: Annotated[str, typer.Option(metavar="NAME", help="What K/V are stored in.")] = "auto",
    index_dtype: Annotated[str, typer.Option(metavar="NAME", help="What index keys are stored in.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, with every missing tensor.")] = False,
) -> None:
    """Print what is there and what is missing, and the bytes that weights and cache take on each rank.

    Reads the headers of the files alone. Files may be absent: they are counted, and what is there is looked at.
    """

    def run() -> int:
        from pdkv.m3.inspection import InspectionOptions, inspect_checkpoint  # noqa: PLC0415  torch below

        options = InspectionOptions(tp_size=tp, expert_parallel=ep, kv_dtype=kv_dtype, index_dtype=index_dtype)
        found = inspect_checkpoint(model_dir, options)
        typer.echo(msgspec.json.encode(found).decode() if as_json else _told(found))
        return 0 if found.fits else UNFIT

    ending(run)


def _told(found: "Inspection") -> str:
    layers, options = found.layers, found.options
    lines = [
        f"checkpoint   {found.model_dir}",
        f"files        {found.num_files}, {found.file_bytes:,} bytes",
        f"names        {found.naming}; {found.num_tensors:,} tensors of the text model",
        f"weights      {found.dtype}" + (f", {found.quantisation}" if found.quantisation != "none" else ""),
        *(f"  {t.name:<10} {t.num_tensors:,} tensors, {t.num_bytes:,} bytes" for t in found.dtypes),
        *(f"  skipped    {t.num_tensors:,} tensors of {t.name}, {t.num_bytes:,} bytes" for t in found.skipped),
        f"attention    full in layers {_runs(layers.full_attention)}; to selected blocks in "
        f"{_runs(layers.sparse_attention)}" + (f", reused in {_runs(layers.reusing)}" if layers.reusing else ""),
        f"MLP          dense in layers {_runs(layers.dense_mlp)}; experts in {_runs(layers.experts)}",
        f"ranks        {options.tp_size}" + (", each with whole experts" if options.expert_parallel else ""),
        *_weights(found.weights, found.dtype),
        *_cache(found.cache),
    ]
    return "\n".join([*lines, *_problems(found)])


def _weights(weights: "tuple[RankWeights, ...]", dtype: str) -> list[str]:
    """One line for all ranks that need as much."""
    ranks: dict[tuple[int, int], list[int]] = {}
    for w in weights:
        ranks.setdefault((w.float32_bytes, w.native_bytes), []).append(w.rank)
    lines = []
    for (held_by_cpu, native), which in ranks.items():
        on_gpu = f", {native:,} bytes in {dtype} (GPU)" if native != held_by_cpu else ""
        lines.append(f"  rank {_runs(tuple(which))}: weights {held_by_cpu:,} bytes in float32 (CPU){on_gpu}")
    return lines


def _cache(cache: "CacheBytes") -> list[str]:
    lines = [
        f"cache        a rank: {cache.bytes_per_token:,} bytes a token, {cache.bytes_per_page:,} a page of "
        f"{cache.block_size} tokens, {cache.row_pitch:,} with padding; index schedule {cache.index_schedule}"
    ]
    for r in cache.regions:
        heads = f"{r.num_heads} head{'s' if r.num_heads > 1 else ''}"
        lines.append(
            f"  {r.name:<9}  {r.dtype}, {r.num_layers} layers, {heads}: {r.bytes_per_token:,} B/token, "
            f"{r.bytes_per_page:,} B/page"
        )
    return lines


def _problems(found: "Inspection") -> list[str]:
    """Tensors of a file that is not there are counted, all others listed."""
    if found.fits:
        return ["verdict      everything is there"]
    lines, listed = [], list(found.problems)
    gone = {**dict.fromkeys(found.absent_files, "is not there"), **dict.fromkeys(found.damaged_files, "cannot be read")}
    for file, reason in gone.items():
        theirs = {problem for problem in listed if problem.endswith(f"in {file}, which {reason})")}
        listed = [problem for problem in listed if problem not in theirs]
        lines.append(f"  {file} {found.damaged_files.get(file, reason)}; {len(theirs):,} tensors are missing with it")
    return [f"verdict      {len(found.problems):,} problems", *lines, *(f"  {problem}" for problem in listed)]


def _runs(ids: tuple[int, ...]) -> str:
    """``(0, 1, 2, 7)`` as ``0..2, 7``."""
    runs: list[list[int]] = []
    for i in ids:
        if runs and runs[-1][-1] == i - 1:
            runs[-1][1:] = [i]
        else:
            runs.append([i])
    return ", ".join("..".join(map(str, run)) for run in runs) or "none"
