"""What the model itself says of answers: prompt and answer computed without scheduler, graphs or company."""

from collections.abc import Iterable, Sequence

from pdkv.bench.judgement import Scored
from pdkv.errors import ModelError
from pdkv.m3.model import M3Model
from pdkv.m3.requests import EngineSettings, PromptScored, RequestId
from pdkv.m3.run import Run
from pdkv.verify.undivided import local_worker

_ID = RequestId(b"judge")


class Scorer:
    """Pages of its own for one request of a length. Owned by the calling thread."""

    def __init__(self, model: M3Model, length: int, chunk: int, stored: tuple[str, str]) -> None:
        """``length``: of a prompt and its answer, at most; ``chunk``: prompt tokens computed at once; ``stored``:
        dtypes of K/V and of index keys."""
        self._block_size = model.config.block_size
        num_pages = -(-length // self._block_size)
        settings = EngineSettings(max_model_len=length, max_batch=1, prefill_chunk=chunk)
        self._runner = local_worker(model, num_pages, settings, *stored).runner
        self._pages = tuple(range(num_pages))
        self._chunk = chunk

    def score(self, prompt: Sequence[int], answers: Iterable[tuple[int, ...]]) -> dict[tuple[int, ...], Scored]:
        """By answer. The prompt is computed once, and behind it each answer in one step.

        Raises ``ModelError`` where the model's output is not finite.
        """
        known = tuple(prompt[:-1])
        for begin in range(0, len(known), self._chunk):
            self._runner.run([self._part(known[begin : begin + self._chunk], begin)])
        return {answer: self._behind(prompt, answer) for answer in set(answers)}

    def damaged(self, prompt: Sequence[int], other: Sequence[int], answer: tuple[int, ...]) -> Scored:
        """What it says of ``answer`` where the page in the middle of its prompt, or half of a shorter one, is of
        ``other``, a prompt of the same length."""
        size = min(self._block_size, (len(prompt) + 1) // 2)
        begin = (len(prompt) - size) // 2
        mixed = (*prompt[:begin], *other[begin : begin + size], *prompt[begin + size :])
        return self.score(mixed, [answer])[answer]

    def _behind(self, prompt: Sequence[int], answer: tuple[int, ...]) -> Scored:
        part = self._part((prompt[-1], *answer[:-1]), len(prompt) - 1, answer)
        scored = self._runner.run([part]).scored[_ID]
        if not isinstance(scored, PromptScored):
            raise ModelError(f"an answer cannot be judged: {scored.message}")
        own, tops = scored.logprobs.unpack()
        best = tuple(top.logprobs[0] for top in tops)
        return Scored(tuple(own), best, tuple(top.token_ids[0] for top in tops))

    def _part(self, tokens: tuple[int, ...], start: int, targets: tuple[int, ...] = ()) -> Run:
        return Run(id=_ID, tokens=tokens, start=start, pages=self._pages, sampling=None, targets=targets, prompt_top=1)
