"""LoRA: adapters alone are trained and kept; merged or as an adapter folder it is the same model, for us and for peft."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from ranks_job import interrupted_after
from transformers import AutoModelForCausalLM, AutoTokenizer

from mtllama import folders
from mtllama.data.batching import pack
from mtllama.data.mixture import Mixture, MixtureConfig
from mtllama.data.prompt import PromptEncoder
from mtllama.errors import UserError
from mtllama.model import adapter
from mtllama.model.find import find_model
from mtllama.model.load import load_model
from mtllama.train import journal, loop, lora, state
from mtllama.train.objective import Objective, target_losses
from mtllama.train.recipe import LoraConfig, Recipe, TrainConfig
from mtllama.weights import delta
from mtllama.weights.restore import apply, open_target
from mtllama.weights.shards import CheckpointReader

peft = pytest.importorskip("peft")
LORA = LoraConfig(rank=4, alpha=16, dropout=0.1)


def recipe(pico: Path, out: Path, config: LoraConfig = LORA, **train: Any) -> Recipe:
    settings: dict[str, Any] = {"examples": 48, "batch_size": 8, "lr": 3e-3, "max_length": 256, "tokens_per_pass": 700, "dtype": "float32"}
    return Recipe(
        out=out,
        train=TrainConfig(**{**settings, "save_every": 2, **train}),
        model=str(pico),
        mixture=MixtureConfig(dir=Path("sampler")),
        lora=config,
    )


def kept(config: LoraConfig = LORA, **changes: Any) -> LoraConfig:
    return LoraConfig(**{**vars(config), "merge": False, **changes})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(folder)
    return {name: reader.tensor(name) for name in reader}


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def loss(folder: Path) -> float:
    """Mean loss on what the runs here are trained on."""
    loaded = load_model(find_model(str(folder)), format="mtllama", train=True)
    encoder, mixture = PromptEncoder(loaded.tokenizer, loaded.format, 256), Mixture(MixtureConfig(dir=Path("sampler")))
    examples = [encoder.encode(example.inputs, example.targets) for example in filter(None, map(mixture.__getitem__, range(48)))]
    with torch.no_grad():
        return float(torch.cat([target_losses(loaded.model, batch) for batch in pack([e for e in examples if e], 2000)]).mean())


@pytest.fixture(scope="module")
def merged(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return loop.run(recipe(pico, tmp_path_factory.mktemp("merged") / "model"))


@pytest.mark.parametrize("tokens_per_pass", [64, 2048])
def test_what_is_frozen_has_no_gradients(pico: Path, tmp_path: Path, tokens_per_pass: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Head and embedding make theirs by themselves where they are trained: one that nobody asks for is as large as a vocabulary is long."""
    seen: list[tuple[bool, bool]] = []
    backward = loop.backward

    def looked_at(objective: Objective, *rest: Any) -> torch.Tensor:
        losses = backward(objective, *rest)
        seen.extend((each.requires_grad, each.grad is not None) for each in objective.parameters())
        return losses

    monkeypatch.setattr(loop, "backward", looked_at)
    loop.run(recipe(pico, tmp_path / "m", examples=8, tokens_per_pass=tokens_per_pass))
    assert set(seen) == {(True, True), (False, False)}


@pytest.fixture(scope="module")
def apart(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return loop.run(recipe(pico, tmp_path_factory.mktemp("apart") / "adapter", kept()))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Merged models are kept in a place of the test's own."""
    monkeypatch.setenv("MTLLAMA_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_the_loss_falls_and_only_the_named_matrices_change(merged: Path, pico: Path) -> None:
    assert loss(merged) < loss(pico) - 0.1
    before, after = weights(pico), weights(merged)
    assert before.keys() == after.keys() and all(before[name].dtype == after[name].dtype for name in before)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.split(".")[-2] in LORA.targets} and len(changed) == 14
    assert AutoModelForCausalLM.from_pretrained(merged).generation_config.eos_token_id == AutoTokenizer.from_pretrained(merged).eos_token_id


def test_an_adapter_folder_is_the_merged_model_for_us_and_for_peft(apart: Path, merged: Path, pico: Path) -> None:
    assert not (apart / "config.json").exists() and not list(apart.glob("model*.safetensors"))
    found = find_model(str(apart))
    assert equal(weights(found.folder), weights(merged))
    base = AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, apart).merge_and_unload().state_dict()
    for name, tensor in weights(merged).items():
        torch.testing.assert_close(theirs[name].to(tensor.dtype), tensor, rtol=1e-2, atol=1e-6)
    assert peft.PeftConfig.from_pretrained(apart).base_model_name_or_path == str(pico)


def test_an_adapter_folder_is_a_model_wherever_one_is_asked_for(apart: Path, merged: Path, pico: Path, home: Path, tmp_path: Path) -> None:
    found = find_model(str(apart))
    assert found.name == "pico + tuned" and found.own_format() == "mtllama" and found.folder.is_relative_to(home)
    assert find_model(str(apart)) == found and len(list((home / "merged").iterdir())) == 1  # merged once
    loaded = load_model(found, dtype="float32")
    assert loaded.tokenizer.chat_template == AutoTokenizer.from_pretrained(merged).chat_template
    delta.make(pico, found.folder, tmp_path / "delta", base_name="pico")
    apply(open_target(pico, [tmp_path / "delta"]), tmp_path / "restored", pico, tmp_path / "delta")
    assert equal(weights(tmp_path / "restored"), weights(merged))


def test_another_base_at_the_same_place_is_merged_anew(apart: Path, pico: Path, tmp_path: Path) -> None:
    base, mine = Path(shutil.copytree(pico, tmp_path / "base")), Path(shutil.copytree(apart, tmp_path / "adapter"))
    config = folders.read_json(mine / adapter.CONFIG)
    folders.write_json(mine / adapter.CONFIG, {**config, "base_model_name_or_path": str(base)})
    first = find_model(str(mine)).folder
    tensors = {name: tensor * 2 for name, tensor in weights(base).items()}
    safetensors.torch.save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    second = find_model(str(mine)).folder
    assert first != second and not equal(weights(first), weights(second))


def test_a_base_with_a_delta_is_trained_and_merged(pico: Path, merged: Path, tmp_path: Path) -> None:
    delta.make(pico, merged, tmp_path / "delta", base_name="pico")
    values = {**vars(recipe(pico, tmp_path / "model")), "model": None, "base": str(pico), "delta": str(tmp_path / "delta")}
    through = loop.run(Recipe(**values))
    assert equal(weights(through), weights(loop.run(recipe(merged, tmp_path / "plain"))))
    with pytest.raises(UserError, match=r"lora\.merge=false needs a base in a folder"):
        loop.run(Recipe(**{**values, "out": tmp_path / "kept", "lora": kept()}))


def test_the_state_holds_the_adapters_alone_and_resumes_with_the_same_bits_in_spite_of_dropout(
    pico: Path, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = recipe(pico, tmp_path / "model")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_interrupts", lambda: interrupted_after(3))
        with pytest.raises(UserError, match="interrupted after step 3"):
            loop.run(run)
    checkpoint = tmp_path / "model.partial" / "checkpoints" / "step-0000003"
    with safetensors.safe_open(checkpoint / state.rank_file(0), "pt") as file:
        names = set(file.keys())
    assert len(names) == 3 * 2 * 14 and all(".lora_A." in name or ".lora_B." in name for name in names)
    assert equal(weights(loop.run(run)), weights(merged))
    without = loop.run(recipe(pico, tmp_path / "without", LoraConfig(rank=4, alpha=16)))
    assert not equal(weights(without), weights(merged))  # dropout does something


def test_the_base_is_kept_in_the_compute_dtype_and_the_adapters_in_float32(pico: Path) -> None:
    model = load_model(find_model(str(pico)), train=True, weights=torch.bfloat16).model
    lora.add(model, LORA)
    lora.start("", model, seed=0)
    dtypes = {name: (parameter.dtype, parameter.requires_grad) for name, parameter in model.named_parameters()}
    assert {value for name, value in dtypes.items() if "lora_" in name} == {(torch.float32, True)}
    assert {value for name, value in dtypes.items() if "lora_" not in name} == {(torch.bfloat16, False)}
    factors = [
        (module.lora_A["default"].weight, module.lora_B["default"].weight) for module in model.modules() if hasattr(module, "lora_A")
    ]
    assert len(factors) == 14 and all(float(a.detach().std()) > 0 and not b.any() for a, b in factors)
    assert len({float(a.detach().sum()) for a, _ in factors}) == 14  # each is drawn apart


def test_another_seed_is_another_start_and_drops_others(pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def first_factors(seed: int) -> list[torch.Tensor]:
        model = load_model(find_model(str(pico)), train=True).model
        lora.add(model, LORA)
        lora.start("", model, seed=seed)
        return [module.lora_A["default"].weight.detach() for module in model.modules() if hasattr(module, "lora_A")]

    starts = [first_factors(seed) for seed in (0, 1, 12345, 2**40)]
    assert all(len({tuple(each[place].flatten().tolist()) for each in starts}) == 4 for place in range(14))
    begin = lora.start
    monkeypatch.setattr(lora, "start", lambda prefix, part, seed: begin(prefix, part, 0))  # from one start: dropout alone differs

    def losses(seed: int) -> list[float]:
        out = loop.run(recipe(pico, tmp_path / f"seed-{seed}", kept(dropout=0.3), examples=24, seed=seed))
        return [json.loads(line)["loss"] for line in (out / journal.METRICS).read_text(encoding="utf-8").splitlines()]

    one, other = losses(0), losses(1)
    assert one[0] == other[0] and one[1:] != other[1:]  # adapters start as nothing: the first loss is the base's


def test_where_peft_is_missing_one_line_says_what_to_install(pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"run: pip install 'mtllama\[lora\]'"):
        loop.run(recipe(pico, tmp_path / "model"))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("qproj",), "the model has no matrix 'qproj'; choose among down_proj, gate_proj"),
        (("lm_head",), "shares its weights with the embedding"),
    ],
)
def test_targets_that_cannot_be_are_named(targets: tuple[str, ...], message: str, pico: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        loop.run(recipe(pico, tmp_path / "model", LoraConfig(targets=targets)))


def change(key: str, value: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        folders.write_json(folder / adapter.CONFIG, {**folders.read_json(folder / adapter.CONFIG), key: value})

    return damage


def tensors(edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / adapter.WEIGHTS
        safetensors.torch.save_file(edit(safetensors.torch.load_file(file)), file)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change("peft_type", "IA3"), "is not of a LoRA adapter"),
        (change("use_dora", True), "use_dora is True, which only peft can merge"),
        (change("modules_to_save", ["lm_head"]), "modules_to_save"),
        (change("bias", "all"), "bias is 'all'"),
        (change("init_lora_weights", "pissa"), "init_lora_weights is 'pissa'"),
        (change("alpha_pattern", {"q_proj": 2}), "alpha_pattern"),
        (change("base_model_name_or_path", ""), "names no base"),
        (lambda folder: (folder / adapter.WEIGHTS).write_bytes(b"no"), "cannot be read"),
        (tensors(lambda found: dict(list(found.items())[1:])), "is not a pair of LoRA factors"),
        (tensors(lambda found: {name.replace("layers.1.", "layers.7."): t for name, t in found.items()}), "do not fit there"),
    ],
)
def test_what_only_peft_can_merge_is_refused_in_one_line(damage: Callable[[Path], None], message: str, apart: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(apart, tmp_path / "adapter"))
    (folder / folders.MANIFEST).unlink()
    find_model(str(folder))
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        find_model(str(folder))
    assert "\n" not in str(error.value)


def test_adapters_by_peft_itself_are_merged_as_peft_does(pico: Path, tmp_path: Path) -> None:
    """With the scale of rank-stabilised LoRA, and ranks that differ by matrix."""
    base = AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32)
    base.config._name_or_path = str(pico)
    config = peft.LoraConfig(
        r=3, lora_alpha=5, use_rslora=True, rank_pattern={"k_proj": 2}, target_modules=["q_proj", "k_proj"], init_lora_weights=False
    )
    model = peft.get_peft_model(base, config)
    model.save_pretrained(tmp_path / "theirs")
    ours = weights(find_model(str(tmp_path / "theirs")).folder)
    theirs = model.merge_and_unload().state_dict()
    before = weights(pico)
    assert sum(not torch.equal(ours[name], before[name]) for name in before) == 4
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name].to(tensor.dtype), tensor, rtol=1e-2, atol=1e-6)
