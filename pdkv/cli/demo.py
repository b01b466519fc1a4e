"""``pdkv demo`` and ``pdkv demo-model``: a transfer whose right answer is known and hangs on every region."""

import tempfile
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from pdkv.cli.lazy import CONTEXT, command_module, ending, keep_lines
from pdkv.daemons.config import UpConfig, load
from pdkv.daemons.link import TransferReport
from pdkv.errors import PdkvError

app = command_module()

WRONG_ANSWER = 4
"""Exit code: the run was complete and its result is wrong."""

_EXAMPLES = """
Examples:

  pdkv demo
  pdkv demo --tokens 20000 --steps 64 --json

Exit code 4 when one of the answers is wrong.
"""
_MODEL_EXAMPLES = """
Examples:

  pdkv demo-model ./link-chasing
  pdkv up --model ./link-chasing
"""


class DemoResult(msgspec.Struct, frozen=True):
    """What ``--json`` prints."""

    schema: str
    right: bool
    prompt_tokens: int
    expected: list[int]
    divided: list[int]
    """Token ids answered through prefill and decode."""
    undivided: list[int]
    divided_s: float
    undivided_s: float
    transfer: TransferReport


@app.command("demo-model", epilog=keep_lines(_MODEL_EXAMPLES), context_settings=CONTEXT)
def demo_model(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write; made if missing.")],
    index_topk_freq: Annotated[
        int, typer.Option(metavar="N", min=1, help="For a model of which every N-th sparse layer selects.")
    ] = 1,
) -> None:
    """Write the link-chasing checkpoint: config.json, model.safetensors and tokenizer.json."""

    def run() -> int:
        _write_checkpoint(folder, index_topk_freq)
        typer.echo(str(folder))
        return 0

    ending(run)


@app.command("demo", epilog=keep_lines(_EXAMPLES), context_settings=CONTEXT)
def demo(
    tokens: Annotated[int, typer.Option(metavar="N", min=64, max=100_000, help="Prompt length in tokens.")] = 6000,
    steps: Annotated[int, typer.Option(metavar="N", min=24, max=4096, help="Links to follow, a token each.")] = 24,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Of the prompt.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what the workers log.")] = False,
) -> None:
    """Answer a long prompt through prefill and decode, and show that no piece of its state was lost.

    The prompt hides links like n3>n41 among thousands of filler words and ends in a node; each token of the answer
    must be the node that the last one links to. Losing K, V or index keys of any layer breaks the chain.
    """

    def run() -> int:
        result = _run_demo(tokens, steps, seed, verbose)
        typer.echo(msgspec.json.encode(result).decode() if as_json else _describe(result))
        return 0 if result.right else WRONG_ANSWER

    ending(run)


def _run_demo(tokens: int, steps: int, seed: int, verbose: bool) -> DemoResult:
    from pdkv.cli.local_run import ask, token_ids  # noqa: PLC0415
    from pdkv.daemons.logs import configure_logging  # noqa: PLC0415
    from pdkv.verify.link_chasing import make_prompt  # noqa: PLC0415

    prompt = make_prompt(seed, tokens)
    with tempfile.TemporaryDirectory(prefix="pdkv-demo-") as folder:
        model = Path(folder) / "link-chasing"
        _write_checkpoint(model)
        flags = {"model": model, "port": 0, "max_batch": 1, "max_model_len": tokens + steps}
        config = load(UpConfig, {**flags, "log_level": "info" if verbose else "warning"})
        configure_logging(config.log_level, "demo", config.log_format)
        typer.echo(f"prefill -> decode: {tokens:,} tokens, two workers and a router ...", err=True)
        answer = ask(
            config, {"prompt": list(prompt.token_ids), "max_tokens": steps, "temperature": 0, "ignore_eos": True}
        )
        typer.echo("undivided: the same prompt through one engine ...", err=True)
        from pdkv.verify.undivided import complete  # noqa: PLC0415  torch, only once the workers have ended

        undivided = complete(model, prompt.token_ids, steps, ignore_eos=True)
    block = answer.completion.pdkv
    if block is msgspec.UNSET or block.transfer is None:
        raise PdkvError("the decode worker reported no transfer")
    expected, divided = list(prompt.expected(steps)), token_ids(answer)
    return DemoResult(
        schema="pdkv.demo/v1",
        right=expected == divided == list(undivided.token_ids),
        prompt_tokens=len(prompt.token_ids),
        expected=expected,
        divided=divided,
        undivided=list(undivided.token_ids),
        divided_s=answer.seconds,
        undivided_s=undivided.seconds,
        transfer=block.transfer,
    )


def _write_checkpoint(folder: Path, index_topk_freq: int = 1) -> None:
    from pdkv.verify.link_chasing_checkpoint import write_checkpoint  # noqa: PLC0415

    try:
        write_checkpoint(folder, index_topk_freq)
    except OSError as exc:
        raise PdkvError(f"cannot write the checkpoint to {folder}: {exc.strerror or exc}") from exc


def _describe(result: DemoResult) -> str:
    from pdkv.verify.link_chasing import vocabulary  # noqa: PLC0415

    words = vocabulary()
    moved = result.transfer
    gigabytes_per_s = moved.num_bytes / moved.read_s / 1e9 if moved.read_s else 0.0
    early = moved.bytes_before_done / moved.num_bytes if moved.num_bytes else 0.0
    rows = [
        ("prompt", f"{result.prompt_tokens:,} tokens"),
        ("steps", f"{len(result.expected)}"),
        ("chain expected", " ".join(words[token] for token in result.expected)),
        ("prefill -> decode", " ".join(words[token] for token in result.divided)),
        ("undivided", " ".join(words[token] for token in result.undivided)),
        ("verdict", "all three are equal" if result.right else "WRONG: they differ"),
        ("bytes", f"{moved.num_bytes:,} ({early:.0%} landed before prefill was done)"),
        *((f"  {region}", f"{size:,}") for region, size in sorted(moved.bytes_by_region.items())),
        ("spans", f"{moved.num_spans:,} for {moved.num_pages:,} pages x {moved.num_regions:,} regions"),
        ("transfer", f"{moved.read_s:.4f} s reading, {gigabytes_per_s:.2f} GB/s, path {moved.path}"),
        ("whole request", f"{result.divided_s:.1f} s (undivided {result.undivided_s:.1f} s)"),
    ]
    return "\n".join(f"{name:<18} {value}" for name, value in rows)
