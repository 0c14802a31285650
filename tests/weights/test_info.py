"""`delta info`: what it says is what the two models say, in the text, the JSON and the figure."""

import dataclasses
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from safetensors.torch import load_file, save_file

from mtllama import cli, folders
from mtllama.errors import UserError
from mtllama.weights import delta, info
from mtllama.weights.manifest import Mode
from mtllama.weights.shards import SINGLE

Tensors = dict[str, torch.Tensor]


def checkpoint(folder: Path, tensors: Tensors) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    return folder


def look(room: Path, before: Tensors, after: Tensors, mode: Mode = "bits") -> info.Info:
    """Make a delta of two checkpoints and look at it."""
    delta.make(checkpoint(room / "base", before), checkpoint(room / "target", after), room / "delta", base_name="the base", mode=mode)
    return info.read(room / "delta")


def noisy(tensors: Tensors, scale: float = 1e-2) -> Tensors:
    generator = torch.Generator().manual_seed(5)
    return {name: (t.float() + scale * torch.randn(t.shape, generator=generator)).to(t.dtype) for name, t in tensors.items()}


def random(names: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.bfloat16) -> Tensors:
    generator = torch.Generator().manual_seed(2)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in names.items()}


def llama(layers: int = 12, rows: int = 30) -> dict[str, tuple[int, ...]]:
    inside = {"self_attn.q_proj": (8, 8), "self_attn.k_proj": (4, 8), "mlp.up_proj": (16, 8), "input_layernorm": (8,)}
    within = {f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in inside.items()}
    return {"model.embed_tokens.weight": (rows, 8), "model.norm.weight": (8,), "lm_head.weight": (rows, 8), **within}


def expected(before: Tensors, after: Tensors, names: list[str]) -> dict[str, float]:
    """The figures of several tensors of one shape in both models, from their definition."""
    assert names
    equal = sum(int((before[n].view(torch.int16) == after[n].view(torch.int16)).sum()) for n in names)
    size = sum(after[n].numel() for n in names)
    norm, base = (
        math.sqrt(sum(float(t.double().square().sum()) for t in each))
        for each in ([after[n].double() - before[n].double() for n in names], [before[n] for n in names])
    )
    return {"tensors": len(names), "weights": size, "equal_share": equal / size, "norm": norm, "relative_norm": norm / base}


def test_every_layer_and_kind_says_what_the_two_models_say(tmp_path: Path) -> None:
    before = random(llama())
    after = noisy(before)
    after["model.norm.weight"] = before["model.norm.weight"]
    after["model.layers.3.mlp.up_proj.weight"] = before["model.layers.3.mlp.up_proj.weight"]
    found = look(tmp_path, before, after).to_json()
    layers = [f"model.layers.{i}" for i in range(12)]
    outside = ["lm_head", "model.embed_tokens", "model.norm"]
    assert [part["name"] for part in found["layers"]] == [*layers, *outside], "layers in the order of their numbers, then the rest"
    assert [part["name"] for part in found["kinds"]] == ["input_layernorm", "up_proj", "k_proj", "q_proj"]
    sizes = {name: t.numel() for name, t in load_file(tmp_path / "delta" / SINGLE).items()}
    assert not {"model.norm.weight", "model.layers.3.mlp.up_proj.weight"} & set(sizes)
    for table, member in (
        ("layers", lambda name, group: name.startswith(f"{group}.")),
        ("kinds", lambda name, group: "layers" in name and f".{group}." in name),
        ("total", lambda name, group: True),
    ):
        for row in found[table] if table != "total" else [found["total"]]:
            names = [name for name in after if member(name, row["name"])]
            for key, value in expected(before, after, names).items():
                assert row[key] == pytest.approx(value, rel=1e-5), (row["name"], key)
            assert row["bytes"] == sum(sizes.get(name, 0) for name in names)
            assert row["inexact"] == 0
    shares = [part["equal_share"] for part in found["layers"]]
    assert shares[-1] == 1 and 0 < shares[3] < 1 and shares[3] > 2 * shares[4], "the models do differ, and not alike"
    assert found["equal_tensors"] == ["model.layers.3.mlp.up_proj.weight", "model.norm.weight"]


def test_sizes_are_those_on_the_disk(tmp_path: Path) -> None:
    before = random(llama())
    found = look(tmp_path, before, noisy(before))
    shard = (tmp_path / "delta" / SINGLE).stat().st_size
    weights = sum(t.numel() for t in before.values())
    assert found.to_json()["bytes"] == sum(file.stat().st_size for file in (tmp_path / "delta").rglob("*") if file.is_file()) > shard
    assert (found.num_weight_bytes, found.target_bytes) == (shard, 2 * weights)
    assert found.to_json()["bits_per_weight"] == pytest.approx(8 * shard / weights)
    assert found.to_json()["target_bits_per_weight"] == 16


def test_tensors_that_are_new_resized_lost_recast_or_untied_are_named(tmp_path: Path) -> None:
    before = random({**llama(2), "old.buffer": (3,), "model.cast.weight": (4, 4)})
    del before["lm_head.weight"]
    after = noisy(before)
    del after["old.buffer"]
    after["model.embed_tokens.weight"] = torch.cat([after["model.embed_tokens.weight"], torch.ones(1, 8, dtype=torch.bfloat16)])
    after["lm_head.weight"] = after["model.embed_tokens.weight"].clone()
    after["model.cast.weight"] = after["model.cast.weight"].float()
    after["head.new.weight"] = torch.tensor([0.0, 3.0, 4.0], dtype=torch.bfloat16)
    found = look(tmp_path, before, after)
    told = found.to_json()
    assert told["base_unused"] == ["old.buffer"] and told["new_tensors"] == ["head.new.weight"] and told["equal_tensors"] == []
    assert told["resized_tensors"] == ["lm_head.weight (30 x 8 to 31 x 8)", "model.embed_tokens.weight (30 x 8 to 31 x 8)"]
    assert told["recast_tensors"] == ["model.cast.weight (BF16 to F32)"]
    assert told["renamed_tensors"] == ["lm_head.weight (on model.embed_tokens.weight)"]
    new = next(part for part in told["layers"] if part["name"] == "head.new")
    assert (new["equal_share"], new["norm"], new["base_norm"], new["relative_norm"]) == (0, 5, 0, None), "zeros are equal to no base"
    for line in (
        "the target has not: 1 (old.buffer)",
        "resized: 2 (lm_head.weight (30 x 8 to 31 x 8), ",
        "new in the target: 1 (head.new.weight)",
    ):
        assert line in found.text()


def test_the_text_has_all_tables_within_100_columns_and_names_few_tensors(tmp_path: Path) -> None:
    before = random(llama(40, rows=5000))
    after = noisy(before)
    for name in list(after)[5:15]:
        after[name] = before[name]
    text = look(tmp_path, before, after).text()
    tables = text.split("\n\n")[1:]
    assert [len(table.splitlines()) for table in tables] == [1 + 40 + 3 + 1, 1 + 4 + 1]
    assert all(len(line) <= 100 for table in tables for line in table.splitlines())
    assert len({len(line) for line in tables[0].splitlines()}) == 1, "columns stand in line"
    assert "tensors equal to the base's: 10 (" in text and "and 6 more" in text
    assert "mode bits: every weight comes back bit for bit" in text and "delta of the base" in text
    assert f"made with mtllama {folders.versions()['mtllama']}" in text
    assert "inexact" not in text


def test_an_arithmetic_delta_says_how_many_weights_are_not_exact(tmp_path: Path) -> None:
    before = random(llama(2), torch.float16)
    after = noisy(before, scale=1.0)
    found = look(tmp_path, before, after, mode="add")
    wrong = {name: int((before[name] + (after[name] - before[name]) != after[name]).sum()) for name in after}
    assert sum(wrong.values()) > 0
    told = found.to_json()
    assert told["total"]["inexact"] == sum(wrong.values())
    assert told["layers"][1]["inexact"] == sum(count for name, count in wrong.items() if ".1." in name)
    assert told["total"]["bytes"] == found.target_bytes
    assert f"{sum(wrong.values())} of {sum(t.numel() for t in after.values()):,} weights do not come back exact" in found.text()
    assert f"{sum(wrong.values()):,}" == next(line for line in found.text().splitlines() if line.startswith("total")).split()[-1]


def test_names_of_any_architecture_make_layers_and_kinds(tmp_path: Path) -> None:
    shapes = {
        f"{stack}.{i}.{name}": (4, 4)
        for stack in ("decoder.block", "vision.h")
        for i in (0, 2, 10)
        for name in (
            "attn.proj.weight",
            "attn.proj.bias",
            "cross.attn.proj.weight",
            "mlp.proj.weight",
            "mlp.experts.0.w1.weight",
            "mlp.experts.1.w1.weight",
            "scale",
        )
    }
    before = random({**shapes, "wte": (3, 2), "vision.ln.bias": (4,)})
    found = look(tmp_path, before, noisy(before))
    layers = [f"{stack}.{i}" for stack in ("decoder.block", "vision.h") for i in (0, 2, 10)]
    assert [part.name for part in found.parts] == [*layers, "vision.ln", "wte"]
    assert {kind.name: kind.num_tensors for kind in found.kinds} == {
        "attn.proj": 6,
        "cross.attn.proj": 6,
        "proj.bias": 6,
        "mlp.proj": 6,
        "w1": 12,
        "scale": 6,
    }
    assert len(found.cells) == 6 * 6
    assert found.cells["vision.h.2", "w1"].num_weights == 32


def test_a_delta_without_a_difference_or_without_layers_has_nothing_to_hide(tmp_path: Path) -> None:
    before = {"a.weight": torch.zeros(4, dtype=torch.bfloat16), "b.empty": torch.zeros(0, 3), "c": torch.tensor(7)}
    found = look(tmp_path, before, before)
    assert (found.all.num_bytes, found.all.equal_share, found.all.relative_norm) == (0, 1, 0 / 7)
    assert found.kinds == () and [part.equal_share for part in found.parts] == [1, None, 1]
    assert [part.relative_norm for part in found.parts] == [None, None, 0]
    assert len(found.text().split("\n\n")) == 2
    info.write_figure(found, tmp_path / "a.png")


def test_norms_that_overflowed_are_null_in_json(tmp_path: Path) -> None:
    before = random(llama(1))
    found = look(tmp_path, before, noisy(before))
    entries = dict(found.manifest.entries)
    entries["model.norm.weight"] = dataclasses.replace(entries["model.norm.weight"], base_norm=math.inf)
    dataclasses.replace(found.manifest, entries=entries).write(tmp_path / "delta")
    overflowed = info.read(tmp_path / "delta")
    told = json.loads(json.dumps(overflowed.to_json(), allow_nan=False))
    (norm,) = (part for part in told["layers"] if part["name"] == "model.norm")
    assert norm["base_norm"] is None and norm["relative_norm"] is None and norm["norm"] > 0
    assert told["total"]["relative_norm"] is None and "inf" not in overflowed.text()
    info.write_figure(overflowed, tmp_path / "a.png")


@pytest.mark.parametrize("layers", [1, 150])
def test_the_figure_is_a_whole_png_and_nothing_is_left_beside(tmp_path: Path, layers: int) -> None:
    before = random(llama(layers))
    after = noisy(before)
    after["model.norm.weight"] = before["model.norm.weight"]
    found, file = look(tmp_path, before, after), tmp_path / "new" / "figure.png"
    info.write_figure(found, file)
    info.write_figure(found, file)  # a second time it is replaced
    assert list(file.parent.iterdir()) == [file]
    pixels = (255 * imread(file)).round().astype(int)
    height, width, _ = pixels.shape
    assert 1000 < width < 2000 and 500 < height < 4000
    for colour in ((0xD5, 0xDA, 0xE0), (0x4F, 0x94, 0xDC)):  # the unchanged cell, the bars
        assert (pixels[..., :3] == colour).all(axis=-1).sum() > 100


def test_a_figure_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = random(llama(1))
    found, file = look(tmp_path, before, noisy(before)), tmp_path / "room" / "figure.png"
    file.parent.mkdir()
    file.write_bytes(b"old")

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folders.os, "fsync", full)
    with pytest.raises(UserError, match="no space left on the disk"):
        info.write_figure(found, file)
    assert file.read_bytes() == b"old" and list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize(("name", "message"), [("a.jpg", "does not end in .png"), ("folder.png", "is a folder")])
def test_a_figure_goes_to_a_png_file(tmp_path: Path, name: str, message: str) -> None:
    before = random(llama(1))
    found = look(tmp_path, before, noisy(before))
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match=message):
        info.write_figure(found, tmp_path / name)
    assert not (tmp_path / "a.jpg").exists()


def test_other_folders_and_damaged_deltas_are_one_clear_error(tmp_path: Path) -> None:
    before = random(llama(1))
    look(tmp_path, before, noisy(before))
    with pytest.raises(UserError, match=r"has no delta\.json.*published by other tools"):
        info.read(tmp_path / "base")
    with pytest.raises(UserError, match="does not exist"):
        info.read(tmp_path / "nowhere")
    short = tmp_path / "short"
    shutil.copytree(tmp_path / "delta", short)
    tensors = load_file(short / SINGLE)
    del tensors["lm_head.weight"]
    save_file(tensors, short / SINGLE)
    with pytest.raises(UserError, match=r"short: the difference of lm_head\.weight is missing"):
        info.read(short)
    (short / SINGLE).unlink()
    with pytest.raises(UserError, match="holds no weights"):
        info.read(short)


def test_the_command_prints_the_text_or_one_json_document(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def out(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["mtllama", "delta", "info", *words])
        cli.main()
        return capsys.readouterr().out

    before = random(llama(2))
    found, folder, figure = look(tmp_path, before, noisy(before)), str(tmp_path / "delta"), tmp_path / "figure.png"
    assert out(folder) == f"{found.text()}\n"
    told: Any = json.loads(out(folder, "--json", "--figure", str(figure)))
    assert told == found.to_json() and figure.stat().st_size > 10_000
    assert out(folder, "--figure", str(figure)).endswith(f"\n{figure}\n")
