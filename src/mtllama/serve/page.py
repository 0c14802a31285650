"""The page of a server: tasks to fill in, a chat, a report, and what the model is. It loads nothing from elsewhere."""

import html
import itertools
import json
import os
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported
# Calls are not kept in the browser, nor in a bucket of a hub, which the server would have to reach. Read when the page is mounted.
os.environ["GRADIO_RUN_HISTORY"] = "False"

import gradio as gr
from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles

from mtllama import api
from mtllama.data.prompt import Turn
from mtllama.errors import MissingDataError, UserError
from mtllama.serve.chat import Chat
from mtllama.serve.scheduler import BusyError, ClosedError, Scheduler
from mtllama.tasks.catalog import Task, catalog, data_folder, load_rows
from mtllama.weights import info

USER = "mtllama"
"""Who logs in where a key is asked for; the password is the key."""
REPORT = "/report-files"
FIRST_TASK = "copa"
MAX_TOKENS = 512
QUEUE = 64
"""Events of all visitors that wait; one more is told that the queue is full."""
NOTHING = "(it says nothing)"
"""Stands in the dialogue for an answer without a word."""
FONTS = ["ui-sans-serif", "system-ui", "sans-serif"]
MONO = ["ui-monospace", "Consolas", "monospace"]
CSS = """
.prompt textarea { font-family: ui-monospace, Consolas, monospace; }
.choices { display: grid; gap: .5rem; margin: 0; padding: 0; list-style: none; }
.choices li { display: grid; gap: .15rem; }
.choices .name { display: flex; justify-content: space-between; gap: 1rem; overflow-wrap: anywhere; }
.choices .best { font-weight: 600; }
.choices .bar { height: .6rem; border-radius: .3rem; background: var(--border-color-primary); }
.choices .bar span { display: block; height: 100%; border-radius: .3rem; background: var(--color-accent); }
.answer { font-size: 1.15rem; overflow-wrap: anywhere; margin: 0 0 .75rem; }
.muted { color: var(--body-text-color-subdued); }
.about th { display: none; }
.about :is(table, thead, tbody, tr) { border: 0 !important; }
.about td:first-child { white-space: nowrap; }
.about td { border: 0; border-bottom: 1px solid var(--border-color-primary); padding: .35rem 1.5rem .35rem 0; }
.report { width: 100%; height: 80vh; border: 1px solid var(--border-color-primary); border-radius: .5rem; background: white; }
footer { display: none !important; }
"""


@dataclass(frozen=True)
class Shown:
    """A model as the page shows it."""

    name: str
    scheduler: Scheduler


@dataclass(frozen=True)
class Page:
    """What the page is made of."""

    model: Shown
    other: Shown | None = None
    """A second model, whose answers stand beside the first one's."""
    report: Path | None = None
    data_dir: Path = Path("sampler")
    delta: Path | None = None

    @property
    def shown(self) -> tuple[Shown, ...]:
        """The models, the first one first."""
        return (self.model, self.other) if self.other else (self.model,)


def require_report(folder: Path) -> None:
    """Refuse a folder that is no report's."""
    if not (folder / "report.html").is_file():
        raise UserError(f"{folder} has no report.html; make it: mtllama report RUN... --out {folder}")


def mount(app: FastAPI, page: Page, *, password: str | None = None) -> FastAPI:
    """Put the page at the root of a server. With a password, whoever comes logs in first."""
    if page.report:
        require_report(page.report)
        if password is None:  # files of a folder know no log-in
            app.mount(REPORT, StaticFiles(directory=page.report), name="report")
    theme = gr.themes.Default(font=FONTS, font_mono=MONO)
    blocks = _blocks(page, framed=password is None)
    # What `launch` would set: without it gradio takes any path of this machine in a message for a file that was sent, and hands it out.
    blocks.has_launched = True
    blocks.queue(max_size=QUEUE, api_open=False)  # open, the routes of an interface would let anybody past the queue
    mounted: FastAPI = gr.mount_gradio_app(
        app,
        blocks,
        "",
        auth=(USER, password) if password is not None else None,
        auth_message=f"The name is {USER}; the password is the server's key.",
        theme=theme,
        css=CSS,
        footer_links=[],
        show_error=True,
        ssr_mode=False,
        enable_monitoring=False,
        max_file_size="1mb",
    )
    return mounted


def _blocks(page: Page, *, framed: bool) -> Any:
    with gr.Blocks(title=f"mtllama: {page.model.name}", analytics_enabled=False) as blocks:
        gr.Markdown(f"# {page.model.name}")
        with gr.Tab("Task"):
            _task_tab(page)
        with gr.Tab("Chat"):
            _chat_tab(page.model)
        with gr.Tab("Report"):
            _report_tab(page, framed=framed)
        with gr.Tab("Model"):
            gr.Markdown(_about(page), elem_classes="about")
    return blocks


# Task


def _task_tab(page: Page) -> None:
    families = list(dict.fromkeys(task.family for task in catalog().values()))
    first = catalog()[FIRST_TASK]
    most = max(len(template.fields) for task in catalog().values() for template in task.prompts)
    with gr.Row():
        family = gr.Dropdown(families, value=first.family, label="Family")
        name = gr.Dropdown(_names(first.family), value=first.name, label="Data set")
        template = gr.Dropdown([each.name for each in first.prompts], value=first.prompts[0].name, label="Prompt")
    with gr.Row(equal_height=False):
        with gr.Column():
            boxes = [_box(first, first.prompts[0].name, number) for number in range(most)]
            with gr.Row():
                load = gr.Button("Random example")
                ask = gr.Button("Ask", variant="primary")
            origin = gr.Markdown("", elem_classes="muted")
        with gr.Column():
            answers = [gr.HTML(_nothing(each), label=each.name, elem_id=f"answer-{i}") for i, each in enumerate(page.shown)]
            prompt = gr.Textbox(
                label="The exact prompt", lines=6, interactive=False, elem_id="prompt", elem_classes="prompt", buttons=["copy"]
            )

    # Each choice brings all that hangs on it in one answer, so that no later one takes away what was typed meanwhile.
    def by_family(chosen: str) -> list[Any]:
        names = _names(chosen)
        return [gr.update(choices=names, value=names[0]), *by_name(names[0])]

    def by_name(chosen: str) -> list[Any]:
        prompts = [each.name for each in catalog()[chosen].prompts]
        return [gr.update(choices=prompts, value=prompts[0]), *by_template(chosen, prompts[0])]

    def by_template(chosen: str, prompt_name: str) -> list[Any]:
        fields = catalog()[chosen].template(prompt_name).fields
        return [_updated(fields, number) for number in range(most)]

    def example(chosen: str, prompt_name: str) -> list[Any]:
        task = catalog()[chosen]
        try:
            row, where = _random_row(task, page.data_dir)
        except (UserError, MissingDataError) as error:
            raise gr.Error(str(error)) from error
        fields = task.template(prompt_name).fields
        return [gr.update(value=_shown(row.get(field, ""))) for field in fields] + [gr.update()] * (most - len(fields)) + [where]

    def answer(chosen: str, prompt_name: str, *values: str) -> list[str]:
        task, found = catalog()[chosen], catalog()[chosen].template(prompt_name)
        try:
            fields = {field: api.field_value(value) for field, value in zip(found.fields, values, strict=False)}
            question = api.ask(task, found, fields)
            told = [_answered(each, question) for each in page.shown]
        except (UserError, BusyError, ClosedError) as error:
            raise gr.Error(str(error)) from error
        return [*told, page.model.scheduler.engine.encoder.prompt_text(question.inputs)]

    family.input(by_family, family, [name, template, *boxes])
    name.input(by_name, name, [template, *boxes])
    template.input(by_template, [name, template], boxes)
    load.click(example, [name, template], [*boxes, origin])
    ask.click(answer, [name, template, *boxes], [*answers, prompt], api_name="ask", concurrency_limit=8)


def _names(family: str) -> list[str]:
    return [task.name for task in catalog().values() if task.family == family]


def _box(task: Task, template: str, number: int) -> gr.Textbox:
    fields = task.template(template).fields
    there = number < len(fields)
    return gr.Textbox(
        label=fields[number] if there else "", visible=there, lines=1, max_lines=8, max_length=20_000, elem_id=f"field-{number}"
    )


def _updated(fields: tuple[str, ...], number: int) -> Any:
    there = number < len(fields)
    return gr.update(label=fields[number] if there else "", visible=there, value="")


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _random_row(task: Task, data_dir: Path) -> tuple[Mapping[str, Any], str]:
    """A row of the split that is not trained on, and where it is from."""
    rows = load_rows(task, data_folder(data_dir), task.validation)
    index = random.randrange(len(rows.rows))
    return rows.rows[index], f"Row {index} of {len(rows.rows)}, {task.title}, {rows.split}"


def _nothing(shown: Shown) -> str:
    return f"<h3>{html.escape(shown.name)}</h3><p class='muted'>Fill in the fields, or load a random example, and ask.</p>"


def _answered(shown: Shown, question: Any) -> str:
    """What a model says to a question, as HTML: the answer, and the choices as bars, the likeliest first."""
    engine, head = shown.scheduler.engine, f"<h3>{html.escape(shown.name)}</h3>"
    if question.choices is None:
        ids = api.prompt_ids(engine, question.inputs, room=api.TASK_TOKENS)
        text = "".join(shown.scheduler.stream(ids, api.answer_settings(engine, api.TASK_TOKENS, stop=("\n",)))).strip()
        return f"{head}<p class='answer'>{html.escape(text) or '<span class=muted>(it says nothing)</span>'}</p>"
    item = api.branches(engine, question.inputs, question.choices)
    (scored,) = shown.scheduler.score([item])[1].result()
    found = api.scores(question.choices, item, [each.log_probs for each in scored])
    rows = sorted(zip(found.choices, found.probabilities, strict=True), key=lambda pair: -pair[1])
    bars = "".join(
        f"<li><span class='name{' best' if place == 0 else ''}'><span>{html.escape(choice.text)}</span><span>{chance:.1%}</span></span>"
        f"<span class='bar' role='img' aria-label='{chance:.1%}'><span style='width:{100 * chance:.2f}%'></span></span></li>"
        for place, (choice, chance) in enumerate(rows)
    )
    return f"{head}<p class='answer'>{html.escape(found.best.text)}</p><ul class='choices'>{bars}</ul>"


# Chat


def _chat_tab(model: Shown) -> None:
    dialogue = gr.Chatbot(
        height="60vh", label="Dialogue", feedback_options=None, allow_file_downloads=False, render_markdown=False, buttons=["copy"]
    )
    with gr.Row():
        line = gr.Textbox(placeholder="Say something", show_label=False, scale=8, max_lines=8, max_length=20_000, elem_id="say")
        temperature = gr.Slider(0, 2, 0, step=0.1, label="Temperature", scale=2, min_width=220)
    with gr.Row():
        send, stop, reset = gr.Button("Send", variant="primary"), gr.Button("Stop"), gr.Button("Reset")

    def said(text: str, turns: list[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
        return ("", [*_without_open(turns), {"role": "user", "content": text.strip()}]) if text.strip() else ("", turns)

    def stopped(text: str, turns: list[dict[str, Any]]) -> tuple[Any, Any]:
        if not turns or turns[-1]["role"] != "user":
            return gr.skip(), gr.skip()
        return text or _text(turns[-1]["content"]), _without_open(turns)

    def answered(turns: list[dict[str, Any]], warmth: float) -> Iterator[list[dict[str, Any]]]:
        if not turns or turns[-1]["role"] != "user":
            yield turns
            return
        engine, answer = model.scheduler.engine, ""
        try:
            ids, room = Chat(engine, max_new_tokens=MAX_TOKENS, history=_history(turns)).prompt_ids(_text(turns[-1]["content"]))
            settings = api.answer_settings(engine, room, temperature=warmth, seed=random.getrandbits(32))
            for piece in model.scheduler.stream(ids, settings):
                answer += piece
                yield [*turns, {"role": "assistant", "content": answer}]
        except (UserError, BusyError, ClosedError) as error:
            raise gr.Error(str(error)) from error
        if not answer:
            yield [*turns, {"role": "assistant", "content": NOTHING}]

    running = [
        event(said, [line, dialogue], [line, dialogue], queue=False).then(answered, [dialogue, temperature], dialogue, concurrency_limit=8)
        for event in (line.submit, send.click)
    ]
    stop.click(stopped, [line, dialogue], [line, dialogue], cancels=running, queue=False)
    reset.click(list, None, dialogue, cancels=running, queue=False)


def _without_open(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The dialogue without what was said last and got no answer: it was stopped, or the queue was full."""
    return turns[:-1] if turns and turns[-1]["role"] == "user" else turns


def _history(turns: list[dict[str, Any]]) -> list[Turn]:
    """What was said and answered before the last turn. By their roles: where a turn stands does not tell whose it is."""
    pairs = [pair for pair in itertools.pairwise(turns) if [turn["role"] for turn in pair] == ["user", "assistant"]]
    texts = [(_text(asked["content"]), _text(answer["content"])) for asked, answer in pairs]
    return [Turn(asked, "" if answer == NOTHING else answer) for asked, answer in texts]


def _text(content: Any) -> str:
    """The text of a message, whichever of its forms gradio gives."""
    if isinstance(content, str):
        return content
    return "".join(part if isinstance(part, str) else part.get("text", "") for part in content)


# Report and model


def _report_tab(page: Page, *, framed: bool) -> None:
    if page.report is None:
        gr.Markdown(
            "No report is shown. Make one and name it: `mtllama report RUN... --out REPORT`, then `mtllama serve MODEL --report REPORT`."
        )
    elif framed:
        gr.HTML(f"<iframe class='report' title='Report' src='{REPORT}/report.html'></iframe>")
    else:
        gr.HTML(
            f"<iframe class='report' title='Report' sandbox srcdoc='{html.escape((page.report / 'report.html').read_text(encoding='utf-8'), quote=True)}'></iframe>"
        )


def _about(page: Page) -> str:
    parts = []
    for shown in page.shown:
        about, format = shown.scheduler.engine.describe(), shown.scheduler.engine.loaded.format
        rows = {
            "parameters": f"{about['parameters']:,}",
            "computes in": about["dtype"],
            "prompt format": format.name,
            "reads at most": f"{shown.scheduler.engine.encoder.max_length:,} tokens",
            "folder": f"`{about['folder']}`",
            "delta": f"`{about['delta']}`" if about["delta"] else "none",
            "SHA-256 of the weights": f"`{about['weights_sha256'][:16]}`",
        }
        table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
        parts.append(f"## {shown.name}\n\n| | |\n|---|---|\n{table}")
        if about["recipe"]:
            parts.append(f"### Its recipe\n\n```json\n{json.dumps(about['recipe'], indent=1, ensure_ascii=False, default=str)}\n```")
    if page.delta:
        try:
            parts.append(f"## The delta\n\n```\n{info.read(page.delta).text()}\n```")
        except UserError as error:  # a published one has no record to tell from
            parts.append(f"## The delta\n\n{error}")
    return "\n\n".join(parts)
