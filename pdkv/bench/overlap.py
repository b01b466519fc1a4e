"""``pdkv bench overlap``: how much of a long prompt's transfer prefill hides, and what every hop of a short one takes.

Each long prompt is asked twice. The first time it is computed, and its state travels meanwhile. The second time prefill
has it in its cache and decode, which keeps none, reads it all at once: that is what the transfer takes alone.
"""

import asyncio
import os
from collections.abc import Callable, Sequence
from statistics import median

import msgspec

from pdkv.bench import http_clients
from pdkv.bench.hops import HopPlan, Hops, hop_lines, hops_of
from pdkv.bench.serve_load import Load, Question, Served
from pdkv.daemons.config import UpConfig
from pdkv.daemons.link import TransferReport
from pdkv.daemons.local import Deployment, deployed
from pdkv.errors import PdkvError
from pdkv.verify.link_chasing import make_prompt

SCHEMA = "pdkv.bench.overlap/1"
STEPS = 8
_SHORT_TOKENS = 100

Tell = Callable[[str], None]


class OverlapPlan(msgspec.Struct, frozen=True):
    up: UpConfig
    """Of a checkpoint that follows links. One prefill and one decode worker."""
    tokens: int = 32_768
    repeats: int = 1
    short_requests: int = 20
    """Asked afterwards, one after another, to time the hops."""
    seed: int = 1
    timeout_s: float = 1800.0


class Move(msgspec.Struct, frozen=True):
    """One long prompt. Seconds."""

    ttft_s: float
    num_bytes: int
    exposed_s: float
    """From P's Done to the last byte."""
    hidden_fraction: float
    """Share of the bytes that had landed at Done."""
    read_s: float
    """With a read outstanding, beside prefill."""
    alone_s: float
    """The same bytes read with nothing beside them; with a limit, at least what it takes them."""
    posted_s: float
    compared_s: float
    """From then to the last digest that was compared, with --verify-pages."""
    first_step_s: float
    right: bool

    @property
    def exposed_share(self) -> float:
        return self.exposed_s / self.alone_s


class OverlapReport(msgspec.Struct, frozen=True):
    schema: str
    tokens: int
    prefill_chunk: int
    layer_groups: int
    path: str
    cores: int
    load_average: tuple[float, float]
    """The machine's, of one minute, before and after: what shared it."""
    moves: tuple[Move, ...]
    exposed_share: float
    """Median over the moves: exposed time / time of the transfer alone."""
    hops: Hops | None

    @property
    def right(self) -> bool:
        return all(move.right for move in self.moves) and (self.hops is None or self.hops.right)


def run(plan: OverlapPlan, tell: Tell) -> OverlapReport:
    """Start a deployment, ask, end it. ``tell`` hears of every answer, and every line of the deployment's log. Wrong
    answers are in the report; raises ``PdkvError`` when a request fails."""
    return asyncio.run(_run(plan, tell))


async def _run(plan: OverlapPlan, tell: Tell) -> OverlapReport:
    before = os.getloadavg()[0]
    tell("the deployment starts")
    async with deployed(plan.up, tell, decode_flags=("--no-prefix-cache",)) as deployment:
        served = await _asked(plan, deployment, _long(plan), plan.tokens, tell)
        moves = tuple(_move(*pair, plan.up.max_pull_gbps) for pair in zip(served[::2], served[1::2], strict=True))
        asked = HopPlan(plan.up, plan.short_requests, plan.seed + 20_000, plan.timeout_s)
        hops = await hops_of(asked, deployment, tell) if plan.short_requests else None
    return OverlapReport(
        schema=SCHEMA,
        tokens=plan.tokens,
        prefill_chunk=plan.up.prefill_chunk,
        layer_groups=plan.up.layer_groups,
        path=_facts(served[0][1]).path,
        cores=len(os.sched_getaffinity(0)),
        load_average=(round(before, 2), round(os.getloadavg()[0], 2)),
        moves=moves,
        exposed_share=median(move.exposed_share for move in moves),
        hops=hops,
    )


def _long(plan: OverlapPlan) -> list[Question]:
    prompts = [make_prompt(plan.seed + number, plan.tokens) for number in range(plan.repeats)]
    return [Question(prompt.token_ids, prompt.expected(STEPS)) for prompt in prompts for _ in range(2)]


async def _asked(
    plan: OverlapPlan, deployment: Deployment, questions: Sequence[Question], tokens: int, tell: Tell
) -> list[tuple[Question, Served]]:
    load = Load(concurrency=1, requests=len(questions), input_tokens=tokens, output_tokens=STEPS)
    warm_up = make_prompt(plan.seed + 10_000, _SHORT_TOKENS)
    all_questions = [*questions, Question(warm_up.token_ids)]
    served, _ = await http_clients.run(deployment.url, load, all_questions, plan.timeout_s, tell)
    for one in served:
        if one.error:
            raise PdkvError(f"a request failed: {one.error}")
    return list(zip(questions, served, strict=True))


def _move(cold: tuple[Question, Served], cached: tuple[Question, Served], limit_gbps: float) -> Move:
    (question, served), facts = cold, _facts(cold[1])
    slowest_s = facts.num_bytes / (limit_gbps * 1e9) if limit_gbps else 0.0
    return Move(
        ttft_s=served.ttft_s,
        num_bytes=facts.num_bytes,
        exposed_s=facts.exposed_s,
        hidden_fraction=facts.hidden_fraction,
        read_s=facts.read_s,
        alone_s=max(_facts(cached[1]).read_s, slowest_s),
        posted_s=facts.posted_s,
        compared_s=facts.compared_s,
        first_step_s=facts.first_step_s or 0.0,
        right=served.tokens == question.expected == cached[1].tokens,
    )


def _facts(served: Served) -> TransferReport:
    assert served.transfer is not None, "every request asks for it"
    return served.transfer


def table(report: OverlapReport) -> str:
    """For people."""
    chunks = f"chunks of {report.prefill_chunk:,}, the last in {report.layer_groups} layer groups"
    machine = f"{report.cores} cores, load {report.load_average[0]} to {report.load_average[1]}"
    lines = [
        f"{report.tokens:,} tokens in {chunks}, over {report.path}; {machine}",
        "",
        f"{'ttft, s':>10} {'bytes':>14} {'alone, s':>10} {'exposed, s':>11} {'of alone':>9} {'hidden':>8} "
        f"{'compared, s':>12}  answer",
    ]
    lines += [
        f"{move.ttft_s:>10.2f} {move.num_bytes:>14,} {move.alone_s:>10.4f} {move.exposed_s:>11.4f} "
        f"{move.exposed_share:>9.1%} {move.hidden_fraction:>8.2%} "
        f"{move.compared_s:>12.4f}  {'right' if move.right else 'WRONG'}"
        for move in report.moves
    ]
    if report.hops is not None:
        lines += ["", *hop_lines(report.hops)]
    return "\n".join(lines)
