"""Contamination: which evaluation items also stand in training rows, and in which passage.

Three rules, each a passage that stands in an evaluation item and in a training row:

* `exact`: a field of the one equals a field of the other. Blanks do not count, so tokenised text equals plain text.
  Fields of under 3 words or under 12 characters do not count.
* `sentence`: a sentence of 25 or more characters of the one stands in a field of the other, from word to word.
* `13-gram`: 13 consecutive words in common; the passage shown is all that is in common around them.

Texts are compared after Unicode NFKC, without case, punctuation and markup (`<br />`, `-LRB-`). Characters are counted in
the words joined by one blank. Clitics are words of their own, as in the Penn Treebank: `it 's`, `ca n't`. Scripts without
blanks have no words, so their characters stand for them, with their marks; in Thai and Lao a consonant with the vowels
written around it, which alone would say too little. A sentence ends at its mark (not after an initial or a title, as in
`J. Smith` or `Dr. Smith`) or at the end of a line. Fields are never joined.

Not every such passage is contamination. What is `boilerplate` is counted apart, for three reasons, each with a bound that
was chosen by reading what stands on both sides of it in the training sets of T0 and their evaluation sets:

* it is a part of more than `MANY_TEXTS` different fields of one set: an instruction, a licence, the first words of every
  article on a sea snail (but not where it is the whole field of an item, of 13 words or more that say `SENTENCE_BITS`);
* it is the whole field in more than `MANY_ROWS` rows of one set that have different longest fields: "What does the man
  mean?". Questions about one context, and a context with its questions, count once;
* it is a common phrase, and not the whole field of an item of 25 characters or more: its distinct words say, each for
  itself, less than `EXACT_BITS` or `SENTENCE_BITS` ("in the opposite direction", "What is the most likely reason"). Words that stand in boilerplate of the first two kinds, in runs of
  four, say nothing. How common a word is, is counted in all texts of the check; few texts tell little about that, so they
  are taken for part of a million words.
"""

import functools
import hashlib
import itertools
import re
import unicodedata
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from mtllama.errors import UserError
from mtllama.progress import progress

EXACT, SENTENCE, GRAM = "exact", "sentence", "13-gram"
RULES = (EXACT, SENTENCE, GRAM)
GRAM_WORDS = 13
SENTENCE_CHARACTERS = 25
EXACT_WORDS, EXACT_CHARACTERS = 3, 12
MANY_TEXTS = 10
"""A passage inside more different fields of one set than this is boilerplate. Seen: the variants of one sentence in PAWS
are 6 at most; formulas of DBpedia are in 16 and 25, the last lines of XSum's articles in 14 to 127."""
MANY_ROWS = 20
"""A field in more unrelated rows of one set than this is boilerplate. Seen: a question with its candidate answers in
Wiki QA is in up to 19, a fact in QASC in 12, questions that fit any text in Cosmos QA, DREAM and Social IQA in 25 to 100."""
EXACT_BITS, SENTENCE_BITS = 50.0, 64.0
"""A passage whose distinct words say less than this is a common phrase. Seen: phrases that chance brings together reach
64 bits in a sentence; a whole field needs less, as that nothing stands around it says something too: films are reviewed
in one line of 50 to 60 bits, "Which of the following is true?" has 49."""
SHOWN = 5
"""Findings shown for each pair of sets and each rule, and passages of boilerplate likewise."""

_SHINGLE = 4
_FEW_WORDS = 1_000_000
_BATCH_CHARACTERS = 16_000_000
"""Training text compared at a time; bounds the memory, as does:"""
_TOGETHER = 100_000
"""Spans compared at a time."""

_Ints = npt.NDArray[np.int64]
_Ids = npt.NDArray[np.int32]
_Hashes = npt.NDArray[np.uint64]
_Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Passages:
    """The texts of one data set that make its rows what they are."""

    name: str
    fields: Iterable[tuple[int, str, str]]
    """(row, column, text); read once, the texts of a row one behind the other."""


@dataclass(frozen=True)
class Finding:
    """One passage that stands in a training row and in an evaluation item."""

    rule: str
    train_set: str
    train_row: int
    train_column: str
    eval_set: str
    eval_row: int
    eval_column: str
    train_text: str
    """The passage with what stands around it."""
    eval_text: str
    passage: str
    """The words in common, normalised."""
    boilerplate: str = ""
    """Why this is no contamination; empty where it is."""


@dataclass(frozen=True)
class Overlap:
    """What one rule finds between a training set and an evaluation set; the counts are exact."""

    train_set: str
    eval_set: str
    rule: str
    eval_items: int
    """Items with a passage in common."""
    train_rows: int
    """Rows with a passage in common."""
    boilerplate_items: int
    """Items with nothing but boilerplate in common."""
    boilerplate_rows: int
    findings: tuple[Finding, ...]
    """At most `SHOWN`, in the order of the items, every item and passage once."""
    boilerplate: tuple[Finding, ...]
    """Likewise."""


@dataclass(frozen=True)
class Report:
    """Everything found, in the order of the sets given."""

    overlaps: tuple[Overlap, ...]
    train_sizes: Mapping[str, int]
    """Rows with any text, by training set."""
    eval_sizes: Mapping[str, int]
    _rows: Mapping[str, frozenset[int]] = field(repr=False)
    _items: Mapping[str, frozenset[int]] = field(repr=False)

    def rows(self, train_set: str) -> frozenset[int]:
        """Rows of a training set with a finding by any rule: what to leave out."""
        return self._rows[train_set]

    def items(self, eval_set: str) -> frozenset[int]:
        """Items of an evaluation set with a finding by any rule."""
        return self._items[eval_set]

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "overlaps": [asdict(overlap) for overlap in self.overlaps],
            "train": {name: {"rows": size, "drop": sorted(self._rows[name])} for name, size in self.train_sizes.items()},
            "evaluation": {name: {"items": size, "found": sorted(self._items[name])} for name, size in self.eval_sizes.items()},
        }

    def lines(self, shown: int = 2) -> list[str]:
        """The report as plain text, with up to `shown` findings for each rule and pair of sets."""
        lines, rest = [], []
        for (train_set, eval_set), pair in itertools.groupby(self.overlaps, key=lambda each: (each.train_set, each.eval_set)):
            group = list(pair)
            names = (
                f"{train_set} ({_number(self.train_sizes[train_set], 'row')}) / {eval_set} ({_number(self.eval_sizes[eval_set], 'item')})"
            )
            if any(overlap.findings for overlap in group):
                lines.append(names)
            for overlap in group:
                if overlap.findings:
                    found = f"{_number(overlap.eval_items, 'item')} in {_number(overlap.train_rows, 'row')}"
                    lines.append(f"  {overlap.rule:8}  {found}")
                for finding in overlap.findings[:shown]:
                    lines.append(f"    row {finding.train_row}, {finding.train_column}: {finding.train_text}")
                    lines.append(f"    item {finding.eval_row}, {finding.eval_column}: {finding.eval_text}")
                if overlap.boilerplate_items:
                    found = f"{_number(overlap.boilerplate_items, 'item')} in {_number(overlap.boilerplate_rows, 'row')}"
                    passages_ = "; ".join(f"{each.passage} ({each.boilerplate})" for each in overlap.boilerplate[:shown])
                    rest.append(f"  {train_set} / {eval_set}, {overlap.rule}: {found}: {passages_}")
        if rest:
            lines += ["Boilerplate alone, which is not counted:", *rest]
        rows, items = sum(map(len, self._rows.values())), sum(map(len, self._items.values()))
        lines.append(
            f"{items:,} of {_number(sum(self.eval_sizes.values()), 'evaluation item')} found in"
            f" {rows:,} of {_number(sum(self.train_sizes.values()), 'training row')}"
        )
        return lines


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def passages(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    """The texts of `columns` (dotted paths into a row), as `Passages.fields`; a list of strings gives several.

    Values that are no text are passed over; a column that no row has is an error.
    """
    for column in columns:
        if rows and not any(_has(row, column.split(".")) for row in rows):
            raise UserError(f"no row has the column {column!r}; the first one has: {', '.join(rows[0])}")
    for number, row in enumerate(rows):
        for column in columns:
            for text in _texts(row, column.split(".")):
                yield number, column, text


def _has(value: Any, path: list[str]) -> bool:
    if not path:
        return True
    if isinstance(value, list | tuple):
        return any(_has(each, path) for each in value)
    return isinstance(value, Mapping) and path[0] in value and _has(value[path[0]], path[1:])


def _texts(value: Any, path: list[str]) -> Iterator[str]:
    if isinstance(value, list | tuple):
        for each in value:
            yield from _texts(each, path)
    elif path:
        if isinstance(value, Mapping) and path[0] in value:
            yield from _texts(value[path[0]], path[1:])
    elif isinstance(value, str):
        yield value


def check(train: Sequence[Passages], evaluation: Sequence[Passages]) -> Report:
    """Compare every training set with every evaluation set.

    Evaluation texts are held in memory as word numbers, training texts pass through it in parts.
    """
    for sets in (train, evaluation):
        names = [part.name for part in sets]
        if len(set(names)) < len(names):
            raise ValueError(f"two sets of one name: {', '.join(sorted(names))}")
    with progress("contamination", len(evaluation) + len(train) + 1) as advance:
        held = _Corpus()
        for number, part in enumerate(evaluation):
            for row, column, text in part.fields:
                held.add(number, row, column, text)
            advance(note=part.name)
        search = _Search(held)
        batch = _Corpus()
        train_rows = [0] * len(train)
        for number, part in enumerate(train):
            last = None
            for row, column, text in part.fields:
                if row != last and batch.characters > _BATCH_CHARACTERS:
                    search.scan(batch)
                    batch = _Corpus()
                train_rows[number] += row != last
                last = row
                batch.add(number, row, column, text)
            advance(note=part.name)
        search.scan(batch)
        report = _report(search, [part.name for part in train], [part.name for part in evaluation], train_rows)
        advance()
    return report


# Text -> words


_APOSTROPHE = "ʼ"
"""Written into `n't`, which is one word, as a letter: it reads well and does not part its neighbours."""
_ENDS = ".!?…。।؟۔\n"
_DROPPED = {ord(character): None for character in _ENDS + _APOSTROPHE}
_TITLES = ("mr", "mrs", "ms", "dr", "st", "vs", "prof", "jr", "sr", "gen", "col", "sgt", "lt", "rev", "gov", "sen", "rep")
_JOINERS = re.compile("[\u00ad\u200b-\u200f\u2060\ufeff]")
_NOT = re.compile(r"\s*n ?' ?t\b", re.IGNORECASE)
_BREAKS = re.compile(r"<br ?/?>|\\n", re.IGNORECASE)
_BRACKETS = re.compile(r"-[lr][rsc]b-", re.IGNORECASE)


@functools.lru_cache(maxsize=1)
def _patterns() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """What a word or a sentence's end is, in case-folded ASCII and in any text."""
    marks = "".join(
        f"{chr(first)}-{chr(last)}" for first, last in _ranges(c for c in range(0x300, 0x1F000) if unicodedata.category(chr(c))[0] == "M")
    )
    thai = f"[\u0e40-\u0e44\u0ec0-\u0ec4]?[\u0e01-\u0e2e\u0e81-\u0eae][{marks}]*[\u0e30\u0e32\u0e33\u0e45\u0eb0\u0eb2]?"
    unspaced = (
        "\u0e01-\u0e30\u0e32\u0e33\u0e40-\u0e46\u0e81-\u0eb0\u0eb2\u0eb3\u0ebd-\u0ec6"  # Thai, Lao
        "\u1000-\u102a\u103f\u1780-\u17b3"  # Burmese, Khmer
        "\u3005-\u3007\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff"  # Japanese syllables
        "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese characters
    )
    # An initial or a title before the dot is no end, blank or not between them (`U.S.`, `J . Smith`).
    no_end = r"(?<!\b\w)(?<!\b\w )" + "".join(rf"(?<!\b{title}{blank})" for title in _TITLES for blank in ("", " "))
    end = rf"(?:{no_end}\.|[!?…。।؟۔])(?=[\"'”’»)\]]*(?:\s|$|[{unspaced}]))|\n"
    letter = rf"[^\W_{unspaced}]"
    word = rf"{thai}|[{unspaced}][{marks}]*|{letter}+(?:[{marks}]+{letter}*)*"
    return re.compile(rf"[a-z0-9{_APOSTROPHE}]+|{end}"), re.compile(rf"{word}|{end}")


def _ranges(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Runs of consecutive numbers."""
    for _, run in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        members = [number for _, number in run]
        yield members[0], members[-1]


def _clean(text: str) -> str:
    """What is compared, still with case and punctuation."""
    if not text.isascii():
        text = _JOINERS.sub("", unicodedata.normalize("NFKC", text))
        text = text.replace("’", "'").replace("‘", "'").replace(_APOSTROPHE, "'")
    if "'" in text:
        text = _NOT.sub(f" n{_APOSTROPHE}t", text)
    if "<" in text or "\\" in text:
        text = _BREAKS.sub("\n", text)
    if "b-" in text or "B-" in text:
        text = _BRACKETS.sub(" ", text)
    return text


def _tokens(text: str) -> list[str]:
    """Words, and the ends of sentences, of a text."""
    simple, full = _patterns()
    return (simple if text.isascii() else full).findall(_clean(text).casefold())


class _Vocabulary(dict[str, int]):
    """Word -> number. 0 is every unknown word and what stands between texts, 1 the end of a sentence."""

    def __init__(self) -> None:
        super().__init__({**dict.fromkeys(_ENDS, 1), "nt": 2, f"n{_APOSTROPHE}t": 2})
        self.words = ["", ".", "nt"]

    def __missing__(self, word: str) -> int:
        self[word] = number = len(self.words)
        self.words.append(word)
        return number


class _Corpus:
    """Texts, each once, with the fields that hold it."""

    def __init__(self) -> None:
        self.characters = 0
        self.texts: list[str] = []
        self.owners: list[list[tuple[int, int, str]]] = []
        """For each text the fields that hold it: (set, row, column)."""
        self.longest: dict[tuple[int, int], int] = {}
        """(set, row) -> its longest text, which says whether two rows are about the same."""
        self._known: dict[str, int] = {}

    def add(self, number: int, row: int, column: str, text: str) -> None:
        """Take in a field."""
        index = self._known.get(text)
        if index is None:
            index = self._known[text] = len(self.texts)
            self.texts.append(text)
            self.owners.append([])
            self.characters += len(text)
        self.owners[index].append((number, row, column))
        longest = self.longest.setdefault((number, row), index)
        if len(text) > len(self.texts[longest]):
            self.longest[number, row] = index

    def held(self, index: int) -> "_Text":
        """A text with what says whether its rows are about the same."""
        text, owners = self.texts[index], self.owners[index]
        about = {(number, self.longest[number, row]) for number, row, _ in owners}
        return _Text(
            text,
            self.text_span(index)[1],
            owners,
            sorted((number, _digest(text)) for number in {number for number, _, _ in owners}),
            sorted((number, _digest(self.texts[longest])) for number, longest in about),
        )

    def encode(self, vocabulary: _Vocabulary, *, learn: bool) -> None:
        """Turn the texts into word numbers, one array with a 0 behind each text, and mark their sentences."""
        ids, ends = array("i"), array("q")
        self.squashed: list[str] = []
        for text in self.texts:
            tokens = _tokens(text)
            ids.extend(map(vocabulary.__getitem__, tokens) if learn else map(vocabulary.get, tokens, itertools.repeat(0)))
            ids.extend((1, 0, 1))
            ends.append(len(ids))
            self.squashed.append("".join(tokens).translate(_DROPPED))
        raw = np.frombuffer(ids, np.int32) if ids else np.zeros(0, np.int32)
        is_end = raw == 1
        self.words: _Ids = raw[~is_end]
        upto = np.cumsum(~is_end)
        self.text_ends: _Ints = upto[np.frombuffer(ends, np.int64) - 1] if ends else np.zeros(0, np.int64)
        bounds = np.unique(np.concatenate([np.zeros(1, np.int64), upto[is_end]]))
        self.sentence_starts, self.sentence_lengths = bounds[:-1], np.diff(bounds)
        unknown = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.words == 0)])
        sizes = np.array([len(word) for word in vocabulary.words])
        characters = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes[self.words] + 1)])
        keep = (unknown[bounds[1:]] == unknown[bounds[:-1]]) & (characters[bounds[1:]] - characters[bounds[:-1]] > SENTENCE_CHARACTERS)
        self.sentence_starts, self.sentence_lengths = self.sentence_starts[keep], self.sentence_lengths[keep]

    def text_of(self, positions: _Ints) -> _Ints:
        """The texts that word positions belong to."""
        return np.searchsorted(self.text_ends, positions, "right")

    def text_span(self, index: int) -> tuple[int, int]:
        """Position and number of the words of a text."""
        start = int(self.text_ends[index - 1]) if index else 0
        return start, int(self.text_ends[index]) - 1 - start


@dataclass(frozen=True)
class _Text:
    """A text that holds a passage."""

    text: str
    num_words: int
    owners: list[tuple[int, int, str]]
    """The fields that hold it: (set, row, column)."""
    sets: list[tuple[int, int]]
    """(set, digest of the text): what counts where a passage is a part of it."""
    rows: list[tuple[int, int]]
    """(set, digest of a row's longest text): what counts where a passage is all of it."""


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


# Words -> equal spans, by hashes that are always verified

_BASE = 0x9E3779B97F4A7C15


def _scramble(ids: _Ids) -> _Hashes:
    """A 64-bit number for each word number."""
    mixed = ids.astype(np.uint64) * np.uint64(0xBF58476D1CE4E5B9) + np.uint64(0x94D049BB133111EB)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    return mixed ^ (mixed >> np.uint64(27))


@functools.lru_cache(maxsize=4)
def _powers(count: int) -> _Hashes:
    powers = np.full(count, _BASE, np.uint64)
    powers[0] = 1
    return np.cumprod(powers, dtype=np.uint64)


def _flat(starts: _Ints, lengths: _Ints) -> tuple[_Ints, _Ints, _Ints]:
    """Every position of some spans one behind the other, its offset in its span, and where each span begins in that."""
    begins = np.cumsum(lengths) - lengths
    offsets = np.arange(int(lengths.sum())) - np.repeat(begins, lengths)
    return np.repeat(starts, lengths) + offsets, offsets, begins


def _hash_spans(words: _Ids, starts: _Ints, lengths: _Ints) -> _Hashes:
    """Hashes of spans: the sum of each word's number times a power of its place."""
    hashes = np.zeros(len(starts), np.uint64)
    for low in range(0, len(starts), _TOGETHER):
        part = slice(low, low + _TOGETHER)
        positions, offsets, begins = _flat(starts[part], lengths[part])
        powers = _powers(1 << int(lengths[part].max()).bit_length())
        hashes[part] = np.add.reduceat(_scramble(words[positions]) * powers[offsets], begins)
    return hashes


def _equal(words: _Ids, starts: _Ints, others: _Ids, other_starts: _Ints, lengths: _Ints) -> _Bools:
    """Whether spans consist of the same words."""
    equal = other_starts + lengths <= len(others)
    inside = np.flatnonzero(equal)
    for low in range(0, len(inside), _TOGETHER):
        part = inside[low : low + _TOGETHER]
        positions, offsets, begins = _flat(starts[part], lengths[part])
        same = words[positions] == others[np.repeat(other_starts[part], lengths[part]) + offsets]
        equal[part] = np.logical_and.reduceat(same, begins)
    return equal


def _firsts(*columns: npt.NDArray[Any]) -> _Bools:
    """Which rows of sorted columns are not equal to the one before."""
    first = np.ones(len(columns[0]), np.bool_)
    first[1:] = np.logical_or.reduce([column[1:] != column[:-1] for column in columns])
    return first


def _distinct(words: _Ids, starts: _Ints, lengths: _Ints) -> tuple[_Ints, _Ints]:
    """The first of every kind of equal spans, in their order, and the kind of each."""
    _, first, kind = np.unique(_hash_spans(words, starts, lengths), return_index=True, return_inverse=True)
    odd = np.flatnonzero((lengths != lengths[first[kind]]) | ~_equal(words, starts, words, starts[first[kind]], lengths))
    kind[odd] = len(first) + np.arange(len(odd))  # another span with the same hash: a kind of its own
    first = np.concatenate([first, odd])
    order = np.argsort(first)
    rank = np.empty(len(first), np.int64)
    rank[order] = np.arange(len(first))
    return first[order], rank[kind]


class _Finder:
    """Looks for many spans at once: by the hash of their first words (13 at most), then word by word."""

    def __init__(self, words: _Ids, starts: _Ints, lengths: _Ints) -> None:
        self.words, self.starts, self.lengths = words, starts, lengths
        self._tables = {}
        heads = np.minimum(lengths, GRAM_WORDS)
        for num in np.unique(heads).tolist():
            members = np.flatnonzero(heads == num)
            hashes = _hash_spans(words, starts[members], heads[members])
            order = np.argsort(hashes, kind="stable")
            shift = np.uint64(64 - min(26, max(12, (8 * len(members)).bit_length())))
            maybe = np.zeros(1 << (64 - int(shift)), np.bool_)  # most words end here, before the slower binary search
            maybe[hashes >> shift] = True
            self._tables[num] = hashes[order], members[order], maybe, shift

    def find(self, words: _Ids) -> tuple[_Ints, _Ints]:
        """(span, position) of every place where one of the spans stands in `words`."""
        found = [(np.zeros(0, np.int64), np.zeros(0, np.int64))]
        scrambled, hashes = _scramble(words), np.zeros(len(words), np.uint64)
        for num in range(1, min(GRAM_WORDS, len(words)) + 1):
            hashes = hashes[: len(words) - num + 1] + scrambled[num - 1 :] * _powers(1 << GRAM_WORDS.bit_length())[num - 1]
            if num not in self._tables:
                continue
            known, members, maybe, shift = self._tables[num]
            positions = np.flatnonzero(maybe[hashes >> shift])
            low = np.searchsorted(known, hashes[positions], "left")
            counts = np.searchsorted(known, hashes[positions], "right") - low
            index, _, _ = _flat(low, counts)
            spans, places = members[index], np.repeat(positions, counts)
            equal = _equal(self.words, self.starts[spans], words, places, self.lengths[spans])
            found.append((spans[equal], places[equal]))
        return np.concatenate([spans for spans, _ in found]), np.concatenate([places for _, places in found])


# The search


class _Links:
    """Pairs of passage and text, each once."""

    def __init__(self) -> None:
        self._parts: list[tuple[_Ints, _Ints]] = []

    def add(self, passage: _Ints, text: _Ints) -> None:
        self._parts.append((passage, text))

    def pairs(self, keep: _Bools) -> tuple[_Ints, _Ints]:
        """Those of the passages to keep, in order."""
        passage = np.concatenate([np.zeros(0, np.int64), *(passage for passage, _ in self._parts)])
        text = np.concatenate([np.zeros(0, np.int64), *(text for _, text in self._parts)])
        passage, text = passage[keep[passage]], text[keep[passage]]
        order = np.lexsort((text, passage))
        passage, text = passage[order], text[order]
        new = _firsts(passage, text)
        return passage[new], text[new]


class _Search:
    """Every passage that may be in common, the evaluation texts that hold it, and the training texts found to hold it.

    Each passage stands in the evaluation texts, so it is known as a span of their words.
    """

    def __init__(self, held: _Corpus) -> None:
        self.held, self.vocabulary = held, _Vocabulary()
        held.encode(self.vocabulary, learn=True)
        words = held.words
        self.eval_links, self.train_links = _Links(), _Links()
        self.num_words = len(words)
        self.counts = np.bincount(words, minlength=len(self.vocabulary.words))
        self.train_texts: list[_Text] = []
        self._whole: dict[str, int] = {}
        spans: list[tuple[int, int]] = []
        links: list[tuple[int, int]] = []
        for index, squashed in enumerate(held.squashed):
            start, length = held.text_span(index)
            first_words = words[start : start + length][:EXACT_CHARACTERS].tolist()  # no more are needed to say what is short
            if length < EXACT_WORDS or sum(len(self.vocabulary.words[word]) + 1 for word in first_words) <= EXACT_CHARACTERS:
                continue
            if squashed not in self._whole:
                self._whole[squashed] = len(spans)
                spans.append((start, length))
            links.append((self._whole[squashed], index))
        whole = np.array(spans, np.int64).reshape(-1, 2)
        self.eval_links.add(*np.array(links, np.int64).reshape(-1, 2).T)

        first, kind_of_sentence = _distinct(words, held.sentence_starts, held.sentence_lengths)
        self.eval_links.add(len(whole) + kind_of_sentence, held.text_of(held.sentence_starts))
        sentences = held.sentence_starts[first], held.sentence_lengths[first]
        gaps = np.concatenate([np.zeros(1, np.int64), np.cumsum(words == 0)])
        grams = np.flatnonzero(gaps[GRAM_WORDS:] == gaps[:-GRAM_WORDS])
        first, kind = _distinct(words, grams, np.full(len(grams), GRAM_WORDS))
        self.eval_links.add(len(whole) + len(sentences[0]) + kind, held.text_of(grams))

        self.starts = np.concatenate([whole[:, 0], sentences[0], grams[first]])
        self.lengths = np.concatenate([whole[:, 1], sentences[1], np.full(len(first), GRAM_WORDS)])
        self.rules = np.repeat(np.arange(3), [len(whole), len(sentences[0]), len(first)])
        self.fields = self._long_fields(whole, kind_of_sentence)
        """Whether a passage is the whole field of some item, and long enough to be a sentence."""
        self._offset = len(whole)
        self._finder = _Finder(words, self.starts[len(whole) :], self.lengths[len(whole) :])
        # Sentences of training texts, from `_more` on, are passages only once they are found.
        self._more: dict[bytes, int] = {}
        self._more_spans: list[tuple[int, int]] = []

    def scan(self, batch: _Corpus) -> None:
        """Find the passages of a part of the training texts."""
        batch.encode(self.vocabulary, learn=False)
        self.num_words += len(batch.words)
        self.counts += np.bincount(batch.words, minlength=len(self.counts))
        exact = [(self._whole[squashed], text) for text, squashed in enumerate(batch.squashed) if squashed in self._whole]
        spans, places = self._finder.find(batch.words)
        found = [np.array(exact, np.int64).reshape(-1, 2), np.stack([self._offset + spans, batch.text_of(places)], axis=1)]

        # The other way round: a training sentence in an evaluation text.
        first, kind = _distinct(batch.words, batch.sentence_starts, batch.sentence_lengths)
        starts, lengths = batch.sentence_starts[first], batch.sentence_lengths[first]
        spans, places = _Finder(batch.words, starts, lengths).find(self.held.words)
        passage_of = np.full(len(first), -1)
        for span, place in zip(spans.tolist(), places.tolist(), strict=True):
            words = batch.words[starts[span] : starts[span] + lengths[span]].tobytes()
            number = self._more.setdefault(words, len(self.starts) + len(self._more))
            if number - len(self.starts) == len(self._more_spans):
                self._more_spans.append((place, int(lengths[span])))
            passage_of[span] = number
        self.eval_links.add(passage_of[spans], self.held.text_of(places))
        hit = passage_of[kind] >= 0
        found.append(np.stack([passage_of[kind[hit]], batch.text_of(batch.sentence_starts[hit])], axis=1))

        pairs = np.concatenate(found)
        texts, local = np.unique(pairs[:, 1], return_inverse=True)
        self.train_links.add(pairs[:, 0], len(self.train_texts) + local)
        self.train_texts.extend(batch.held(text) for text in texts.tolist())

    def finish(self) -> None:
        """Take the sentences of training texts in as passages."""
        more = np.array(self._more_spans, np.int64).reshape(-1, 2)
        self.starts, self.lengths = np.concatenate([self.starts, more[:, 0]]), np.concatenate([self.lengths, more[:, 1]])
        self.rules = np.concatenate([self.rules, np.full(len(more), RULES.index(SENTENCE))])
        self.fields = np.concatenate([self.fields, np.zeros(len(more), np.bool_)])

    def _long_fields(self, whole: _Ints, kind_of_sentence: _Ints) -> _Bools:
        held, fields = self.held, np.zeros(len(self.starts), np.bool_)
        sizes = np.array([len(word) + 1 for word in self.vocabulary.words])
        characters = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes[held.words])])
        fields[: len(whole)] = characters[whole.sum(axis=1)] - characters[whole[:, 0]] > SENTENCE_CHARACTERS
        text = held.text_of(held.sentence_starts)
        text_starts = np.concatenate([np.zeros(1, np.int64), held.text_ends[:-1]])
        alone = (held.sentence_starts == text_starts[text]) & (held.sentence_lengths == held.text_ends[text] - 1 - text_starts[text])
        fields[len(whole) + kind_of_sentence[alone]] = True
        return fields

    def bits(self, passage: _Ints, leave_out: _Bools) -> npt.NDArray[np.float64]:
        """What the distinct words of passages say, each for itself, without those that are left out."""
        each = np.log2(max(self.num_words, _FEW_WORDS) / np.maximum(self.counts, 1))
        each[0] = 0.0
        words = np.where(leave_out, 0, self.held.words)
        bits = np.zeros(len(passage))
        for low in range(0, len(passage), _TOGETHER):
            part = passage[low : low + _TOGETHER]
            positions, _, _ = _flat(self.starts[part], self.lengths[part])
            owner = np.repeat(np.arange(len(part)), self.lengths[part])
            keys = np.sort(owner * len(each) + words[positions])
            owner, word = np.divmod(keys[_firsts(keys)], len(each))
            bits[low : low + _TOGETHER] = np.bincount(owner, each[word], len(part))
        return bits


# From passages to a report


@dataclass(frozen=True)
class _Side:
    """The texts of one side and which passages they hold."""

    names: list[str]
    passage: _Ints
    text: _Ints
    texts: list[_Text]

    def most(self, search: _Search, *, whole: bool) -> tuple[_Ints, _Ints]:
        """For every passage, in how many unrelated rows of one set it is the whole field (or in how many texts a part of
        it), and in which set."""
        sizes = np.array([each.num_words for each in self.texts], np.int64)
        is_whole = (search.rules[self.passage] == RULES.index(EXACT)) | (search.lengths[self.passage] >= sizes[self.text])
        links = np.flatnonzero(is_whole == whole)
        passage, text = self.passage[links], self.text[links]
        hosts = [each.rows if whole else each.sets for each in self.texts]
        counts = np.array([len(each) for each in hosts], np.int64)
        flat = np.array([pair for each in hosts for pair in each], np.uint64).reshape(-1, 2)
        index, _, _ = _flat((np.cumsum(counts) - counts)[text], counts[text])
        key = np.repeat(passage, counts[text]) * len(self.names) + flat[index, 0].astype(np.int64)
        order = np.lexsort((flat[index, 1], key))
        key, host = key[order], flat[index[order], 1]
        keys, rows = np.unique(key[_firsts(key, host)], return_counts=True)
        most, where = np.zeros(len(search.starts), np.int64), np.zeros(len(search.starts), np.int64)
        order = np.argsort(rows, kind="stable")  # the largest is written last
        passage, number = np.divmod(keys[order], max(1, len(self.names)))
        most[passage], where[passage] = rows[order], number
        return most, where

    def in_set(self, count: int) -> list[_Bools]:
        """For every set, which passages its texts hold."""
        held = [np.zeros(count, np.bool_) for _ in self.names]
        for number, texts in enumerate(self._texts_of()):
            held[number][self.passage[texts[self.text]]] = True
        return held

    def rows(self, number: int, passages_: _Bools) -> set[int]:
        """Rows of a set that hold any of some passages."""
        texts = np.unique(self.text[passages_[self.passage]]).tolist()
        return {row for text in texts for owner, row, _ in self.texts[text].owners if owner == number}

    def _texts_of(self) -> list[_Bools]:
        texts = [np.zeros(len(self.texts), np.bool_) for _ in self.names]
        for index, text in enumerate(self.texts):
            for number, _ in text.sets:
                texts[number][index] = True
        return texts


def _report(search: _Search, train_names: list[str], eval_names: list[str], train_rows: list[int]) -> Report:
    search.finish()
    count = len(search.starts)
    everything = np.ones(count, np.bool_)
    train_pairs = search.train_links.pairs(everything)
    hit = np.zeros(count, np.bool_)
    hit[train_pairs[0]] = True
    eval_pairs = search.eval_links.pairs(hit)
    texts, local = np.unique(eval_pairs[1], return_inverse=True)
    train = _Side(train_names, *train_pairs, search.train_texts)
    evaluation = _Side(eval_names, eval_pairs[0], local, [search.held.held(text) for text in texts.tolist()])
    reasons = _Reasons(search, hit, train, evaluation)

    overlaps = []
    rows: dict[str, set[int]] = {name: set() for name in train_names}
    items: dict[str, set[int]] = {name: set() for name in eval_names}
    in_train, in_eval = train.in_set(count), evaluation.in_set(count)
    for train_number, train_name in enumerate(train_names):
        if not in_train[train_number].any():
            continue
        for eval_number, eval_name in enumerate(eval_names):
            common = in_train[train_number] & in_eval[eval_number]
            if not common.any():
                continue
            for rule_number, rule in enumerate(RULES):
                of_rule = common & (search.rules == rule_number)
                if not of_rule.any():
                    continue
                real, empty = of_rule & ~reasons.boilerplate, of_rule & reasons.boilerplate
                found_rows, found_items = train.rows(train_number, real), evaluation.rows(eval_number, real)
                rows[train_name] |= found_rows
                items[eval_name] |= found_items
                shown = [
                    tuple(
                        Finding(
                            rule,
                            train_name,
                            *one,
                            eval_name,
                            *other,
                            *_excerpts(search, passage, *held, those is real),
                            reasons.of(passage),
                        )
                        for passage, held, one, other in _examples(search, train, train_number, evaluation, eval_number, those)
                    )
                    for those in (real, empty)
                ]
                overlaps.append(
                    Overlap(
                        train_name,
                        eval_name,
                        rule,
                        len(found_items),
                        len(found_rows),
                        len(evaluation.rows(eval_number, empty) - found_items),
                        len(train.rows(train_number, empty) - found_rows),
                        *shown,
                    )
                )
    eval_sizes = dict.fromkeys(eval_names, 0)
    for number, _ in search.held.longest:
        eval_sizes[eval_names[number]] += 1
    return Report(
        tuple(overlaps),
        dict(zip(train_names, train_rows, strict=True)),
        eval_sizes,
        {name: frozenset(numbers) for name, numbers in rows.items()},
        {name: frozenset(numbers) for name, numbers in items.items()},
    )


class _Reasons:
    """Which passages are boilerplate, and why."""

    def __init__(self, search: _Search, hit: _Bools, train: _Side, evaluation: _Side) -> None:
        count = len(search.starts)
        many = np.zeros(count, np.bool_)
        self._many: dict[int, str] = {}
        for side, kind in ((evaluation, "items"), (train, "rows")):
            for whole, bound, what in ((False, MANY_TEXTS, "texts"), (True, MANY_ROWS, f"unrelated {kind}")):
                most, where = side.most(search, whole=whole)
                many |= most > bound
                self._many |= {
                    each: f"in {most[each]} {what} of {side.names[where[each]]}" for each in np.flatnonzero(most > bound).tolist()
                }
        # A long field that says enough is leaked, however often it is there.
        telling = np.flatnonzero(many & search.fields & (search.lengths >= GRAM_WORDS))
        telling = telling[search.bits(telling, np.zeros(search.held.words.size, np.bool_)) >= SENTENCE_BITS]
        many[telling] = False
        self._many = {each: why for each, why in self._many.items() if many[each]}
        others = np.flatnonzero(hit & ~many & ~search.fields)
        bounds = np.array([EXACT_BITS, SENTENCE_BITS, SENTENCE_BITS])[search.rules]
        self._common, self._rest = np.zeros(count, np.bool_), np.zeros(count, np.bool_)
        cover = self._cover(search, np.flatnonzero(many & (search.lengths >= _SHINGLE)))
        self._common[others] = search.bits(others, np.zeros(len(cover), np.bool_)) < bounds[others]
        self._rest[others] = search.bits(others, cover) < bounds[others]
        self.boilerplate: _Bools = many | self._rest

    def _cover(self, search: _Search, many: _Ints) -> _Bools:
        """Words of the evaluation texts that stand in a run of four words of such passages."""
        starts, _, _ = _flat(search.starts[many], search.lengths[many] - _SHINGLE + 1)
        lengths = np.full(len(starts), _SHINGLE)
        first, _ = _distinct(search.held.words, starts, lengths)
        _, places = _Finder(search.held.words, starts[first], lengths[first]).find(search.held.words)
        cover = np.zeros(len(search.held.words), np.bool_)
        for offset in range(_SHINGLE):
            cover[places + offset] = True
        return cover

    def of(self, passage: int) -> str:
        """The reason in words; empty where it is no boilerplate."""
        if passage in self._many:
            return self._many[passage]
        if self._common[passage]:
            return "a common phrase"
        return "a common phrase but for other boilerplate" if self._rest[passage] else ""


_Field = tuple[int, str]


def _examples(
    search: _Search, train: _Side, train_number: int, evaluation: _Side, eval_number: int, passages_: _Bools
) -> Iterator[tuple[int, tuple[_Text, _Text], _Field, _Field]]:
    """Up to `SHOWN` pairs of (row, column), in the order of the items, with the passage and the texts that hold it.

    Every item and every passage is shown once.
    """
    fields = []
    for index in np.flatnonzero(passages_[evaluation.passage]).tolist():
        passage, text = int(evaluation.passage[index]), int(evaluation.text[index])
        fields += [(row, column, passage, text) for number, row, column in evaluation.texts[text].owners if number == eval_number]
    seen_rows: set[int] = set()
    seen_passages: set[bytes] = set()
    for row, column, passage, text in sorted(fields, key=lambda each: (each[0], each[2])):
        words = search.held.words[search.starts[passage] : search.starts[passage] + search.lengths[passage]].tobytes()
        if row in seen_rows or words in seen_passages:
            continue
        seen_rows.add(row)
        seen_passages.add(words)
        low, high = np.searchsorted(train.passage, [passage, passage + 1])
        train_row, train_column, train_text = min(
            (owner_row, owner_column, candidate)
            for candidate in train.text[low:high].tolist()
            for number, owner_row, owner_column in train.texts[candidate].owners
            if number == train_number
        )
        yield passage, (train.texts[train_text], evaluation.texts[text]), (train_row, train_column), (row, column)
        if len(seen_rows) == SHOWN:
            return


_AROUND, _INSIDE = 60, 240
"""Characters shown around a passage, and of a passage."""


def _excerpts(search: _Search, passage: int, train: _Text, evaluation: _Text, widen: bool) -> tuple[str, str, str]:
    """A passage as it stands in a training text and in an evaluation text, and its words.

    With `widen` a 13-gram is shown with all that is in common around it.
    """
    start, length, rule = int(search.starts[passage]), int(search.lengths[passage]), RULES[search.rules[passage]]
    words = [search.vocabulary.words[word] for word in search.held.words[start : start + length].tolist()]
    (clean, spans), (other_clean, other_spans) = _spans(train.text), _spans(evaluation.text)
    if rule == EXACT:
        return _cut(clean, 0, len(clean)), _cut(other_clean, 0, len(other_clean)), " ".join(words)
    at, other_at = _place(spans, words), _place(other_spans, words)
    if rule == GRAM and widen:
        while at and other_at and spans[at - 1][0] == other_spans[other_at - 1][0]:
            at, other_at, length = at - 1, other_at - 1, length + 1
        following = zip(spans[at + length :], other_spans[other_at + length :], strict=False)
        length += sum(1 for _ in itertools.takewhile(lambda pair: pair[0][0] == pair[1][0], following))
    last, other_last = spans[at + length - 1], other_spans[other_at + length - 1]
    return (
        _cut(clean, spans[at][1], last[2]),
        _cut(other_clean, other_spans[other_at][1], other_last[2]),
        " ".join(word for word, _, _ in spans[at : at + length]),
    )


def _spans(text: str) -> tuple[str, list[tuple[str, int, int]]]:
    """A text as it is compared, still with case, and its words with their places."""
    clean = _clean(text)
    found = ((match.group().casefold().replace(_APOSTROPHE, ""), *match.span()) for match in _patterns()[1].finditer(clean))
    return clean, [each for each in found if each[0] not in _ENDS]


def _place(spans: list[tuple[str, int, int]], passage: list[str]) -> int:
    words = [word for word, _, _ in spans]
    return next(at for at in range(len(words)) if words[at : at + len(passage)] == passage)


def _cut(text: str, start: int, end: int) -> str:
    """A passage with a little around it, as one line."""
    passage = text[start:end] if end - start <= _INSIDE else f"{text[start : start + _INSIDE // 2]} … {text[end - _INSIDE // 2 : end]}"
    left, right = text[max(0, start - _AROUND) : start], text[end : end + _AROUND]
    return " ".join(f"{'…' if start > _AROUND else ''}{left}{passage}{right}{'…' if end + _AROUND < len(text) else ''}".split())
