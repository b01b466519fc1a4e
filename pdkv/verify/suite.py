"""``pdkv verify``: link chasing through P -> D, every byte compared, and controls that must fail.

A harness that cannot fail proves nothing. So each kind of region is dropped and zeroed in turn, and each of these
controls must be caught: by the bytes always, by the answer wherever the answer can show it (index keys only beyond the
blind window: below it every block is selected whatever they say, which is the disguise that this suite exists to lift).
"""

import contextlib
import logging
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import torch

import pdkv
from pdkv.errors import FailureCode, TransferError
from pdkv.m3.config import M3Config
from pdkv.m3.model import M3Model, load_model
from pdkv.schema import VerifyPages
from pdkv.verify.link_chasing import NUM_KV_HEADS, NUM_LAYERS, LinkChasingPrompt, make_prompt
from pdkv.verify.link_chasing_checkpoint import served_layers, write_checkpoint
from pdkv.verify.pair import DividedPair
from pdkv.verify.report import SCHEMA, CaseResult, Coverage, Environment, Exit, RegionLoss, Report
from pdkv.verify.tampering import Kind, Mutation, differing_blocks
from pdkv.verify.undivided import complete_with

STEPS = 64
"""A whole cycle: every node is asked for once, so every home is visited."""

CONTROL_STEPS = 24
"""Enough for every layer to be asked several times."""


_BYTES_ONLY = {(Kind.DROP, "k_scale"), (Kind.DROP, "v_scale")}
"""Controls that this checkpoint's answers cannot show; the bytes do."""


class SuiteOptions(msgspec.Struct, frozen=True):
    name: str = "smoke"
    lengths: tuple[int, ...] = (512, 3072)
    seed: int = 1
    mutate: str | None = None
    """A mutation that the subject itself runs with; no controls then."""
    kv_dtype: str = "auto"
    index_dtype: str = "auto"
    index_topk_freq: int = 1
    """Every so many-th sparse layer selects; the checkpoint is written for it."""


def run_suite(options: SuiteOptions, tell: Callable[[str], None]) -> Report:
    """Run everything; ``tell`` gets a line as each case begins. Raises ``ConfigError`` for a mutation that is none."""
    started, started_at = time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
    with tempfile.TemporaryDirectory(prefix="pdkv-verify-") as folder:
        model_dir = Path(folder) / "link-chasing"
        write_checkpoint(model_dir, options.index_topk_freq)
        model = load_model(model_dir)
        cases: list[CaseResult] = []
        controls: list[CaseResult] = []
        digest = ""
        for length in options.lengths:
            # The same prompt again and again: nothing of it may be had from the last time.
            with DividedPair(
                model_dir,
                length + STEPS,
                kv_dtype=options.kv_dtype,
                index_dtype=options.index_dtype,
                prefix_cache=False,
            ) as pair:
                runner = _Runner(pair, model, make_prompt(options.seed, length), options)
                regions = sorted({slot.spec.name for slot in pair.decode_arena.layout.slots})
                subject = Mutation.parse(options.mutate, regions) if options.mutate else None
                tell(f"{length:,} tokens{f', {subject}' if subject else ''} ...")
                cases.append(runner.run(subject))
                for control in () if subject else _controls(regions):
                    tell(f"{length:,} tokens, control {control} ...")
                    controls.append(runner.run(control))
                digest = pair.manifest_digest
            if subject is None:
                tell(f"{length:,} tokens, with digests of pages ...")
                with _untold():
                    found = _refusals(model_dir, length, options, [None, *_controls(regions)])
                cases, controls = (_with_refusals(some, length, found) for some in (cases, controls))
        coverage = tuple(_coverage(model.config, options))
    problems = [*_subject_problems(cases), *_control_problems(controls), *_coverage_problems(coverage)]
    questions = _open_questions(cases, coverage)
    verdict = "wrong" if problems else "inconclusive" if questions else "right"
    return Report(
        schema=SCHEMA,
        suite=options.name,
        environment=_environment(),
        started_at=started_at,
        seconds=time.perf_counter() - started,
        transport="inproc",
        storage=_storage(options),
        blind_window_tokens=blind_window(model.config),
        manifest_digest=digest,
        mutation=options.mutate or "",
        cases=tuple(cases),
        controls=tuple(controls),
        coverage=coverage,
        problems=tuple(problems),
        open_questions=tuple(questions),
        not_tested=tuple(_not_tested(options)),
        verdict=verdict,
        exit_code={"right": Exit.RIGHT, "wrong": Exit.WRONG, "inconclusive": Exit.INCONCLUSIVE}[verdict],
    )


def blind_window(config: M3Config) -> int:
    """Tokens up to which every visible block is selected, whatever the index keys say."""
    return config.topk_blocks * config.block_size


class _Runner:
    """One prompt, run through one pair as often as there are mutations."""

    def __init__(self, pair: DividedPair, model: M3Model, prompt: LinkChasingPrompt, options: SuiteOptions) -> None:
        self._pair = pair
        self._prompt = prompt
        self._seed = options.seed
        self._beyond = len(prompt.token_ids) > blind_window(model.config)
        stored = (options.kv_dtype, options.index_dtype)
        self._undivided = complete_with(model, prompt.token_ids, STEPS, ignore_eos=True, stored=stored).token_ids
        pair.ask(make_prompt(options.seed + 1, len(prompt.token_ids)).token_ids, 1)
        self._stale = pair.decode_arena.rows().clone()

    def run(self, mutation: Mutation | None) -> CaseResult:
        pair, prompt = self._pair, self._prompt
        num_tokens = len(prompt.token_ids)
        steps = STEPS if mutation is None else CONTROL_STEPS
        pair.decode_arena.rows().copy_(self._stale)  # another prompt's bytes, in the pages that this one will get
        pair.witness.watch(mutation)
        answer = pair.ask(prompt.token_ids, steps)
        differing = differing_blocks(pair.prefill_arena, pair.decode_arena, pair.witness.rows, num_tokens)
        expected = prompt.expected(steps)
        wrong = (step for step, (a, b) in enumerate(zip(answer.token_ids, expected, strict=True)) if a != b)
        return CaseResult(
            num_tokens=num_tokens,
            seed=self._seed,
            beyond_blind_window=self._beyond,
            mutation=str(mutation) if mutation else "",
            steps=steps,
            first_wrong_step=next(wrong, None),
            equals_undivided=answer.token_ids == self._undivided[:steps],
            differing=tuple(RegionLoss(k.name, k.layer, k.head, blocks) for k, blocks in sorted(differing.items())),
            num_spans=answer.report.num_spans,
            num_bytes=answer.report.num_bytes,
            seconds=answer.seconds,
        )


@contextlib.contextmanager
def _untold() -> Iterator[None]:
    """A worker logs every difference; those that were made on purpose are in the report."""
    log = logging.getLogger("pdkv.agent")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


def _refusals(
    model_dir: Path, length: int, options: SuiteOptions, mutations: Sequence[Mutation | None]
) -> dict[str, bool]:
    """Whether ``--verify-pages full`` refuses to answer, by mutation; "" for none."""
    prompt, other = (make_prompt(seed, length).token_ids for seed in (options.seed, options.seed + 1))
    found: dict[str, bool] = {}
    with DividedPair(
        model_dir,
        length + STEPS,
        kv_dtype=options.kv_dtype,
        index_dtype=options.index_dtype,
        prefix_cache=False,
        verify_pages=VerifyPages.FULL,
    ) as pair:
        pair.ask(other, 1)
        stale = pair.decode_arena.rows().clone()
        for mutation in mutations:
            pair.decode_arena.rows().copy_(stale)
            pair.witness.watch(mutation)
            name = str(mutation) if mutation else ""
            found[name] = False
            try:
                pair.ask(prompt, 1)
            except TransferError as exc:
                if exc.code is not FailureCode.DIGEST_MISMATCH:
                    raise
                found[name] = True
    return found


def _with_refusals(cases: Sequence[CaseResult], length: int, found: Mapping[str, bool]) -> list[CaseResult]:
    return [
        msgspec.structs.replace(case, refused=found[case.mutation]) if case.num_tokens == length else case
        for case in cases
    ]


def _controls(regions: Sequence[str]) -> list[Mutation]:
    return [Mutation(kind, region) for region in regions for kind in Kind]


def _subject_problems(cases: Sequence[CaseResult]) -> Iterator[str]:
    for case in cases:
        if case.answer_wrong:
            yield f"{case.num_tokens:,} tokens: the answer is wrong from step {case.first_wrong_step}"
        if case.refused:
            yield f"{case.num_tokens:,} tokens: digests of pages differ although every byte arrived"
        for region in sorted({loss.region for loss in case.differing}):
            losses = [loss for loss in case.differing if loss.region == region]
            yield f"{case.num_tokens:,} tokens: {region} differs after the transfer in {len(losses)} layers and heads"


def _control_problems(controls: Sequence[CaseResult]) -> Iterator[str]:
    for case in controls:
        kind, _, region = case.mutation.partition(":")
        if {loss.region for loss in case.differing} != {region}:
            yield f"control {case.mutation} at {case.num_tokens:,} tokens was not seen in the bytes of {region} alone"
        if not case.refused:
            yield f"control {case.mutation} at {case.num_tokens:,} tokens passed --verify-pages full"
        # A needle's scale is the smallest there is: those of another prompt only make it louder.
        can_show = case.beyond_blind_window if region == "index_k" else (kind, region) not in _BYTES_ONLY
        if can_show and not case.answer_wrong:
            yield f"control {case.mutation} at {case.num_tokens:,} tokens did not change the answer"


def _coverage(config: M3Config, options: SuiteOptions) -> Iterator[Coverage]:
    """Counted over the prompts beyond the blind window; step 0 is P's own token and hangs on nothing transferred."""
    beyond = [make_prompt(options.seed, n) for n in options.lengths if n > blind_window(config)]
    homes = [prompt.home(step) for prompt in beyond for step in range(1, STEPS)]
    served = served_layers(options.index_topk_freq)
    for layer in range(NUM_LAYERS) if beyond else ():
        for head in range(NUM_KV_HEADS):
            steps = sum(home.layer == layer and home.kv_head == head for home in homes)
            yield Coverage("k", layer, head, steps)
            yield Coverage("v", layer, head, steps)
            if _has_scales(options):
                yield Coverage("k_scale", layer, head, steps)
                yield Coverage("v_scale", layer, head, steps)
        if layer in served:
            yield Coverage("index_k", layer, 0, sum(home.layer in served[layer] for home in homes))


def _coverage_problems(coverage: Sequence[Coverage]) -> Iterator[str]:
    for entry in coverage:
        if entry.steps == 0:
            yield f"no step hung on {entry.region} of layer {entry.layer} head {entry.head}"


def _open_questions(cases: Sequence[CaseResult], coverage: Sequence[Coverage]) -> list[str]:
    if coverage and any(case.beyond_blind_window for case in cases):
        return []
    return ["no prompt lies beyond the blind window: lost index keys could not have been seen"]


def _has_scales(options: SuiteOptions) -> bool:
    return options.kv_dtype == "fp8"


def _storage(options: SuiteOptions) -> str:
    freq = options.index_topk_freq
    selecting = "every sparse layer selects" if freq == 1 else f"one of {freq} sparse layers selects"
    return f"K/V {options.kv_dtype}, index {options.index_dtype}, {selecting}"


def _not_tested(options: SuiteOptions) -> Iterator[str]:
    yield "transports other than inproc"
    yield "tensor parallelism, GPUs"
    if options.kv_dtype == "auto" and options.index_dtype == "auto":
        yield "state stored in other than float32"
    if options.index_topk_freq == 1:
        yield "layers that reuse a selection"
    yield "K and V rows permuted alike inside a block: attention does not depend on their order"
    yield "MoE, rope and norm weights: the link-chasing checkpoint has none that matter"


def _environment() -> Environment:
    return Environment(
        pdkv=pdkv.__version__,
        python=platform.python_version(),
        torch=str(torch.__version__),
        machine=f"{platform.machine()}, {os.cpu_count()} cores",
        threads=torch.get_num_threads(),
    )
