"""What a verification found: one schema-versioned value, and its one-screen summary."""

import msgspec

SCHEMA = "pdkv.verify/v1"


class Exit:
    RIGHT = 0
    WRONG = 4
    INCONCLUSIVE = 5


class RegionLoss(msgspec.Struct, frozen=True):
    """A region of one layer and head, and in how many blocks D's bytes differ from P's."""

    region: str
    layer: int
    head: int
    blocks: int


class CaseResult(msgspec.Struct, frozen=True):
    """One prompt through P -> D, as it is or with one mutation."""

    num_tokens: int
    seed: int
    beyond_blind_window: bool
    mutation: str
    """"" for none."""
    steps: int
    first_wrong_step: int | None
    """Against the known chain; None when every token is right."""
    equals_undivided: bool
    differing: tuple[RegionLoss, ...]
    num_spans: int
    num_bytes: int
    seconds: float
    refused: bool | None = None
    """By ``--verify-pages full``; None when that was not asked."""

    @property
    def answer_wrong(self) -> bool:
        return self.first_wrong_step is not None or not self.equals_undivided


class Coverage(msgspec.Struct, frozen=True):
    """How many decode steps beyond the blind window hung on one region of one layer and head."""

    region: str
    layer: int
    head: int
    steps: int


class Environment(msgspec.Struct, frozen=True):
    pdkv: str
    python: str
    torch: str
    machine: str
    threads: int


class Report(msgspec.Struct, frozen=True):
    """``verdict``: "right", "wrong" or "inconclusive"; ``exit_code`` 0, 4 or 5 accordingly."""

    schema: str
    suite: str
    environment: Environment
    started_at: str
    seconds: float
    transport: str
    storage: str
    """How state was stored, and which layers selected, in words."""
    blind_window_tokens: int
    manifest_digest: str
    mutation: str
    cases: tuple[CaseResult, ...]
    controls: tuple[CaseResult, ...]
    coverage: tuple[Coverage, ...]
    problems: tuple[str, ...]
    open_questions: tuple[str, ...]
    """Why the run could not tell."""
    not_tested: tuple[str, ...]
    verdict: str
    exit_code: int


def summary(report: Report) -> str:
    """At most one screen."""
    lines = [f"suite {report.suite}, {report.transport}, blind window {report.blind_window_tokens:,} tokens"]
    lines += [report.storage, ""]
    lines += [_line(case) for case in report.cases]
    if report.controls:
        lines += ["", "controls (each must be caught):"]
        lines += [_line(case) for case in report.controls]
    if report.coverage:
        lines += ["", "decode steps beyond the blind window that hung on (layer: heads):"]
        lines += _coverage_lines(report.coverage)
    lines += ["", *(f"WRONG  {problem}" for problem in report.problems[:8])]
    lines += [f"OPEN   {question}" for question in report.open_questions[:4]]
    lines += [f"verdict: {report.verdict} (exit {report.exit_code}) in {report.seconds:.0f} s"]
    return "\n".join(lines)


def _line(case: CaseResult) -> str:
    answer = "answer right" if not case.answer_wrong else f"answer wrong from step {case.first_wrong_step}"
    differing = sorted({loss.region for loss in case.differing})
    bytes_told = "every byte equal" if not differing else f"bytes differ in {', '.join(differing)}"
    name = case.mutation or "as it is"
    by_digests = {None: "", True: "  refused by digests", False: "  passed by digests"}[case.refused]
    return f"  {case.num_tokens:>6,} tokens  {name:<13} {answer:<27} {bytes_told}{by_digests}"


def _coverage_lines(coverage: tuple[Coverage, ...]) -> list[str]:
    lines = []
    for region in sorted({entry.region for entry in coverage}):
        layers: dict[int, list[int]] = {}
        for entry in coverage:
            if entry.region == region:
                layers.setdefault(entry.layer, []).append(entry.steps)
        told = "  ".join(f"{layer}: {' '.join(map(str, steps))}" for layer, steps in sorted(layers.items()))
        lines.append(f"  {region:<8} {told}")
    return lines
