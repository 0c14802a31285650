"""Token ids word by word, out of a table: what a byte-level BPE tokenizer gives, several times as fast.

Such a tokenizer splits a text into words by a regular expression and then merges the bytes of each word, whatever stands
around it. So a word has the same ids wherever it stands: they are asked of the tokenizer's own model once. Only the split is
done here, for the splits that are known below and for characters whose class has not changed in any version of Unicode;
every other tokenizer and text goes through the tokenizers library as ever (tests compare the two).
"""

import itertools
import json
import re
from typing import Any

_LETTERS = "A-Za-z\u00aa\u00b5\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f"
_NUMBERS = "0-9\u00b2\u00b3\u00b9\u00bc-\u00be"
_KNOWN = re.compile("[\t\n\r -~\u00a0-\u024f\u2010-\u2027\u2030-\u205e\u20ac]*")
"""Characters whose class the standard library's `re` and the tokenizers' engines agree on."""
# The letters stand first, where in GPT-2's own the clitics do: nothing else begins as they do, and most words are letters.
_GPT2 = r" ?\p{L}+|'s|'t|'re|'ve|'m|'ll|'d| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Digits are cut out first, one by one, so that for the rest a digit is where the text ends.
_DIGITS_GPT2 = r" ?\p{L}+|'s|'t|'re|'ve|'m|'ll|'d|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
_SPLITS = frozenset(
    {
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",  # LLaMA 3
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",  # Qwen 2
    }
)
MAX_WORDS = 500_000
"""Words kept; beyond that the table is begun anew."""
LONGEST_WORD = 64
"""Characters of a word that is kept: longer ones hardly come twice, and texts of strangers must not fill the memory."""


class WordTable(dict[str, tuple[int, ...]]):
    """Word -> ids, filled as words are met."""

    def __init__(self, model: Any, pattern: str, apart: re.Pattern[str] | None) -> None:
        super().__init__()
        self._model, self._apart = model, apart
        inside = re.sub(r"\[[^]]*\]", lambda match: match[0].replace(r"\p{L}", _LETTERS).replace(r"\p{N}", _NUMBERS), pattern)
        self._words = re.compile(inside.replace(r"\p{L}", f"[{_LETTERS}]").replace(r"\p{N}", f"[{_NUMBERS}]")).findall

    def ids(self, text: str) -> list[int] | None:
        """The ids of a text; None where its split is left to the tokenizer itself."""
        if _KNOWN.fullmatch(text) is None or (self._apart is not None and self._apart.search(text)):
            return None
        if len(self) > MAX_WORDS:
            self.clear()
        return list(itertools.chain.from_iterable(map(self.__getitem__, self._words(text))))

    def __missing__(self, word: str) -> tuple[int, ...]:
        mapped = "".join(map(BYTE_LETTERS.__getitem__, word.encode()))
        ids = tuple(token.id for token in self._model.tokenize(mapped))
        if len(word) <= LONGEST_WORD:
            self[word] = ids
        return ids


def word_table(backend: Any) -> WordTable | None:
    """The table of a tokenizer of the tokenizers library (to which special tokens are text); None where its split is not known."""
    parts = json.loads(backend.to_str())
    pattern = _pattern(parts["pre_tokenizer"])
    model = parts["model"]
    plain = model["type"] == "BPE" and not model.get("dropout") and not any(model.get(key) for key in _AFFIXES)
    if pattern is None or parts["normalizer"] is not None or not plain:
        return None
    words = [token["content"] for token in parts["added_tokens"] if not token["special"]]
    return WordTable(backend.model, pattern, re.compile("|".join(map(re.escape, words))) if words else None)


_AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "fuse_unk")


def _pattern(split: dict[str, Any] | None) -> str | None:
    """The regular expression of a known split."""
    steps: list[dict[str, Any]] = [] if split is None else split["pretokenizers"] if split["type"] == "Sequence" else [split]
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    first, by_regex = steps[:-1], steps[-1]["use_regex"]
    if not first and by_regex:
        return _GPT2
    if len(first) != 1:
        return None
    if first[0]["type"] == "Digits" and first[0]["individual_digits"] and by_regex:
        return _DIGITS_GPT2
    if first[0]["type"] == "Split" and first[0]["behavior"] == "Isolated" and not first[0]["invert"] and not by_regex:
        pattern: str | None = first[0]["pattern"].get("Regex")
        return pattern if pattern in _SPLITS else None
    return None


def _byte_letters() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary (Radford et al. 2019)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


BYTE_LETTERS = _byte_letters()
"""Byte -> the character that stands for it in a byte-level vocabulary."""
