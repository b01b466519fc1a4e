"""Each region that another process computed and UCX brought over matters: zeroed after the transfer, it shows.

The model is a random checkpoint of transformers. Noise is how far the logits of the transferred state lie from those of
one undivided run with other chunks: float32 sums in another order.
"""

import multiprocessing
import select
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from pdkv.core.plan import TransferPlan
from pdkv.m3.config import kv_layout
from pdkv.m3.model import M3Model, load_model
from pdkv.memory.arena import Arena
from pdkv.memory.manifest import build_manifest
from pdkv.schema import Manifest, RegionKey, TransportAddress
from pdkv.transport.base import Completion, ReadStatus
from pdkv.transport.ucx import UcxTransport
from tests.checkpoints import write_random_checkpoint
from tests.m3.paged_run import PagedRun

LONG, SHORT = 2100, 250
"""Tokens: 17 blocks, far more than the two that a query chooses; and two blocks, where there is nothing to choose."""
CHUNK, OTHER_CHUNK = 512, 700
FLOAT32_NOISE = 1e-6
"""Two runs may agree to the bit by luck."""
SECONDS = 200.0


class Offer(msgspec.Struct, frozen=True):
    """Where the state of a prompt can be read."""

    manifest: Manifest
    address: TransportAddress
    pages: tuple[int, ...]


def manifest_of(model: M3Model, arena: Arena) -> Manifest:
    return build_manifest(arena, kv_layout(model.config, "float32", "float32"), "the same model")


def serve_states(model_dir: Path, prompts: list[list[int]], connection: Connection) -> None:
    """The prefill side, in a process of its own: compute, offer, and stay until it has been read."""
    torch.set_num_threads(1)
    model = load_model(model_dir)
    for prompt in prompts:
        run = PagedRun(model, len(prompt), seed=5)
        run.prefill(prompt, CHUNK)
        transport = UcxTransport()
        transport.register(run.arena.memory)
        pages = tuple(run.page_table[0].tolist())
        connection.send(Offer(manifest_of(model, run.arena), transport.address(), pages))
        if connection.poll(SECONDS):
            connection.recv()
        transport.close()


class DecodeSide:
    """One decode step over state that was read from another process, as often as wanted."""

    def __init__(self, model: M3Model, prompt: list[int], offer: Offer) -> None:
        self.run = PagedRun(model, len(prompt) + 1, seed=6)
        self.prompt = prompt
        self._num_pages = len(offer.pages)
        plan = TransferPlan.between([offer.manifest], manifest_of(model, self.run.arena))
        (batch,) = plan.reads(offer.pages, self.pages, (self.run.arena.memory.address,)).values()
        transport = UcxTransport()
        try:
            transport.register(self.run.arena.memory)
            transport.submit(transport.connect(offer.address), batch)
            select.select([transport.fileno()], [], [], SECONDS)
            self.completions: list[Completion] = transport.poll()
        finally:
            transport.close()

    @property
    def pages(self) -> list[int]:
        return list(self.run.page_table[0, : self._num_pages].tolist())

    def step(self, token: int) -> torch.Tensor:  # [vocab]
        self.run.num_tokens = len(self.prompt)
        return self.run.feed([token])[0]

    def step_without(self, lost: RegionKey, token: int) -> torch.Tensor:  # [vocab]
        """The same step with one region zeroed; it is put back afterwards."""
        pieces = [self.run.arena.page_bytes(lost.name, lost.layer, lost.head, page) for page in self.pages]
        kept = [piece.clone() for piece in pieces]
        for piece in pieces:
            piece.zero_()
        logits = self.step(token)
        for piece, bytes_ in zip(pieces, kept, strict=True):
            piece.copy_(bytes_)
        return logits

    def regions(self) -> list[RegionKey]:
        return [RegionKey(region.name, region.layer, region.head_start) for region in self.run.arena.regions()]


def random_prompt(num_tokens: int) -> list[int]:
    return list(np.random.default_rng(num_tokens).integers(3, 320, num_tokens).tolist())


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("region-loss")
    write_random_checkpoint(directory, seed=11)
    return directory


@pytest.fixture(scope="module")
def model(model_dir: Path) -> M3Model:
    return load_model(model_dir)


@pytest.fixture(scope="module")
def sides(model_dir: Path, model: M3Model) -> dict[int, DecodeSide]:
    """The decode side of each prompt, by its length; the process that computed it is gone."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    prompts = [random_prompt(length) for length in (LONG, SHORT)]
    child = context.Process(target=serve_states, args=(model_dir, prompts, theirs))
    child.start()
    sides = {}
    try:
        for prompt in prompts:
            assert ours.poll(SECONDS), "the prefill side offers nothing"
            sides[len(prompt)] = DecodeSide(model, prompt, ours.recv())
            ours.send("read")
        child.join(SECONDS)
    finally:
        child.kill()
        ours.close()
        theirs.close()
    assert child.exitcode == 0
    return sides


def moved_by_each_loss(model: M3Model, side: DecodeSide) -> tuple[float, dict[RegionKey, float]]:
    """Noise, and how far each loss moves the logits of the next step."""
    assert [completion.status for completion in side.completions] == [ReadStatus.OK]
    token = 17
    whole = side.step(token)
    undivided = PagedRun(model, len(side.prompt) + 1)
    undivided.prefill(side.prompt, OTHER_CHUNK)
    noise = max(FLOAT32_NOISE, float((whole - undivided.feed([token])[0]).abs().max()))
    moved = {lost: float((side.step_without(lost, token) - whole).abs().max()) for lost in side.regions()}
    assert torch.equal(side.step(token), whole), "a region was not put back"
    return noise, moved


def test_each_region_of_each_layer_and_head_moves_the_logits(model: M3Model, sides: dict[int, DecodeSide]) -> None:
    noise, moved = moved_by_each_loss(model, sides[LONG])
    assert len(moved) == 4 * 4 * 2 + 3, "K and V of four layers and heads, index keys of three layers"
    print(f"noise {noise:.1e}, least moved {min(moved.values()):.1e} by {min(moved, key=moved.__getitem__)}")  # noqa: T201
    assert noise < 1e-4
    assert {key: by for key, by in moved.items() if not by > 100 * noise} == {}


def test_lost_index_keys_hide_where_there_is_nothing_to_choose(model: M3Model, sides: dict[int, DecodeSide]) -> None:
    noise, moved = moved_by_each_loss(model, sides[SHORT])
    hidden = {key for key, by in moved.items() if not by > 100 * noise}
    assert hidden == {key for key in moved if key.name == "index_k"}
