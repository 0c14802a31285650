"""Tokens told one by one: their bytes put together are the text, and each is where it is said to be."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtllama.serve.token_text import Offsets, TokenBytes

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)
HARD = "Naïve 🙂 漢字\n  two  blanks, it's <0x41> ½"


@pytest.fixture(params=["bpe_tokenizer", "sentencepiece_tokenizer"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def bytes_of(tokenizer: Any, text: str) -> tuple[list[int], list[bytes]]:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    tokens = TokenBytes(tokenizer)
    return ids, [tokens.of(token) for token in ids]


def test_the_bytes_of_the_tokens_are_those_of_the_text(bpe_tokenizer: Any, sentencepiece_tokenizer: Any) -> None:
    split = 0

    @given(TEXTS)
    def check(text: str) -> None:
        nonlocal split
        found = bytes_of(bpe_tokenizer, text)[1]
        assert b"".join(found) == text.encode()
        split += any(not _whole(each) for each in found)

    check()
    assert split > 20, "characters came in parts"
    text = HARD.replace("<0x41>", "")  # a vocabulary with bytes of its own takes that for one
    assert b"".join(bytes_of(sentencepiece_tokenizer, text)[1]) == b" " + text.encode(), "with the blank that it puts before a text"


def _whole(raw: bytes) -> bool:
    return "\N{REPLACEMENT CHARACTER}" not in raw.decode(errors="replace")


def test_a_token_is_read_as_it_stands_and_parts_of_characters_as_bytes(tokenizer: Any) -> None:
    ids, raw = bytes_of(tokenizer, HARD)
    tokens = TokenBytes(tokenizer)
    texts = [tokens.text(token) for token in ids]
    assert all(text == each.decode() if _whole(each) else text.startswith("bytes:\\x") for text, each in zip(texts, raw, strict=True))
    assert any(text.startswith("bytes:\\xf0") for text in texts) and any(text.startswith(" ") for text in texts)
    vocabulary = {tokens.of(token) for token in range(len(tokenizer)) if not _whole(tokens.of(token))}
    assert len(vocabulary) > 100, "of different tokens none reads as another"


def test_a_vocabulary_keeps_a_word_with_its_blank_apart_from_the_word(sentencepiece_tokenizer: Any) -> None:
    vocabulary = sentencepiece_tokenizer.get_vocab()
    pairs = [(vocabulary[entry], vocabulary[entry[1:]]) for entry in vocabulary if entry[0] == "▁" and entry[1:] in vocabulary]
    tokens = TokenBytes(sentencepiece_tokenizer)
    assert len(pairs) > 5 and all(tokens.text(a) == " " + tokens.text(b) for a, b in pairs)


def test_an_id_without_an_entry_has_no_bytes(tokenizer: Any) -> None:
    assert TokenBytes(tokenizer).of(len(tokenizer) + 5) == b""


def test_places_count_the_characters_of_the_text_however_the_tokens_come(bpe_tokenizer: Any) -> None:
    tokens = TokenBytes(bpe_tokenizer)
    ids, raw = bytes_of(bpe_tokenizer, HARD)
    theirs = [len(b"".join(raw[:i]).decode(errors="ignore")) for i in range(len(ids))]
    assert Offsets(tokens).take(ids) == theirs and theirs[-1] > 10
    piecewise = Offsets(tokens)
    assert [place for token in ids for place in piecewise.take([token])] == theirs
    shifted = Offsets(tokens)
    shifted.unwritten(2)
    assert shifted.take(ids) == [max(place - 2, 0) for place in theirs]


def test_special_tokens_take_places_where_they_are_written_alone(bpe_tokenizer: Any) -> None:
    (word,), special = bpe_tokenizer("a", add_special_tokens=False).input_ids, bpe_tokenizer.bos_token_id
    assert Offsets(TokenBytes(bpe_tokenizer)).take([special, word, word]) == [
        0,
        len(bpe_tokenizer.bos_token),
        len(bpe_tokenizer.bos_token) + 1,
    ]
    assert Offsets(TokenBytes(bpe_tokenizer)).take([word, special, word], special=False) == [0, 1, 1]
