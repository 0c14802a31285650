"""Chat in a terminal or over a pipe: lines that are asked, and commands that begin with a slash."""

import contextlib
import io
import re
import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

from mtllama import api, folders
from mtllama.errors import UserError
from mtllama.model.engine import Engine
from mtllama.model.find import home
from mtllama.serve.chat import EXAMPLES, Chat

Read = Callable[[str], str]
"""The next line, behind a prompt; `EOFError` where there is none, `KeyboardInterrupt` on Ctrl-C."""
Load = Callable[[str], Engine]
"""A model by its name, for `/model NAME`."""
MAX_FIELD = 100_000
_NO_CHARACTER = re.compile("[\ud800-\udfff]")
"""What Python makes of bytes of a command line that are not in its encoding."""


def run(chat: Chat, load: Load, *, prompt: str | None = None, examples: bool = False) -> None:
    """Answer one prompt, the examples, every line of a pipe, or a person. Bytes that are no text are read as U+FFFD."""
    if prompt is not None:
        _say(chat.answer(_NO_CHARACTER.sub("\N{REPLACEMENT CHARACTER}", prompt)))
    elif examples:
        for title, text in EXAMPLES:
            print(f"# {title}\n{text}\n-> ", end="")
            _say(chat.answer(text))
            chat.history.clear()
    elif sys.stdin.isatty():
        _Dialogue(chat, load, _editor(), person=True).run()
    else:
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")
        _Dialogue(chat, load, _piped, person=False).run()


def _piped(prompt: str) -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\r\n")


def _editor() -> Read:
    """Line editing with a history over sessions; text of several lines may be pasted, or entered with Alt-Enter between them."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    history = None
    with contextlib.suppress(OSError):  # a home that cannot be written to costs the history, not the chat
        home().mkdir(parents=True, exist_ok=True)
        history = FileHistory(str(home() / "chat_history"))
    session: PromptSession[str] = PromptSession(
        history=history,
        key_bindings=keys,
        multiline=True,
        completer=WordCompleter(sorted(COMMANDS), sentence=True),
        complete_while_typing=False,
    )
    return session.prompt


@dataclass
class _Dialogue:
    chat: Chat
    load: Load
    read: Read
    person: bool
    """Whether somebody sits there: then what is typed is prompted for, and help is offered."""

    def run(self) -> None:
        if self.person:
            loaded = self.chat.engine.loaded
            print(f"{loaded.source.name} (format {loaded.format.name}); /help lists the commands, Ctrl-C stops an answer, Ctrl-D ends")
        while True:
            try:
                line = self.read("> ").strip()
            except KeyboardInterrupt:
                continue
            except EOFError:
                return
            try:
                self.do(line)
            except UserError as error:  # told, and the dialogue goes on
                print(f"mtllama: {error}", file=sys.stderr)
            except KeyboardInterrupt:
                print(" [stopped]")
            except EOFError:
                return

    def do(self, line: str) -> None:
        """Do what a line says; `EOFError` ends the dialogue."""
        name, _, rest = line.partition(" ")
        if name in COMMANDS:
            COMMANDS[name].do(self, rest.strip())
        elif name.startswith("/") and "/" not in name[1:] and "\n" not in line:
            raise UserError(f"there is no command {name}; /help lists them")
        elif line:
            _say(self.chat.answer(line))


def _say(pieces: Generator[str, None, None]) -> None:
    with contextlib.closing(pieces):  # a stopped answer is remembered now, not when it is collected
        for piece in pieces:
            print(piece, end="", flush=True)
    print(flush=True)


def _help(dialogue: _Dialogue, rest: str) -> None:
    width = max(len(f"{name} {command.takes}") for name, command in COMMANDS.items())
    for name, command in COMMANDS.items():
        print(f"{f'{name} {command.takes}'.ljust(width)}  {command.help}")
    if dialogue.person:
        print("Enter sends, Alt-Enter begins a new line, text of several lines may be pasted, arrow keys go back in the history")


def _reset(dialogue: _Dialogue, rest: str) -> None:
    dialogue.chat.history.clear()
    print("forgotten")


def _examples(dialogue: _Dialogue, rest: str) -> None:
    print("\n".join(f"{title}: {text}" for title, text in EXAMPLES))


def _task(dialogue: _Dialogue, rest: str) -> None:
    name, _, template = rest.partition(" ")
    if not name:
        raise UserError("/task wants the name of a task, such as /task copa (mtllama tasks list shows all)")
    task, chosen = api.find_question(name, template.strip() or None)
    values = {}
    for each in chosen.fields:
        value = dialogue.read(f"{each}: ").strip()
        if len(value) > MAX_FIELD:
            raise UserError(f"{each} has {len(value):,} characters; at most {MAX_FIELD:,} are read")
        values[each] = api.field_value(value)
    model = api.Model(dialogue.chat.engine)
    answer = model.run_task(task.name, template=chosen.name, **values)
    print(f"{answer.prompt}\n-> {answer.answer}")
    if answer.scores:
        for choice, chance in zip(answer.scores.choices, answer.scores.probabilities, strict=True):
            print(f"{chance:7.1%} {'#' * round(chance * 20):20} {choice.text}")


def _model(dialogue: _Dialogue, rest: str) -> None:
    chat = dialogue.chat
    if rest:
        chat.engine = dialogue.load(rest)
        chat.history.clear()
        chat.last_ids = []  # of the other model's tokenizer
    about, format = chat.engine.describe(), chat.engine.loaded.format
    recipe = about["recipe"] or {}
    print(f"{about['name']}: {about['parameters']:,} parameters, {about['dtype']}, format {format.name}, {about['folder']}")
    if recipe:
        print(f"trained by the recipe {recipe.get('name')}: {recipe.get('train', {}).get('examples'):,} examples")


def _temperature(dialogue: _Dialogue, rest: str) -> None:
    if rest:
        try:
            value = float(rest)
        except ValueError:
            value = -1.0
        if not 0 <= value <= 100:
            raise UserError(f"/temperature wants a number from 0 (greedy), not {rest!r}")
        dialogue.chat.temperature = value
    print(f"temperature {dialogue.chat.temperature:g}{'' if dialogue.chat.temperature else ' (greedy)'}")


def _tokens(dialogue: _Dialogue, rest: str) -> None:
    chat, encoder = dialogue.chat, dialogue.chat.engine.encoder
    ids = encoder.whole_prompt_ids(rest) if rest else chat.last_ids
    if not ids:
        raise UserError("/tokens shows the ids of the last prompt; there is none yet: /tokens TEXT")
    for token in ids:
        print(f"{token:7}  {chat.engine.tokenizer.convert_ids_to_tokens(token)!r}{'  BOS' if token in encoder.bos_ids else ''}")
    end = chat.engine.tokenizer.convert_ids_to_tokens(encoder.end_ids)
    print(f"{len(ids)} tokens, format {encoder.format.name}; BOS ids {encoder.bos_ids}; the answer ends at {end} (ids {encoder.end_ids})")


def _save(dialogue: _Dialogue, rest: str) -> None:
    if not rest:
        raise UserError("/save wants a file name, such as /save dialogue.json")
    path, chat = Path(rest).expanduser(), dialogue.chat
    if path.exists():
        raise UserError(f"{path} is there already; choose another name")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} is no folder; make it first, or choose another")
    messages = []
    for turn in chat.history:
        messages += [{"role": "user", "content": turn.inputs}, {"role": "assistant", "content": turn.answer}]
    format = chat.engine.loaded.format.name
    with folders.explained(path):
        folders.write_json(
            path, {"model": chat.engine.loaded.source.name, "format": format, "temperature": chat.temperature, "messages": messages}
        )
    print(f"{len(messages)} messages in {path}")


def _exit(dialogue: _Dialogue, rest: str) -> None:
    raise EOFError


@dataclass(frozen=True)
class _Command:
    takes: str
    help: str
    do: Callable[[_Dialogue, str], None]


COMMANDS = {
    "/task": _Command("NAME [TEMPLATE]", "fill in a task's fields and see how the model ranks or answers it", _task),
    "/examples": _Command("", "show tasks to try", _examples),
    "/tokens": _Command("[TEXT]", "show the exact ids of the last prompt, or of TEXT", _tokens),
    "/temperature": _Command("[T]", "show or set the temperature; 0 is greedy", _temperature),
    "/model": _Command("[NAME]", "show the model, or load another and begin anew", _model),
    "/save": _Command("FILE", "write the dialogue as JSON", _save),
    "/reset": _Command("", "forget the dialogue", _reset),
    "/help": _Command("", "show this", _help),
    "/exit": _Command("", "end (Ctrl-D, too)", _exit),
}
