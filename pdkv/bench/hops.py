"""What the way through a deployment adds to a short prompt's time to the first token, hop by hop and in all.

Every prompt is asked twice: of the deployment's router, and of an undivided worker whose front, engine and number of
threads are those of the deployment's workers. Who is asked first changes from prompt to prompt, so that what one leaves
behind burdens both alike. The difference is what dividing costs: the router, and the two workers' agreement and
transfer. HTTP of the client and of one front is on both sides.
"""

import math
import os
from collections.abc import Sequence
from statistics import fmean, median

import httpx
import msgspec

from pdkv.bench import http_clients, undivided_server
from pdkv.bench.serve_load import Load, Question, Served, Tell
from pdkv.daemons.config import UpConfig
from pdkv.daemons.link import TransferReport
from pdkv.daemons.local import Deployment
from pdkv.errors import PdkvError
from pdkv.metric_table import PREFILL_SECONDS, TIME_TO_FIRST_TOKEN
from pdkv.verify.link_chasing import make_prompt

_PROMPT_TOKENS = 100
_STEPS = 2
"""Tokens of an answer: the first is what is timed, the second has attended to what was moved."""


class HopPlan(msgspec.Struct, frozen=True):
    up: UpConfig
    """What the deployment was made of."""
    requests: int
    seed: int
    timeout_s: float


class Hops(msgspec.Struct, frozen=True):
    """Milliseconds. Medians, but for those that say otherwise."""

    requests: int
    prompt_tokens: int
    added_ms: float
    """By how much a prompt's first token came later from the deployment than from the undivided worker."""
    added_low_ms: float
    """The median of all such differences lies between these two, 19 times of 20."""
    added_high_ms: float
    added_p10_ms: float
    added_p90_ms: float
    ttft_ms: float
    """Of the deployment, as its client saw it; ``undivided_ms`` likewise."""
    undivided_ms: float
    granted_ms: float
    posted_ms: float
    exposed_ms: float
    first_step_ms: float
    prefill_ms: float
    """Mean. From P's pages to the first token."""
    control_ms: float
    """Mean. All else of the time to the first token."""
    client_ms: float
    """Mean. Of ``control_ms``, outside the router: the client's own HTTP."""
    router_ms: float
    """Mean. Between the router's taking the request and passing on the first token, outside decode's front, from where
    that has read the request: router, HTTP between the two, and the front's reading."""
    workers_ms: float
    """Mean. From there on, without prefill: link to the engine processes, Acquire to Granted, the last of the transfer,
    and the first token's way back."""
    undivided_http_ms: float
    """Mean. Of the undivided worker, what its front and client take outside of the request's time in the engine."""
    right: bool
    """Every answer, of both."""


class _Totals(msgspec.Struct, frozen=True):
    """What daemons have counted so far, each as a sum in seconds and a number."""

    router: tuple[float, float]
    decode: tuple[float, float]
    prefill: tuple[float, float]


async def hops_of(plan: HopPlan, deployment: Deployment, tell: Tell) -> Hops:
    """Ask a deployment that is ready, and an undivided worker that is started beside it. Raises ``PdkvError`` when a
    request fails."""
    prompts = [make_prompt(plan.seed + number, _PROMPT_TOKENS) for number in range(plan.requests + 1)]
    questions = [Question(prompt.token_ids, prompt.expected(_STEPS)) for prompt in prompts]
    load = Load(concurrency=1, requests=plan.requests, input_tokens=_PROMPT_TOKENS, output_tokens=_STEPS)
    threads = plan.up.threads or max(1, len(os.sched_getaffinity(0)) // (plan.up.num_prefill + plan.up.num_decode))
    tell("the undivided worker starts")
    async with (
        undivided_server.undivided(plan.up, threads) as worker,
        http_clients.connected(deployment.url, load, questions[-1], plan.timeout_s) as ours,
        http_clients.connected(
            worker.url, load, questions[-1], plan.timeout_s, lambda: undivided_server.headers(plan.timeout_s)
        ) as theirs,
    ):
        before, undivided_before = await _totals(deployment), await _seconds(worker.admin_url, TIME_TO_FIRST_TOKEN.name)
        divided, undivided = list[Served](), list[Served]()
        turns = ((ours, divided), (theirs, undivided))
        for number, question in enumerate(questions[: plan.requests]):
            for clients, answers in turns if number % 2 == 0 else reversed(turns):
                answers.append(await _asked(clients, question))
            tell(f"{len(divided)} of {plan.requests} short prompts answered twice")
        after, undivided_after = await _totals(deployment), await _seconds(worker.admin_url, TIME_TO_FIRST_TOKEN.name)
    right = all(a.tokens == b.tokens == q.expected for a, b, q in zip(divided, undivided, questions, strict=False))
    outside_ms = _mean_ms(undivided) - _between(undivided_before, undivided_after)
    return _hops(divided, undivided, (before, after), outside_ms, right=right)


def _hops(
    divided: Sequence[Served],
    undivided: Sequence[Served],
    counted: tuple[_Totals, _Totals],
    undivided_http_ms: float,
    *,
    right: bool,
) -> Hops:
    facts = [_facts(one) for one in divided]
    added = sorted((a.ttft_s - b.ttft_s) * 1e3 for a, b in zip(divided, undivided, strict=True))
    low, high = median_interval(added)
    before, after = counted
    ttft_ms = _mean_ms(divided)
    router_ms, decode_ms = _between(before.router, after.router), _between(before.decode, after.decode)
    prefill_ms = _between(before.prefill, after.prefill)
    rounded = {
        "added_ms": median(added),
        "added_low_ms": low,
        "added_high_ms": high,
        "added_p10_ms": added[len(added) // 10],
        "added_p90_ms": added[len(added) * 9 // 10],
        "ttft_ms": median(one.ttft_s for one in divided) * 1e3,
        "undivided_ms": median(one.ttft_s for one in undivided) * 1e3,
        "granted_ms": median(f.granted_s for f in facts) * 1e3,
        "posted_ms": median(f.posted_s for f in facts) * 1e3,
        "exposed_ms": median(f.exposed_s for f in facts) * 1e3,
        "first_step_ms": median(f.first_step_s or 0.0 for f in facts) * 1e3,
        "prefill_ms": prefill_ms,
        "control_ms": ttft_ms - prefill_ms,
        "client_ms": ttft_ms - router_ms,
        "router_ms": router_ms - decode_ms,
        "workers_ms": decode_ms - prefill_ms,
        "undivided_http_ms": undivided_http_ms,
    }
    named = {name: round(value, 3) for name, value in rounded.items()}
    return Hops(requests=len(divided), prompt_tokens=_PROMPT_TOKENS, right=right, **named)


def median_interval(ordered: Sequence[float]) -> tuple[float, float]:
    """Between which two of the values, which ascend, the median of what they were drawn from lies 19 times of 20.

    However they are distributed: how many of them lie below it is binomial, by halves. Of fewer than six no two can
    promise that; they give the first and the last.
    """
    half_width = 0.5 + 1.96 * math.sqrt(len(ordered)) / 2
    below = max(0, math.floor(len(ordered) / 2 - half_width))
    return ordered[below], ordered[-1 - below]


async def _asked(clients: http_clients.Clients, question: Question) -> Served:
    served = await clients.ask(question)
    if served.error:
        raise PdkvError(f"a request failed: {served.error}")
    return served


async def _totals(deployment: Deployment) -> _Totals:
    admin = deployment.admin_urls
    return _Totals(
        router=await _seconds(admin["router"], TIME_TO_FIRST_TOKEN.name),
        decode=await _seconds(admin["decode-0"], TIME_TO_FIRST_TOKEN.name),
        prefill=await _seconds(admin["prefill-0"], PREFILL_SECONDS.name),
    )


async def _seconds(admin_url: str, metric: str) -> tuple[float, float]:
    """Sum and count of a histogram without labels of its own."""
    async with httpx.AsyncClient(trust_env=False) as client:
        text = (await client.get(f"{admin_url}/metrics")).raise_for_status().text
    values = {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line[:1] != "#"}
    return values[f"{metric}_sum"], values[f"{metric}_count"]


def _between(before: tuple[float, float], after: tuple[float, float]) -> float:
    """Mean of what was counted meanwhile, in milliseconds."""
    return (after[0] - before[0]) / (after[1] - before[1]) * 1e3


def _mean_ms(served: Sequence[Served]) -> float:
    return fmean(one.ttft_s for one in served) * 1e3


def _facts(served: Served) -> TransferReport:
    assert served.transfer is not None, "every request asks for it"
    return served.transfer


def hop_lines(hops: Hops) -> list[str]:
    """For people."""
    return [
        f"{hops.requests} prompts of {hops.prompt_tokens} tokens, in turn with an undivided worker behind the same "
        "front; ms to the first token, medians:",
        f"  added {hops.added_ms:.2f} (95 % interval {hops.added_low_ms:.2f} to {hops.added_high_ms:.2f}; p10 "
        f"{hops.added_p10_ms:.2f}, p90 {hops.added_p90_ms:.2f}): divided {hops.ttft_ms:.2f}, undivided "
        f"{hops.undivided_ms:.2f}",
        f"  Acquire to Granted {hops.granted_ms:.2f}, watermark to read posted {hops.posted_ms:.2f}, Done to last byte "
        f"{hops.exposed_ms:.2f}, last byte to first step {hops.first_step_ms:.2f}",
        f"  means: prefill {hops.prefill_ms:.2f}, all else {hops.control_ms:.2f}: client {hops.client_ms:.2f}, router "
        f"and HTTP to decode {hops.router_ms:.2f}, between the workers {hops.workers_ms:.2f}; HTTP of the undivided "
        f"{hops.undivided_http_ms:.2f}",
    ]
