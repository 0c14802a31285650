"""MT-LLaMA's own rule for reading an answer off generated text, to the letter of its evaluation code.

Tasks of two written-out options take the option whose `difflib` quick ratio to the lower-cased text is larger, the first
of equals. The others take the first key of a dictionary, in its order, that is a part of the lower-cased text, and class 0
when none is. So nearly every text that holds the letter a is answer A of OpenBookQA. It is kept to compare with, never used
to choose.
"""

import difflib
from collections.abc import Sequence

PROMPTS = ("mt-llama", "mt-llama-5")
"""Prompts of the catalogue that the rule was written for; under another one its words mean nothing."""
OPTIONS = frozenset({"copa", "winogrande", "xcopa", "xstorycloze", "xwinograd"})
"""Sets (without their language) whose options are compared with the text."""
NO_ANSWER = "None"
"""A text of extractive QA that has this in it counts as an empty answer."""

_NO_YES = {"no": 0, "yes": 1}
_STARS = {"1": 0, "2": 0, "4": 1, "5": 1, "★": 0, "★★": 0, "★★★★": 1, "★★★★★": 1, **_NO_YES}
_MAYBE_YES_NO = {"maybe": 0, "yes": 1, "no": 2, "a": 0, "b": 1, "c": 2, "inconclusive": 0, "true": 1, "false": 2}
_LETTERS = {"a": 0, "b": 1, "c": 2, "d": 3}
KEYS: dict[str, dict[str, int]] = {
    "openbookqa": {"1.": 0, "2.": 1, "3.": 2, "4.": 3, **_LETTERS, **{f"({letter})": place for letter, place in _LETTERS.items()}},
    "wic": _NO_YES,
    "pawsx": _NO_YES,
    "rte": {"yes": 0, "no": 1},
    "sst2": _STARS,
    "marc": _STARS,
    "xnli": _MAYBE_YES_NO,
    "mnli": _MAYBE_YES_NO,
}
"""Set (without its language) -> words looked for -> class, in the order in which they are looked for."""
FIVE_STARS = {str(n + 1): n for n in range(5)} | {"★" * (n + 1): n for n in range(5)}
FIVE_STARS |= {"not at all": 0, "no": 1, "maybe": 2, "yes": 3, "definitely": 4}
"""The same of MARC in five classes."""
WORDS_MEAN = (1, 0, 2)
"""Class of `_MAYBE_YES_NO` (neutral, entailment, contradiction) -> place among the choices Yes, Maybe, No. Its XNLI is read by this."""


def applies(task: str, template: str, *, choices: bool, mended: bool = False) -> bool:
    """Whether the rule says anything about a task asked through a template; `mended`: whether the reading with GLUE's labels does."""
    if template not in PROMPTS:
        return False
    if mended:
        return _set(task) == "mnli"
    return not choices or _set(task) in OPTIONS or _set(task) in KEYS


def choose(task: str, template: str, text: str, choices: Sequence[str], *, mended: bool = False) -> tuple[int, str | None]:
    """The class that the rule reads out of a text, as a place among the choices, and the word that it found; None: it fell through.

    MNLI's classes are not GLUE's, and the data file that they were compared with was not released. As it stands the class's
    number is compared with GLUE's label (so `maybe` is entailment); `mended`, its words mean what they say, as in its XNLI.
    """
    name, said = _set(task), text.lower()
    if name in OPTIONS:
        ratios = [difflib.SequenceMatcher(None, said, choice.lower()).quick_ratio() for choice in choices]
        place = ratios.index(max(ratios))
        return place, choices[place]
    keys = FIVE_STARS if template == "mt-llama-5" else KEYS[name]
    found = next((key for key in keys if key in said), None)
    place = 0 if found is None else keys[found]
    return WORDS_MEAN[place] if name == "xnli" or (name == "mnli" and mended) else place, found


def _set(task: str) -> str:
    """A task's name without its language."""
    return task.partition("-")[0]
