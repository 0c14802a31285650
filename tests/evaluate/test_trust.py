"""Numbers one can trust: the self-test, one item explained, training data found again, and a rule for each odd input."""

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from mtllama import cli
from mtllama.data.mixture import Mixture, MixtureConfig
from mtllama.errors import UserError
from mtllama.evaluate import ask as asking
from mtllama.evaluate import explain, memory, protocols, runner, selftest
from mtllama.evaluate.ask import ask, boundary
from mtllama.evaluate.items import EvalConfig, Item, load_items
from mtllama.evaluate.selftest import SAMPLE, TOLERANCE, self_test
from mtllama.model.engine import Branches, Engine
from mtllama.model.find import find_model
from mtllama.model.load import LoadedModel, load_model


@pytest.fixture(scope="module")
def loaded(pico: Path) -> LoadedModel:
    return load_model(find_model(str(pico)), dtype="float32")


@pytest.fixture(scope="module")
def engine(loaded: LoadedModel) -> Engine:
    return Engine(loaded)


@pytest.fixture(scope="module")
def plain(pico: Path) -> Engine:
    return Engine(load_model(find_model(str(pico)), dtype="float32", format="plain"))


def item(inputs: str, *choices: str) -> Item:
    return Item("copa", ("accuracy",), "mt-llama", "7", 7, inputs, choices[0], choices, choices[:1])


def test_the_self_test_finds_that_scores_depend_on_their_item_alone(engine: Engine) -> None:
    largest = self_test(engine, load_items(EvalConfig(limit=4))[0])
    assert largest.passed and 0 < largest.nats <= TOLERANCE
    assert largest.items == SAMPLE and largest.log_probs > 100


@pytest.mark.parametrize("wrong", [1e-3, math.nan])
def test_the_self_test_finds_a_model_that_is_swayed_by_company(engine: Engine, monkeypatch: pytest.MonkeyPatch, wrong: float) -> None:
    score = engine.score

    def swayed(items: Sequence[Branches], *rest: Any) -> list[list[list[float]]]:
        found = score(items, *rest)
        if len(items) == 5:
            found[4][0][-1] += wrong
        return found

    monkeypatch.setattr(engine, "score", swayed)
    largest = self_test(engine, load_items(EvalConfig(limit=4))[0])
    assert not largest.passed and largest.way == "in groups of 5" and ", choice 1" in largest.where
    assert largest.nats == (pytest.approx(1e-3, rel=0.1) if wrong == 1e-3 else math.inf)


def test_the_base_models_scores_depend_on_their_item_alone(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "SAMPLE", 4)
    engine = Engine(load_model(find_model(str(smollm2)), dtype="float32"))
    largest = self_test(engine, load_items(EvalConfig(tasks=("sst2", "winogrande"), limit=4))[0])
    assert largest.passed and largest.items == 4 and largest.nats > 0


def run_cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["mtllama", *words])
    status = 0
    try:
        cli.main()
    except SystemExit as ended:
        status = int(ended.code or 0)
    return status, capsys.readouterr().out


def test_the_self_test_says_the_largest_difference_and_ends_with_its_status(
    pico: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("eval", str(pico), "--self-test", "--limit", "3", "--tasks", "copa,rte")
    status, said = run_cli(capsys, monkeypatch, *words)
    assert status == 0 and said.startswith("largest difference ") and "6 items, float32; within 0.0001" in said
    monkeypatch.setattr("mtllama.evaluate.selftest.TOLERANCE", -1.0)
    status, said = run_cli(capsys, monkeypatch, *words)
    assert status == 1 and "MORE THAN -1" in said


@pytest.mark.parametrize("kind", ["score", "generate"])
def test_a_model_that_gives_no_numbers_is_refused_by_its_name_and_the_items(pico: Path, kind: protocols.Kind) -> None:
    damaged = Engine(load_model(find_model(str(pico)), dtype="float32"))
    with torch.no_grad():
        damaged.head.weight[5, 0] = math.nan
    with pytest.raises(UserError, match=r"^copa/7: pico gives .*(nan|NaN).*its weights are damaged") as refused:
        ask(kind, damaged, [item("It rained.", "wet", "dry")])
    assert "\n" not in str(refused.value)


def test_a_tokens_log_probability_that_is_minus_infinity_is_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    score = engine.score
    monkeypatch.setattr(engine, "score", lambda *given: [[[-math.inf, *tokens[1:]] for tokens in answers] for answers in score(*given)])
    with pytest.raises(UserError, match="copa/7: pico gives a token the log-probability -inf"):
        ask("score", engine, [item("It rained.", "wet", "dry")])


def test_records_whose_scores_are_no_numbers_are_not_judged() -> None:
    record = {
        "task": "cb",
        "template": "x",
        "item_id": "3",
        "kind": "score",
        "metrics": ["accuracy"],
        "choices": ["no", "yes"],
        "gold_index": 0,
    }
    record |= {"references": ["no"], "unconditional": None, "logprobs": [[math.nan], [-1.0]]}
    with pytest.raises(UserError, match="cb/3: its log-probabilities are no numbers"):
        protocols.judge(record, "rank")


def test_an_item_is_explained_under_every_protocol(
    pico: Path, engine: Engine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, said = run_cli(capsys, monkeypatch, "eval", str(pico), "--explain", "copa/7", "--dtype", "float32")
    assert status == 0
    example = load_items(EvalConfig(tasks=("copa",)))[0][0].items[7]
    assert all(f"  | {line}" in said for line in f"Input: {example.inputs}\nOutput:".split("\n"))
    record = ask("score", engine, [example], unconditional=True)[0]
    for place, choice in enumerate(record["choices"]):
        assert f"choice ({'AB'[place]}) {choice}" in said
        for key, label in (("logprobs", "given the prompt"), ("unconditional", "after an empty prompt")):
            assert f"{label}: {sum(record[key][place]):.2f} = " in said
    verdicts = said[said.index("protocol       verdict") :].splitlines()[1:8]
    assert [line.split()[0] for line in verdicts] == [*protocols.RANKS, "generate", "mt-llama"]
    for line in verdicts[:5]:
        judged = protocols.judge(record, line.split()[0])
        assert f"{'right' if judged.correct else 'wrong'}: ({'AB'[judged.predicted or 0]})" in line
    assert said.strip().splitlines()[-1].startswith("They differ: rank")


def test_the_sentence_says_who_differs_and_why_or_that_nobody_does() -> None:
    record = {"task": "cb", "template": "x", "kind": "score", "metrics": ["accuracy"], "choices": ["no", "yes, of course"], "gold_index": 0}
    record |= {"references": ["no"], "unconditional": None}
    differ = record | {"logprobs": [[-2.0, -2.0], [-1.5] * 4]}
    verdicts = [(differ, protocol, protocols.judge(differ, protocol)) for protocol in ("rank", "rank-mean", "rank-char")]
    assert explain._difference(verdicts) == (
        "They differ: rank takes (A) no, since its sum is the largest (-4.000, the next -6.000); rank-mean, rank-char take "
        "(B) yes, of course, since over its 4 tokens it is the most likely (-1.500, the next -2.000)."
    )
    agree = record | {"logprobs": [[-1.0], [-9.0]]}
    verdicts = [(agree, protocol, protocols.judge(agree, protocol)) for protocol in ("rank", "rank-mean")]
    assert explain._difference(verdicts) == "All 2 protocols take (A) no for the answer."


@pytest.mark.parametrize(
    ("name", "message"),
    [("copa", "give TASK/ITEM"), ("copa/900", "copa has no item '900'; it has 80: 0, 1, 2, ..."), ("copa/", "give TASK")],
)
def test_an_item_that_is_not_there_is_said(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        explain.find_items(load_items(EvalConfig(tasks=("copa",)))[0], name)


def test_items_that_occur_in_the_training_data_are_told_apart(engine: Engine, tmp_path: Path) -> None:
    seen = "a gripping, beautifully photographed portrait of two sisters who run a failing circus"
    others = [
        f"sentence number {i} is about a wholly different subject, namely the {word}" for i, word in enumerate(("sea", "moon", "tax"))
    ]
    for task, rows in {
        "rotten_tomatoes/train": [{"text": seen, "label": 1}, {"text": "nothing to see here, move along please", "label": 0}],
        "sst2/validation": [{"sentence": text, "label": i % 2, "idx": i} for i, text in enumerate([others[0], seen, *others[1:]])],
    }.items():
        (tmp_path / task).parent.mkdir()
        (tmp_path / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = EvalConfig("mt-llama", ("sst2",), tmp_path, protocols=("rank", "generate"))
    mixture = ("r.yaml", MixtureConfig(dir=tmp_path, tasks=("rotten_tomatoes",)))
    results = runner.evaluate(engine, config, tmp_path / "out", mixture=mixture)
    assert results["contamination"]["recipe"] == "r.yaml" and results["contamination"]["rows"] == {"rotten_tomatoes": 2}
    for protocol in ("rank", "generate"):
        result = results["tasks"]["sst2"][protocol]
        found, clean = result["contamination"]["found"], result["contamination"]["clean"]
        assert (found["n"], clean["n"], result["n"]) == (1, 3, 4)
        assert found["value"] + 3 * clean["value"] == pytest.approx(4 * result["value"])
    records = [record for record in runner.read_run(tmp_path / "out")[1] if record["kind"] == "score"]
    right = next(protocols.judge(record, "rank").correct for record in records if record["row"] == 1)
    assert results["tasks"]["sst2"]["rank"]["contamination"]["found"]["value"] == 100 * right


def test_rows_that_were_left_out_of_training_are_not_found_in_it(engine: Engine, tmp_path: Path) -> None:
    seen = {
        "rotten_tomatoes": "a gripping, beautifully photographed portrait of two sisters who run a failing circus",
        "imdb": "the slow unravelling of a lighthouse keeper who writes letters to a whale that never answers",
    }
    (tmp_path / "sst2").mkdir()
    held = [{"sentence": text, "label": 1, "idx": i} for i, text in enumerate(seen.values())]
    (tmp_path / "sst2/validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held), encoding="utf-8")
    for place, (task, text) in enumerate(seen.items()):
        rows = [{"text": "nothing to see here, move along please", "label": 0}]
        rows.insert(place, {"text": text, "label": 1})  # not at the same place in both
        (tmp_path / task).mkdir()
        (tmp_path / f"{task}/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "elsewhere/sst2").mkdir(parents=True)
    (tmp_path / "elsewhere/sst2/validation.jsonl").write_text(json.dumps(held[0]) + "\n", encoding="utf-8")
    tasks, _ = load_items(EvalConfig("mt-llama", ("sst2",), tmp_path))
    config = MixtureConfig(dir=tmp_path, tasks=tuple(seen))
    kept = dataclasses.replace(config, decontaminate=True)
    partly = dataclasses.replace(kept, eval_dir=tmp_path / "elsewhere")
    found = {name: runner.Seen.of("r", each, tasks).report for name, each in {"all": config, "kept": kept, "partly": partly}.items()}
    assert {name: sorted(report.items("sst2")) for name, report in found.items()} == {"all": [0, 1], "kept": [], "partly": [1]}
    assert found["kept"].train_sizes == {"rotten_tomatoes": 1, "imdb": 1}
    assert [part.num_rows for part in Mixture(kept).parts] == [1, 1]


def test_where_nothing_occurs_in_the_training_data_all_items_are_clean(engine: Engine, tmp_path: Path) -> None:
    config = EvalConfig(tasks=("sst2",), limit=4, protocols=("rank",))
    result = runner.evaluate(engine, config, tmp_path / "out", mixture=("r", MixtureConfig(dir=Path("sampler"))))["tasks"]["sst2"]["rank"]
    assert result["contamination"]["found"] is None and result["contamination"]["clean"]["value"] == result["value"]


def test_a_model_that_is_too_large_for_memory_is_refused_before_it_is_loaded(
    pico: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: 100_000)
    monkeypatch.setattr("mtllama.model.load.load_model", lambda *a, **o: pytest.fail("loaded all the same"))
    monkeypatch.setattr(sys, "argv", ["mtllama", "eval", str(pico), "--out", str(tmp_path / "x"), "--dtype", "float32"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "pico does not fit into memory: its weights take 0.0 GB in float32" in capsys.readouterr().err


def test_free_memory_is_bounded_by_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 900 kB\nMemAvailable:     500 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    cpu = torch.device("cpu")
    assert memory.free_memory(cpu) == 500 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_memory(cpu) == 500 * 1024
    (tmp_path / "memory.max").write_text("300000\n")
    (tmp_path / "memory.stat").write_text("anon 100000\nfile 190000\n")
    assert memory.free_memory(cpu) == 200_000
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "none")
    (tmp_path / "memory.max").unlink()
    assert memory.free_memory(cpu) is None


def test_a_tokenizer_without_an_eos_is_refused(loaded: LoadedModel, bpe_tokenizer: Any) -> None:
    tokenizer = type(bpe_tokenizer)(tokenizer_object=bpe_tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match="the tokenizer has no EOS token, so an answer could not end; set eos_token in its config"):
        Engine(dataclasses.replace(loaded, tokenizer=tokenizer))


def test_an_empty_prompt_is_predicted_from_bos_and_that_is_recorded(plain: Engine) -> None:
    records = [ask(kind, plain, [item("", "a", "bc")], unconditional=True)[0] for kind in ("score", "generate")]
    assert [record["prompt_ids"] for record in records] == [[1], [1]] and boundary(plain)["empty_prompt_ids"] == [1]
    assert records[0]["logprobs"] == [pytest.approx(tokens, abs=1e-4) for tokens in records[0]["unconditional"]]
    assert all(math.isfinite(nats) for tokens in records[0]["logprobs"] for nats in tokens)
    bos = plain.tokenizer.bos_token
    try:
        plain.tokenizer.bos_token = None
        assert boundary(plain)["empty_prompt_ids"] == [plain.tokenizer.eos_token_id]
    finally:
        plain.tokenizer.bos_token = bos


def test_a_choice_of_no_tokens_is_scored_by_its_end_marker(plain: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    answer_ids = plain.encoder.answer_ids
    monkeypatch.setattr(plain.encoder, "answer_ids", lambda answer: answer_ids(answer) if answer else list(plain.encoder.end_ids))
    record = ask("score", plain, [item("Say nothing.", "", "something")], unconditional=True)[0]
    assert record["choice_ids"][0] == [2] and len(record["logprobs"][0]) == len(record["unconditional"][0]) == 1
    for protocol in protocols.RANKS:
        scores = protocols.judge(record, protocol).scores
        assert scores is not None and all(math.isfinite(score) for score in scores)


def test_a_sentencepiece_choice_without_text_has_its_end_marker_alone(sentencepiece_tokenizer: Any) -> None:
    from mtllama.data.prompt import PromptEncoder, find_format

    assert PromptEncoder(sentencepiece_tokenizer, find_format("plain"), 64).answer_ids("") == [sentencepiece_tokenizer.eos_token_id]


def test_a_choice_longer_than_the_context_is_scored_whole_behind_eight_tokens(engine: Engine) -> None:
    record = ask("score", engine, [item("word " * 600, "long " * 700, "short")])[0]
    assert len(record["prompt_ids"]) == 8 and record["cut"]
    assert len(record["logprobs"][0]) == len(record["choice_ids"][0]) > 700 and math.isfinite(sum(record["logprobs"][0]))


def test_unconditional_scores_do_not_depend_on_how_choices_are_grouped(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [item("Which?", f"answer {n}", "no answer") for n in range(5)]
    many = [record["unconditional"] for record in ask("score", engine, items, unconditional=True)]
    monkeypatch.setattr(asking, "_TOGETHER", 1)
    for n, each in enumerate(items):
        alone = ask("score", engine, [each], unconditional=True)[0]["unconditional"]
        assert [pytest.approx(tokens, abs=1e-4) for tokens in alone] == many[n]
