"""Chat in the terminal, one-shot, or over a pipe, in the model folder's own prompt format."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

from rich.console import Console

from mtllama.data.prompt import Turn
from mtllama.model.engine import Engine
from mtllama.model.generation import Settings

HELP = "/reset forgets the dialogue, /exit (or Ctrl-D) ends, /examples shows tasks to try, /help shows this"
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

    def answer(self, text: str) -> Iterator[str]:
        """Pieces of the answer to `text` as they come; the turn is remembered once it is whole."""
        encoder = self.engine.encoder
        room = min(self.max_new_tokens, encoder.max_length // 2)
        ids, cut = encoder.prompt_ids(text, self.history, room=room)
        while cut and self.history:  # the oldest turns are forgotten first
            del self.history[0]
            ids, cut = encoder.prompt_ids(text, self.history, room=room)
        stop = (encoder.format.end,) if encoder.format.end else ()
        pieces = []
        for piece in self.engine.stream(ids, Settings(room, self.temperature, stop=stop, strip=True)):
            pieces.append(piece)
            yield piece
        self.history.append(Turn(text, "".join(pieces)))


def run(chat: Chat, *, prompt: str | None = None, examples: bool = False) -> None:
    """Answer one prompt, the examples, every line of a pipe, or a person."""
    if prompt is not None:
        _print_answer(chat, prompt)
    elif examples:
        for title, text in EXAMPLES:
            print(f"# {title}\n{text}\n-> ", end="")
            _print_answer(chat, text)
            chat.history.clear()
    elif not sys.stdin.isatty():
        for line in sys.stdin:
            if not _command(chat, line.strip()):
                return
    else:
        _talk(chat)


def _talk(chat: Chat) -> None:
    console = Console(highlight=False)
    source, format = chat.engine.loaded.source, chat.engine.loaded.format
    console.print(f"{source.name} (format {format.name}); {HELP}", style="dim", markup=False)
    while True:
        try:
            line = console.input("[bold]> [/bold]").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        try:
            if not _command(chat, line):
                return
        except KeyboardInterrupt:  # stops the answer, not the program
            print(" [stopped]")


def _command(chat: Chat, line: str) -> bool:
    """Do what a line says; False ends the chat."""
    if line == "/exit":
        return False
    if line == "/reset":
        chat.history.clear()
        print("forgotten")
    elif line == "/examples":
        print("\n".join(f"{title}: {text}" for title, text in EXAMPLES))
    elif line.startswith("/") and " " not in line:
        print(HELP)
    elif line:
        _print_answer(chat, line)
    return True


def _print_answer(chat: Chat, text: str) -> None:
    for piece in chat.answer(text):
        print(piece, end="", flush=True)
    print(flush=True)
