"""``pdkv bench serve``: the same load on a divided deployment and on one undivided engine, and what each took."""

import asyncio
import os
from collections.abc import Sequence

import msgspec

from pdkv.bench import http_clients
from pdkv.bench.memories import gpu_names
from pdkv.bench.serve_load import Load, Question, Served, Side, Spread, Tell, chains, noise
from pdkv.daemons.config import UpConfig
from pdkv.daemons.local import deployed
from pdkv.errors import ConfigError

SCHEMA = "pdkv.bench.serve/1"


class ServePlan(msgspec.Struct, frozen=True):
    load: Load
    up: UpConfig | None = None
    """The deployment to start, or whose model ``url`` serves; None: nothing is known of what ``url`` serves."""
    url: str = ""
    """Of a server that runs; empty = start one."""
    undivided: bool = True
    chains: bool = False
    """Ask link-chasing prompts, whose answers are known: the model is the demo's."""
    timeout_s: float = 600.0


class Answers(msgspec.Struct, frozen=True):
    """Of the divided side, against what is known, else against the undivided engine."""

    compared: int
    equal: int
    near_ties: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()


class ServeReport(msgspec.Struct, frozen=True):
    schema: str
    served: str
    """A URL, or what was started."""
    model: str
    device: str
    load: Load
    cores: int
    load_average: tuple[float, float]
    """The machine's, of one minute, before and after: what shared it."""
    sides: tuple[Side, ...]
    answers: Answers
    gpus: tuple[str, ...] = ()
    """That the divided side had; none on a CPU."""
    replicas: int = 1
    """Undivided engines among which the same load was dealt out: one a GPU."""

    @property
    def failed(self) -> bool:
        return any(side.errors for side in self.sides)


def run(plan: ServePlan, tell: Tell) -> ServeReport:
    """Ask. ``tell`` hears of every answer, and every line of the deployment's log. Failed requests and wrong answers
    are in the report; raises ``PdkvError`` when a side cannot be asked at all."""
    began = os.getloadavg()[0]
    questions = chains(plan.load) if plan.chains else _noise(plan)
    served, seconds = asyncio.run(_divided(plan, questions, tell))
    sides = [Side.of("divided", served, seconds)]
    answers = _known(questions, served) if plan.chains else Answers(0, 0)
    gpus = _gpus(plan)
    replicas = max(1, len(gpus))
    if plan.undivided and plan.up is not None:
        undivided, compared = _undivided(plan.up, plan.load, questions, served, replicas, tell)
        sides.append(undivided)
        answers = msgspec.structs.replace(compared, wrong=answers.wrong + compared.wrong)
    up = plan.up
    return ServeReport(
        schema=SCHEMA,
        served=plan.url or (f"{up.num_prefill} prefill, {up.num_decode} decode, {up.transport}" if up else ""),
        model=up.model.resolve().name if up else "",
        device=up.device if up else "",
        load=plan.load,
        cores=len(os.sched_getaffinity(0)),
        load_average=(round(began, 2), round(os.getloadavg()[0], 2)),
        sides=tuple(sides),
        answers=answers,
        gpus=gpus,
        replicas=replicas,
    )


def _gpus(plan: ServePlan) -> tuple[str, ...]:
    """By name, as many as the deployment that is started takes."""
    up = plan.up
    if up is None or plan.url or up.device != "cuda":
        return ()
    return gpu_names()[: up.num_prefill * up.prefill_tp + up.num_decode * up.decode_tp]


def _noise(plan: ServePlan) -> list[Question]:
    if plan.up is None:
        return noise(plan.load)
    from pdkv.m3.config_file import load_config  # noqa: PLC0415  torch

    return noise(plan.load, (0, load_config(plan.up.model).vocab_size))


async def _divided(plan: ServePlan, questions: Sequence[Question], tell: Tell) -> tuple[list[Served], float]:
    if plan.url:
        return await _asked(plan.url, plan, questions, tell)
    if plan.up is None:
        raise ConfigError("neither a URL nor a model to serve is given")
    tell("divided: the deployment starts")
    async with deployed(plan.up, tell) as deployment:
        return await _asked(deployment.url, plan, questions, tell)


async def _asked(url: str, plan: ServePlan, questions: Sequence[Question], tell: Tell) -> tuple[list[Served], float]:
    return await http_clients.run(url, plan.load, questions, plan.timeout_s, lambda step: tell(f"divided: {step}"))


def _undivided(
    up: UpConfig,
    load: Load,
    questions: Sequence[Question],
    divided: Sequence[Served],
    replicas: int,
    tell: Tell,
) -> tuple[Side, Answers]:
    from pdkv.bench.undivided_clients import Undivided  # noqa: PLC0415  torch, once the workers have ended

    tell("undivided: the engine starts")
    engine = Undivided(up)
    served, seconds = engine.run(load, questions, lambda step: tell(f"undivided: {step}"), replicas)
    wrong: list[str] = []
    near_ties: list[str] = []
    pairs = [(n, a, b) for n, (a, b) in enumerate(zip(divided, served, strict=True)) if not a.error]
    for number, ours, theirs in pairs:
        if ours.tokens == theirs.tokens:
            continue
        at = next(i for i, (a, b) in enumerate(zip(ours.tokens, theirs.tokens, strict=True)) if a != b)
        text = f"request {number}, token {at}: {ours.tokens[at]}, undivided {theirs.tokens[at]}"
        excused = engine.is_near_tie(questions[number], ours.tokens, at)
        (near_ties if excused else wrong).append(text)
    equal = len(pairs) - len(wrong) - len(near_ties)
    return Side.of("undivided", served, seconds), Answers(len(pairs), equal, tuple(near_ties), tuple(wrong))


def _known(questions: Sequence[Question], served: Sequence[Served]) -> Answers:
    pairs = [(n, q, one) for n, (q, one) in enumerate(zip(questions, served, strict=False)) if not one.error]
    wrong = tuple(f"request {n}: {list(one.tokens)}" for n, q, one in pairs if one.tokens != q.expected)
    return Answers(len(pairs), len(pairs) - len(wrong), wrong=wrong)


def table(report: ServeReport) -> str:
    """For people: a line a side and quantity."""
    load = report.load
    lines = [
        f"{report.model or report.served}: {load.requests} requests of {load.input_tokens:,} + {load.output_tokens} "
        f"tokens, {load.concurrency} at a time",
        "",
        f"{'':<10} {'':<26} {'p50':>10} {'p90':>10} {'p99':>10} {'max':>10}",
    ]
    for side in report.sides:
        for name, unit, spread in _spreads(side):
            digits = 3 if unit == "share" else 2
            values = " ".join(f"{value:>10.{digits}f}" for value in (spread.p50, spread.p90, spread.p99, spread.max))
            lines.append(f"{side.name:<10} {f'{name}, {unit}':<26} {values}")
    lines.append("")
    for side in report.sides:
        over = ", ".join(f"{count} over {path}" for path, count in side.paths.items())
        lines.append(
            f"{side.name}: {side.output_tokens_per_s:,.1f} tokens/s, {side.requests_per_s:.2f} requests/s, "
            f"{side.answered} answered in {side.seconds:.1f} s{f'; transfers: {over}' if over else ''}"
        )
        lines += [f"{side.name}: {count} failed: {error}" for error, count in side.errors.items()]
    lines += _verdict(report.answers)
    if report.replicas > 1:
        lines.append(f"undivided: {report.replicas} engines, one a GPU, each with its share of the clients")
    before, after = report.load_average
    machine = "".join(f"{name}, " for name in report.gpus)
    return "\n".join([*lines, f"{machine}{report.cores} cores, load average {before} before, {after} after"])


def _spreads(side: Side) -> list[tuple[str, str, Spread]]:
    named = [
        ("time to first token", "ms", side.ttft_ms),
        ("between tokens", "ms", side.itl_ms),
        ("whole answer", "ms", side.total_ms),
        ("transfer left exposed", "ms", side.exposed_ms),
        ("exposed / prefill", "share", side.exposed_share),
        ("transfer hidden", "share", side.hidden),
    ]
    return [(name, unit, spread) for name, unit, spread in named if spread is not None]


def _verdict(answers: Answers) -> list[str]:
    if not answers.compared:
        return ["answers: not compared"]
    ties = f", {len(answers.near_ties)} differ by a near tie" if answers.near_ties else ""
    lines = [f"answers: {answers.equal} of {answers.compared} equal{ties}"]
    return lines + [f"WRONG: {text}" for text in answers.wrong[:10]]
