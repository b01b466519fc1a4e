"""One step of the model: ragged batches, any chunking, pages in disorder, bytes that nobody may look at."""

from pathlib import Path

import msgspec
import pytest
import torch

from pdkv.m3.config import load_config
from pdkv.m3.model import M3Model, StepBatch, load_model
from pdkv.m3.weights import load_weights
from tests.checkpoints import write_random_checkpoint
from tests.m3.paged_run import PagedRun


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> M3Model:
    directory = tmp_path_factory.mktemp("model")
    write_random_checkpoint(directory, 11, index_topk_blocks=3)
    return load_model(directory)


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 320, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


@pytest.mark.parametrize("chunk", [1, 100, 128, 255, 700])
def test_chunks_and_page_order_do_not_change_the_answer(model: M3Model, chunk: int):
    ids = prompt(700 if chunk > 1 else 300)
    whole = PagedRun(model, 701, seed=1)
    expected = whole.feed(ids)
    run = PagedRun(model, 701, seed=2)
    close(run.prefill(ids, chunk)[None], expected)
    close(run.feed([5]), whole.feed([5]))


def test_logits_of_any_rows_in_any_order(model: M3Model):
    ids = prompt(400)
    every = PagedRun(model, 400).feed(ids, list(range(400)))
    assert every.shape == (400, 320)
    assert every.dtype == torch.float32
    picked = PagedRun(model, 400).feed(ids, [399, 0, 128])
    close(picked, every[[399, 0, 128]])
    assert PagedRun(model, 400).feed(ids, []).shape == (0, 320)


def test_a_chunk_without_logits_stores_the_same_bytes(model: M3Model):
    ids = prompt(300)
    silent, asked = PagedRun(model, 300), PagedRun(model, 300)
    silent.feed(ids, [])
    asked.feed(ids)
    for region in asked.arena.regions():
        one = asked.arena.view(region.name, region.layer).nan_to_num(7.0)
        assert torch.equal(silent.arena.view(region.name, region.layer).nan_to_num(7.0), one)


def test_decodes_and_chunks_of_several_sequences_in_one_step(model: M3Model):
    """Four sequences in one arena: two decode, one goes on with a chunk, one begins; another page table is shared."""
    lengths, chunks = [500, 129, 200, 0], [1, 1, 150, 60]
    texts = [prompt(length + chunk, seed) for seed, (length, chunk) in enumerate(zip(lengths, chunks, strict=True))]
    expected = [PagedRun(model, len(text)).feed(text)[0] for text in texts]
    shared = PagedRun(model, 2000, seed=4)
    tables = torch.full((4, 5), -1, dtype=torch.int32)
    taken = 0
    for seq, text in enumerate(texts):
        num_blocks = -(-len(text) // 128)
        tables[seq, :num_blocks] = shared.page_table[0, taken : taken + num_blocks]
        taken += num_blocks
    for seq, length in enumerate(lengths):
        if length:
            step(shared, tables[seq : seq + 1], [texts[seq][:length]], [0])
    logits = step(shared, tables, [text[n:] for text, n in zip(texts, lengths, strict=True)], lengths)
    close(logits, torch.stack(expected))


def step(run: PagedRun, tables: torch.Tensor, tokens: list[list[int]], contexts: list[int]) -> torch.Tensor:
    counts = torch.tensor([len(part) for part in tokens])
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))
    batch = StepBatch(
        token_ids=torch.tensor([token for part in tokens for token in part]),
        positions=torch.cat([torch.arange(c, c + len(part)) for c, part in zip(contexts, tokens, strict=True)]),
        query_starts=starts.int(),
        context_lens=torch.tensor(contexts, dtype=torch.int32),
        page_table=tables,
        logits_rows=starts[1:] - 1,
    )
    return run.model.forward(batch, run.arena)


def test_several_query_tokens_of_one_sequence_equal_one_by_one(model: M3Model):
    ids = prompt(600)
    one, several = PagedRun(model, 604), PagedRun(model, 604)
    one.prefill(ids, 256)
    several.prefill(ids, 256)
    expected = torch.cat([one.feed([token]) for token in (7, 8, 9, 10)])
    close(several.feed([7, 8, 9, 10], [0, 1, 2, 3]), expected)


def test_garbage_behind_the_last_token_does_not_matter(model: M3Model):
    ids = prompt(700)
    run = PagedRun(model, 701)
    run.prefill(ids, 512)
    stored = {(r.name, r.layer): run.arena.view(r.name, r.layer).clone() for r in run.arena.regions()}
    logits = []
    for poison in (0.0, 1e30, torch.nan):
        last, others = int(run.page_table[0, 5]), [p for p in range(9) if p not in run.page_table[0].tolist()]
        for (name, layer), clean in stored.items():
            view = run.arena.view(name, layer)
            view.copy_(clean)
            view[others] = poison
            view[last][..., 700 - 5 * 128 :, :] = poison
        run.num_tokens = 700
        logits.append(run.feed([5]))
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


def test_bfloat16_state_is_near_the_float32_answer(model: M3Model):
    ids = prompt(500)
    exact = PagedRun(model, 500).feed(ids)
    coarse = PagedRun(model, 500, kv_dtype="bfloat16").prefill(ids, 128)[None]
    assert 0 < float((coarse - exact).abs().max()) < 0.2


def test_a_token_without_a_page_is_refused(model: M3Model):
    run = PagedRun(model, 200)
    run.page_table[0, 1] = -1
    with pytest.raises(AssertionError, match="no page"):
        run.feed(prompt(200))


def test_initial_blocks_are_always_attended(tmp_path: Path):
    """The released config forces none, but the engine must be able to."""
    write_random_checkpoint(tmp_path, 5)
    config = msgspec.structs.replace(load_config(tmp_path), init_blocks=1)
    run = PagedRun(M3Model(config, load_weights(tmp_path, config, "cpu", torch.float32)), 901)
    run.prefill(prompt(900), 512)
    before = run.feed([5])
    for layer in (1, 2, 3):
        run.num_tokens = 900
        values = run.arena.view("v", layer)[int(run.page_table[0, 0])]
        kept = values.clone()
        values.zero_()
        assert float((run.feed([5]) - before).abs().max()) > 1e-3
        values.copy_(kept)
