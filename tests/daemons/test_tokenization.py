"""Streamed text joins to the whole text, and never breaks a character."""

from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from pdkv.daemons.tokenization import TextCodec, TextStream
from pdkv.errors import ModelError


def _byte_level() -> TextCodec:
    """One token a byte: every character beyond ASCII takes several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    return TextCodec(tokenizer)


def _metaspace() -> TextCodec:
    """Words that carry their leading space, which the decoder drops at the start of a text."""
    words = ["<unk>", "▁a", "▁b", "c", "▁"]
    tokenizer = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    return TextCodec(tokenizer)


def _words() -> TextCodec:
    words = ["<unk>", "n1", "n2", "n1>n2"]
    return TextCodec(
        tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    )


CODECS = {"bytes": (_byte_level(), 257), "metaspace": (_metaspace(), 5), "words": (_words(), 4)}


@pytest.mark.parametrize("name", sorted(CODECS))
@given(data=st.data())
def test_the_pieces_join_to_the_whole(name: str, data: st.DataObject) -> None:
    codec, vocab_size = CODECS[name]
    steps = data.draw(st.lists(st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=3), max_size=30))
    stream = TextStream(codec)
    pieces = [stream.push(step) for step in steps] + [stream.finish()]
    assert "".join(pieces) == codec.decode([token for step in steps for token in step])


@given(text=st.text(max_size=20).filter(lambda text: "<eos>" not in text))
def test_no_character_is_sent_in_halves(text: str) -> None:
    codec = _byte_level()
    stream = TextStream(codec)
    pieces = [stream.push([token]) for token in codec.encode(text)]
    assert "".join(pieces) + stream.finish() == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)


def test_bytes_that_never_become_a_character_come_at_the_end() -> None:
    codec = _byte_level()
    stream = TextStream(codec)
    euro = codec.encode("€")
    assert [stream.push([token]) for token in euro[:2]] == ["", ""]
    assert stream.finish() == codec.decode(euro[:2]) != ""


def test_tokens_read_as_they_do_inside_a_text() -> None:
    assert [CODECS["metaspace"][0].token_text(i) for i in range(5)] == ["<unk>", " a", " b", "c", " "]
    assert [CODECS["words"][0].token_text(i) for i in (1, 2)] == [" n1", " n2"]
    codec = CODECS["bytes"][0]
    assert [codec.token_text(i) for i in codec.encode("a\n")] == ["a", "\n"]
    assert len({codec.token_text(i) for i in range(257)}) == 257
    assert codec.token_text(256) == "<eos>"


def test_offsets_say_where_each_token_begins() -> None:
    assert CODECS["bytes"][0].encode_with_offsets("a€b")[1] == [0, 1, 1, 1, 2]


def test_without_a_tokenizer_there_is_no_text(tmp_path: Path) -> None:
    assert TextCodec.load(tmp_path) is None
    assert TextStream(None).push([1, 2]) + TextStream(None).finish() == ""


def test_a_broken_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json is not a tokenizer"):
        TextCodec.load(tmp_path)


def test_bytes_of_a_token_are_those_that_it_adds() -> None:
    codec = CODECS["bytes"][0]
    for text in ("a\n", "€", "Ā", "\xff\x00"):
        assert b"".join(codec.token_bytes(token) or b"" for token in codec.encode(text)) == text.encode()
    assert codec.token_bytes(256) == b"<eos>"
    assert CODECS["metaspace"][0].token_bytes(1) == b" a"
    words = {"a": 0, "<0xE2>": 1, "<0x82>": 2}
    fallback = tokenizers.Tokenizer(models.BPE(vocab=words, merges=[], byte_fallback=True))
    fallback.decoder = decoders.ByteFallback()
    assert [TextCodec(fallback).token_bytes(token) for token in range(3)] == [b"a", b"\xe2", b"\x82"]
