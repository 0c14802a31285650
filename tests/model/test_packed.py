"""Whoever stands in one packed row sees what it would see alone: by blocks, side by side, and token by token."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from mtllama.data.prompt import find_format
from mtllama.errors import UserError
from mtllama.model import attention, packed
from mtllama.model.engine import Branches, Engine
from mtllama.model.families import SHARED, families
from mtllama.model.find import ModelFolder
from mtllama.model.load import LoadedModel
from mtllama.model.packed import PACKED, Cache, Part, Trees

WINDOW = 9
SIZES: dict[str, Any] = {
    "vocab_size": 600,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "max_position_embeddings": 256,
}


@pytest.fixture(scope="module", params=["llama", "window"])
def engine(request: pytest.FixtureRequest, bpe_tokenizer: Any) -> Engine:
    """A model that sees everything, and one that sees the last nine tokens."""
    torch.manual_seed(0)
    model = (
        LlamaForCausalLM(LlamaConfig(**SIZES))
        if request.param == "llama"
        else MistralForCausalLM(MistralConfig(sliding_window=WINDOW, **SIZES))
    )
    return Engine(LoadedModel(ModelFolder(Path(), "random"), model, bpe_tokenizer, find_format("plain"), torch.float32, 256))


def items() -> list[Branches]:
    draw = random.Random(0)

    def ids(length: int) -> list[int]:
        return [draw.randrange(3, 600) for _ in range(length)]

    shapes = [(1, [1]), (40, [3, 1, 30]), (7, [5, 5, 5, 5]), (90, [2, 60]), (4, [300]), (33, [1, 1]), (64, [12] * 12)]
    alone = [Branches(ids(prompt), [ids(answer) for answer in answers]) for prompt, answers in shapes]
    common = ids(SHARED + 7)
    # A family: some go on, one ends with what they have in common, two are the same but for their answers.
    family = [
        Branches(common + ids(rest), [ids(answer) for answer in answers]) for rest, answers in ((5, [2, 9]), (70, [1]), (0, [4, 4, 4]))
    ]
    return [*alone[:3], *family, *alone[3:], Branches(list(family[0].prompt), [ids(3)])]


@pytest.fixture(scope="module")
def theirs(engine: Engine) -> torch.Tensor:
    """Log-probabilities from one plain pass of transformers' own eager attention for every answer."""
    engine.model.set_attn_implementation("eager")
    found = []
    with torch.inference_mode():
        for item in items():
            for answer in item.answers:
                log_probs = engine.model(torch.tensor([item.prompt + answer])).logits[0].log_softmax(-1)
                found += [float(log_probs[len(item.prompt) - 1 + place, token]) for place, token in enumerate(answer)]
    engine.model.set_attn_implementation(PACKED)
    return torch.tensor(found)


def test_some_of_the_prompts_share_their_beginning() -> None:
    """Or else the tests of this file would say nothing of families."""
    found = [family for family in families([item.prompt for item in items()]) if family.shared]
    assert [(len(family.members), family.shared >= SHARED) for family in found] == [(4, True)]


def test_what_prompts_have_in_common_is_computed_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    fed: list[int] = []
    hidden = engine._hidden
    monkeypatch.setattr(engine, "_hidden", lambda ids, plan: fed.append(len(ids)) or hidden(ids, plan))
    common = list(range(3, 103))
    prompts = [[*common, 200 + i] for i in range(5)]
    engine.score([Branches(prompt, [[7], [8, 9]]) for prompt in prompts])
    assert sum(fed) == 100 + 5 * (1 + 1)
    fed.clear()
    engine.continue_ids(prompts, max_new_tokens=1)
    assert sum(fed) == 100 + 5


def flat(scores: Sequence[Sequence[Sequence[float]]]) -> torch.Tensor:
    return torch.tensor([score for item in scores for answer in item for score in answer])


@pytest.mark.parametrize("rows", [1, 5, 32, packed.ROWS])
def test_blocks_of_any_size_give_what_separate_passes_give(
    engine: Engine, theirs: torch.Tensor, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "ROWS", rows)
    torch.testing.assert_close(flat(engine.score(items())), theirs, atol=1e-4, rtol=0)
    assert theirs.std() > 0.5 and len(theirs) > 500


def test_the_items_side_by_side_give_the_same(engine: Engine, theirs: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way that a GPU goes."""
    calls = []

    def side_by_side(self: Trees, *arguments: Any) -> torch.Tensor:
        calls.append(1)
        return self._padded(*arguments)

    monkeypatch.setattr(Trees, "_by_blocks", side_by_side)
    torch.testing.assert_close(flat(engine.score(items())), theirs, atol=1e-4, rtol=0)
    assert calls


@pytest.mark.parametrize("by_blocks", [True, False])
def test_continued_prompts_are_those_of_transformers(engine: Engine, by_blocks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not by_blocks:
        monkeypatch.setattr(Trees, "_by_blocks", Trees._padded)
    prompts = [item.prompt for item in items()]
    eos = engine.tokenizer.eos_token_id
    config = GenerationConfig(max_new_tokens=30, do_sample=False, eos_token_id=eos, pad_token_id=eos)
    ours = engine.continue_ids(prompts, max_new_tokens=30)
    engine.model.set_attn_implementation("eager")
    theirs = [
        engine.model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), generation_config=config)[0, len(prompt) :]
        for prompt in prompts
    ]
    engine.model.set_attn_implementation(PACKED)
    assert ours == [ids.tolist() for ids in theirs]
    assert len({tuple(ids) for ids in ours}) > 4


def test_a_window_is_seen_in_the_numbers(bpe_tokenizer: Any) -> None:
    """Or else the tests of the model with a window would say nothing."""
    numbers = []
    for window in (WINDOW, None):
        torch.manual_seed(0)
        model = MistralForCausalLM(MistralConfig(sliding_window=window, **SIZES))
        engine = Engine(LoadedModel(ModelFolder(Path(), "random"), model, bpe_tokenizer, find_format("plain"), torch.float32, 256))
        numbers.append(flat(engine.score(items())))
    assert (numbers[0] - numbers[1]).abs().max() > 0.1


def test_without_a_plan_a_model_computes_as_with_sdpa(engine: Engine) -> None:
    ids, mask = torch.randint(3, 600, (2, 20)), torch.ones(2, 20, dtype=torch.int64)
    mask[0, :6] = 0
    with torch.inference_mode():
        ours = engine.model(ids, attention_mask=mask).logits[mask.bool()]
        engine.model.set_attn_implementation("sdpa")
        theirs = engine.model(ids, attention_mask=mask).logits[mask.bool()]
        engine.model.set_attn_implementation(PACKED)
    torch.testing.assert_close(ours, theirs)


def test_a_slot_that_is_left_is_taken_by_the_last_one() -> None:
    cache = Cache(4, 6)
    like = torch.zeros(2, 1, 3)
    keys, values = cache.layer(0, like)
    cache.lengths = [4, 2, 5, 3]
    for slot in range(4):
        keys[slot], values[slot] = slot, -slot
    assert cache.leave(1) == 3 and cache.lengths == [4, 3, 5]
    assert keys[1, 0, :3, 0].tolist() == [3, 3, 3] and values[1, 0, :3, 0].tolist() == [-3, -3, -3]
    assert cache.leave(2) == 2 and cache.lengths == [4, 3]
    assert cache.leave(0) == 1 and cache.leave(0) == 0 and cache.lengths == []


@pytest.mark.parametrize("part", ["softcap", "s_aux"])
def test_attention_of_another_kind_is_refused(part: str) -> None:
    plan = Trees([Part(3)], torch.device("cpu"))
    query = torch.zeros(1, 2, 3, 4)
    module = torch.nn.Module()
    module.layer_idx = 0
    with pytest.raises(UserError, match=part):
        packed.packed_attention(module, query, query, query, None, plan=plan, **{part: 1.0})
    with pytest.raises(UserError, match=part):
        attention.segment_attention(module, query, query, query, None, segments=[3], **{part: 1.0})


def test_one_long_answer_needs_no_mask_that_grows_with_its_square() -> None:
    def hidden(*answers: int) -> int:
        return sum(block.hidden.numel() for block in Trees([Part(1, answers)], torch.device("cpu")).blocks)

    assert hidden(4095) <= 4096 * packed.ROWS < hidden(2047, 2048) / 4


def test_one_answer_alone_scores_as_beside_another(engine: Engine) -> None:
    prompt, answer = list(range(30, 61)), [5 + number % 400 for number in range(170)]  # more than a block of queries
    ((alone,), (beside, _)) = engine.score([Branches(prompt, [answer])]) + engine.score([Branches(prompt, [answer, [7]])])
    assert alone == pytest.approx(beside, abs=1e-4) and len(alone) == 170
