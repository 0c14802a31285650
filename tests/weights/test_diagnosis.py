"""What is said of a base that is not the delta's, each sentence of a model that really is such a one."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import EMBEDDING, HEAD, NORM, Q, Tensors, add_noise, apply, nothing_left, save, weights, with_weights
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mtllama.errors import UserError
from mtllama.weights import delta, restore


def refusal(base: Path, made: Path, room: Path) -> str:
    """What is said of a base, whatever check is asked for; it says so at once, and nothing is left."""
    said = []
    for check in restore.CHECKS:
        with pytest.raises(UserError) as raised:
            apply(base, made, room / "restored", check=check)
        said.append(str(raised.value))
        assert nothing_left(room / "restored")
    assert said[0] == said[1], "a sample tells as much as the whole"
    assert "\n" not in said[0] and said[0].startswith("wrong base: ") and said[0].endswith("; the delta needs the pico")
    return said[0]


def another(pico: Path, folder: Path, **changes: Any) -> Path:
    """A model of the pico's configuration but for `changes`, initialised anew."""
    torch.manual_seed(11)
    config = LlamaConfig.from_pretrained(pico)
    for key, value in changes.items():
        assert hasattr(config, key)
        setattr(config, key, value)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def correlation(said: str) -> float:
    found = re.search(r"\(correlation (-?[\d.]+)\)", said)
    assert found
    return float(found[1])


def test_another_model_of_the_same_shape(pico: Path, made: Path, tmp_path: Path) -> None:
    base = another(pico, tmp_path / "base")
    assert {name: tensor.shape for name, tensor in weights(base).items()} == {n: t.shape for n, t in weights(pico).items()}
    said = refusal(base, made, tmp_path)
    assert f"the tensor {EMBEDDING} differs in its values: another model of the same shape (correlation" in said
    assert abs(correlation(said)) < 0.3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 32}, r"the tensor .* has the shape \[.*32.*\], not \[.*64.*\]: another model"),
        ({"intermediate_size": 96}, r"the tensor .*mlp.* has the shape \[.*96.*\], not \[.*128.*\]: another model"),
        ({"num_key_value_heads": 4}, r"the tensor .*k_proj.* has the shape \[64, 64\], not \[32, 64\]: another model"),
        ({"num_hidden_layers": 1}, r"has no tensor model\.layers\.1\..*: another model"),
        ({"vocab_size": 700}, rf"the tensor {EMBEDDING} has the shape \[700, 64\], not \[600, 64\]: its vocabulary was resized"),
    ],
)
def test_another_model_of_another_shape(pico: Path, made: Path, tmp_path: Path, changes: dict[str, int], message: str) -> None:
    assert re.search(message, refusal(another(pico, tmp_path / "base", **changes), made, tmp_path))


@pytest.mark.parametrize("rows", [601, 599, 608])
def test_a_resized_vocabulary(pico: Path, made: Path, tmp_path: Path, rows: int) -> None:
    """The base as a chat template's new tokens leave it: resized by transformers."""
    model = AutoModelForCausalLM.from_pretrained(pico, dtype=torch.bfloat16)
    model.resize_token_embeddings(rows, mean_resizing=False)
    model.save_pretrained(tmp_path / "base")
    said = refusal(tmp_path / "base", made, tmp_path)
    assert f"the tensor {EMBEDDING} has the shape [{rows}, 64], not [600, 64]: its vocabulary was resized" in said


def test_a_resized_vocabulary_of_an_untied_base(pico: Path, tmp_path: Path) -> None:
    base = with_weights(pico, tmp_path / "base", lambda tensors: tensors.update({HEAD: tensors[EMBEDDING] * 2}))
    delta.make(base, with_weights(base, tmp_path / "target", add_noise), tmp_path / "made", base_name="the pico")
    resized = with_weights(base, tmp_path / "resized", lambda tensors: tensors.update({HEAD: tensors[HEAD][1:].clone()}))
    assert f"the tensor {HEAD} has the shape [599, 64], not [600, 64]: its vocabulary was resized" in refusal(
        resized, tmp_path / "made", tmp_path
    )


@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
def test_the_same_weights_in_another_precision(pico: Path, made: Path, tmp_path: Path, wide: torch.dtype) -> None:
    AutoModelForCausalLM.from_pretrained(pico, dtype=wide).save_pretrained(tmp_path / "base")
    said = refusal(tmp_path / "base", made, tmp_path)
    kind = {torch.float32: "F32", torch.float64: "F64"}[wide]
    assert f"is {kind}, not BF16: the same weights in another precision: convert it to BF16" in said


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
def test_the_same_weights_rounded(tmp_path: Path, narrow: torch.dtype) -> None:
    """The delta was made from the float32 original, the base at hand was rounded."""
    exact = {name: torch.randn(40, 30, generator=torch.Generator().manual_seed(i)) for i, name in enumerate(("a", "b", "c"))}
    base = save(exact, tmp_path / "base")
    target = save({name: tensor * 1.01 for name, tensor in exact.items()}, tmp_path / "target")
    delta.make(base, target, tmp_path / "made", base_name="the pico")
    rounded = save({name: tensor.to(narrow) for name, tensor in exact.items()}, tmp_path / "rounded")
    kind = {torch.float16: "F16", torch.bfloat16: "BF16"}[narrow]
    said = refusal(rounded, tmp_path / "made", tmp_path)
    assert f"the tensor a is {kind}, not F32: the same weights, but rounded: the original in F32 is needed" in said


def test_other_values_in_another_precision(pico: Path, made: Path, tmp_path: Path) -> None:
    for number, change in enumerate((lambda t: t.float() * 1.1, lambda t: t.half() + 0.01)):
        base = with_weights(
            pico, tmp_path / f"base{number}", lambda tensors, change=change: tensors.update({n: change(t) for n, t in tensors.items()})
        )
        assert re.search(r"is F(32|16), not BF16: another precision, and other values too", refusal(base, made, tmp_path))
    base = with_weights(pico, tmp_path / "base", lambda tensors: tensors.update({Q: tensors[Q].view(torch.int16).clone()}))
    assert f"{Q} is I16, not BF16: another model" in refusal(base, made, tmp_path)


def trained(tensors: Tensors, size: float = 0.02) -> None:
    """As a chat variant differs from its base: every matrix by some percent of its size."""
    generator = torch.Generator().manual_seed(5)
    for name, tensor in tensors.items():
        change = size * tensor.float().norm() / tensor.numel() ** 0.5 * torch.randn(tensor.shape, generator=generator)
        tensors[name] = (tensor.float() + change).to(tensor.dtype)


@pytest.mark.parametrize("size", [0.02, 0.2])
def test_a_model_trained_further_such_as_a_chat_variant(pico: Path, made: Path, tmp_path: Path, size: float) -> None:
    said = refusal(with_weights(pico, tmp_path / "base", lambda tensors: trained(tensors, size)), made, tmp_path)
    assert "differs in its values: a model trained further from the same weights, such as a chat variant (correlation" in said
    assert correlation(said) > 0.9


def test_the_target_itself_taken_for_the_base_is_a_model_trained_further(target: Path, made: Path, tmp_path: Path) -> None:
    assert "a model trained further from the same weights" in refusal(target, made, tmp_path)


def test_a_delta_taken_for_a_model(pico: Path, made: Path, added: Path, tmp_path: Path) -> None:
    """Ours of mode add, and the same without its manifest, as others publish it."""
    plain = Path(shutil.copytree(added, tmp_path / "plain"))
    for name in ("delta.json", "mtllama.json"):
        (plain / name).unlink()
    for base in (added, plain):
        said = refusal(base, made, tmp_path)
        assert f"in {base} the tensor {EMBEDDING} differs in its values: its numbers are as small as differences: a delta," in said


def damaged(tensors: Tensors) -> None:
    """A block of a file that was lost and reads as zeros."""
    tensors[Q].reshape(-1)[1000:3000] = 0


def noise_in_one(tensors: Tensors) -> None:
    tensors[Q] = torch.randn(tensors[Q].shape, generator=torch.Generator().manual_seed(0)).to(tensors[Q].dtype)


@pytest.mark.parametrize("change", [damaged, noise_in_one])
def test_one_damaged_tensor(pico: Path, made: Path, tmp_path: Path, change: Callable[[Tensors], None]) -> None:
    said = refusal(with_weights(pico, tmp_path / "base", change), made, tmp_path)
    assert f"the tensor {Q} differs in its values: the rest looks right: the file is damaged, or that tensor was edited" in said


def test_one_edited_vector(pico: Path, made: Path, tmp_path: Path) -> None:
    said = refusal(with_weights(pico, tmp_path / "base", lambda tensors: tensors[NORM].mul_(1.5)), made, tmp_path)
    assert f"the tensor {NORM} differs in its values: the rest looks right: the file is damaged, or that tensor was edited" in said


def test_a_model_of_zeros_and_one_of_values_that_are_no_numbers_are_described_too(pico: Path, made: Path, tmp_path: Path) -> None:
    for number, value in enumerate((0.0, torch.nan, torch.inf, -torch.inf)):
        base = with_weights(pico, tmp_path / str(number), lambda tensors, value=value: [tensor.fill_(value) for tensor in tensors.values()])
        assert f"the tensor {EMBEDDING} differs in its values: " in refusal(base, made, tmp_path)
        assert AutoConfig.from_pretrained(base).vocab_size == 600
