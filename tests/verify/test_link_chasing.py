"""Link chasing: the checkpoint answers exactly what its prompts expect, and every lost region shows as it should."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import DynamicCache
from transformers.models.minimax_m3_vl import MiniMaxM3VLForCausalLM

from pdkv.m3.config import IndexScheduleOverride, load_config
from pdkv.m3.model import M3Model, load_model
from pdkv.verify.link_chasing import (
    BLOCK_SIZE,
    FIRST_LINK,
    FIRST_NODE,
    LOST,
    NUM_HEADS,
    NUM_LAYERS,
    NUM_NODES,
    VOCAB_SIZE,
    home,
    make_prompt,
    vocabulary,
)
from pdkv.verify.link_chasing_checkpoint import write_checkpoint
from pdkv.verify.undivided import complete, complete_with

NUM_STEPS = 64
"""As many as there are nodes: every home of the chain is visited."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("link-chasing")
    write_checkpoint(directory)
    return directory


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> M3Model:
    return load_model(checkpoint)


def test_the_checkpoint_is_the_same_bytes_every_time(checkpoint: Path, tmp_path: Path) -> None:
    script = "import sys; from pathlib import Path; from pdkv.verify.link_chasing_checkpoint import write_checkpoint; "
    script += "write_checkpoint(Path(sys.argv[1]) / 'new'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    written = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert written == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    for name in written:
        assert (tmp_path / "new" / name).read_bytes() == (checkpoint / name).read_bytes()


def test_the_config_is_the_one_described(checkpoint: Path) -> None:
    config = load_config(checkpoint)
    assert (config.num_layers, config.sparse_layers) == (4, (False, True, True, True))
    assert (config.num_heads, config.num_kv_heads, config.num_index_heads, config.head_dim) == (8, 4, 4, 128)
    assert (config.hidden_size, config.vocab_size, config.rotary_dim) == (320, 4224, 64)
    assert (config.topk_blocks, config.init_blocks, config.local_blocks) == (16, 0, 1)
    assert config.eos_token_ids == (2,)


def test_text_and_token_ids_are_two_forms_of_one_prompt(checkpoint: Path) -> None:
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == VOCAB_SIZE == len(set(vocabulary()))
    prompt = make_prompt(7, 700)
    assert tuple(tokenizer.encode(prompt.text).ids) == prompt.token_ids
    assert tokenizer.decode(list(prompt.expected(2))) == " ".join(f"n{node}" for node in prompt.chain[1:3])
    assert tokenizer.encode("unheard-of").ids == [LOST]


def test_every_layer_and_query_head_is_home_to_two_nodes() -> None:
    homes = Counter(home(node) for node in range(NUM_NODES))
    assert len(homes) == NUM_LAYERS * NUM_HEADS
    assert set(homes.values()) == {2}
    assert all(at.kv_head == at.q_head // 2 for at in homes)


@pytest.mark.parametrize("num_tokens", [64, 65, 127, 128, 129, 130, 257, 300, 2048, 2049, 3072, 100_000])
def test_a_prompt_holds_one_link_for_each_node_of_its_chain(num_tokens: int) -> None:
    prompt = make_prompt(num_tokens, num_tokens)
    assert prompt == make_prompt(num_tokens, num_tokens)
    assert prompt != make_prompt(num_tokens + 1, num_tokens)
    assert len(prompt.token_ids) == num_tokens
    links = {divmod(t - FIRST_LINK, NUM_NODES): at for at, t in enumerate(prompt.token_ids) if t >= FIRST_LINK}
    chain = prompt.chain
    assert set(links) == set(zip(chain, chain[1:] + chain[:1], strict=True))
    assert prompt.start == FIRST_NODE + chain[0]
    assert prompt.expected(len(chain)) == tuple(FIRST_NODE + node for node in chain[1:] + chain[:1])
    for layer in range(NUM_LAYERS):
        blocks = [at // BLOCK_SIZE for (source, _), at in links.items() if home(source).layer == layer]
        if num_tokens >= 24 * BLOCK_SIZE:
            assert len(set(blocks)) == 16, "no choice of 15 blocks may hold all links of a layer"
            assert max(blocks) < -(-num_tokens // BLOCK_SIZE) - 2


@pytest.mark.parametrize("num_tokens", [63, 100_001])
def test_a_length_outside_the_limits_is_an_error(num_tokens: int) -> None:
    with pytest.raises(ValueError, match="64 to 100,000"):
        make_prompt(1, num_tokens)


@pytest.mark.parametrize(
    ("num_tokens", "num_steps"),
    [(64, NUM_STEPS), (127, 16), (128, 16), (129, 16), (512, 16), (2048, 16), (2049, NUM_STEPS)],
)
def test_the_undivided_engine_follows_the_chain(model: M3Model, num_tokens: int, num_steps: int) -> None:
    prompt = make_prompt(1, num_tokens)
    answer = complete_with(model, prompt.token_ids, num_steps)
    assert answer.token_ids == prompt.expected(num_steps)
    assert min(answer.logprobs) > -1e-4


def test_bfloat16_follows_the_chain_too(checkpoint: Path) -> None:
    prompt = make_prompt(4, 2300)
    answer = complete(checkpoint, prompt.token_ids, 16, dtype="bfloat16")
    assert answer.token_ids == prompt.expected(16)


@pytest.mark.parametrize(
    ("stored", "index_topk_freq"),
    [
        (("fp8", "fp8"), 1),
        (("fp8_unit", "bfloat16"), 2),
        (("fp8_e5m2", "fp8"), 3),
        (("float16", "float16"), 1),
    ],
)
def test_every_way_to_store_state_follows_the_chain(
    tmp_path: Path, stored: tuple[str, str], index_topk_freq: int
) -> None:
    write_checkpoint(tmp_path, index_topk_freq)
    prompt = make_prompt(5, 2177)
    model = load_model(tmp_path)
    assert model.config.reusing_layers == {1: (), 2: (2,), 3: (2, 3)}[index_topk_freq]
    answer = complete_with(model, prompt.token_ids, 16, stored=stored)
    assert answer.token_ids == prompt.expected(16)
    assert min(answer.logprobs) > -1e-4


def test_without_codes_for_those_it_serves_a_shared_selection_loses_links(checkpoint: Path) -> None:
    """The default checkpoint served with a schedule: layer 2 looks where layer 1's links are."""
    model = load_model(checkpoint, schedule=IndexScheduleOverride(topk_freq=2))
    prompt = make_prompt(1, 3072)
    answer = complete_with(model, prompt.token_ids, 16)
    wrong = next(step for step in range(16) if answer.token_ids[step] != prompt.expected(16)[step])
    assert prompt.home(wrong).layer == 2


def test_a_checkpoint_for_a_schedule_answers_without_it_too(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, index_topk_freq=2)
    prompt = make_prompt(5, 2177)
    model = load_model(tmp_path, schedule=IndexScheduleOverride(topk_freq=1))
    assert complete_with(model, prompt.token_ids, 16).token_ids == prompt.expected(16)


def test_transformers_follows_the_same_chain(checkpoint: Path) -> None:
    prompt = make_prompt(2, 2176)
    oracle = MiniMaxM3VLForCausalLM.from_pretrained(checkpoint, attn_implementation="eager", dtype=torch.float32).eval()
    cache = DynamicCache(config=oracle.config)
    generated: list[int] = []
    pending = torch.tensor([prompt.token_ids])
    with torch.inference_mode():
        for chunk in pending.split(256, dim=1):
            logits = oracle(input_ids=chunk, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        while len(generated) < NUM_STEPS:
            generated.append(int(logits[0, -1].argmax()))
            logits = oracle(input_ids=torch.tensor([generated[-1:]]), past_key_values=cache, use_cache=True).logits
    assert tuple(generated) == prompt.expected(NUM_STEPS)
