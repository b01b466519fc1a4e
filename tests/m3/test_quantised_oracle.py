"""Our model over fp8 state against transformers' own, whose cache is made to hold what fp8 would.

Its K, V and index keys pass through a plain quantisation before they are cached, its index queries before they score.
float32 sums differ in order, and an element near a tie may then round the other way: so answers are near, not equal.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache
from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as modeling

from pdkv.m3.model import M3Model, load_model
from tests.checkpoints import Oracle, write_random_checkpoint
from tests.m3.paged_run import PagedRun

NUM_TOKENS = 520
Rounding = Callable[[torch.Tensor], torch.Tensor]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("quantised")
    write_random_checkpoint(directory, 41)
    return directory


@pytest.fixture(scope="module")
def oracle(checkpoint: Path) -> Oracle:
    return Oracle(checkpoint)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> M3Model:
    return load_model(checkpoint)


def scaled(x: torch.Tensor) -> torch.Tensor:
    scale = x.abs().amax(dim=-1, keepdim=True) / 448
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def e4m3(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()


def e5m2(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-57344, 57344).to(torch.float8_e5m2).float()


class RoundedOracle:
    """transformers' model with a cache that rounds."""

    def __init__(self, oracle: Oracle, kv: Rounding, index: Rounding) -> None:
        self._model: Any = oracle._model
        self._kv, self._index = kv, index

    @torch.no_grad()
    def logits(self, ids: list[int], chunk: int, patch: pytest.MonkeyPatch) -> torch.Tensor:  # [num_tokens, vocab]
        cache = DynamicCache(config=self._model.config)
        for layer in cache.layers:
            patch.setattr(layer, "update", self._rounding(layer.update))
            if hasattr(layer, "update_index"):
                patch.setattr(layer, "update_index", lambda x, plain=layer.update_index: plain(self._index(x)))
        turn = modeling.apply_rotary_pos_emb

        def turned(q: torch.Tensor, k: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
            q, k = turn(q, k, *rest)
            return (self._index(q) if k.shape[1] == 1 else q), k  # one key head: the indexer's

        patch.setattr(modeling, "apply_rotary_pos_emb", turned)
        parts = [ids[begin : begin + chunk] for begin in range(0, len(ids), chunk)]
        rows = [self._model(torch.tensor([part]), past_key_values=cache).logits[0] for part in parts]
        return torch.cat(rows)

    def _rounding(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        return lambda k, v, *rest, **more: plain(self._kv(k), self._kv(v), *rest, **more)


@pytest.mark.parametrize(
    ("kv_dtype", "index_dtype", "kv", "index"),
    [
        ("fp8", "fp8", scaled, e4m3),
        ("fp8_unit", "float32", e4m3, lambda x: x),
        ("fp8_e5m2", "fp8", e5m2, e4m3),
    ],
    ids=["fp8", "fp8_unit", "fp8_e5m2"],
)
def test_answers_are_those_of_a_cache_that_rounds(
    oracle: Oracle,
    model: M3Model,
    monkeypatch: pytest.MonkeyPatch,
    kv_dtype: str,
    index_dtype: str,
    kv: Rounding,
    index: Rounding,
):
    ids = np.random.default_rng(1).integers(3, 320, NUM_TOKENS).tolist()
    exact = torch.from_numpy(oracle.logits(ids, 200))
    rounded = RoundedOracle(oracle, kv, index).logits(ids, 200, monkeypatch)
    run = PagedRun(model, NUM_TOKENS, 0, kv_dtype, index_dtype)
    ours = torch.cat([run.feed(part, list(range(len(part)))) for part in (ids[:200], ids[200:400], ids[400:])])
    off = (ours - rounded).square().mean(dim=-1).sqrt() / exact.std()  # [num_tokens]
    cost = float((rounded - exact).square().mean().sqrt() / exact.std())
    print(f"{kv_dtype}: median {off.median():.1e}, mean {off.mean():.1e}, cost of rounding {cost:.2f}")  # noqa: T201
    assert cost > 0.1, "rounding makes no difference: nothing was tested"
    assert float(off.median()) < 0.01 * cost
    assert float(off.mean()) < 0.1 * cost
