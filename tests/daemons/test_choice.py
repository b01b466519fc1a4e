"""A choice's pieces: text, ids and logprobs stay together, and end where a stop string begins."""

import msgspec
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from pdkv.daemons.choice import ChoiceWriter, EncodedPrompt, merge
from pdkv.daemons.completion_request import CompletionRequest
from pdkv.daemons.link import TokensOut
from pdkv.daemons.openai_api import Choice
from pdkv.daemons.tokenization import TextCodec
from pdkv.m3.logprobs import PromptLogprobs, TopLogprobs


def bytes_codec() -> TextCodec:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return TextCodec(tokenizer)


CODEC = bytes_codec()


def write(text: str, reason: str = "length", prompt: EncodedPrompt | None = None, **asked: object) -> list[Choice]:
    """Every piece of an answer that the model gives as ``text``, one byte a token, until its writer has enough."""
    request = CompletionRequest(prompts=[""], return_token_ids=True, **asked)  # type: ignore[arg-type]
    writer = ChoiceWriter(request, 3, prompt or EncodedPrompt([0]), CODEC)
    pieces: list[Choice] = []
    for i, token in enumerate(CODEC.encode(text)):
        top = [TopLogprobs((token, 5), (-0.5, -1.0))] if request.logprobs else []
        piece = writer.push(TokensOut(b"", [token], [-0.5 - i], top))
        pieces += [piece] if piece is not None else []
        if writer.stopped:
            break
    return [*pieces, writer.finish(reason)]


def spelled(choice: Choice) -> str:
    assert choice.token_ids is not msgspec.UNSET
    return CODEC.decode(list(choice.token_ids))


@pytest.mark.parametrize("stop", [("lo",), ("low", "lo w"), ("o",), ("xyz", "lo wo")])
def test_text_and_ids_end_where_a_stop_string_begins(stop: tuple[str, ...]) -> None:
    whole = merge(write("hello world", stop=stop, logprobs=1))
    cut = min("hello world".find(one) for one in stop if one in "hello world")
    assert whole.text == "hello world"[:cut] == spelled(whole)
    assert (whole.finish_reason, whole.index) == ("stop", 3)
    assert whole.logprobs is not None
    assert "".join(whole.logprobs.tokens) == whole.text
    assert whole.logprobs.text_offset == list(range(cut))
    assert whole.logprobs.token_logprobs == [-0.5 - i for i in range(cut)]


def test_no_piece_shows_anything_of_a_stop_string() -> None:
    for piece in write("ab\n\nQ: c", stop=("\n\nQ:",), logprobs=0):
        assert "\n" not in piece.text
        assert piece.logprobs is not None
        assert not any("\n" in token for token in piece.logprobs.tokens)
        assert "\n" not in spelled(piece)


def test_what_was_held_back_for_nothing_comes_with_its_tokens() -> None:
    pieces = write("a\n\nP\n", stop=("\n\nQ",), logprobs=1)
    assert [piece.text for piece in pieces] == ["a", "\n\nP", "\n"]
    assert merge(pieces).text == spelled(merge(pieces)) == "a\n\nP\n"
    assert pieces[1].logprobs is not None
    assert pieces[1].logprobs.text_offset == [1, 2, 3]
    assert pieces[-1].finish_reason == "length"


def test_bytes_of_one_character_share_its_offset() -> None:
    whole = merge(write("a€b", logprobs=1))
    assert whole.text == "a€b"
    assert whole.logprobs is not None
    assert whole.logprobs.text_offset == [0, 1, 1, 1, 2]
    assert whole.logprobs.tokens[0] == "a"
    assert len(set(whole.logprobs.tokens)) == 5, "each byte has a name of its own"


def test_likeliest_tokens_are_told_with_the_chosen_one() -> None:
    whole = merge(write("ab", logprobs=2))
    rival = CODEC.token_text(5)
    assert whole.logprobs is not None
    assert whole.logprobs.top_logprobs == [{"a": -0.5, rival: -1.0}, {"b": -0.5, rival: -1.0}]
    without = merge(write("ab", logprobs=0))
    assert without.logprobs is not None
    assert without.logprobs.top_logprobs == [{"a": -0.5}, {"b": -1.5}]
    assert merge(write("ab")).logprobs is None


@pytest.mark.parametrize("text", ["n€w", None])
def test_an_echo_comes_first_with_the_prompts_own_logprobs(text: str | None) -> None:
    ids, offsets = CODEC.encode_with_offsets("n€w")
    prompt = EncodedPrompt(ids, text, offsets if text else None)
    request = CompletionRequest(prompts=[""], echo=True, logprobs=1, max_tokens=0)
    writer = ChoiceWriter(request, 0, prompt, CODEC)
    scored = PromptLogprobs.pack(*_arrays(len(ids) - 1))
    pieces = [writer.echo(scored)]
    assert writer.push(TokensOut(b"", [7], [-1.0])) is None
    whole = merge([*pieces, writer.finish("length")])
    assert whole.text == "n€w"
    assert whole.logprobs is not None
    assert whole.logprobs.text_offset == [0, 1, 1, 1, 2]
    assert whole.logprobs.token_logprobs == [None, 0.0, -1.0, -2.0, -3.0]
    assert whole.logprobs.top_logprobs[0] is None
    assert len(whole.logprobs.top_logprobs) == 5
    assert writer.num_tokens == 0


def test_an_answer_goes_on_behind_its_echo() -> None:
    ids = CODEC.encode("ab")
    request = CompletionRequest(prompts=[""], echo=True, logprobs=0, stop=("a",))
    writer = ChoiceWriter(request, 0, EncodedPrompt(ids, "ab"), CODEC)
    pieces = [writer.echo(PromptLogprobs.pack(*_arrays(1, 0)))]
    for token in CODEC.encode("cda"):
        piece = writer.push(TokensOut(b"", [token], [-1.0]))
        pieces += [piece] if piece else []
    whole = merge([*pieces, writer.finish("length")])
    assert (whole.text, whole.finish_reason) == ("abcd", "stop")
    assert whole.logprobs is not None
    assert whole.logprobs.text_offset == [0, 1, 2, 3]
    assert writer.num_tokens == 3


def _arrays(count: int, num_top: int = 1):
    rivals = np.zeros((count, num_top), np.int64), np.full((count, num_top), -0.25, np.float32)
    return -np.arange(count, dtype=np.float32), *rivals


def test_without_a_tokenizer_tokens_are_named_by_their_ids() -> None:
    request = CompletionRequest(prompts=[""], logprobs=0, echo=True)
    writer = ChoiceWriter(request, 0, EncodedPrompt([4]), None)
    pieces = [writer.echo(PromptLogprobs()), writer.push(TokensOut(b"", [9], [-1.0])), writer.finish("length")]
    whole = merge([piece for piece in pieces if piece is not None])
    assert whole.logprobs is not None
    assert (whole.text, whole.logprobs.tokens) == ("", ["token_id:4", "token_id:9"])
