"""The page in a real browser: a task asked of two models, a chat, a report, what the model is; nothing is loaded from elsewhere."""

import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import PATIENCE, Served, run_server

from mtllama import api
from mtllama.data.prompt import Turn
from mtllama.errors import UserError
from mtllama.model.engine import Engine
from mtllama.model.find import find_model
from mtllama.model.load import load_model
from mtllama.serve.server import PageSettings, bind, start
from mtllama.tasks.catalog import catalog, load_rows, sampler_dir

pytest.importorskip("gradio")
pages = pytest.importorskip("mtllama.serve.page")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WAIT = 1000 * PATIENCE
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    (folder / "report.html").write_text("<!doctype html><title>r</title><h1>Zero-shot evaluation</h1>")
    return folder


@pytest.fixture(scope="module")
def other(pico: Path) -> Engine:
    return Engine(load_model(find_model(str(pico)), dtype="bfloat16", format="plain"))


@pytest.fixture(scope="module")
def paged(engine: Engine, other: Engine, report: Path) -> Iterator[Served]:
    with run_server(engine, page=PageSettings(other, report)) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium is installed")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(params=SIZES)
def page(request: pytest.FixtureRequest, browser: Any, paged: Served) -> Iterator[Any]:
    """The page, opened; at the end nothing came from elsewhere and nothing went wrong in it."""
    width, height = SIZES[request.param]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme="dark" if width < 500 else "light")
    opened, strangers, faults = context.new_page(), [], []
    opened.on("request", lambda asked: None if asked.url.startswith((paged.url, "data:", "blob:")) else strangers.append(asked.url))
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.goto(paged.url, wait_until="domcontentloaded")
    opened.get_by_role("button", name="Random example").wait_for(timeout=WAIT)
    yield opened
    context.close()
    assert not strangers and not faults


def test_a_task_is_filled_in_and_asked_of_both_models(page: Any, paged: Served, other: Engine) -> None:
    field = page.locator("#field-0 textarea")
    assert field.input_value() == ""
    page.get_by_role("button", name="Random example").click()
    wait_for(lambda: field.input_value() != "")
    values = {
        name: page.locator(f"#field-{i} textarea").input_value() for i, name in enumerate(("premise", "question", "choice1", "choice2"))
    }
    rows = load_rows(catalog()["copa"], sampler_dir()).rows
    assert any(all(row[name] == value for name, value in values.items()) for row in rows)
    page.get_by_role("button", name="Ask").click()
    page.locator("#answer-1 .choices .bar").first.wait_for(timeout=WAIT)
    for number, engine in enumerate((paged.engine, other)):
        told = api.Model(engine).run_task("copa", **values)
        assert told.scores is not None
        shown = page.locator(f"#answer-{number}").inner_text()
        assert told.answer in shown
        assert sorted(re.findall(r"[\d.]+%", shown)) == sorted(f"{chance:.1%}" for chance in told.scores.probabilities)
    assert page.locator("#prompt textarea").input_value() == api.Model(paged.engine).run_task("copa", **values).prompt
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_other_data_sets_bring_their_own_fields_and_a_missing_one_is_told(page: Any) -> None:
    choose(page, "Family", "Extractive QA")
    wait_for(lambda: page.get_by_label("Data set").input_value() != "copa")
    choose(page, "Data set", "squad")
    wait_for(lambda: page.locator("#field-0").inner_text().strip() in ("question", "context"))
    wait_for(lambda: page.locator("#field-2").count() == 0 or not page.locator("#field-2").is_visible())
    page.locator("#field-0 textarea").fill("Where is Paris?")
    page.locator("#field-1 textarea").fill("Paris is in France.")
    page.get_by_role("button", name="Ask").click()
    wait_for(lambda: "Where is Paris?" in page.locator("#prompt textarea").input_value())
    assert page.locator("#answer-0 .answer").count() == 1 and page.locator("#answer-0 .choices").count() == 0
    choose(page, "Family", "Sentence completion")
    wait_for(lambda: page.locator("#field-3").count() == 1 and page.locator("#field-3").is_visible())
    page.get_by_role("button", name="Ask").click()
    page.get_by_text("there are no two different choices").first.wait_for(timeout=WAIT)


def test_a_chat_streams_and_is_stopped_and_forgotten(page: Any, engine: Engine, monkeypatch: pytest.MonkeyPatch, paged: Served) -> None:
    step = engine.step

    def slow(*args: Any) -> Any:
        time.sleep(0.05)
        return step(*args)

    monkeypatch.setattr(engine, "step", slow)
    page.get_by_role("tab", name="Chat").click()
    page.locator("#say textarea").fill("Is fog wet?")
    page.get_by_role("spinbutton").fill("2")
    page.get_by_role("spinbutton").press("Tab")
    page.get_by_role("button", name="Send").click()
    page.locator(".bot").first.wait_for(timeout=WAIT)
    before = page.locator(".bot").last.inner_text()
    wait_for(lambda: page.locator(".bot").last.inner_text() != before or paged.metric("mtllama_running") == 0)
    page.get_by_role("button", name="Stop").click()
    wait_for(lambda: paged.metric("mtllama_running") == 0)
    assert page.locator(".user").count() >= 1 and page.locator("#say textarea").input_value() == ""
    page.get_by_role("button", name="Reset", exact=True).click()
    wait_for(lambda: page.locator(".bot").count() == 0)


def test_what_is_stopped_before_its_first_word_is_taken_back(
    page: Any, engine: Engine, monkeypatch: pytest.MonkeyPatch, paged: Served
) -> None:
    begin, goes_on, read = engine.begin, threading.Event(), list[list[int]]()

    def held(prompts: list[list[int]], cache: Any) -> Any:
        read.extend(prompts)
        assert goes_on.wait(PATIENCE)
        return begin(prompts, cache)

    monkeypatch.setattr(engine, "begin", held)
    monkeypatch.setattr(pages, "MAX_TOKENS", 8)  # so short that no turn has to be forgotten
    say = page.locator("#say textarea")
    page.get_by_role("tab", name="Chat").click()
    say.fill("First?")
    page.get_by_role("button", name="Send").click()
    wait_for(lambda: len(read) == 1 and page.locator(".user").count() == 1)
    with page.expect_response("**/cancel", timeout=WAIT):
        page.get_by_role("button", name="Stop").click()
    wait_for(lambda: say.input_value() == "First?" and page.locator(".user").count() == 0)
    goes_on.set()
    for number, text in enumerate(("Second?", "Third?"), start=1):
        say.fill(text)
        page.get_by_role("button", name="Send").click()
        wait_for(lambda number=number: page.locator(".bot").count() == number and paged.metric("mtllama_running") == 0)  # type: ignore[misc]
        wait_for(lambda: say.input_value() == "")
    asked = [engine.tokenizer.decode(ids) for ids in read]
    assert "First?" not in asked[1] + asked[2] and asked[1].count("Input:") == 1
    assert asked[2].startswith("Input: Second?\nOutput:") and asked[2].endswith("Input: Third?\nOutput:")


def test_a_dialogue_is_read_by_its_roles(engine: Engine) -> None:
    def turn(role: str, text: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": text}]}

    turns = [turn("user", "lost"), turn("user", "one"), turn("assistant", "1"), turn("user", "two"), turn("assistant", pages.NOTHING)]
    assert pages._history([*turns, turn("user", "three")]) == [Turn("one", "1"), Turn("two", "")]
    assert pages._without_open([*turns, turn("user", "three")]) == turns == pages._without_open(turns)


def test_report_and_model_are_shown(page: Any, paged: Served) -> None:
    page.get_by_role("tab", name="Report").click()
    page.frame_locator("iframe.report").get_by_role("heading", name="Zero-shot evaluation").wait_for(timeout=WAIT)
    page.get_by_role("tab", name="Model").click()
    about = page.locator(".about").last
    about.wait_for(timeout=WAIT)
    text = about.inner_text()
    assert f"{paged.engine.describe()['parameters']:,}" in text and "prompt format" in text and "mtllama" in text and "plain" in text


def test_with_a_key_the_page_has_a_log_in_and_the_interface_its_key(engine: Engine, browser: Any, report: Path) -> None:
    with run_server(engine, api_key="secret", page=PageSettings(report=report)) as served:
        assert httpx.get(f"{served.url}/v1/models").status_code == httpx.get(f"{served.url}/metrics").status_code == 401
        assert (
            httpx.get(f"{served.url}/config").status_code == 401 and httpx.get(f"{served.url}/report-files/report.html").status_code != 200
        )
        opened = browser.new_page()
        opened.goto(served.url, wait_until="domcontentloaded")
        opened.get_by_label("username").fill("mtllama")
        opened.get_by_label("password").fill("secret")
        opened.get_by_role("button", name="Login").click()
        opened.get_by_role("button", name="Random example").wait_for(timeout=WAIT)
        opened.close()


def test_a_folder_without_a_report_is_told(engine: Engine, tmp_path: Path) -> None:
    with bind("127.0.0.1", 0) as bound, pytest.raises(UserError, match=r"has no report\.html; make it: mtllama report"):
        start(engine, bound, page=PageSettings(report=tmp_path))


def test_the_page_takes_no_files(paged: Served) -> None:
    for path in ("/gradio_api/upload", "/gradio_api/upload?upload_id=x", "/gradio_api/upload/", "//gradio_api/upload", "/upload"):
        answer = httpx.post(f"{paged.url}{path}", files={"files": ("x.bin", b"x" * 1000)}, follow_redirects=True)
        assert answer.status_code in (403, 404, 405), path
    assert "has no files" in httpx.post(f"{paged.url}/gradio_api/upload", files={"files": ("x", b"x")}).json()["error"]["message"]


def test_the_page_serves_no_file_but_its_own(paged: Served) -> None:
    assert httpx.get(paged.url).status_code == 200
    for path in (
        "/file=/etc/hosts",
        "/gradio_api/file=/etc/hosts",
        "//gradio_api//file=/etc/hosts",
        "/gradio_api/file/etc/hosts",
        f"/gradio_api/file={paged.url}/health",
        f"/gradio_api/proxy={paged.url}/health",
        "/report-files/../../etc/hosts",
        "/report-files/%2e%2e/%2e%2e/etc/hosts",
    ):
        answer = httpx.get(f"{paged.url}{path}")
        assert answer.status_code in (403, 404) and "localhost" not in answer.text


def test_a_path_in_a_message_is_not_read(paged: Served, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("swordfish")
    file = {"path": str(secret), "meta": {"_type": "gradio.FileData"}}
    names = list(httpx.get(f"{paged.url}/gradio_api/info").json()["named_endpoints"])
    assert {"/ask", "/answered", "/stopped"} <= set(names)
    with httpx.Client(base_url=f"{paged.url}/gradio_api", timeout=60) as client:

        def told(name: str, data: list[Any]) -> str:
            asked = client.post(f"/call{name}", json={"data": data})
            return client.get(f"/call{name}/{asked.json()['event_id']}").text if asked.status_code == 200 else asked.text

        def said(content: Any) -> list[dict[str, Any]]:
            return [{"role": "user", "content": content}]

        text = {"type": "text", "text": "harmless"}
        read = [name for name in names for data in ([said([text]), 0], ["x", said([text])]) if "harmless" in told(name, data)]
        assert read, "where no path stands in it, a message is read, and told back"
        for turns in (said([{"type": "file", "file": file}]), said([text, {"type": "file", "file": file}]), said(file), file, [file]):
            for name in names:
                for data in (["x", turns], [turns, 0], [turns]):
                    found = told(name, data) + client.post(f"/run{name}", json={"data": data}).text
                    assert "swordfish" not in found
                    for path in re.findall(r'"path": ?"([^"]+)"', found):
                        assert path == str(secret) or not Path(path).exists(), f"{name} made a copy"
                        assert client.get(f"/file={path}").status_code == 403


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/score", 405), ("GET", "/v1/nothing", 404), ("PUT", "/v1/x/y", 404)])
def test_behind_a_page_too_errors_have_openais_form(paged: Served, method: str, path: str, status: int) -> None:
    answer = httpx.request(method, f"{paged.url}{path}")
    assert answer.status_code == status and set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_every_tab_fits_into_the_window_in_the_colours_that_are_asked_for(browser: Any, paged: Served, size: str, colours: Any) -> None:
    width, height = SIZES[size]
    opened = browser.new_page(viewport={"width": width, "height": height}, color_scheme=colours)
    opened.goto(paged.url, wait_until="domcontentloaded")
    opened.get_by_role("button", name="Random example").wait_for(timeout=WAIT)
    for tab in ("Task", "Chat", "Report", "Model"):
        opened.get_by_role("tab", name=tab).click()
        opened.get_by_role("tabpanel").locator("visible=true").first.wait_for(timeout=WAIT)
        assert opened.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), tab
        if folder := os.environ.get("MTLLAMA_SCREENSHOTS"):
            opened.screenshot(path=Path(folder) / f"{tab}-{size}-{colours}.png")
    light = opened.evaluate("getComputedStyle(document.body).backgroundColor.match(/[\\d.]+/g).slice(0, 3).every(part => part > 200)")
    assert light == (colours == "light")
    opened.close()


def test_what_visitors_ask_waits_in_a_queue_with_an_end(paged: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on = threading.Event()
    monkeypatch.setattr(pages, "_answered", lambda *rest: str(goes_on.wait(PATIENCE)))
    boxes = max(len(template.fields) for task in catalog().values() for template in task.prompts)
    row = load_rows(catalog()["copa"], sampler_dir()).rows[0]
    template = catalog()["copa"].prompts[0]
    data = ["copa", template.name, *(row[field] for field in template.fields), *[""] * (boxes - len(template.fields))]
    try:
        answers = [httpx.post(f"{paged.url}/gradio_api/call/ask", json={"data": data}, timeout=PATIENCE) for _ in range(pages.QUEUE + 20)]
    finally:
        goes_on.set()
    assert [answer.status_code for answer in answers[: pages.QUEUE]] == [200] * pages.QUEUE
    assert answers[-1].status_code == 503 and "full" in answers[-1].text
    for path in ("run", "api"):  # past the queue
        assert httpx.post(f"{paged.url}/gradio_api/{path}/ask", json={"data": data}, timeout=PATIENCE).status_code in (401, 404)


def test_the_page_keeps_no_history_of_calls(paged: Served) -> None:
    assert httpx.get(f"{paged.url}/config").json()["run_history"] is False
    assert httpx.get(f"{paged.url}/gradio_api/runs").status_code == 404
    assert httpx.post(f"{paged.url}/gradio_api/run-history/connect", json={"bucket_id": "a/b"}).status_code in (404, 405)


def choose(page: Any, label: str, value: str) -> None:
    page.get_by_label(label, exact=True).click()
    page.get_by_role("option", name=value, exact=True).first.click()


def wait_for(true: Any) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline and threading.main_thread().is_alive()
        time.sleep(0.05)
