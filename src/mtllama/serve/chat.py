"""A dialogue with a model, in the model folder's own prompt format."""

from collections.abc import Generator
from dataclasses import dataclass, field

from mtllama import api
from mtllama.data.prompt import Turn
from mtllama.model.engine import Engine

EXAMPLES = (
    (
        "Sentiment",
        "a film made with as little wit, interest, and professionalism as artistically possible for a slummy hollywood caper flick. "
        "Based on this review, would the user recommend this product? No or Yes?",
    ),
    (
        "Multi-choice QA",
        "There is most likely going to be fog around: Which is the correct answer? - (A) a marsh - (B) a tundra - (C) the plains - (D) a desert",
    ),
    (
        "Sentence selection",
        "The flame on the candle went out. This happened because... Help me pick the more plausible option: "
        "- I blew on the wick.. - I put a match to the wick.",
    ),
    (
        "Entailment",
        "The new rights are nice enough Question: Does this imply that Everyone really likes the newest benefits ? "
        "Please response with 'Yes', 'No', or 'Maybe'.",
    ),
)
"""The sample dialogues that MT-LLaMA's README shows (github.com/DAMO-NLP-SG/MT-LLaMA)."""


@dataclass
class Chat:
    """A dialogue with a model: every answer sees the turns before it, as far as they fit."""

    engine: Engine
    temperature: float = 0.0
    max_new_tokens: int = 256
    history: list[Turn] = field(default_factory=list)
    last_ids: list[int] = field(default_factory=list)
    """What the model read before its last answer."""

    def answer(self, text: str) -> Generator[str, None, None]:
        """Pieces of the answer to `text` as they come. The turn is remembered, as far as it came where the answer is stopped."""
        ids, room = self.prompt_ids(text)
        self.last_ids = ids
        settings = api.answer_settings(self.engine, room, temperature=self.temperature, seed=len(self.history))
        pieces: list[str] = []
        try:
            for piece in self.engine.stream(ids, settings):
                pieces.append(piece)
                yield piece
        finally:
            self.history.append(Turn(text, "".join(pieces)))

    def prompt_ids(self, text: str) -> tuple[list[int], int]:
        """Ids of the dialogue with `text` behind it, and how many new tokens there is room for; the oldest turns are forgotten first."""
        encoder = self.engine.encoder
        room = min(self.max_new_tokens, encoder.max_length // 2)
        self._forget_all_but_the_last(2 * encoder.max_length)
        fewest, most = 0, len(self.history)  # turns to forget: the fewest behind which the rest fits, or all
        while fewest < most:
            half = (fewest + most) // 2
            if encoder.prompt_ids(text, self.history[half:], room=room)[1]:
                fewest = half + 1
            else:
                most = half
        del self.history[:fewest]
        return encoder.prompt_ids(text, self.history, room=room)[0], room

    def _forget_all_but_the_last(self, tokens: int) -> None:
        """Forget the turns before the last so many tokens: each turn is read once, however many there are."""
        for number in range(len(self.history) - 1, -1, -1):
            turn = self.history[number]
            tokens -= len(self.engine.encoder.raw_continuation_ids(f"{turn.inputs}\n{turn.answer}"))
            if tokens < 0:
                del self.history[:number]
                return
