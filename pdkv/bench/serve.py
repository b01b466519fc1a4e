"""``pdkv bench serve``: the same load on a divided deployment and on one undivided engine, and what each took."""

import asyncio
import os
from collections.abc import Mapping, Sequence
from itertools import chain

import msgspec

from pdkv.bench import http_clients
from pdkv.bench.judgement import Answer, Judged, Rounding, Scored, judge, judge_bits, rounding_of
from pdkv.bench.memories import gpu_names
from pdkv.bench.serve_load import Load, Question, Served, Side, Spread, Tell, chains, noise
from pdkv.daemons.config import UpConfig
from pdkv.daemons.local import deployed
from pdkv.errors import ConfigError

SCHEMA = "pdkv.bench.serve/1"
_DAMAGED = 8
"""Answers at most of which is looked at what a wrong page does to them."""


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
    api_key: str = ""
    """That the server at ``url`` asks for."""


class Answers(msgspec.Struct, frozen=True):
    """Against what is known, else against what the undivided engine says by itself. Numbers are the divided side's."""

    compared: int
    equal: int
    near_ties: tuple[str, ...] = ()
    """Of every side."""
    wrong: tuple[str, ...] = ()
    undecided: str = ""
    """Why nothing can be told, where that is so."""
    rounding: Rounding | None = None
    """By which answers were judged that are not known."""
    sides: tuple[Judged, ...] = ()


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
    answers = _known(questions, {"divided": served}) if plan.chains else Answers(0, 0)
    gpus = _gpus(plan)
    replicas = max(1, len(gpus))
    if plan.undivided and plan.up is not None:
        undivided, answers = _undivided(plan, plan.up, questions, served, replicas, tell)
        sides.append(undivided)
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
    told = lambda step: tell(f"divided: {step}")  # noqa: E731
    return await http_clients.run(url, plan.load, questions, plan.timeout_s, told, plan.api_key)


def _undivided(
    plan: ServePlan, up: UpConfig, questions: Sequence[Question], divided: Sequence[Served], replicas: int, tell: Tell
) -> tuple[Side, Answers]:
    from pdkv.bench.undivided_clients import Undivided  # noqa: PLC0415  torch, once the workers have ended

    tell("undivided: the engine starts")
    engine, load = Undivided(up), plan.load
    served, seconds = engine.run(load, questions, lambda step: tell(f"undivided: {step}"), replicas)
    side = Side.of("undivided", served, seconds)
    if plan.chains:
        return side, _known(questions, {"divided": divided, "undivided": served})
    alone = engine.alone(load, questions, lambda step: tell(f"one at a time: {step}"))
    by_itself = [Answer(one.tokens, one.logprobs) for one in alone]
    given = {name: _answers(some) for name, some in {"divided": divided, "undivided": served}.items()}
    if up.batch_invariant:
        return side, _summed([judge_bits(name, some, by_itself) for name, some in given.items()])
    scorer = engine.scorer(load)
    scored = [
        scorer.score(question.prompt, [own.tokens, *(some[n].tokens for some in given.values() if n in some)])
        for n, (question, own) in enumerate(zip(questions, by_itself, strict=False))
    ]
    damaged = [
        scorer.damaged(questions[n].prompt, questions[n + 1].prompt, own.tokens)
        for n, own in enumerate(by_itself[:_DAMAGED])
    ]
    rounding = rounding_of(
        by_itself, [its[own.tokens] for own, its in zip(by_itself, scored, strict=True)], damaged, engine.last_place
    )
    return side, _judged(given, by_itself, scored, rounding)


def _known(questions: Sequence[Question], sides: Mapping[str, Sequence[Served]]) -> Answers:
    wrong = {
        name: [
            f"{name}, request {n}: {list(one.tokens)}"
            for n, (question, one) in enumerate(zip(questions, served, strict=False))
            if not one.error and one.tokens != question.expected
        ]
        for name, served in sides.items()
    }
    compared = sum(not one.error for one in sides["divided"])
    return Answers(compared, compared - len(wrong["divided"]), wrong=tuple(chain.from_iterable(wrong.values())))


def _answers(served: Sequence[Served]) -> dict[int, Answer]:
    return {number: Answer(one.tokens, one.logprobs) for number, one in enumerate(served) if not one.error}


def _judged(
    given: Mapping[str, dict[int, Answer]],
    alone: Sequence[Answer],
    scored: Sequence[dict[tuple[int, ...], Scored]],
    rounding: Rounding,
) -> Answers:
    """The divided side comes first. ``scored``: of each question, by answer."""
    judged = [
        judge(name, some, alone, {n: scored[n][one.tokens] for n, one in some.items()}, rounding)
        for name, some in given.items()
    ]
    return _summed(judged, rounding)


def _summed(judged: Sequence[Judged], rounding: Rounding | None = None) -> Answers:
    near_ties = tuple(text for one in judged for text in one.near_ties)
    wrong = tuple(text for one in judged for text in one.wrong)
    undecided = ""
    if rounding is not None and not rounding.decides:
        undecided = (
            f"half of an answer's tokens differ by {rounding.answer_margin / 2:.3g} by rounding alone, and by "
            f"{rounding.damage:.3g} where a page is wrong; ask with --batch-invariant"
        )
    return Answers(judged[0].compared, judged[0].equal, near_ties, wrong, undecided, rounding, tuple(judged))


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


def _said_of(judged: Judged, rounding: Rounding | None) -> str:
    equal = f"answers, {judged.side}: {judged.equal} of {judged.compared} equal to those of one engine asked one by one"
    if rounding is None:
        return f"{equal}, log-probabilities bit for bit"
    return (
        f"{equal}, {len(judged.near_ties)} other by rounding; tokens at most {judged.behind:.2g} behind the best, told "
        f"log-probabilities at most {judged.deviation:.2g} off, half of an answer's {judged.typical_deviation:.2g}"
    )


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
    if not answers.sides:
        lines = [f"answers: {answers.equal} of {answers.compared} equal"]
    else:
        lines = [_said_of(one, answers.rounding) for one in answers.sides]
    if answers.rounding is not None:
        by = answers.rounding
        lines.append(
            f"rounding: that engine differs from itself by {by.p50:.2g} (median) to {by.max:.2g} in {by.tokens} "
            f"tokens, which explains {by.token_margin:.2g} in one and {by.answer_margin:.2g} in half of an answer; one "
            f"wrong page of the prompt makes it {by.damage:.2g} in half of an answer"
        )
    if answers.undecided:
        lines.append(f"UNDECIDED: {answers.undecided}")
    return lines + [f"WRONG: {text}" for text in answers.wrong[:10]]
