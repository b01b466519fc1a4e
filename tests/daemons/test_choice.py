"""A choice's pieces: text, ids and logprobs stay together, and end where a stop string begins."""

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from pdkv.daemons.choice import ChoiceWriter, Piece, merge
from pdkv.daemons.completion_form import CompletionForm
from pdkv.daemons.generation import EncodedPrompt, Generation, Options
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


def generation(prompt: EncodedPrompt, max_tokens: int = 16, **options: object) -> Generation:
    return Generation([prompt] * 4, max_tokens, Options(**options))  # type: ignore[arg-type]


def formed(pieces: list[Piece], options: Options, codec: TextCodec | None = CODEC) -> Choice:
    """The whole choice as completions have it."""
    return CompletionForm(options, "m", codec).choice(merge(pieces))


def pieces_of(text: str, reason: str = "length", **options: object) -> list[Piece]:
    """Every piece of an answer that the model gives as ``text``, one byte a token, until its writer has enough."""
    asked = generation(EncodedPrompt([0]), **options)
    writer = ChoiceWriter(asked, 3, CODEC)
    pieces: list[Piece] = []
    for i, token in enumerate(CODEC.encode(text)):
        top = [TopLogprobs((token, 5), (-0.5, -1.0))] if asked.options.logprobs else []
        piece = writer.push(TokensOut(b"", [token], [-0.5 - i], top))
        pieces += [piece] if piece is not None else []
        if writer.stopped:
            break
    return [*pieces, writer.finish(reason)]


def write(text: str, **options: object) -> Choice:
    return formed(pieces_of(text, **options), Options(return_token_ids=True, **options))  # type: ignore[arg-type]


def spelled(piece: Piece | Choice) -> str:
    ids = [token.id for token in piece.tokens] if isinstance(piece, Piece) else piece.token_ids
    return CODEC.decode(list(ids))  # type: ignore[arg-type]


@pytest.mark.parametrize("stop", [("lo",), ("low", "lo w"), ("o",), ("xyz", "lo wo")])
def test_text_and_ids_end_where_a_stop_string_begins(stop: tuple[str, ...]) -> None:
    whole = write("hello world", stop=stop, logprobs=1)
    cut = min("hello world".find(one) for one in stop if one in "hello world")
    assert whole.text == "hello world"[:cut] == spelled(whole)
    assert (whole.finish_reason, whole.index) == ("stop", 3)
    assert whole.logprobs is not None
    assert "".join(whole.logprobs.tokens) == whole.text
    assert whole.logprobs.text_offset == list(range(cut))
    assert whole.logprobs.token_logprobs == [-0.5 - i for i in range(cut)]


def test_no_piece_shows_anything_of_a_stop_string() -> None:
    for piece in pieces_of("ab\n\nQ: c", stop=("\n\nQ:",), logprobs=0):
        assert "\n" not in piece.text
        assert "\n" not in spelled(piece)


def test_what_was_held_back_for_nothing_comes_with_its_tokens() -> None:
    pieces = pieces_of("a\n\nP\n", stop=("\n\nQ",), logprobs=1)
    assert [piece.text for piece in pieces] == ["a", "\n\nP", "\n"]
    assert merge(pieces).text == spelled(merge(pieces)) == "a\n\nP\n"
    assert [token.offset for token in pieces[1].tokens] == [1, 2, 3]
    assert pieces[-1].finish_reason == "length"


def test_bytes_of_one_character_share_its_offset() -> None:
    whole = write("a€b", logprobs=1)
    assert whole.text == "a€b"
    assert whole.logprobs is not None
    assert whole.logprobs.text_offset == [0, 1, 1, 1, 2]
    assert whole.logprobs.tokens[0] == "a"
    assert len(set(whole.logprobs.tokens)) == 5, "each byte has a name of its own"


def test_likeliest_tokens_are_told_with_the_chosen_one() -> None:
    whole = write("ab", logprobs=2)
    rival = CODEC.token_text(5)
    assert whole.logprobs is not None
    assert whole.logprobs.top_logprobs == [{"a": -0.5, rival: -1.0}, {"b": -0.5, rival: -1.0}]
    without = write("ab", logprobs=0)
    assert without.logprobs is not None
    assert without.logprobs.top_logprobs == [{"a": -0.5}, {"b": -1.5}]
    assert write("ab").logprobs is None


@pytest.mark.parametrize("text", ["n€w", None])
def test_an_echo_comes_first_with_the_prompts_own_logprobs(text: str | None) -> None:
    ids, offsets = CODEC.encode_with_offsets("n€w")
    prompt = EncodedPrompt(ids, text, offsets if text else None)
    asked = generation(prompt, 0, echo=True, logprobs=1)
    writer = ChoiceWriter(asked, 0, CODEC)
    scored = PromptLogprobs.pack(*_arrays(len(ids) - 1))
    pieces = [writer.echo(scored)]
    assert writer.push(TokensOut(b"", [7], [-1.0])) is None
    whole = formed([*pieces, writer.finish("length")], asked.options)
    assert whole.text == "n€w"
    assert whole.logprobs is not None
    assert whole.logprobs.text_offset == [0, 1, 1, 1, 2]
    assert whole.logprobs.token_logprobs == [None, 0.0, -1.0, -2.0, -3.0]
    assert whole.logprobs.top_logprobs[0] is None
    assert len(whole.logprobs.top_logprobs) == 5
    assert writer.num_tokens == 0


def test_an_answer_goes_on_behind_its_echo() -> None:
    ids = CODEC.encode("ab")
    asked = generation(EncodedPrompt(ids, "ab"), echo=True, logprobs=0, stop=("a",))
    writer = ChoiceWriter(asked, 0, CODEC)
    pieces = [writer.echo(PromptLogprobs.pack(*_arrays(1, 0)))]
    for token in CODEC.encode("cda"):
        piece = writer.push(TokensOut(b"", [token], [-1.0]))
        pieces += [piece] if piece else []
    whole = formed([*pieces, writer.finish("length")], asked.options)
    assert (whole.text, whole.finish_reason) == ("abcd", "stop")
    assert whole.logprobs is not None
    assert whole.logprobs.text_offset == [0, 1, 2, 3]
    assert writer.num_tokens == 3


def _arrays(count: int, num_top: int = 1):
    rivals = np.zeros((count, num_top), np.int64), np.full((count, num_top), -0.25, np.float32)
    return -np.arange(count, dtype=np.float32), *rivals


def test_without_a_tokenizer_tokens_are_named_by_their_ids() -> None:
    asked = generation(EncodedPrompt([4]), logprobs=0, echo=True)
    writer = ChoiceWriter(asked, 0, None)
    pieces = [writer.echo(PromptLogprobs()), writer.push(TokensOut(b"", [9], [-1.0])), writer.finish("length")]
    whole = formed([piece for piece in pieces if piece is not None], asked.options, None)
    assert whole.logprobs is not None
    assert (whole.text, whole.logprobs.tokens) == ("", ["token_id:4", "token_id:9"])
