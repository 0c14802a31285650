"""Tokens -> pieces of text, for vocabularies that no model here has: a token that ends one character and begins another, many of no text."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from mtllama.data.words import BYTE_LETTERS
from mtllama.model.generation import TextStream

FACE = "\N{GRINNING FACE}".encode()
STRADDLING = [bytes([byte]) for byte in range(256)] + [FACE[:2], FACE[2:] + FACE[:2], FACE[2:], FACE[1:] + b"a", b"ab" + FACE[:3]]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Its ids are the numbers of the bytes, then those of `STRADDLING`, then a special token."""
    vocab = {"".join(BYTE_LETTERS[byte] for byte in token): number for number, token in enumerate(STRADDLING)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|none|>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|none|>", clean_up_tokenization_spaces=False)


def pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [*(stream.push(token) for token in ids), stream.finish()]


def test_characters_that_begin_in_the_token_that_ends_another_are_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    first, between, last = 256, 257, 258
    ids = [first, between, between, between, last]
    assert tokenizer.decode(ids) == FACE.decode() * 4
    assert "".join(pieces(tokenizer, ids)) == FACE.decode() * 4
    assert "".join(pieces(tokenizer, [*b"a", 0x9F, *ids])).replace("\N{REPLACEMENT CHARACTER}", "") == "a" + FACE.decode() * 4


@given(st.lists(st.sampled_from([*b"ab\xf0\x9f\x98\x80\xe2\x82\xac", 256, 257, 258, 259, 260]), max_size=24))
def test_a_stream_says_what_the_whole_says_but_for_bytes_of_no_character(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> None:
    whole, streamed = tokenizer.decode(ids), "".join(pieces(tokenizer, ids))
    assert streamed.replace("\N{REPLACEMENT CHARACTER}", "") == whole.replace("\N{REPLACEMENT CHARACTER}", "")


def test_tokens_of_no_text_are_not_looked_at_again_and_again(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    special, decoded, decode = tokenizer.eos_token_id, [0], tokenizer.decode

    def counted(ids: list[int], **options: Any) -> str:
        decoded[0] += len(ids)
        return str(decode(ids, **options))

    monkeypatch.setattr(tokenizer, "decode", counted)
    assert "".join(pieces(tokenizer, [*b"a", *[special] * 2000, *b"b"])) == "ab"
    assert 2 < decoded[0] < 100
