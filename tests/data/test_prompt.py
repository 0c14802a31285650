"""Text becomes ids and a mask in one way, whoever asks: training, evaluation, chat, or a tool that reads the chat template."""

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from conftest import corpus
from mtllama.data.batching import pack
from mtllama.data.prompt import DEFAULT_FORMAT, FORMATS, Encoded, PromptEncoder, Turn, find_format
from mtllama.errors import UserError
from mtllama.tasks.catalog import catalog, load_rows, sampler_dir
from mtllama.tasks.template import Example

OURS = [name for name, format in FORMATS.items() if not format.native]
KINDS = ["byte-level", "sentencepiece", "sentencepiece of late"]
SYSTEM = "Answer in one word, in English."
NATIVE = (
    "{% for message in messages %}{{ '<s>' if loop.first and bos_token == '<s>' }}{{ '[' + message['role'] + ']\\n' + message['content']"
    " + eos_token + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '[assistant]\\n' }}{% endif %}"
)


def sentencepiece(*, legacy: bool) -> PreTrainedTokenizerFast:
    """LLaMA's kind of tokenizer: no token spans a blank. `legacy`: a blank is put behind special tokens as well."""
    trained = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    first = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trained.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=800, special_tokens=first, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    backend = Tokenizer(models.BPE(model["vocab"], merges, byte_fallback=True, unk_token="<unk>"))
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=False
    )


@pytest.fixture(scope="module")
def tokenizers(bpe_tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """One tokenizer of each kind, with a chat template of its own; copies, since tests change the template."""
    kinds = [copy.deepcopy(bpe_tokenizer), sentencepiece(legacy=True), sentencepiece(legacy=False)]
    for tokenizer in kinds:
        tokenizer.chat_template = NATIVE
    return dict(zip(KINDS, kinds, strict=True))


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tokenizers: dict[str, Any]) -> Any:
    return copy.deepcopy(tokenizers[request.param])


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    """Examples of every kind of prompt in the sampler, line breaks, quotes and digits in them."""
    made = []
    for task in catalog().values():
        folder = sampler_dir() / task.name
        if folder.is_dir() or task.name in ("copa", "rte", "wic"):
            rows = load_rows(task, sampler_dir(), "train" if task.role == "train" else None)
            made += [example for i, template in enumerate(task.prompts) if (example := rows.render(5 * i, template))]
    made = [example for example in made if len(example.inputs) < 1500]
    assert len(made) > 50
    assert any("\n" in example.inputs for example in made) and any(example.targets[0].isdigit() for example in made)
    return made


def encode(encoder: PromptEncoder, example: Example) -> Encoded:
    encoded = encoder.encode(example.inputs, example.targets)
    assert encoded is not None and not encoded.cut
    return encoded


def end_text(encoder: PromptEncoder) -> str:
    return str(encoder.tokenizer.eos_token) if encoder.format.end is None else encoder.format.end


def messages(turns: list[Turn], inputs: str | None, system: str | None = None) -> list[dict[str, str]]:
    """A dialogue in the form of chat templates."""
    said = [{"role": "system", "content": system}] if system is not None else []
    for turn in turns:
        said += [{"role": "user", "content": turn.inputs}, {"role": "assistant", "content": turn.answer}]
    return said + ([{"role": "user", "content": inputs}] if inputs is not None else [])


def templated(tokenizer: Any, said: list[dict[str, str]], *, prompt: bool = True) -> list[int]:
    """What any other tool makes of a dialogue."""
    return list(tokenizer.apply_chat_template(said, tokenize=True, add_generation_prompt=prompt, return_dict=False))


@pytest.mark.parametrize("name", FORMATS)
def test_an_example_is_the_ids_of_its_prompt_and_then_those_of_its_answer(name: str, tokenizer: Any, examples: list[Example]) -> None:
    encoder = PromptEncoder(tokenizer, find_format(name), 4096)
    for example in examples:
        encoded = encode(encoder, example)
        answer = encoder.answer_ids(example.targets)
        assert encoded.ids == encoder.prompt_ids(example.inputs)[0] + answer
        assert encoded.num_target == len(answer) > len(encoder.end_ids) > 0
        assert encoded.ids[-len(encoder.end_ids) :] == encoder.end_ids


@pytest.mark.parametrize("name", OURS)
def test_the_mask_covers_exactly_the_answer_and_its_end_marker(name: str, tokenizer: Any, examples: list[Example]) -> None:
    encoder = PromptEncoder(tokenizer, find_format(name), 4096)
    blank = "" if encoder.dummy_prefix else " "  # a decoder of SentencePiece takes the first blank away
    for example in examples:
        encoded = encode(encoder, example)
        prompt, answer = encoded.ids[: -encoded.num_target], encoded.ids[-encoded.num_target :]
        assert tokenizer.decode(answer) == blank + example.targets + end_text(encoder)
        assert tokenizer.decode(prompt[len(encoder.bos_ids) :]) == encoder.prompt_text(example.inputs)


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=40).map(str.strip).filter(bool)
"""As templates give it: stripped, and not empty."""


@pytest.mark.parametrize("name", OURS)
@given(inputs=TEXT, answer=TEXT)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_decoding_an_example_gives_its_text_back(name: str, tokenizer: Any, inputs: str, answer: str) -> None:
    encoder = PromptEncoder(tokenizer, find_format(name), 4096)
    encoded = encoder.encode(inputs, answer)
    assert encoded is not None
    text = tokenizer.decode(encoded.ids[len(encoder.bos_ids) :])
    assert text == encoder.prompt_text(inputs) + " " + answer + end_text(encoder)


@pytest.mark.parametrize("name", OURS)
def test_the_chat_template_that_travels_gives_the_same_ids(name: str, tokenizer: Any, examples: list[Example]) -> None:
    encoder = PromptEncoder(tokenizer, find_format(name), 100_000)
    tokenizer.chat_template = encoder.format.chat_template(bos=bool(encoder.bos_ids))
    longest = 0
    for first, second, last in zip(examples, examples[1:], examples[2:], strict=False):
        turns = [Turn(first.inputs, first.targets), Turn(second.inputs, second.targets)]
        assert encoder.prompt_ids(last.inputs)[0] == templated(tokenizer, messages([], last.inputs))
        assert encode(encoder, last).ids == templated(tokenizer, messages([Turn(last.inputs, last.targets)], None), prompt=False)
        for system in (None, SYSTEM, ""):
            ours = encoder.prompt_ids(last.inputs, turns, system)[0]
            theirs = templated(tokenizer, messages(turns, last.inputs, system))
            assert ours == theirs, (first.template, second.template, last.template, system)
            longest = max(longest, len(ours))
    assert longest > 500


@pytest.mark.parametrize("name", OURS)
def test_the_chat_template_that_travels_gives_the_same_text(name: str, tokenizer: Any, examples: list[Example]) -> None:
    encoder = PromptEncoder(tokenizer, find_format(name), 100_000)
    tokenizer.chat_template = encoder.format.chat_template(bos=bool(encoder.bos_ids))
    bos = tokenizer.bos_token if encoder.bos_ids else ""
    turns = [Turn(example.inputs, example.targets) for example in examples[:3]]
    for system in (None, SYSTEM, ""):
        said = messages(turns, "And {{ now }} '\\n'?", system)
        theirs = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        assert bos + encoder.prompt_text("And {{ now }} '\\n'?", turns, system) == theirs


@pytest.mark.parametrize("name", FORMATS)
def test_a_special_token_that_a_user_writes_never_becomes_one(name: str, tokenizer: Any) -> None:
    encoder = PromptEncoder(tokenizer, find_format(name), 4096)
    specials = [str(token) for token in tokenizer.all_special_tokens]
    ids = set(tokenizer.all_special_ids)
    assert len(specials) == 3
    assert ids <= set(tokenizer("".join(specials)).input_ids), "the tokenizer itself would take them for special"
    evil = "a" + "b".join(specials) + specials[0] + specials[1]

    def num_special(text: str) -> list[int]:
        prompt = encoder.prompt_ids(text, [Turn(text, text)], system=text)[0]
        encoded = encoder.encode(text, text)
        assert encoded is not None
        return [sum(i in ids for i in made) for made in (prompt, encoded.ids, encoder.answer_ids(text))]

    assert num_special(evil) == num_special("harmless")
    shown = tokenizer.decode(encoder.prompt_ids(evil)[0])
    assert shown.count(evil) == 1, "nothing of it is lost"


def test_bos_stands_once_before_every_dialogue_where_the_tokenizer_puts_it_and_nowhere_else(tokenizers: dict[str, Any]) -> None:
    turns = [Turn("One?", "Two."), Turn("Three?", "Four.")]
    for kind, tokenizer in tokenizers.items():
        for name in OURS:
            encoder = PromptEncoder(tokenizer, find_format(name), 4096)
            for ids in (encoder.prompt_ids("Five?")[0], encoder.prompt_ids("Five?", turns, SYSTEM)[0], encoder.prompt_ids("Five?" * 3)[0]):
                assert ids.count(tokenizer.bos_token_id) == (0 if kind == "byte-level" else 1), (kind, name)
                assert (ids[0] == tokenizer.bos_token_id) == (kind != "byte-level")
            assert tokenizer.bos_token_id not in encoder.answer_ids("Six.")


def test_an_answer_joins_a_prompt_as_if_both_were_tokenised_together(tokenizer: Any, examples: list[Example]) -> None:
    encoder = PromptEncoder(tokenizer, find_format("plain"), 4096)
    for example in examples:
        # BOS as text: some tokenizers put a blank behind it only where they put BOS themselves.
        bos = tokenizer.bos_token if encoder.bos_ids else ""
        joint = tokenizer(f"{bos}{example.inputs} {example.targets}", add_special_tokens=False).input_ids
        assert encode(encoder, example).ids == [*joint, tokenizer.eos_token_id]


@pytest.mark.parametrize("name", OURS)
def test_no_blank_is_doubled_and_none_stands_before_a_later_turn(name: str, tokenizer: Any) -> None:
    encoder = PromptEncoder(tokenizer, find_format(name), 4096)
    ids = encoder.prompt_ids("Five?", [Turn("One?", "Two."), Turn("Three?", "Four.")])[0] + encoder.answer_ids("Six.")
    text = tokenizer.decode(ids)
    assert "  " not in text and text.count(" Six.") == 1
    if encoder.format.end is not None or not encoder.dummy_prefix:
        assert "\n " not in text


def test_the_sentencepiece_tokenizer_of_the_other_tests_gives_whole_examples_as_well(
    sentencepiece_tokenizer: PreTrainedTokenizerFast, examples: list[Example]
) -> None:
    for name in OURS:
        encoder = PromptEncoder(sentencepiece_tokenizer, find_format(name), 4096)
        assert encoder.bos_ids == [1] and encoder.dummy_prefix
        for example in examples[:20]:
            text = sentencepiece_tokenizer.decode(encode(encoder, example).ids[1:])
            assert text == encoder.prompt_text(example.inputs) + " " + example.targets + end_text(encoder)


@pytest.mark.parametrize("kind", KINDS)
@given(num_words=st.integers(0, 120), limit=st.integers(9, 100), room=st.integers(0, 60))
@settings(max_examples=40, deadline=None)
def test_a_prompt_that_is_too_long_loses_its_middle_and_says_so(
    kind: str, tokenizers: dict[str, Any], num_words: int, limit: int, room: int
) -> None:
    tokenizer = tokenizers[kind]
    inputs = " ".join(f"w{i}" for i in range(num_words))
    whole = PromptEncoder(tokenizer, find_format("mtllama"), 100_000).prompt_ids(inputs)[0]
    ids, cut = PromptEncoder(tokenizer, find_format("mtllama"), limit).prompt_ids(inputs, room=room)
    allowed = max(limit - room, 8)
    assert cut == (len(whole) > allowed)
    assert len(ids) == min(len(whole), allowed)
    head = next((i for i, (ours, theirs) in enumerate(zip(ids, whole, strict=False)) if ours != theirs), len(ids))
    tail = allowed // 4
    assert head >= len(ids) - tail if cut else ids == whole
    assert ids[len(ids) - tail :] == whole[len(whole) - tail :]


@pytest.mark.parametrize("name", OURS)
def test_no_example_is_longer_than_the_limit(name: str, tokenizer: Any, examples: list[Example]) -> None:
    cut = dropped = 0
    for limit in (16, 60, 150):
        encoder = PromptEncoder(tokenizer, find_format(name), limit)
        for example in examples:
            encoded = encoder.encode(example.inputs, example.targets)
            if encoded is None:
                dropped += 1
                assert len(encoder.answer_ids(example.targets)) > limit - 8
                continue
            assert len(encoded.ids) <= limit
            assert encoded.ids[-encoded.num_target :] == encoder.answer_ids(example.targets)
            assert not encoded.cut or len(encoded.ids) == limit
            cut += encoded.cut
    assert cut > 50 and dropped > 5


@pytest.mark.parametrize("name", [*OURS, "native"])
def test_examples_that_are_encoded_together_are_as_encoded_alone(name: str, tokenizer: Any, examples: list[Example]) -> None:
    tokenizer.chat_template = tokenizer.chat_template or "{{ messages[0]['content'] }}\n"
    hostile = [(f"{tokenizer.eos_token} ends? {tokenizer.bos_token}", f"{tokenizer.eos_token} no"), ("", "x"), ("\n a", "\n"), ("雨 ", " ")]
    pairs = [*hostile, *((example.inputs, example.targets) for example in examples)]
    for limit in (4096, 64, 14):
        encoder = PromptEncoder(tokenizer, find_format(name), limit)
        together = encoder.encode_batch(pairs)
        assert together == [encoder.encode(inputs, answer) for inputs, answer in pairs]
        assert len({each is None for each in together}) == (2 if limit == 14 else 1), "some are too long only for the shortest limit"
    assert PromptEncoder(tokenizer, find_format(name), 64).encode_batch([]) == []


@pytest.mark.parametrize("name", FORMATS)
def test_a_prompt_of_no_text_still_has_a_token_that_the_answer_is_predicted_from(name: str, tokenizer: Any) -> None:
    """Some of P3's prompts render to nothing: in a pack, their answer must not be predicted from the example before."""
    encoder = PromptEncoder(tokenizer, find_format(name), 512)
    alone, (together,) = encoder.encode("", "yes"), encoder.encode_batch([("", "yes")])
    assert alone == together and alone and 0 < alone.num_target == len(encoder.answer_ids("yes")) < len(alone.ids)
    assert alone.ids[: -alone.num_target] == encoder.prompt_ids("")[0]


def test_an_answer_that_is_too_long_by_itself_gives_no_example(tokenizer: Any) -> None:
    answer = "a long answer of many words"
    num = len(PromptEncoder(tokenizer, find_format("mtllama"), 4096).answer_ids(answer))
    assert PromptEncoder(tokenizer, find_format("mtllama"), num + 7).encode("Why?", answer) is None
    fits = PromptEncoder(tokenizer, find_format("mtllama"), num + 8).encode("Why?", answer)
    assert fits is not None and fits.num_target == num and len(fits.ids) <= num + 8


def test_a_tokenizer_without_eos_is_refused(bpe_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = copy.deepcopy(bpe_tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no EOS token"):
        PromptEncoder(tokenizer, find_format("mtllama"), 128)


def test_the_end_marker_is_a_target_also_where_it_is_the_padding_token(bpe_tokenizer: PreTrainedTokenizerFast) -> None:
    assert bpe_tokenizer.pad_token_id == bpe_tokenizer.eos_token_id == 2
    encoder = PromptEncoder(bpe_tokenizer, find_format("mtllama"), 128)
    encoded = [encoder.encode("Is it?", "Yes"), encoder.encode("Is it really so?", "No, not at all")]
    (batch,) = pack([example for example in encoded if example], 4096)
    assert (batch.targets == bpe_tokenizer.eos_token_id).sum() == 2
    assert batch.targets[batch.owners == 0].tolist() == encoder.answer_ids("Yes")


def test_an_unknown_format_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="unknown format 'alpaca'; choose one of mtllama, plain, native, mt-llama-train, mt-llama-chat"):
        find_format("alpaca")
    assert find_format(DEFAULT_FORMAT).end is None, "the default ends every answer with EOS"


TRAIN_HEADER = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite "
    "answers to the user's questions.\n\n"
)
CHAT_HEADER = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite "
    "answers to the human's questions."
)


@pytest.mark.parametrize(
    ("name", "one", "three", "end"),
    [
        ("mtllama", "Input: Q3\nOutput:", "Input: Q1\nOutput: A1<|end|>\nInput: Q2\nOutput: A2<|end|>\nInput: Q3\nOutput:", "<|end|>"),
        ("plain", "Q3", "Q1 A1<|end|>\nQ2 A2<|end|>\nQ3", "<|end|>"),
        (
            "mt-llama-train",
            TRAIN_HEADER + "### USER: Q3\n### ASSISTANT:",
            TRAIN_HEADER + "### USER: Q1\n### ASSISTANT: A1\n### USER: Q2\n### ASSISTANT: A2\n### USER: Q3\n### ASSISTANT:",
            "\n",
        ),
        (
            "mt-llama-chat",
            CHAT_HEADER + "### Human: Q3### Assistant:",
            CHAT_HEADER + "### Human: Q1### Assistant: A1<|end|>### Human: Q2### Assistant: A2<|end|>### Human: Q3### Assistant:",
            "<|end|>",
        ),
    ],
)
def test_each_format_is_written_to_the_letter(bpe_tokenizer: PreTrainedTokenizerFast, name: str, one: str, three: str, end: str) -> None:
    encoder = PromptEncoder(bpe_tokenizer, find_format(name), 4096)
    turns = [Turn("Q1", "A1"), Turn("Q2", "A2")]
    assert encoder.prompt_text("Q3") == one
    assert encoder.prompt_text("Q3", turns) == three
    assert bpe_tokenizer.decode(encoder.prompt_ids("Q3", turns)[0]) == three
    assert bpe_tokenizer.decode(encoder.answer_ids("A3")) == " A3" + end


def test_a_system_text_replaces_the_formats_own_and_an_empty_one_removes_it(bpe_tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = PromptEncoder(bpe_tokenizer, find_format("mt-llama-train"), 4096)
    assert encoder.prompt_text("Q", system="Be kind.") == "Be kind.\n\n### USER: Q\n### ASSISTANT:"
    assert encoder.prompt_text("Q", system="") == "### USER: Q\n### ASSISTANT:"
    assert PromptEncoder(bpe_tokenizer, find_format("mtllama"), 64).prompt_text("Q", system="Be kind.") == "Be kind.\n\nInput: Q\nOutput:"


def test_a_prompt_that_looks_like_a_template_is_left_as_it_is(bpe_tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = PromptEncoder(bpe_tokenizer, find_format("mtllama"), 4096)
    for text in ("{inputs}", "{{ messages }}", "Input: {inputs}\nOutput:", "{% raw %}", "%s {0}"):
        assert encoder.prompt_text(text) == f"Input: {text}\nOutput:"
        assert bpe_tokenizer.decode(encoder.prompt_ids(text)[0]) == f"Input: {text}\nOutput:"


def test_format_native_is_the_folders_own_chat_template(tokenizer: Any) -> None:
    encoder = PromptEncoder(tokenizer, find_format("native"), 4096)
    turns = [Turn("One?", "Two.")]
    for system in (None, SYSTEM):
        said = messages(turns, "Three?", system)
        assert encoder.prompt_text("Three?", turns, system) == tokenizer.apply_chat_template(
            said, tokenize=False, add_generation_prompt=True
        )
        assert encoder.prompt_ids("Three?", turns, system) == (templated(tokenizer, said), False)
    assert tokenizer.decode(encoder.answer_ids("Four.")) == "Four." + tokenizer.eos_token
    ids, cut = PromptEncoder(tokenizer, find_format("native"), 64).prompt_ids("Three?" * 50)
    assert cut and len(ids) == 64


@pytest.mark.parametrize("name", ["mtllama", "native"])
def test_half_of_a_surrogate_pair_is_told_in_one_line_wherever_it_stands(name: str, tokenizer: Any) -> None:
    encoder = PromptEncoder(tokenizer, find_format(name), 4096)
    for encode in (
        lambda: encoder.prompt_ids("a\ud800"),
        lambda: encoder.prompt_ids("a", [Turn("b", "\udfff")]),
        lambda: encoder.prompt_ids("a", system="\udcff b"),
        lambda: encoder.raw_ids("\ud800"),
        lambda: encoder.answer_ids("a \ud83d"),
        lambda: encoder.encode_batch([("a", "b"), ("c", "\ud800")]),
    ):
        with pytest.raises(UserError, match="half of a surrogate pair"):
            encode()
    assert encoder.answer_ids("a \U0001f600")  # a whole pair is a character


def test_a_chat_template_that_refuses_a_dialogue_is_told_in_one_line(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role\nnot supported') }}{% endif %}{{ messages[-1].content }}"
    )
    encoder = PromptEncoder(tokenizer, find_format("native"), 128)
    assert encoder.prompt_text("Hello") == "Hello"
    for encode in (encoder.prompt_text, encoder.whole_prompt_ids):
        with pytest.raises(UserError, match=r"chat template refuses this: System role not supported$"):
            encode("Hello", (), "Be brief.")


def test_format_native_is_refused_where_the_folder_has_no_chat_template(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        PromptEncoder(tokenizer, find_format("native"), 128)


GOLDEN = [("Is water wet? Yes or no?", "Yes"), ("Add 12 and 30.", "42"), ("Name it: <|im_end|>", "a\nb é")]
# fmt: off
TRAIN_IDS = [49, 11743, 826, 253, 7436, 2914, 284, 354, 6416, 5290, 11173, 30, 378, 11173, 3894, 5356, 28, 5861, 28, 284, 26310, 5360, 288,
             260, 2914, 506, 2029, 30, 198, 198, 3757, 2038, 1754, 42]
CHAT_IDS = [49, 11743, 826, 253, 7436, 1205, 284, 354, 6416, 5290, 11173, 30, 378, 11173, 3894, 5356, 28, 5861, 28, 284, 26310, 5360, 288,
            260, 1205, 506, 2029, 30, 3757, 4996, 42]
GOLDEN_IDS: dict[str, list[tuple[list[int], list[int]]]] = {
    "mtllama": [
        ([10219, 42, 1431, 913, 5793, 47, 9230, 355, 787, 47, 198, 17597, 42], [9230, 2]),
        ([10219, 42, 5419, 216, 33, 34, 284, 216, 35, 32, 30, 198, 17597, 42], [216, 36, 34, 2]),
        ([10219, 42, 10181, 357, 42, 2067, 108, 306, 79, 486, 108, 46, 198, 17597, 42], [253, 198, 82, 26411, 2]),
    ],
    "plain": [
        ([4182, 913, 5793, 47, 9230, 355, 787, 47], [9230, 2]),
        ([7684, 216, 33, 34, 284, 216, 35, 32, 30], [216, 36, 34, 2]),
        ([5820, 357, 42, 2067, 108, 306, 79, 486, 108, 46], [253, 198, 82, 26411, 2]),
    ],
    "mt-llama-train": [
        ([*TRAIN_IDS, 1431, 913, 5793, 47, 9230, 355, 787, 47, 198, 3757, 40800, 9814, 17321, 42], [9230, 198]),
        ([*TRAIN_IDS, 5419, 216, 33, 34, 284, 216, 35, 32, 30, 198, 3757, 40800, 9814, 17321, 42], [216, 36, 34, 198]),
        ([*TRAIN_IDS, 10181, 357, 42, 2067, 108, 306, 79, 486, 108, 46, 198, 3757, 40800, 9814, 17321, 42], [253, 198, 82, 26411, 198]),
    ],
    "mt-llama-chat": [
        ([*CHAT_IDS, 1431, 913, 5793, 47, 9230, 355, 787, 47, 3757, 20108, 42], [9230, 2]),
        ([*CHAT_IDS, 5419, 216, 33, 34, 284, 216, 35, 32, 30, 3757, 20108, 42], [216, 36, 34, 2]),
        ([*CHAT_IDS, 10181, 357, 42, 2067, 108, 306, 79, 486, 108, 46, 3757, 20108, 42], [253, 198, 82, 26411, 2]),
    ],
}
# fmt: on


@pytest.mark.real
def test_ids_and_masks_of_the_base_models_tokenizer_are_the_golden_ones(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert set(GOLDEN_IDS) == set(OURS)
    for name, expected in GOLDEN_IDS.items():
        encoder = PromptEncoder(tokenizer, find_format(name), 2048)
        for (inputs, answer), (prompt_ids, answer_ids) in zip(GOLDEN, expected, strict=True):
            assert encoder.encode(inputs, answer) == Encoded(prompt_ids + answer_ids, len(answer_ids), False), (name, inputs)


@pytest.mark.real
def test_the_base_models_tokenizer_agrees_with_each_chat_template(smollm2: Path, examples: list[Example]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    native = tokenizer.chat_template
    compared = 0
    for name in FORMATS:
        encoder = PromptEncoder(tokenizer, find_format(name), 8192)
        tokenizer.chat_template = native if name == "native" else encoder.format.chat_template(bos=bool(encoder.bos_ids))
        for first, last in itertools.pairwise(examples):
            turns = [Turn(first.inputs, first.targets)]
            assert encoder.prompt_ids(last.inputs, turns, SYSTEM)[0] == templated(tokenizer, messages(turns, last.inputs, SYSTEM))
            assert encoder.prompt_ids(last.inputs)[0] == templated(tokenizer, messages([], last.inputs))
            compared += 1
        tokenizer.chat_template = native
    assert compared > 5 * 50
