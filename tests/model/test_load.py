"""From what a user calls a model to a model: names, folders, hub ids, base + delta; and one clear line for the rest."""

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

from mtllama import folders
from mtllama.errors import UserError
from mtllama.model import convert, find, load
from mtllama.model.find import ModelFolder, find_model
from mtllama.model.load import load_model, pick_dtype
from mtllama.weights import delta, restore
from mtllama.weights.manifest import FILES
from mtllama.weights.shards import SINGLE


def tuned_copy(pico: Path, folder: Path) -> Path:
    """The pico with other weights, and a manifest as training leaves it."""
    shutil.copytree(pico, folder)
    tensors = safetensors.torch.load_file(pico / SINGLE)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        tensors[name] = (tensor.float() + 0.01 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
    safetensors.torch.save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    folders.write_manifest(folder, "model", name="pico + tuned", format="plain", recipe={"name": "tuned"})
    return folder


@pytest.fixture(scope="module")
def tuned(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tuned_copy(pico, tmp_path_factory.mktemp("load") / "tuned")


@pytest.fixture(scope="module")
def difference(pico: Path, tuned: Path) -> Path:
    delta.make(pico, tuned, tuned.parent / "difference", base_name="pico")
    return tuned.parent / "difference"


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_is_found_and_called_by_its_manifest_or_its_own_name(pico: Path, tuned: Path) -> None:
    assert find_model(str(pico)) == ModelFolder(pico, "pico")
    assert find_model(str(tuned)) == ModelFolder(tuned, "pico + tuned")


def test_a_name_is_found_in_the_home_folder(pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTLLAMA_HOME", str(tmp_path))
    folder = shutil.copytree(pico, tmp_path / "models" / convert.NAME)
    folders.write_manifest(tmp_path / "models" / convert.NAME, "base", conversion=convert.CONVERSION)
    monkeypatch.setattr(convert, "convert", lambda *args: pytest.fail("converted again"))
    assert find_model(convert.NAME) == ModelFolder(Path(folder), convert.DESCRIPTION)


def test_a_name_is_converted_once_and_again_by_a_version_that_writes_another_folder(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTLLAMA_HOME", str(tmp_path))
    calls = []

    def fake(gguf_file: Path, out: Path) -> None:
        calls.append(gguf_file)
        shutil.copytree(pico, out, dirs_exist_ok=True)
        folders.write_manifest(out, "base", conversion=convert.CONVERSION)

    monkeypatch.setattr(convert, "find_gguf", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(convert, "convert", fake)
    assert find_model(convert.NAME).folder == find_model(convert.NAME).folder == find.fetch(convert.NAME)
    assert calls == [tmp_path / "model.gguf"]
    monkeypatch.setattr(convert, "CONVERSION", convert.CONVERSION + 1)  # a newer version writes another folder
    find_model(convert.NAME)
    find_model(convert.NAME)
    assert len(calls) == 2


def test_a_name_that_is_not_installed_says_what_to_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTLLAMA_HOME", str(tmp_path))
    monkeypatch.setattr(convert, "find_gguf", lambda: None)
    with pytest.raises(UserError, match=f"is not installed; run: mtllama models fetch {convert.NAME}"):
        find_model(convert.NAME)


def test_home_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MTLLAMA_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert find.home() == tmp_path / "cache" / "mtllama"
    monkeypatch.setenv("MTLLAMA_HOME", "~/models")
    assert find.home() == Path.home() / "models"


@pytest.mark.parametrize("hub_id", ["nobody/no-such-model", "DAMO-NLP-SG/mt-llama-7b-delta"])
def test_a_hub_id_offline_fails_at_once_without_a_connection(hub_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("a connection was tried"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: pytest.fail("a name was looked up"))
    with pytest.raises(UserError, match=f"no folder '{hub_id}'.*HF_HUB_OFFLINE is set") as error:
        find_model(hub_id)
    one_line(error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, None, None), r"a model is needed: a name \(smollm2-135m\), a folder, a hub id"),
        (("", "", ""), "a model is needed"),
        (("MODEL", "MODEL", "DELTA"), "either MODEL, or both --base and --delta"),
        (("MODEL", None, "DELTA"), "either MODEL, or both"),
        (("MODEL", "MODEL", None), "either MODEL, or both"),
        ((None, "MODEL", None), "either MODEL, or both"),
        ((None, None, "DELTA"), "either MODEL, or both"),
        (("DELTA", None, None), "is a delta, not a model: pass --base B --delta"),
        ((None, "DELTA", "DELTA"), "is a delta, not a model"),
        ((None, "MODEL", "EMPTY"), r"has no delta\.json"),
        (("FILE", None, None), "is a file; a model folder is needed"),
        (("EMPTY", None, None), r"has no config\.json; is it a model folder\?"),
        (("NO_WEIGHTS", None, None), "holds no weights"),
        (("CUT_OFF", None, None), rf"{SINGLE} is cut off or damaged"),
        (("no-such-name", None, None), r"no model 'no-such-name': neither a folder nor a known name \(smollm2-135m\) nor a hub id"),
        (("no/such/folder", None, None), "no model 'no/such/folder'"),
    ],
)
def test_what_is_not_a_model_is_one_clear_line(
    pico: Path, difference: Path, tmp_path: Path, arguments: tuple[str | None, ...], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "no_weights").mkdir()
    (tmp_path / "cut_off").mkdir()
    for name in ("no_weights", "cut_off"):
        shutil.copyfile(pico / "config.json", tmp_path / name / "config.json")
    (tmp_path / "cut_off" / SINGLE).write_bytes((pico / SINGLE).read_bytes()[:5000])
    places = {
        "MODEL": pico,
        "DELTA": difference,
        "EMPTY": tmp_path / "empty",
        "FILE": pico / "config.json",
        "NO_WEIGHTS": tmp_path / "no_weights",
        "CUT_OFF": tmp_path / "cut_off",
    }
    with pytest.raises(UserError, match=message) as error:
        find_model(*(str(places.get(argument, argument)) if argument else argument for argument in arguments))
    one_line(error)


def parameters(model: Any) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_base_and_delta_in_memory_equal_the_restored_folder(
    pico: Path, tuned: Path, difference: Path, tmp_path: Path, dtype: find.Dtype
) -> None:
    restore.apply(restore.open_target(pico, [difference]), tmp_path / "restored", pico, difference)
    before = sorted(path for path in pico.parent.rglob("*"))
    ours = load_model(find_model(None, str(pico), str(difference)), dtype=dtype)
    theirs = load_model(find_model(str(tmp_path / "restored")), dtype=dtype)
    base = load_model(find_model(str(pico)), dtype=dtype)
    assert parameters(ours.model).keys() == parameters(theirs.model).keys()
    for name, tensor in parameters(theirs.model).items():
        assert tensor.dtype == ours.dtype == getattr(torch, dtype)
        assert torch.equal(parameters(ours.model)[name], tensor), name
    changed = [name for name, tensor in parameters(base.model).items() if not torch.equal(parameters(ours.model)[name], tensor)]
    assert len(changed) > 10, "the delta did something"
    for loaded in (ours, theirs):
        assert loaded.model.lm_head.weight.data_ptr() == loaded.model.get_input_embeddings().weight.data_ptr(), "the head is tied"
        assert not loaded.model.training
    assert ours.model.config.to_dict() | {"_name_or_path": ""} == theirs.model.config.to_dict() | {"_name_or_path": ""}
    ids = torch.tensor([[5, 300, 17]])
    assert torch.equal(ours.model(ids).logits, theirs.model(ids).logits)
    assert ours.tokenizer("one two").input_ids == theirs.tokenizer("one two").input_ids
    assert (ours.format.name, ours.max_length) == (theirs.format.name, theirs.max_length) == ("plain", 512)
    assert sorted(path for path in pico.parent.rglob("*")) == before, "nothing is written"


def test_an_untied_head_comes_through_a_delta(pico: Path, tmp_path: Path) -> None:
    target = Path(shutil.copytree(pico, tmp_path / "target"))
    tensors = safetensors.torch.load_file(pico / SINGLE)
    tensors["lm_head.weight"] = -tensors["model.embed_tokens.weight"]
    safetensors.torch.save_file(tensors, target / SINGLE, metadata={"format": "pt"})
    config = folders.read_json(target / "config.json") | {"tie_word_embeddings": False}
    folders.write_json(target / "config.json", config)
    delta.make(pico, target, tmp_path / "difference")
    ours = load_model(find_model(None, str(pico), str(tmp_path / "difference")), dtype="bfloat16")
    assert torch.equal(ours.model.lm_head.weight, tensors["lm_head.weight"])
    assert torch.equal(ours.model.get_input_embeddings().weight, tensors["model.embed_tokens.weight"])


def test_our_loading_equals_that_of_transformers(pico: Path) -> None:
    ours = parameters(load_model(find_model(str(pico)), dtype="bfloat16").model)
    theirs = parameters(AutoModelForCausalLM.from_pretrained(pico, dtype=torch.bfloat16))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_model_to_train_has_fp32_weights_and_is_in_training(pico: Path) -> None:
    loaded = load_model(find_model(str(pico)), dtype="bfloat16", train=True)
    assert loaded.model.training and {tensor.dtype for tensor in loaded.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "damage",
    [
        lambda base, made: (made / FILES / "tokenizer.json").write_text("{}", encoding="utf-8"),
        lambda base, made: (made / FILES / "config.json").unlink(),
        lambda base, made: safetensors.torch.save_file(
            {name: tensor + 1 for name, tensor in safetensors.torch.load_file(base / SINGLE).items()}, base / SINGLE
        ),
        lambda base, made: safetensors.torch.save_file(
            {name: tensor.flip(0) for name, tensor in safetensors.torch.load_file(made / SINGLE).items()}, made / SINGLE
        ),
    ],
    ids=["tokenizer", "config", "base", "delta"],
)
def test_damage_to_base_or_delta_is_found_while_loading(
    pico: Path, difference: Path, tmp_path: Path, damage: Callable[[Path, Path], Any]
) -> None:
    base, made = Path(shutil.copytree(pico, tmp_path / "base")), Path(shutil.copytree(difference, tmp_path / "difference"))
    load_model(find_model(None, str(base), str(made)))
    damage(base, made)
    with pytest.raises(UserError, match=r"missing or damaged|wrong base|is damaged") as error:
        load_model(find_model(None, str(base), str(made)))
    one_line(error)


def test_a_model_in_place_of_a_delta_is_refused_while_loading(pico: Path, tuned: Path) -> None:
    for model in (pico, tuned):
        with pytest.raises(UserError, match=f"^{model} is a model, not a delta") as error:
            load_model(find_model(None, str(pico), str(model)))
        one_line(error)


def test_a_checkpoint_that_lacks_a_tensor_is_not_filled_with_random_weights(pico: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pico, tmp_path / "model"))
    tensors = safetensors.torch.load_file(pico / SINGLE)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    safetensors.torch.save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 tensors .*model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(find_model(str(folder)))


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{", encoding="utf-8")


def unknown_architecture(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "no-such-model"}', encoding="utf-8")


def other_size(folder: Path) -> None:
    folders.write_json(folder / "config.json", folders.read_json(folder / "config.json") | {"intermediate_size": 96})


def damaged_weights(folder: Path) -> None:
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:-100])


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


@pytest.mark.parametrize("damage", [broken_config, unknown_architecture, other_size, damaged_weights, no_tokenizer])
def test_a_folder_that_cannot_be_loaded_is_one_clear_line(pico: Path, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    folder = Path(shutil.copytree(pico, tmp_path / "model"))
    damage(folder)
    with pytest.raises(UserError, match=r"model.* cannot be loaded") as error:
        load_model(ModelFolder(folder, "broken"))
    one_line(error)


def test_a_tokenizer_with_ids_outside_the_embedding_is_refused(pico: Path, tmp_path: Path, sentencepiece_tokenizer: Any) -> None:
    folder = Path(shutil.copytree(pico, tmp_path / "model"))
    sentencepiece_tokenizer.save_pretrained(folder)
    assert len(sentencepiece_tokenizer) > 600
    with pytest.raises(UserError, match=r"token id 799 lies outside the embedding of 600 rows"):
        load_model(find_model(str(folder)))


def test_the_format_comes_from_the_caller_then_the_manifest_then_the_default(
    pico: Path, tuned: Path, difference: Path, tmp_path: Path
) -> None:
    assert find_model(str(pico)).own_format() is None and load_model(find_model(str(pico))).format.name == "mtllama"
    assert find_model(str(tuned)).own_format() == "plain" and load_model(find_model(str(tuned))).format.name == "plain"
    through = find_model(None, str(pico), str(difference))
    assert through.own_format() == "plain" and through.name == "pico + tuned"
    assert load_model(through, format="mt-llama-chat").format.name == "mt-llama-chat"
    with pytest.raises(UserError, match="unknown format 'other'; choose one of mtllama"):
        load_model(through, format="other")
    foreign = Path(shutil.copytree(tuned, tmp_path / "foreign"))
    folders.write_manifest(foreign, "model", format="of another program")
    assert find_model(str(foreign)).own_format() is None


def test_what_is_told_of_a_model_names_its_weights(pico: Path, tuned: Path, difference: Path, tmp_path: Path) -> None:
    sources = [find_model(str(pico)), find_model(str(tuned)), find_model(None, str(pico), str(difference))]
    told = [load_model(source).describe() for source in sources]
    assert len({facts["weights_sha256"] for facts in told}) == 3
    assert [facts["name"] for facts in told] == ["pico", "pico + tuned", "pico + tuned"]
    assert [facts["recipe"] for facts in told] == [None, {"name": "tuned"}, {"name": "tuned"}]
    assert {facts["parameters"] for facts in told} == {sum(t.numel() for t in safetensors.torch.load_file(pico / SINGLE).values())}
    moved = Path(shutil.copytree(tuned, tmp_path / "elsewhere"))
    assert load.weights_digest(find_model(str(moved)).folder) == told[1]["weights_sha256"]
    json.dumps(told)


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_the_chat_template_of_a_folder_is_found_in_both_places(place: str, pico: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pico, tmp_path / "chat"))
    assert find_model(str(folder)).spoken_format() is None
    template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    if place == "chat_template.jinja":
        (folder / place).write_text(template, encoding="utf-8")
    else:
        config = json.loads((folder / place).read_text(encoding="utf-8"))
        (folder / place).write_text(json.dumps({**config, "chat_template": template}), encoding="utf-8")
    assert find_model(str(folder)).spoken_format() == "native"


@pytest.mark.parametrize(("key", "value"), [("logits_scaling", 8.0), ("logit_scale", 0.0625), ("final_logit_softcapping", 30.0)])
@pytest.mark.parametrize("train", [False, True])
def test_a_model_that_does_more_than_its_head_to_its_logits_is_refused(
    key: str, value: float, train: bool, pico: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(pico, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, key: value}), encoding="utf-8")
    with pytest.raises(UserError, match=key) as error:
        load_model(find_model(str(folder)), train=train)
    assert "\n" not in str(error.value)
    (folder / "config.json").write_text(json.dumps({**config, key: 1 if key != "final_logit_softcapping" else None}), encoding="utf-8")
    load_model(find_model(str(folder)), train=train)


@pytest.mark.parametrize(("native", "chosen"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_bfloat16_only_where_the_hardware_multiplies_it(native: bool, chosen: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "cpu_has_bf16", lambda: native)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation)
    for device in (torch.device("cpu"), torch.device("cuda")):
        assert pick_dtype("auto", device) == chosen
        assert pick_dtype("float32", device) == torch.float32 and pick_dtype("bfloat16", device) == torch.bfloat16


@pytest.mark.parametrize(
    ("cpuinfo", "native"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16 amx_tile\n\nprocessor\t: 1\nflags\t: fpu\n", True),
        ("processor\t: 0\nflags\t\t: fpu amx_bf16\n", True),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\n", True),
        ("processor\t: 0\nflags\t\t: fpu avx2 bf16_of_another_name\n", False),
        ("", False),
        (None, False),
    ],
)
def test_bf16_is_read_from_the_processors_flags(cpuinfo: str | None, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_text(self: Path, encoding: str) -> str:
        assert str(self) == "/proc/cpuinfo"
        if cpuinfo is None:
            raise FileNotFoundError(str(self))
        return cpuinfo

    monkeypatch.setattr(Path, "read_text", read_text)
    assert load.cpu_has_bf16() is native
