"""What one rank of a divided model does in a test. Imports little, for processes that do only this."""

from dataclasses import dataclass
from pathlib import Path

import torch

from pdkv.m3.model import load_model
from pdkv.m3.parallel import SOLO, Group, find_store, join_group
from pdkv.m3.run import Run
from pdkv.m3.sampling import SamplingParams
from pdkv.m3.step import StepOutput, StepRunner
from tests.m3.paged_run import PagedRun


@dataclass(frozen=True)
class Asked:
    """A prompt and the tokens after it."""

    prompt: list[int]
    tokens: list[int]


def answer(directory: Path, asked: Asked, group: Group = SOLO, expert_parallel: bool = False) -> torch.Tensor | None:
    """Logits that give the tokens, [num_tokens, vocab], with the prompt in two chunks; on rank 0."""
    model = load_model(directory, group=group, expert_parallel=expert_parallel)
    run = PagedRun(model, len(asked.prompt) + len(asked.tokens))
    run.feed(asked.prompt[:300], [])
    parts = [run.feed(asked.prompt[300:]), *(run.feed([token]) for token in asked.tokens[:-1])]
    return torch.cat(parts) if group.rank == 0 else None


def two_runs(pages: tuple[int, ...]) -> list[Run]:
    """One that wants a token and scores more prompt tokens than are looked at at once, and one that only scores."""
    prompt = tuple(3 + i % 300 for i in range(200))
    first = Run(
        id=1, tokens=prompt, start=0, pages=pages[:2], sampling=SamplingParams(), targets=prompt[1:], prompt_top=2
    )
    other = Run(id=2, tokens=prompt[:90], start=0, pages=pages[2:], sampling=None, targets=prompt[1:80], prompt_top=0)
    return [first, other]


def step(directory: Path, group: Group, damage: bool = False) -> StepOutput:
    model = load_model(directory, group=group)
    if damage:
        model._weights.norm[0] = torch.inf
    run = PagedRun(model, 384)
    run.arena.rows().zero_()
    return StepRunner(model, run.arena).run(two_runs(tuple(run.page_table[0].tolist())))


def second_rank(directory: Path, asked: Asked, port: int) -> None:
    group = join_group(find_store("127.0.0.1", port), 1, 2, timeout_s=60)
    assert answer(directory, asked, group) is None
    assert step(directory, group) == StepOutput([], {})
    group.close()
