"""A prompt that was asked before is neither computed nor moved again, and clients are told."""

import openai

from pdkv.verify.link_chasing import make_prompt, text_of
from tests.e2e.deployment import Trio, ask, token_ids, transfer_facts


def test_usage_tells_what_was_cached(three: Trio) -> None:
    prompt = make_prompt(2001, 700)
    with openai.OpenAI(base_url=f"{three.router.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        for cached in (0, 640):
            answer = client.completions.create(
                model="link-chasing", prompt=list(prompt.token_ids), max_tokens=8, temperature=0
            )
            assert answer.choices[0].text == text_of(prompt.expected(8))
            assert answer.usage
            assert answer.usage.prompt_tokens_details
            assert answer.usage.prompt_tokens_details.cached_tokens == cached


def test_a_conversation_that_goes_on_moves_only_its_end(three: Trio) -> None:
    prompt = make_prompt(2002, 1000)
    answer = ask(three.router.url, prompt.token_ids, 40)
    assert token_ids(answer) == list(prompt.expected(60)[:40])
    assert transfer_facts(answer)["num_pages"] == 8
    longer = [*prompt.token_ids, *prompt.expected(30)]
    answer = ask(three.router.url, longer, 10)
    assert token_ids(answer) == list(prompt.expected(60)[30:40])
    facts = transfer_facts(answer)
    assert (facts["num_pages"], facts["resident_pages"], facts["cached_tokens"]) == (1, 8, 896)
