"""Evaluation of the pico model: items, records and results."""

import json
from pathlib import Path

import pytest

from mtllama.errors import UserError
from mtllama.evaluate import metrics, protocols, runner
from mtllama.evaluate.ask import ask
from mtllama.evaluate.items import EvalConfig, Item, load_items, sample_indices
from mtllama.evaluate.suites import SUITES, suite_tasks
from mtllama.model.engine import Branches, Engine, Said
from mtllama.model.find import find_model
from mtllama.model.load import load_model
from mtllama.tasks.catalog import ANSWER_TOKENS, catalog


@pytest.fixture(scope="module")
def engine(pico: Path) -> Engine:
    return Engine(load_model(find_model(str(pico)), dtype="float32"))


@pytest.fixture(scope="module")
def run(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, list[dict]]:
    """The whole sampler suite, twelve rows a task, all protocols."""
    out = tmp_path_factory.mktemp("runs") / "pico"
    runner.evaluate(engine, EvalConfig(limit=12), out)
    assert not out.with_name("pico.partial").exists()
    return runner.read_run(out)


def of(records: list[dict], task: str, protocol: str) -> list[dict]:
    return [record for record in records if record["task"] == task and protocol in protocols.of_record(record)]


def test_every_task_and_protocol_is_there_with_the_whole_schema(run: tuple[dict, list[dict]]) -> None:
    results, records = run
    assert results["schema"] == 2
    assert list(results["tasks"]) == list(SUITES["sampler"].tasks)
    assert {"model", "format", "dtype", "boundary", "templates", "seed", "limit", "data_sha256", "versions"} <= results.keys()
    assert results["model"]["weights_sha256"] and results["boundary"]["end_ids"] == [2]
    keys = {
        "metric",
        "value",
        "ci95",
        "stderr",
        "set_ci95",
        "n",
        "rows",
        "chance",
        "majority",
        "unparsed",
        "not_found",
        "cut",
        "split",
        "split_rows",
        "templates",
        "protocol",
    }
    for task, by_protocol in results["tasks"].items():
        mended = {"mt-llama-glue"} if task == "mnli" else set()
        ranks = set() if task == "squad" else set(protocols.RANKS)
        assert set(by_protocol) == {"generate", "mt-llama"} | mended | ranks
        for protocol, result in by_protocol.items():
            assert keys <= result.keys() and result["data_sha256"] == results["data_sha256"][task]
            assert result["n"] == result["rows"] == len(of(records, task, protocol)) == 12
            assert result["value"] == result[result["metric"]]
            assert result["ci95"][0] <= result["value"] <= result["ci95"][1]
            assert result["set_ci95"] == result["templates"]["mt-llama"]["set_ci95"] == {}  # none of these has a metric of a whole set
            assert result["templates"]["mt-llama"]["value"] == result["value"] == result["over_templates"]["median"]
    assert results["tasks"]["squad"]["generate"]["metric"] == "f1" and "em" in results["tasks"]["squad"]["generate"]
    assert results["tasks"]["openbookqa"]["rank"]["chance"] == 25.0


def test_results_can_be_computed_again_from_the_records(run: tuple[dict, list[dict]]) -> None:
    results, records = run
    compared = 0
    for task, by_protocol in results["tasks"].items():
        for protocol in by_protocol.keys() & {"rank", "generate"}:
            mine = of(records, task, protocol)
            if task == "squad":
                value = sum(metrics.f1(record["text"], record["references"]) for record in mine)
            elif protocol == "rank":
                sums = [[sum(tokens) for tokens in record["logprobs"]] for record in mine]
                value = sum(record["choices"][each.index(max(each))] == record["gold"] for record, each in zip(mine, sums, strict=True))
            else:
                value = sum(metrics.normalize(record["text"]) == metrics.normalize(record["gold"]) for record in mine)
            assert by_protocol[protocol]["value"] == pytest.approx(100 * value / len(mine))
            compared += 1
    assert compared == 15


def test_there_is_one_record_a_row_and_kind_whatever_the_number_of_protocols(run: tuple[dict, list[dict]]) -> None:
    _, records = run
    keys = [(record["task"], record["template"], record["row"], record["kind"]) for record in records]
    assert len(keys) == len(set(keys)) == 12 * (8 + 7)
    assert all(("logprobs" in record) == (record["kind"] == "score") != ("text" in record) for record in records)


def test_records_hold_the_exact_prompt_and_ids(run: tuple[dict, list[dict]], engine: Engine) -> None:
    _, records = run
    ranked = [record for record in records if record["kind"] == "score"]
    assert len(ranked) == 84
    for record in ranked:
        assert record["prompt"].startswith("Input: ") and record["prompt"].endswith("\nOutput:")
        assert engine.tokenizer.decode(record["prompt_ids"]) == record["prompt"]
        for place, (choice, ids) in enumerate(zip(record["choices"], record["choice_ids"], strict=True)):
            assert ids[-1] == engine.tokenizer.eos_token_id
            assert engine.tokenizer.decode(ids[:-1]) == " " + choice
            assert len(record["logprobs"][place]) == len(record["unconditional"][place]) == len(ids)


def test_the_unconditional_scores_are_those_after_the_formats_empty_prompt(run: tuple[dict, list[dict]], engine: Engine) -> None:
    record = of(run[1], "copa", "rank-pmi")[0]
    ids = engine.tokenizer("Input: \nOutput:").input_ids
    theirs = engine.score([Branches(ids, [record["choice_ids"][1]])])[0][0]
    assert record["unconditional"][1] == pytest.approx(theirs, abs=1e-4)


def test_a_limit_takes_the_same_items_in_file_order_for_every_protocol(run: tuple[dict, list[dict]]) -> None:
    _, records = run
    by_protocol = {protocol: [record["item_id"] for record in of(records, "copa", protocol)] for protocol in ("rank", "generate")}
    assert by_protocol["rank"] == by_protocol["generate"]
    assert by_protocol["rank"] == sorted(by_protocol["rank"], key=int)
    assert by_protocol["rank"] != [str(i) for i in range(12)]
    assert sample_indices(80, 12, "0/copa") == [int(i) for i in by_protocol["rank"]]
    assert sample_indices(80, 12, "1/copa") != sample_indices(80, 12, "0/copa")
    assert sample_indices(5, 12, "x") == [0, 1, 2, 3, 4]


def test_the_primary_protocol_ranks_choices_and_generates_answers(engine: Engine, tmp_path: Path) -> None:
    results = runner.evaluate(engine, EvalConfig(tasks=("squad", "sst2"), protocols=("primary",), limit=2), tmp_path / "out")
    assert {task: list(by) for task, by in results["tasks"].items()} == {"squad": ["generate"], "sst2": ["rank"]}


def test_a_task_without_data_is_left_out_of_a_suite_but_refused_by_name(engine: Engine, tmp_path: Path) -> None:
    data = tmp_path / "data" / "sst2"
    data.mkdir(parents=True)
    (data / "validation.jsonl").write_text(json.dumps({"sentence": "fine", "label": 1, "idx": 0}) + "\n", encoding="utf-8")
    config = EvalConfig(suite="mt-llama", data_dir=tmp_path / "data", protocols=("rank",))
    results = runner.evaluate(engine, config, tmp_path / "out")
    assert list(results["tasks"]) == ["sst2"]
    assert "squad" in results["missing"] and len(results["missing"]) == 10
    with pytest.raises(UserError, match="copa: no file"):
        runner.evaluate(engine, EvalConfig(suite="mt-llama", tasks=("copa",), data_dir=tmp_path / "data"), tmp_path / "out2")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"suite": "mtllama"}, "unknown suite"),
        ({"protocols": ("ranking",)}, "unknown protocol"),
        ({"limit": 0}, "--limit is 0"),
        ({"tasks": ("cop",)}, "did you mean copa"),
        ({"tasks": ("xquad-en",)}, "not in the suite sampler"),
        ({"tasks": ("squad",), "protocols": ("rank",)}, "applies to none"),
        ({"tasks": ("sst2", "squad"), "protocols": ("rank",)}, "squad: the protocol rank applies to none of its items; it has no choices"),
        ({"tasks": ("sst2",), "protocols": ("mt-llama-glue",)}, "sst2: the protocol mt-llama-glue applies to none"),
        ({"split": "test"}, "no task of the suite sampler can be measured: squad: no file for the split test"),
    ],
)
def test_what_cannot_be_measured_is_refused(engine: Engine, tmp_path: Path, config: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        runner.evaluate(engine, EvalConfig(**config), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_task_to_which_no_protocol_applies_is_named_among_what_is_missing() -> None:
    tasks, missing = load_items(EvalConfig(limit=2, protocols=("rank",)))
    assert [each.task.name for each in tasks] == list(SUITES["sampler"].tasks[1:])
    assert missing == {"squad": "squad: the protocol rank applies to none of its items; it has no choices: add generate to --protocol"}


def squad_data(folder: Path, *answers: object) -> Path:
    (folder / "squad").mkdir(parents=True)
    rows = [{"id": str(i), "title": "t", "context": "c", "question": "q", "answers": each} for i, each in enumerate(answers)]
    (folder / "squad" / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "sst2").mkdir()
    (folder / "sst2" / "validation.jsonl").write_text('{"sentence": "good", "label": 1, "idx": 0}\n', encoding="utf-8")
    return folder


def test_questions_that_their_text_does_not_answer_are_skipped_and_counted(tmp_path: Path) -> None:
    data = squad_data(tmp_path, {"text": ["a"], "answer_start": [0]}, {"text": [], "answer_start": []})
    tasks, _ = load_items(EvalConfig("mt-llama", ("squad",), data))
    assert [item.item_id for item in tasks[0].items] == ["0"] and tasks[0].skipped == 1


def test_a_row_that_its_prompt_cannot_ask_leaves_its_task_out_of_a_suite_but_is_refused_by_name(tmp_path: Path) -> None:
    data = squad_data(tmp_path, {"text": ["a"], "answer_start": [0]}, {"answer_start": [0]})
    tasks, missing = load_items(EvalConfig("mt-llama", (), data))
    assert [each.task.name for each in tasks] == ["sst2"]
    assert "squad/validation.jsonl: template 'mt-llama' of squad, row 1:" in missing["squad"] and "\n" not in missing["squad"]
    with pytest.raises(UserError, match="of squad, row 1:"):
        load_items(EvalConfig("mt-llama", ("squad", "sst2"), data))


def test_the_folder_that_one_stands_in_can_be_the_output(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    results = runner.evaluate(engine, EvalConfig(tasks=("sst2",), limit=1, protocols=("rank",)), Path("."))
    assert json.loads((tmp_path / "here" / "results.json").read_text(encoding="utf-8")) == results
    assert [file.name for file in tmp_path.iterdir()] == ["here"]


def test_summaries_may_be_longer_and_have_lines_and_those_that_end_at_the_limit_are_counted(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {
        "xsum": [{"document": f"text {i}", "summary": "short", "id": str(i)} for i in range(3)],
        "adversarial_qa_dbert": [
            {"id": "a", "title": "t", "context": "c", "question": "q", "answers": {"text": ["c"], "answer_start": [0]}}
        ],
    }
    for task, each in rows.items():
        (tmp_path / task).mkdir()
        (tmp_path / task / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each), encoding="utf-8")
    asked: list[tuple[int, int, tuple[str, ...]]] = []

    def answer(prompts: list[list[int]], *, max_new_tokens: int, stop: tuple[str, ...], advance: object) -> list[Said]:
        asked.append((len(prompts), max_new_tokens, stop))
        return [Said("one line\nand another", number != 1) for number in range(len(prompts))]

    monkeypatch.setattr(engine, "answer", answer)
    config = EvalConfig("train-validation", tuple(rows), tmp_path)
    results = runner.evaluate(engine, config, tmp_path / "out")
    assert sorted(asked) == [(1, 64, ("\n",)), (3, 256, ())]
    assert results["max_new_tokens"] == {"xsum": 256, "adversarial_qa_dbert": 64}
    assert results["stop"] == {"xsum": [], "adversarial_qa_dbert": ["\n"]}
    assert results["tasks"]["xsum"]["generate"]["at_limit"] == 2
    texts = [record["text"] for record in runner.read_run(tmp_path / "out")[1] if record["task"] == "xsum"]
    assert texts == ["one line\nand another"] * 3
    suites = {name: suite_tasks(name) for name in SUITES if name != "train-validation"}
    assert not any(task.summary for tasks in suites.values() for task in tasks) and catalog()["multi_news"].summary


def test_a_format_whose_answers_end_at_a_line_break_ends_summaries_there(pico: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(load_model(find_model(str(pico)), dtype="float32", format="mt-llama-train"))
    stops = []
    monkeypatch.setattr(engine, "answer", lambda prompts, **given: stops.append(given["stop"]) or [Said("", False)])
    ask("generate", engine, [Item("xsum", ("rougeL",), "x", "1", 1, "text", "short", None, ("short",), 256, ())])
    assert stops == [("\n",)]


def test_a_text_ends_at_the_limit_unless_its_end_marker_or_a_stop_string_ends_it(engine: Engine) -> None:
    prompts = [engine.encoder.prompt_ids(f"Say {word}.", room=64)[0] for word in ("yes", "no", "fog", "wet", "sea")]
    ids = engine.continue_ids(prompts, max_new_tokens=6)
    said = engine.answer(prompts, max_new_tokens=6, stop=())
    assert [each.at_limit for each in said] == [new[-1] not in engine.ends for new in ids] and any(each.at_limit for each in said)
    assert [each.text for each in said] == engine.generate(prompts, max_new_tokens=6, stop=())
    place = next(i for i, each in enumerate(said) if each.at_limit and each.text)
    (stopped,) = engine.answer([prompts[place]], max_new_tokens=6, stop=(said[place].text[-1],))
    assert not stopped.at_limit and len(stopped.text) < len(said[place].text)


def test_rows_whose_label_is_hidden_are_skipped_and_counted(engine: Engine, tmp_path: Path) -> None:
    data = tmp_path / "data" / "sst2"
    data.mkdir(parents=True)
    rows = [{"sentence": f"text {i}", "label": label, "idx": i} for i, label in enumerate((1, -1, 0))]
    (data / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = EvalConfig(suite="mt-llama", tasks=("sst2",), data_dir=tmp_path / "data", protocols=("rank",))
    result = runner.evaluate(engine, config, tmp_path / "out")["tasks"]["sst2"]["rank"]
    assert (result["n"], result["skipped"]) == (2, 1)


def test_an_output_folder_is_never_overwritten_unasked(engine: Engine, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x", encoding="utf-8")
    config = EvalConfig(tasks=("sst2",), limit=1, protocols=("rank",))
    with pytest.raises(UserError, match="not empty"):
        runner.evaluate(engine, config, out)
    assert (out / "precious").read_text(encoding="utf-8") == "x"
    runner.evaluate(engine, config, out, overwrite=True)
    assert not (out / "precious").exists() and (out / "results.json").is_file()


def test_a_prompt_that_is_too_long_is_cut_and_counted(pico: Path, tmp_path: Path) -> None:
    data = tmp_path / "data" / "squad"
    data.mkdir(parents=True)
    context = "word " * 2000 + "the end"
    row = {
        "id": "a",
        "title": "t",
        "context": context,
        "question": "what?",
        "answers": {"text": ["the end"], "answer_start": [context.index("the end")]},
    }
    (data / "validation.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    engine = Engine(load_model(find_model(str(pico)), dtype="float32"))
    config = EvalConfig(suite="mt-llama", tasks=("squad",), data_dir=tmp_path / "data")
    runner.evaluate(engine, config, tmp_path / "out")
    results, records = runner.read_run(tmp_path / "out")
    assert results["tasks"]["squad"]["generate"]["cut"] == 1
    assert results["max_new_tokens"] == {"squad": 64} and results["stop"] == {"squad": ["\n"]}
    assert len(records[0]["prompt_ids"]) <= 512 - ANSWER_TOKENS
