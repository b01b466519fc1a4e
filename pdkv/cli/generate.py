"""``pdkv generate``: one prompt, answered through prefill and decode or by the undivided model."""

import sys
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from pdkv.cli.lazy import CONTEXT, command_module, ending, keep_lines
from pdkv.daemons.config import UpConfig, load
from pdkv.errors import ConfigError

app = command_module()

_SCHEMA = "pdkv.generate/v1"

_EXAMPLES = """
Examples:

  pdkv generate --model ./checkpoint --prompt "n1>n2 word n1" --max-tokens 8
  echo "[1, 17, 42]" | pdkv generate --model ./checkpoint --prompt-ids - --undivided --json

The answer goes to stdout, as text where the checkpoint has a tokenizer, else as token ids.
"""


class Generated(msgspec.Struct, frozen=True):
    """What ``--json`` prints."""

    schema: str
    model: str
    undivided: bool
    prompt_tokens: int
    token_ids: list[int]
    text: str
    seconds: float
    """Without the loading of the model."""
    transfer: object = None
    """How the state moved; null when undivided."""


class _Asked(msgspec.Struct, frozen=True):
    prompt: list[int]
    max_tokens: int
    temperature: float
    seed: int
    ignore_eos: bool


@app.command("generate", epilog=keep_lines(_EXAMPLES), context_settings=CONTEXT)
def generate(  # noqa: PLR0913  a command's parameters are its flags
    *,
    model: Annotated[Path, typer.Option(metavar="DIR", help="Checkpoint folder.")],
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="The prompt as text.")] = None,
    prompt_ids: Annotated[
        str | None, typer.Option(metavar="FILE", help="The prompt as token ids: a JSON list or numbers; - is stdin.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens to generate at most.")] = 16,
    temperature: Annotated[float, typer.Option(metavar="T", min=0, max=2, help="0 = greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Of the sampling.")] = 0,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on to --max-tokens.")] = False,
    kv_dtype: Annotated[str | None, typer.Option(metavar="NAME", help="Storage of K/V, as of a worker.")] = None,
    index_dtype: Annotated[str | None, typer.Option(metavar="NAME", help="Storage of index keys.")] = None,
    index_topk_freq: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Every N-th sparse layer selects; 0 = as config.json says.")
    ] = None,
    undivided: Annotated[bool, typer.Option("--undivided", help="One engine in this process, no transfer.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object with ids, text and transfer.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what the workers log.")] = False,
) -> None:
    """Answer one prompt: through a prefill and a decode worker started for it, or undivided."""

    def run() -> int:
        asked = _Asked(_read_prompt(model, prompt, prompt_ids), max_tokens, temperature, seed, ignore_eos)
        stored = {"kv_dtype": kv_dtype, "index_dtype": index_dtype, "index_topk_freq": index_topk_freq}
        config = _config(model, asked, {name: value for name, value in stored.items() if value is not None}, verbose)
        generated = _undivided(config, asked) if undivided else _divided(config, asked)
        shown = generated.text or " ".join(map(str, generated.token_ids))
        typer.echo(msgspec.json.encode(generated).decode() if as_json else shown)
        return 0

    ending(run)


def _read_prompt(model: Path, text: str | None, ids_file: str | None) -> list[int]:
    from pdkv.daemons.generation import check_token_ids  # noqa: PLC0415
    from pdkv.daemons.tokenization import TextCodec  # noqa: PLC0415
    from pdkv.m3.config import load_config  # noqa: PLC0415

    if (text is None) == (ids_file is None):
        raise ConfigError("give the prompt either as --prompt TEXT or as --prompt-ids FILE")
    vocab_size = load_config(model).vocab_size
    if text is not None:
        codec = TextCodec.load(model)
        if codec is None:
            raise ConfigError(f"{model} has no tokenizer.json; give the prompt as --prompt-ids FILE")
        ids = codec.encode(text)
    else:
        assert ids_file is not None, "one of the two is given"
        ids = _parse_ids(ids_file)
    check_token_ids(ids, vocab_size)
    return ids


def _parse_ids(file: str) -> list[int]:
    try:
        content = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except OSError as exc:
        raise ConfigError(f"--prompt-ids {file}: {exc.strerror}") from exc
    content = content.strip()
    try:
        if content.startswith("["):
            return msgspec.json.decode(content, type=list[int])
        return [int(word) for word in content.split()]
    except ValueError as exc:  # msgspec's errors are ValueErrors too
        raise ConfigError(f"--prompt-ids {file} must hold a JSON list of numbers or numbers alone: {exc}") from exc


def _config(model: Path, asked: _Asked, stored: dict[str, object], verbose: bool) -> UpConfig:
    """Of the workers that are started, or would be: an undivided run heeds the same settings."""
    room = {"max_model_len": len(asked.prompt) + asked.max_tokens, "max_batch": 1}
    level = "info" if verbose else "warning"
    return load(UpConfig, {**room, **stored, "model": model, "port": 0, "log_level": level})


def _undivided(config: UpConfig, asked: _Asked) -> Generated:
    from pdkv.daemons.tokenization import TextCodec  # noqa: PLC0415
    from pdkv.m3.config import IndexScheduleOverride  # noqa: PLC0415
    from pdkv.m3.sampling import SamplingParams  # noqa: PLC0415
    from pdkv.verify.undivided import CacheOptions, complete  # noqa: PLC0415

    sampling = SamplingParams(temperature=asked.temperature, seed=asked.seed)
    schedule = IndexScheduleOverride(
        topk_freq=config.index_topk_freq,
        topk_pattern=config.index_topk_pattern,
        skip_topk_offset=config.index_skip_topk_offset,
    )
    answer = complete(
        config.model,
        asked.prompt,
        asked.max_tokens,
        sampling,
        ignore_eos=asked.ignore_eos,
        device="cuda:0" if config.device == "cuda" else "cpu",
        dtype=config.dtype,
        cache=CacheOptions(config.kv_dtype, config.index_dtype, schedule),
    )
    ids = list(answer.token_ids)
    codec = TextCodec.load(config.model)
    return Generated(
        schema=_SCHEMA,
        model=str(config.model),
        undivided=True,
        prompt_tokens=len(asked.prompt),
        token_ids=ids,
        text=codec.decode(ids) if codec else "",
        seconds=answer.seconds,
    )


def _divided(config: UpConfig, asked: _Asked) -> Generated:
    from pdkv.cli.local_run import ask, token_ids  # noqa: PLC0415
    from pdkv.daemons.logs import configure_logging  # noqa: PLC0415

    configure_logging(config.log_level, "generate", config.log_format)
    body = msgspec.to_builtins(asked)
    answer = ask(config, body)
    block = answer.completion.pdkv
    transfer = None if block is msgspec.UNSET else block.transfer
    return Generated(
        schema=_SCHEMA,
        model=str(config.model),
        undivided=False,
        prompt_tokens=len(asked.prompt),
        token_ids=token_ids(answer),
        text=answer.completion.choices[0].text,
        seconds=answer.seconds,
        transfer=transfer,
    )
