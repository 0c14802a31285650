"""Our engine under lm-eval gives what lm-eval's own `hf` model gives, and in its layout."""

import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from mtllama import cli
from mtllama.data.prompt import find_format
from mtllama.errors import UserError
from mtllama.evaluate.ask import ask
from mtllama.evaluate.items import EvalConfig, load_items
from mtllama.model.engine import Branches, Engine
from mtllama.model.find import ModelFolder, find_model
from mtllama.model.load import LoadedModel, load_model
from mtllama.tasks.catalog import sampler_dir

needs_lm_eval = pytest.mark.skipif("not __import__('importlib.util').util.find_spec('lm_eval')", reason="lm-eval is not installed")
"""The extra `harness` is optional."""


@pytest.fixture(scope="module")
def engine(pico: Path) -> Engine:
    return Engine(load_model(find_model(str(pico)), dtype="float32"))


@pytest.fixture(scope="module")
def theirs(pico: Path) -> Any:
    """Lm-eval's own model of the same folder."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(pico), dtype="float32", device="cpu", batch_size=3)


@pytest.fixture(scope="module")
def ours(engine: Engine) -> Any:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from mtllama.evaluate.harness import EngineLM

    return EngineLM(engine)


def requests(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, argument, number) for number, argument in enumerate(arguments)]


def texts() -> list[str]:
    rows = (sampler_dir() / "adversarial_qa_dbert" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(row)["context"] for row in rows[:12]]


def pairs() -> list[tuple[str, str]]:
    """Prompts and continuations of all kinds, some of them far longer than the 512 tokens that the model reads."""
    long = " ".join(texts())
    found = [(text[:120], continuation) for text in texts() for continuation in (" yes", " no, not at all", " yes", "\n", "ing")]
    return [
        *found,
        ("A blank ends it ", "here"),
        ("two  ", " here"),
        ("", "nothing stands before it"),
        (long, " the end"),
        (long, long[:700]),
        ("short", " " + long[:700]),
    ]


def assert_close(ours: Sequence[tuple[float, bool]], theirs: Sequence[tuple[float, bool]]) -> None:
    assert len(ours) == len(theirs) > 0
    for (score, greedy), (score_of_theirs, greedy_of_theirs) in zip(ours, theirs, strict=True):
        assert score == pytest.approx(score_of_theirs, abs=1e-3) and greedy == greedy_of_theirs
    assert len({round(score, 2) for score, _ in theirs}) > len(theirs) // 2


@needs_lm_eval
def test_log_likelihoods_equal_those_of_lm_eval(ours: Any, theirs: Any) -> None:
    asked = requests("loglikelihood", pairs())
    assert any(len(ours.tok_encode(a + b)) > ours.max_length for a, b in pairs())
    assert_close(ours.loglikelihood(asked), theirs.loglikelihood(asked))


@needs_lm_eval
def test_what_the_model_would_say_itself_is_called_greedy(ours: Any, theirs: Any, engine: Engine) -> None:
    prompts = [text[:100] for text in texts()]
    said = engine.continue_ids([ours.tok_encode(prompt) for prompt in prompts], max_new_tokens=3)
    asked = [(("", ""), ours.tok_encode(prompt), ids) for prompt, ids in zip(prompts, said, strict=True)]
    asked += [(("", ""), ids, [*answer[:-1], 7]) for _, ids, answer in asked]
    found = ours._loglikelihood_tokens(asked)
    assert [greedy for _, greedy in found] == [True] * 12 + [False] * 12
    assert_close(found, theirs._loglikelihood_tokens(asked, disable_tqdm=True))


@needs_lm_eval
def test_scores_of_our_own_items_equal_those_of_lm_eval_on_the_same_ids(engine: Engine, theirs: Any) -> None:
    """Within 1e-3 nat, on every ranked task of the embedded data, end markers included."""
    tasks, _ = load_items(EvalConfig(limit=3))
    asked, scores, apart = [], [], 0
    for each in tasks:
        if each.items[0].choices:
            for record in ask("score", engine, each.items):
                asked += [(("", ""), record["prompt_ids"], ids) for ids in record["choice_ids"]]
                scores += [sum(tokens) for tokens in record["logprobs"]]
                for choice, ids in zip(record["choices"], record["choice_ids"], strict=True):
                    apart += engine.tokenizer(record["prompt"] + " " + choice).input_ids != record["prompt_ids"] + ids[:-1]
    assert len(asked) > 40
    answers = theirs._loglikelihood_tokens(asked, disable_tqdm=True)
    assert max(abs(score - other) for score, (other, _) in zip(scores, answers, strict=True)) < 1e-3
    assert apart == 0, "behind a colon, tokenised apart is tokenised together"


@needs_lm_eval
@pytest.mark.real
def test_scores_of_the_real_model_equal_those_of_lm_eval(smollm2: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    engine = Engine(load_model(find_model(str(smollm2)), dtype="float32"))
    tasks, _ = load_items(EvalConfig(tasks=("openbookqa", "winogrande"), limit=2))
    items = [item for each in tasks for item in each.items]
    branches = [Branches(engine.encoder.prompt_ids(i.inputs)[0], [engine.encoder.answer_ids(c) for c in i.choices or ()]) for i in items]
    scores = [sum(answer) for item in engine.score(branches) for answer in item]
    asked = [(("", ""), item.prompt, answer) for item in branches for answer in item.answers]
    found = HFLM(pretrained=str(smollm2), dtype="float32", device="cpu", batch_size=4)._loglikelihood_tokens(asked, disable_tqdm=True)
    assert len(asked) == 12
    assert max(abs(score - other) for score, (other, _) in zip(scores, found, strict=True)) < 1e-3


@needs_lm_eval
def test_rolling_log_likelihoods_equal_those_of_lm_eval(ours: Any, theirs: Any) -> None:
    long = " ".join(texts())
    assert len(ours.tok_encode(long)) > 2 * ours.max_length
    asked = requests("loglikelihood_rolling", [(long,), ("one",), (texts()[0],)])
    for score, other in zip(ours.loglikelihood_rolling(asked), theirs.loglikelihood_rolling(asked), strict=True):
        assert score == pytest.approx(other, abs=1e-2)


@needs_lm_eval
def test_generated_text_equals_that_of_lm_eval(ours: Any, theirs: Any) -> None:
    options = [{"until": ["\n", "a"], "max_gen_toks": 9}, {"until": "e", "max_gen_toks": 12}, {"until": [], "max_new_tokens": 5}]
    long = " ".join(texts())
    asked = [(text, {**each, "do_sample": False}) for text in (*(text[:80] for text in texts()), long) for each in options]
    found = ours.generate_until(requests("generate_until", asked))
    assert found == theirs.generate_until(requests("generate_until", [(text, dict(each)) for text, each in asked]), disable_tqdm=True)
    assert len(set(found)) > len(found) // 2


@needs_lm_eval
def test_sampling_is_refused_in_one_line(ours: Any) -> None:
    with pytest.raises(UserError, match="greedy"):
        ours.generate_until(requests("generate_until", [("a", {"do_sample": True, "temperature": 0.7})]))


@needs_lm_eval
def test_pairs_that_are_other_ids_when_tokenised_apart_are_counted(engine: Engine) -> None:
    from mtllama.evaluate.harness import EngineLM

    model = EngineLM(engine)

    def ids(text: str) -> list[int]:
        return list(engine.tokenizer(text).input_ids)

    words = [(word[:-2], word[-2:]) for text in texts() for word in text.split() if len(word) > 4]
    merged = next((a, b) for a, b in words if ids(a + b)[: len(ids(a))] != ids(a))
    model.loglikelihood(requests("loglikelihood", [("Say it:", " yes"), merged, ("Say it: ", "yes")]))
    assert (model.boundaries.pairs, model.boundaries.differing, model.boundaries.examples) == (3, 1, [merged])


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder of three tasks over files of our own: choices, text, and perplexity."""
    rows = [
        {"question": text[:90], "options": ["yes", "no, it is not", text[90:110]], "gold": number % 3, "text": text}
        for number, text in enumerate(texts())
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    shared = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}, "test_split": "test"}
    choices = {
        "task": "own_choices",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "options",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    text = {
        "task": "own_text",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{options[0]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    rolling = {
        "task": "own_perplexity",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    for each in (choices, text, rolling):
        (tmp_path / f"{each['task']}.yaml").write_text(yaml.safe_dump({**each, **shared}), encoding="utf-8")
    return tmp_path


NAMES = ("own_choices", "own_text", "own_perplexity")


@needs_lm_eval
def test_tasks_of_lm_eval_run_with_the_numbers_of_its_own_model(
    engine: Engine, theirs: Any, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks import TaskManager

    from mtllama.evaluate import harness
    from mtllama.evaluate.harness import run_harness

    simple_evaluate = functools.partial(harness.simple_evaluate, bootstrap_iters=10)
    monkeypatch.setattr(harness, "simple_evaluate", simple_evaluate)
    out = tmp_path / "out"
    found = run_harness(engine, NAMES, limit=10, out=out, include=tasks)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    expected = simple_evaluate(theirs, tasks=list(NAMES), limit=10, task_manager=manager)
    assert expected is not None
    compared = 0
    for name in NAMES:
        for metric, value in expected["results"][name].items():
            if isinstance(value, float):
                assert found["results"][name][metric] == pytest.approx(value, abs=1e-4)
                compared += 1
    assert compared >= 6
    mine, others = found["n-samples"], expected["n-samples"]
    assert mine == others and mine["own_choices"]["effective"] == 10
    (written,) = out.rglob("results_*.json")
    content = json.loads(written.read_text(encoding="utf-8"))
    assert content["results"]["own_choices"] == json.loads(json.dumps(found["results"]["own_choices"]))
    assert content["mtllama"]["weights_sha256"] and content["mtllama"]["boundaries"]["pairs"] > 0
    assert {"results", "configs", "versions", "n-shot", "n-samples", "config", "task_hashes"} <= content.keys()
    (samples,) = out.rglob("samples_own_choices_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 10 and len(rows[0]["filtered_resps"]) == 3
    with pytest.raises(UserError, match="not empty"):
        run_harness(engine, NAMES, limit=1, out=out, include=tasks)
    run_harness(engine, NAMES[:1], limit=1, out=out, include=tasks, overwrite=True)
    (written,) = out.rglob("results_*.json")
    assert list(json.loads(written.read_text(encoding="utf-8"))["results"]) == ["own_choices"]


@needs_lm_eval
def test_a_task_that_lm_eval_does_not_have_is_named(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    from mtllama.evaluate import harness

    monkeypatch.setattr(harness, "TaskManager", lambda **options: SimpleNamespace(all_tasks=["arc_easy"]))  # reading all takes long
    for tasks in (["arc_easy", "arc_esay"], []):
        with pytest.raises(UserError, match=r"no task (arc_esay|of no name);"):
            harness.run_harness(engine, tasks)


@needs_lm_eval
def test_a_sentencepiece_tokenizer_gives_lm_evals_ids(sentencepiece_tokenizer: Any, engine: Engine) -> None:
    from lm_eval.models.huggingface import HFLM

    from mtllama.evaluate.harness import EngineLM

    loaded = engine.loaded
    other = LoadedModel(
        ModelFolder(Path(), "other"), loaded.model, sentencepiece_tokenizer, find_format("mtllama"), loaded.dtype, loaded.max_length
    )
    model, theirs = EngineLM(Engine(other)), HFLM(pretrained=loaded.model, tokenizer=sentencepiece_tokenizer, batch_size=1)
    assert model.prefix_token_id == theirs.prefix_token_id == 1
    for text in ("Paris", "<s>Paris", "", " Paris"):
        assert model.tok_encode(text) == theirs.tok_encode(text)
    for context, continuation in (("The town is", " Paris"), ("Town:", " Paris"), ("Town: ", "Paris"), ("Town:", "\n")):
        assert model._encode_pair(context, continuation) == theirs._encode_pair(context, continuation)
    assert model.boundaries.pairs == 4


@pytest.mark.parametrize(
    ("words", "ranks", "said"),
    [
        (("--format", "native"), "1", "--harness does not use --format: data"),
        (("--tasks", "copa", "--protocol", "rank"), "1", "--harness does not use --tasks, --protocol: data"),
        (("--data-dir", "sampler", "--split", "test", "--seed", "1"), "1", "--harness does not use --data-dir, --split, --seed: data"),
        (("--recipe", "r.yaml", "--suite", "t0", "--templates", "all"), "1", "--harness does not use --suite, --templates, --recipe: data"),
        ((), "2", "--harness runs in one process; start it without torchrun"),
    ],
)
def test_options_that_lm_evals_tasks_do_not_use_are_refused_before_the_model_is_loaded(
    words: tuple[str, ...], ranks: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.evaluate, "_harness", lambda *given: pytest.fail("went on all the same"))
    monkeypatch.setenv("WORLD_SIZE", ranks)
    monkeypatch.setattr(sys, "argv", ["mtllama", "eval", "nowhere", "--harness", "arc_easy", "--out", str(tmp_path / "out"), *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_the_command_replaces_a_folder_of_lm_evals_results_only_when_asked(
    pico: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(cli.evaluate, "_harness", lambda source, *given: asked.append(given))
    (tmp_path / "results.json").write_text("{}", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["mtllama", "eval", str(pico), "--harness", "arc_easy", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        cli.main()
    assert "is not empty" in capsys.readouterr().err and not asked
    sys.argv.append("--overwrite")
    cli.main()
    assert asked == [(("arc_easy",), None, tmp_path, "auto", None, None, True)]


def test_without_lm_eval_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "mtllama.evaluate.harness", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'mtllama\[harness\]'"):
        import mtllama.evaluate.harness  # noqa: F401
