"""The state of a long prompt travels while prefill computes: by Done most of it has landed, also over TCP."""

from pathlib import Path

from pdkv.verify.link_chasing import make_prompt
from tests.e2e.deployment import Trio, another_prefill, ask, token_ids, transfer_facts


def test_most_bytes_land_before_done_over_tcp(three: Trio, link_chasing_model: Path, tmp_path: Path) -> None:
    prompt = make_prompt(31, 3600)
    flags = ("--max-model-len", "8192", "--prefill-chunk", "256", "--ucx-tls", "tcp")
    with another_prefill(three.decode, link_chasing_model, tmp_path, *flags) as deployment:
        answer = ask(deployment.router.url, prompt.token_ids, 8)
    assert token_ids(answer) == list(prompt.expected(8))
    facts = transfer_facts(answer)
    assert facts["path"] == "tcp"
    assert facts["num_bytes"] == sum(facts["bytes_by_region"].values())
    assert facts["bytes_before_done"] >= 0.8 * facts["num_bytes"], facts
