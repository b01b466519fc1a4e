"""A random checkpoint in released form, in shards, served by ``pdkv up``: transformers' tokens through P -> D."""

import json
from pathlib import Path

from pdkv.verify.equality import compare_tokens
from tests.checkpoints import Oracle, write_random_checkpoint, write_released_form
from tests.e2e.deployment import ask, running, token_ids, up
from tests.e2e.test_oracle import THREE_LAYERS
from tests.http import HTTP

LENGTH = 1100
"""Beyond the two blocks of 128 tokens that a query selects."""
NUM_TOKENS = 8


def test_tokens_of_a_released_checkpoint_are_transformers(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "plain", 7, max_position_embeddings=2048, **THREE_LAYERS)
    oracle = Oracle(tmp_path / "plain")
    case = oracle.case(LENGTH, NUM_TOKENS, seed=1)
    model = tmp_path / "released-m3"
    write_released_form(tmp_path / "plain", model, shards=4)
    stop = case.tokens[NUM_TOKENS // 2]
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [stop]}))
    with running(up(model, tmp_path, "--prefill-chunk", "333")) as served:
        tokens = token_ids(ask(served.url, case.prompt, NUM_TOKENS))
        verdict = compare_tokens(tokens, case.tokens, case.logits)
        assert verdict.equal, verdict.problems

        # What else the front reads from the nested config: end tokens, vocabulary, longest prompt.
        ended = ask(served.url, case.prompt, NUM_TOKENS, ignore_eos=False)
        choice = ended.json()["choices"][0]
        assert choice["finish_reason"] == "stop"
        assert choice["token_ids"] == tokens[: tokens.index(stop) + 1]
        assert ask(served.url, [oracle.vocab_size], 1).status_code == 400
        listed = HTTP.get(f"{served.url}/v1/models", timeout=10).json()["data"][0]
        assert (listed["id"], listed["max_model_len"]) == ("released-m3", 2048)
        assert "skipped 27 tensors of the vision tower" in served.log.read_text()
