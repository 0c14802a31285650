"""Ids out of the table of words are those of the tokenizers library, or the table says that it does not know."""

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from mtllama.data import words
from mtllama.data.words import WordTable, word_table

LLAMA3 = next(pattern for pattern in words._SPLITS if "{1,3}" in pattern)
QWEN2 = next(pattern for pattern in words._SPLITS if "{1,3}" not in pattern)
CORPUS = [
    "It's what we'll do, they've said: 1,234.5 apples!! (They'd said no.)\n\n  Indented\tand\r\nbroken lines...   ",
    "Naïve café déjà vu – “quoted”, it’s €5 or ½ … WE'LL SEE. x² + y²=z",
] * 30


def byte_level(split: pre_tokenizers.PreTokenizer) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = split
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.encode_special_tokens = True
    return backend


def plain() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def split_by(pattern: str) -> pre_tokenizers.PreTokenizer:
    first = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


SPLITS = {
    "gpt2": plain,
    "smollm2": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain()]),
    "llama3": lambda: split_by(LLAMA3),
    "qwen2": lambda: split_by(QWEN2),
}


@pytest.fixture(scope="module", params=SPLITS)
def backend(request: pytest.FixtureRequest) -> Tokenizer:
    return byte_level(SPLITS[request.param]())


def table(backend: Tokenizer) -> WordTable:
    found = word_table(backend)
    assert found is not None
    return found


def test_words_of_any_length_do_not_fill_the_memory(backend: Tokenizer) -> None:
    found = table(backend)
    for length in (words.LONGEST_WORD - 1, words.LONGEST_WORD + 1, 50_000):
        text = "ab" * (length // 2) + "c" * (length % 2)
        assert found.ids(text) == backend.encode(text, add_special_tokens=False).ids
    assert [len(word) for word in found] == [words.LONGEST_WORD - 1]


KNOWN = [chr(code) for code in range(0x2100) if words._KNOWN.fullmatch(chr(code))]
PIECES = [
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "\u00a0",
    "a",
    "Ab",
    "'s",
    "'S",
    "'",
    "1",
    "12",
    "1234",
    "²",
    "½",
    ".",
    "...",
    "é",
    "–",
    "<|end|>",
    "x'll",
    "\n\n ",
]


@given(text=st.text(st.sampled_from(KNOWN), max_size=20) | st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
@settings(max_examples=600)
def test_the_table_gives_the_ids_of_the_library(backend: Tokenizer, text: str) -> None:
    assert table(backend).ids(text) == backend.encode(text, add_special_tokens=False).ids


def test_every_character_that_is_taken_is_split_alike(backend: Tokenizer) -> None:
    ours = table(backend)
    assert len(KNOWN) > 500
    for each in KNOWN:
        for text in (each, f"a{each}b", f" {each} ", f"1{each}2", f"'{each}", f"\n{each}\n", f"  {each}"):
            assert ours.ids(text) == backend.encode(text, add_special_tokens=False).ids, repr(text)


@given(text=st.text(max_size=20))
@settings(max_examples=200)
def test_what_the_table_does_not_know_it_leaves(backend: Tokenizer, text: str) -> None:
    ids = table(backend).ids(text)
    assert (ids is None) == (not words._KNOWN.fullmatch(text))
    assert ids is None or ids == backend.encode(text, add_special_tokens=False).ids


def test_a_text_with_an_added_word_is_left_to_the_library() -> None:
    backend = byte_level(plain())
    backend.add_tokens([AddedToken("<tool>", special=False)])
    ours = table(backend)
    assert ours.ids("a <tool> b") is None
    assert ours.ids("a <too> b") == backend.encode("a <too> b", add_special_tokens=False).ids


def _with(backend: Tokenizer, change: Any) -> Tokenizer:
    change(backend)
    return backend


@pytest.mark.parametrize(
    "backend",
    [
        lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda: byte_level(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), plain()])),
        lambda: byte_level(pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), plain()])),
        lambda: byte_level(split_by(r"\w+|\W+")),
        lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
        lambda: _with(byte_level(plain()), lambda b: setattr(b, "normalizer", normalizers.NFC())),
        lambda: _with(byte_level(plain()), lambda b: setattr(b.model, "dropout", 0.1)),
        lambda: Tokenizer(models.WordLevel({"a": 0}, unk_token="a")),
    ],
    ids=["prefix", "digits together", "punctuation", "another split", "no split", "normalizer", "dropout", "no BPE"],
)
def test_another_kind_of_tokenizer_has_no_table(backend: Any) -> None:
    assert word_table(backend()) is None


def test_the_sentencepiece_kind_has_no_table(sentencepiece_tokenizer: Any, bpe_tokenizer: Any) -> None:
    assert word_table(sentencepiece_tokenizer.backend_tokenizer) is None
    assert word_table(bpe_tokenizer.backend_tokenizer) is not None


def test_a_full_table_is_begun_anew(backend: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "MAX_WORDS", 3)
    ours = table(backend)
    for text in CORPUS[:2] * 3:
        assert ours.ids(text) == backend.encode(text, add_special_tokens=False).ids
        assert len(ours) <= 3 + len(re.findall(r"\S+|\s+", text)) * 4
