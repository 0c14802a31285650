"""The quickstart on the pico model: all steps, resumed where it was cut off, never over other files."""

import json
from pathlib import Path

import pytest

from mtllama import quickstart
from mtllama.errors import UserError
from mtllama.evaluate import items
from mtllama.train import loop

SMALL = ("train.examples=16", "train.batch_size=8", "train.lr=1e-3")


@pytest.fixture(autouse=True)
def few_items(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six items a task are enough to see the steps."""
    whole = items.sample_indices
    monkeypatch.setattr(items, "sample_indices", lambda n, limit, seed: whole(n, 6, seed))


def test_a_run_that_was_cut_off_goes_on_and_does_nothing_twice(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "quick"

    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(quickstart.delta, "make", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quickstart.run(out, base=str(pico), recipe_overrides=SMALL)
    assert (out / "tuned" / "config.json").is_file() and not (out / "delta").exists()
    trained = (out / "tuned" / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()

    with monkeypatch.context() as patched:
        patched.setattr(loop, "run", lambda *a, **o: pytest.fail("trained twice"))
        quickstart.run(out, base=str(pico), recipe_overrides=SMALL)
    shown = capsys.readouterr()
    assert "[done]" in shown.err and "[to do]" in shown.err
    assert (out / "tuned" / "model.safetensors").stat().st_mtime_ns == trained
    for made in (
        "eval-base/results.json",
        "delta/delta.json",
        "restored/config.json",
        "eval-tuned/records.jsonl",
        "report/report.html",
        "chat.txt",
    ):
        assert (out / made).stat().st_size > 0, made
        assert str(out / made.split("/")[0]) in shown.out or made.startswith("eval")
    assert "Unseen data sets (3): mean" in shown.out and "mtllama chat --base" in shown.out
    assert set(json.loads((out / quickstart.STATE).read_text(encoding="utf-8"))) == {step.title for step in _steps(out, pico)}

    quickstart.run(out, base=str(pico), recipe_overrides=SMALL)
    assert "[to do]" not in capsys.readouterr().err


def _steps(out: Path, pico: Path) -> list[quickstart.Step]:
    from mtllama.train.recipe import load_recipe

    return quickstart._plan(out, load_recipe(Path("quickstart"), SMALL), str(pico))


def test_a_folder_of_other_files_or_another_recipe_is_refused(pico: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x", encoding="utf-8")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"other files|not a quickstart"):
            quickstart.run(tmp_path / "other", base=str(pico), recipe_overrides=SMALL, overwrite=overwrite)
    assert (tmp_path / "other" / "thesis.tex").is_file()
    from mtllama.train.recipe import load_recipe

    mine = tmp_path / "mine"
    quickstart._claim(mine, load_recipe(Path("quickstart"), SMALL), overwrite=False)
    with pytest.raises(UserError, match="another recipe"):
        quickstart.run(mine, base=str(pico), recipe_overrides=("train.examples=8",))
