"""Scores as separate forward passes give them, greedy text as transformers gives it, streams that show whole characters."""

import json
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mtllama.data.prompt import find_format
from mtllama.model import engine as engine_module
from mtllama.model.engine import Branches, BrokenLogitsError, Engine, Scored
from mtllama.model.find import ModelFolder, find_model
from mtllama.model.generation import Settings
from mtllama.model.load import LoadedModel, load_model

Scores = list[list[list[float]]]


@pytest.fixture(scope="module")
def bpe_engine(pico: Path) -> Engine:
    return Engine(load_model(find_model(str(pico)), dtype="float32"))


@pytest.fixture(scope="module")
def sentencepiece_engine(sentencepiece_tokenizer: Any) -> Engine:
    """A random model with an untied head behind the tokenizer in the manner of SentencePiece."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(sentencepiece_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )
    # Byte tokens are ordinary ones in such tokenizers: text, not markers to be skipped.
    backend = json.loads(sentencepiece_tokenizer.backend_tokenizer.to_str())
    backend["added_tokens"] = [token for token in backend["added_tokens"] if not token["content"].startswith("<0x")]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    assert (
        tokenizer("a\n").input_ids == sentencepiece_tokenizer("a\n").input_ids and tokenizer.decode([13], skip_special_tokens=True) == "\n"
    )
    model = LlamaForCausalLM(config)
    model.lm_head.weight.data[3:259] = 0  # of its own accord it says no stray bytes
    return Engine(LoadedModel(ModelFolder(Path(), "random"), model, tokenizer, find_format("mtllama"), torch.float32, 512))


@pytest.fixture(params=["bpe", "sentencepiece"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return request.getfixturevalue(f"{request.param}_engine")


def random_ids(draw: random.Random, engine: Engine, length: int) -> list[int]:
    return [draw.randrange(3, len(engine.tokenizer)) for _ in range(length)]


def random_items(engine: Engine, seed: int = 0) -> list[Branches]:
    """Prompts of all lengths with one-token, very long, equal and prefix answers."""
    draw = random.Random(seed)
    items = []
    for length in (1, 2, 3, 9, 30, 77, 120):
        stem = random_ids(draw, engine, 4)
        answers = [[draw.randrange(3, 500)], stem, stem[:2], [*stem, 7], random_ids(draw, engine, 60), stem[:1], stem]
        items.append(Branches(random_ids(draw, engine, length), answers[: draw.randrange(1, 8)] if length != 9 else answers))
    items.append(Branches(random_ids(draw, engine, 40), [[5], [6], [7]]))
    return items


def separate_scores(engine: Engine, items: Sequence[Branches]) -> Scores:
    """The reference: one plain forward pass for every answer."""
    results: Scores = []
    for item in items:
        results.append([])
        for answer in item.answers:
            ids = torch.tensor([item.prompt + answer])
            with torch.inference_mode():
                log_probs = engine.model(ids).logits[0].log_softmax(-1)
            start = len(item.prompt) - 1
            results[-1].append([float(log_probs[start + i, token]) for i, token in enumerate(answer)])
    return results


def assert_close(ours: Scores, theirs: Scores, tolerance: float = 1e-4) -> None:
    assert [[len(answer) for answer in item] for item in ours] == [[len(answer) for answer in item] for item in theirs]
    flat_ours, flat_theirs = (torch.tensor([t for item in scores for answer in item for t in answer]) for scores in (ours, theirs))
    assert len(flat_theirs) > 0 and flat_theirs.isfinite().all() and flat_theirs.std() > 0.5
    torch.testing.assert_close(flat_ours, flat_theirs, atol=tolerance, rtol=0)


def test_tree_scores_equal_separate_forward_passes(engine: Engine) -> None:
    items = random_items(engine)
    assert {len(answer) for item in items for answer in item.answers} >= {1, 2, 4, 5, 60}
    ours, theirs = engine.score(items), separate_scores(engine, items)
    assert_close(ours, theirs)


def test_scores_depend_on_neither_order_nor_company_nor_batch_size(bpe_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    items = random_items(bpe_engine, seed=1)
    theirs = separate_scores(bpe_engine, items)
    order = random.Random(0).sample(range(len(items)), len(items))
    passes: list[int] = []
    score_pass = Engine._score_pass

    def counted(self: Engine, *arguments: Any) -> Iterator[tuple[int, list[Scored]]]:
        passes[-1] += 1
        return score_pass(self, *arguments)

    monkeypatch.setattr(Engine, "_score_pass", counted)
    for tokens in (1, 200, 400, 100_000):
        monkeypatch.setattr(engine_module, "TOKENS_PER_PASS", tokens)
        passes.append(0)
        assert_close(bpe_engine.score(items), theirs)
        shuffled = bpe_engine.score([items[i] for i in order])
        assert_close([shuffled[order.index(i)] for i in range(len(items))], theirs)
    assert passes[0] == 2 * len(items) > passes[1] > passes[2] > passes[3] == 2
    monkeypatch.setattr(engine_module, "ROWS_PER_CHUNK", 3)
    assert_close(bpe_engine.score(items), theirs)
    assert_close([bpe_engine.score([item])[0] for item in items], theirs)
    alone = [[bpe_engine.score([Branches(item.prompt, [answer])])[0][0] for answer in item.answers] for item in items]
    assert_close(alone, theirs)


def test_a_choice_that_is_the_prefix_of_another_scores_the_same_tokens_the_same(bpe_engine: Engine) -> None:
    encoder = bpe_engine.encoder
    prompt, _ = encoder.prompt_ids("Which one is it?")
    answers = [encoder.answer_ids(text) for text in ("no", "no one", "no one else")]
    scores = bpe_engine.score([Branches(prompt, answers)])[0]
    shared = len(answers[0]) - 1
    assert shared > 0 and answers[1][:shared] == answers[0][:shared] and answers[0][-1] == bpe_engine.tokenizer.eos_token_id
    torch.testing.assert_close(scores[1][:shared], scores[0][:shared], atol=1e-4, rtol=0)
    assert abs(scores[1][shared] - scores[0][shared]) > 1e-3, "then they part"


def test_equal_answers_score_equally_and_choices_sum_to_less_than_one(bpe_engine: Engine) -> None:
    prompt = [5, 300, 17]
    every = bpe_engine.score([Branches(prompt, [[token] for token in range(len(bpe_engine.tokenizer))])])[0]
    total = torch.tensor(every).exp().sum()
    torch.testing.assert_close(total, torch.tensor(1.0), atol=1e-4, rtol=0)
    twice = bpe_engine.score([Branches(prompt, [[9, 8, 7], [4], [9, 8, 7]])])[0]
    torch.testing.assert_close(twice[0], twice[2], atol=1e-5, rtol=0)


def test_an_answer_longer_than_the_context_is_scored_as_alone(bpe_engine: Engine) -> None:
    draw = random.Random(5)
    answers = [random_ids(draw, bpe_engine, length) for length in (600, 2, 520)]
    assert len(answers[0]) > bpe_engine.loaded.max_length
    items = [Branches(random_ids(draw, bpe_engine, 40), answers), Branches([9], [[8]])]
    assert_close(bpe_engine.score(items), separate_scores(bpe_engine, items))


def test_what_greedy_text_would_say_is_called_greedy(engine: Engine) -> None:
    prompts = [item.prompt for item in random_items(engine)]
    said = engine.continue_ids(prompts, max_new_tokens=4)
    items = [Branches(prompt, [ids, [*ids[:-1], ids[-1] ^ 1], ids[:1]]) for prompt, ids in zip(prompts, said, strict=True)]
    judged = engine.judge(items)
    assert [[answer.greedy for answer in item] for item in judged] == [[True, False, True]] * len(items)
    assert [[answer.log_probs for answer in item] for item in judged] == engine.score(items)


def test_the_head_is_computed_once_a_prompt_and_token_that_is_fed(bpe_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    head = bpe_engine.head
    monkeypatch.setattr(bpe_engine, "head", lambda hidden: rows.append(len(hidden)) or head(hidden))
    bpe_engine.score([Branches([5] * 30, [[6], [7], [8]]), Branches([5] * 20, [[6], [7]])])
    assert sum(rows) == 2, "answers of one token need no more than the prompt's last row"
    rows.clear()
    bpe_engine.score([Branches([5] * 30, [[6, 7, 8], [7]])])
    assert sum(rows) == 3


def test_nothing_is_computed_for_padding_or_for_rows_that_are_done(bpe_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    fed = []
    hidden = bpe_engine._hidden
    monkeypatch.setattr(bpe_engine, "_hidden", lambda ids, plan: fed.append(len(ids)) or hidden(ids, plan))
    items = random_items(bpe_engine)
    bpe_engine.score(items)
    assert sum(fed) == sum(len(item) for item in items)
    prompts = [item.prompt for item in items]
    monkeypatch.setattr(engine_module, "ROWS_PER_GENERATION", 3)
    found = bpe_engine.continue_ids(prompts, max_new_tokens=9, ended=lambda new: new[-1] % 3 == 0)
    assert len({len(ids) for ids in found}) > 2, "rows end at different times"
    fed.clear()
    assert bpe_engine.continue_ids(prompts, max_new_tokens=9, ended=lambda new: new[-1] % 3 == 0) == found
    assert sum(fed) == sum(map(len, prompts)) + sum(len(ids) - 1 for ids in found)


def test_advance_counts_every_item_once_and_nothing_gives_nothing(bpe_engine: Engine) -> None:
    items = random_items(bpe_engine)
    counts: list[int] = []
    bpe_engine.score(items, counts.append)
    assert sum(counts) == len(items)
    counts.clear()
    bpe_engine.generate([item.prompt for item in items], max_new_tokens=1, advance=counts.append)
    assert sum(counts) == len(items)
    assert bpe_engine.score([]) == [] and bpe_engine.generate([]) == []


def their_text(engine: Engine, prompt: list[int], max_new_tokens: int) -> str:
    """Transformers' own greedy text behind one prompt alone."""
    eos = engine.tokenizer.eos_token_id
    config = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=eos, pad_token_id=eos)
    generated = engine.model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), generation_config=config)
    return engine.tokenizer.decode(generated[0, len(prompt) :], skip_special_tokens=True)


def whole(text: str) -> str:
    """Without the first bytes of a character that the limit cut off."""
    return text.rstrip("\N{REPLACEMENT CHARACTER}")


def test_greedy_text_equals_that_of_transformers_for_each_prompt_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [item.prompt for item in random_items(engine, seed=2)]
    theirs = [whole(their_text(engine, prompt, 12)).strip() for prompt in prompts]
    assert len(set(theirs)) > len(prompts) // 2 and len({len(prompt) for prompt in prompts}) > 4
    for tokens, rows, places in ((2048, 32, 2**15), (100, 32, 2**15), (2048, 1, 2**15), (2048, 3, 2**15), (2048, 32, 200), (1, 2, 1)):
        monkeypatch.setattr(engine_module, "TOKENS_PER_PASS", tokens)
        monkeypatch.setattr(engine_module, "ROWS_PER_GENERATION", rows)
        monkeypatch.setattr(engine_module, "CACHE_BYTES", places * engine.bytes_per_place())
        assert engine.generate(prompts, max_new_tokens=12, stop=()) == theirs
    assert engine.generate(prompts[::-1], max_new_tokens=12, stop=()) == theirs[::-1]


def test_a_folders_own_generation_settings_do_not_change_greedy_text(pico: Path, bpe_engine: Engine) -> None:
    prompts = [item.prompt for item in random_items(bpe_engine, seed=2)]
    theirs = bpe_engine.generate(prompts, max_new_tokens=12, stop=())
    loaded = load_model(find_model(str(pico)), dtype="float32")
    settings = {"repetition_penalty": 3.0, "no_repeat_ngram_size": 1, "stop_strings": ["\n"], "min_new_tokens": 40, "suppress_tokens": [5]}
    loaded.model.generation_config = GenerationConfig(do_sample=True, temperature=2.0, **settings)
    ours = Engine(loaded).generate(prompts, max_new_tokens=12, stop=())
    assert ours == theirs and any(ours)


Force = Callable[..., list[int]]


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Force:
    """Make the model of an engine say the given ids behind any prompt of the given length, whatever it thinks."""

    def start(engine: Engine, ids: Sequence[int], prompt_length: int = 3) -> list[int]:
        def decoder(*, position_ids: torch.Tensor, **kwargs: Any) -> Any:
            return SimpleNamespace(last_hidden_state=position_ids[:, :, None])

        def head(places: torch.Tensor) -> torch.Tensor:
            steps = (places.squeeze(-1) - prompt_length + 1).tolist()
            logits = torch.full((len(steps), len(engine.tokenizer)), -50.0)
            for row, step in enumerate(steps):
                logits[row, ids[step] if step < len(ids) else engine.tokenizer.eos_token_id] = 50
            return logits

        monkeypatch.setattr(engine, "decoder", decoder)
        monkeypatch.setattr(engine, "head", head)
        return [5] * prompt_length

    return start


def byte_ids(engine: Engine, text: str | bytes) -> list[int]:
    """One id for every UTF-8 byte of a text."""
    vocab = engine.tokenizer.get_vocab()
    if "<0x0A>" in vocab:
        return [vocab[f"<0x{byte:02X}>"] for byte in (text if isinstance(text, bytes) else text.encode())]
    # Byte-level BPE: a byte is written as the character that its pre-tokenizer shows for it.
    shown = {}
    spare = 256
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255:
            shown[byte] = chr(byte)
        else:
            shown[byte] = chr(spare)
            spare += 1
    return [vocab[shown[byte]] for byte in (text if isinstance(text, bytes) else text.encode())]


def tokens_of(engine: Engine, text: str) -> list[int]:
    ids = engine.tokenizer(text, add_special_tokens=False).input_ids
    assert engine.tokenizer.decode(ids) == text
    return list(ids)


@pytest.mark.parametrize(
    ("said", "stop", "heard"),
    [
        ("Paris\nand more", ("\n",), "Paris"),
        ("\n\n  Paris\nand more", ("\n",), "Paris"),
        ("Paris and more", ("\n",), "Paris and more"),
        ("Paris. END of it", ("END",), "Paris."),
        ("Paris### Human: hi", ("### Human:",), "Paris"),
        ("Paris### Hummus", ("### Human:",), "Paris### Hummus"),
        ("Paris##", ("### Human:",), "Paris##"),
        ("one two three four", ("four", "two"), "one"),
        ("one\ntwo", (), "one\ntwo"),
        ("\n\n", ("\n",), ""),
    ],
)
@pytest.mark.parametrize("split", ["bytes", "tokens"])
def test_text_ends_before_the_first_stop_string(
    bpe_engine: Engine, force: Force, said: str, stop: tuple[str, ...], heard: str, split: str
) -> None:
    ids = byte_ids(bpe_engine, said) if split == "bytes" else tokens_of(bpe_engine, said)
    prompt = force(bpe_engine, ids)
    for max_new_tokens in (len(ids), len(ids) + 5):
        assert bpe_engine.generate([prompt, prompt], max_new_tokens=max_new_tokens, stop=stop) == [heard, heard]
        pieces = list(bpe_engine.stream(prompt, Settings(max_new_tokens=max_new_tokens, stop=stop, strip=True)))
        assert "".join(pieces).rstrip() == heard


def test_logits_that_are_no_numbers_are_not_taken_for_a_token(bpe_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    step = bpe_engine.step

    def no_numbers(*args: Any) -> torch.Tensor:
        logits = step(*args)
        logits[0, 3] = torch.nan
        return logits

    monkeypatch.setattr(bpe_engine, "ends", frozenset())
    assert len(bpe_engine.continue_ids([[5, 6]], max_new_tokens=3)[0]) == 3
    monkeypatch.setattr(bpe_engine, "step", no_numbers)
    with pytest.raises(BrokenLogitsError, match="no numbers"):
        bpe_engine.continue_ids([[5, 6]], max_new_tokens=3)
    with pytest.raises(BrokenLogitsError, match="no numbers"):
        list(bpe_engine.stream([5, 6], Settings(max_new_tokens=3)))


def test_a_stop_string_split_over_tokens_ends_the_text_at_once(bpe_engine: Engine, force: Force, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = byte_ids(bpe_engine, "Paris### Human: and then a long tail")
    prompt = force(bpe_engine, ids)
    calls = []
    decoder = bpe_engine.decoder

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return decoder(*args, **kwargs)

    monkeypatch.setattr(bpe_engine, "decoder", counted)
    assert bpe_engine.generate([prompt], max_new_tokens=len(ids), stop=("### Human:",)) == ["Paris"]
    needed = len("Paris### Human:")
    assert len(calls) == needed < len(ids)
    calls.clear()
    assert "".join(bpe_engine.stream(prompt, Settings(max_new_tokens=len(ids), stop=("### Human:",), strip=True))) == "Paris"
    assert len(calls) == needed


def test_the_end_marker_ends_text_and_is_not_shown(engine: Engine, force: Force) -> None:
    ids = [*byte_ids(engine, "Par"), engine.tokenizer.eos_token_id, *byte_ids(engine, "is")]
    prompt = force(engine, ids)
    assert engine.generate([prompt], max_new_tokens=20, stop=()) == ["Par"]
    assert "".join(engine.stream(prompt, Settings(max_new_tokens=20, strip=True))) == "Par"
    prompt = force(engine, [engine.tokenizer.eos_token_id])
    assert engine.generate([prompt], max_new_tokens=20) == [""] and list(engine.stream(prompt, Settings(strip=True))) == []


def test_rows_that_end_early_do_not_disturb_the_others(bpe_engine: Engine) -> None:
    prompts = [item.prompt for item in random_items(bpe_engine, seed=3)]
    unstopped = bpe_engine.generate(prompts, max_new_tokens=12, stop=())
    stop = next((letter,) for letter in "abcdefghijklm" if 2 < sum(letter in text for text in unstopped) < 6)
    assert 2 < sum(stop[0] in text for text in unstopped) < len(unstopped), "some stop and some do not"
    ours = bpe_engine.generate(prompts, max_new_tokens=12, stop=stop)
    theirs = [text.partition(stop[0])[0].strip() for text in unstopped]
    assert ours == theirs


def test_a_stream_joined_is_the_generated_text(engine: Engine) -> None:
    prompts = [item.prompt for item in random_items(engine, seed=2)]
    texts = engine.generate(prompts, max_new_tokens=16, stop=())
    pieces = [list(engine.stream(prompt, Settings(max_new_tokens=16, strip=True))) for prompt in prompts]
    assert ["".join(each).strip() for each in pieces] == texts and any(texts)
    assert sum(len(each) > 3 for each in pieces) > len(prompts) // 2, "it comes in pieces"


def test_a_raw_continuation_keeps_the_blank_before_its_first_word(engine: Engine, force: Force) -> None:
    prompt, said = engine.encoder.raw_ids("Is fog"), engine.encoder.raw_ids("Is fog wet? It is")
    bos = len(engine.encoder.raw_ids("")) or 0
    new = said[len(prompt) :]
    assert said[: len(prompt)] == prompt and new and bos <= 1
    force(engine, new, prompt_length=len(prompt))
    settings = Settings(max_new_tokens=len(new))
    pieces = list(engine.stream(prompt, settings))
    assert "".join(pieces) == " wet? It is" and len(pieces) > 2
    force(engine, new, prompt_length=len(prompt))
    assert "".join(engine.stream(prompt, Settings(max_new_tokens=len(new), strip=True))) == "wet? It is"


def test_each_end_marker_of_the_folder_ends_a_text(pico: Path, tmp_path: Path, force: Force) -> None:
    folder = Path(shutil.copytree(pico, tmp_path / "model"))
    told = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    (folder / "generation_config.json").write_text(json.dumps({**told, "eos_token_id": [2, 484]}), encoding="utf-8")
    engine = Engine(load_model(find_model(str(folder)), dtype="float32"))
    said = byte_ids(engine, "Yes")
    assert engine.ends == {2, 484} and 484 not in said
    prompt = force(engine, [*said, 484, *byte_ids(engine, " and no")])
    assert engine.generate([prompt], max_new_tokens=20, stop=()) == ["Yes"]
    assert "".join(engine.stream(prompt, Settings(max_new_tokens=20))) == "Yes"
    (generated,) = engine.continue_ids([prompt], max_new_tokens=20)
    assert generated == [*said, 484]


EMOJI = "a\N{GRINNING FACE}é\N{FAMILY}漢 b\N{ROCKET}"


def test_a_character_of_several_bytes_is_never_split(engine: Engine, force: Force) -> None:
    prompt = force(engine, byte_ids(engine, EMOJI))
    pieces = list(engine.stream(prompt, Settings(max_new_tokens=100, strip=True)))
    assert "".join(pieces) == EMOJI == engine.generate([prompt], max_new_tokens=100, stop=())[0]
    assert pieces == list(EMOJI), "one piece for each character, none before it is whole"


def test_a_character_that_the_limit_cuts_off_is_left_out(engine: Engine, force: Force) -> None:
    ids = byte_ids(engine, EMOJI)
    prompt = force(engine, ids)
    for limit in range(1, len(ids)):
        text = "".join(engine.stream(prompt, Settings(max_new_tokens=limit, strip=True)))
        assert text == EMOJI.encode()[:limit].decode(errors="ignore")
        assert engine.generate([prompt], max_new_tokens=limit, stop=()) == [text.strip()]


def test_bytes_that_are_no_character_do_not_hold_the_rest_back(bpe_engine: Engine, force: Force) -> None:
    broken = byte_ids(bpe_engine, "\N{GRINNING FACE}")[:2]
    prompt = force(bpe_engine, [*byte_ids(bpe_engine, "a"), *broken, *byte_ids(bpe_engine, "bSTOPc")])
    pieces = list(bpe_engine.stream(prompt, Settings(max_new_tokens=100, stop=("STOP",), strip=True)))
    assert pieces[0] == "a" and "".join(pieces).endswith("b") and "STOP" not in "".join(pieces)


@pytest.mark.parametrize(
    "broken", [b"\x9f", b"\xf0", b"\xe2\x82", b"\xf0\x9f", b"\xf0\x9f\x98", b"\x80\x80\x80\x80\x80", b"\xe2\x82\xf0\x9f\xe2"]
)
def test_bytes_that_are_no_character_do_not_spoil_the_one_behind_them(bpe_engine: Engine, force: Force, broken: bytes) -> None:
    said = byte_ids(bpe_engine, b"a" + broken + EMOJI.encode())
    pieces = list(bpe_engine.stream(force(bpe_engine, said), Settings(max_new_tokens=100, strip=True)))
    assert "".join(pieces).replace("\N{REPLACEMENT CHARACTER}", "") == "a" + EMOJI
    assert pieces[-1] == EMOJI[-1] and "".join(pieces).startswith("a\N{REPLACEMENT CHARACTER}")


def test_a_stop_string_behind_broken_bytes_is_not_shown(bpe_engine: Engine, force: Force) -> None:
    broken = byte_ids(bpe_engine, "\N{GRINNING FACE}")[:2]
    prompt = force(bpe_engine, [*byte_ids(bpe_engine, "a"), *broken, *byte_ids(bpe_engine, "STOP and more")])
    assert (
        "".join(bpe_engine.stream(prompt, Settings(max_new_tokens=100, stop=("STOP",), strip=True))).rstrip("\N{REPLACEMENT CHARACTER}")
        == "a"
    )
    assert bpe_engine.generate([prompt], max_new_tokens=100, stop=("STOP",))[0].rstrip("\N{REPLACEMENT CHARACTER}") == "a"


def test_a_stop_string_is_never_shown_even_in_part(engine: Engine, force: Force) -> None:
    said, stop = "Yes ### Hum ### Human: no", "### Human:"
    prompt = force(engine, byte_ids(engine, said))
    shown = ""
    for piece in engine.stream(prompt, Settings(max_new_tokens=100, stop=(stop,), strip=True)):
        shown += piece
        assert not any(shown.endswith(stop[:n]) for n in range(1, len(stop)))
    assert shown == "Yes ### Hum "


def test_leading_blanks_are_not_shown(engine: Engine, force: Force) -> None:
    prompt = force(engine, byte_ids(engine, " \n Yes no"))
    assert "".join(engine.stream(prompt, Settings(max_new_tokens=100, stop=("\n",), strip=True))) == "Yes no"


def test_a_sampled_stream_depends_on_its_seed_alone(bpe_engine: Engine) -> None:
    def text(seed: int, temperature: float) -> str:
        return "".join(bpe_engine.stream([5, 300, 17], Settings(max_new_tokens=20, temperature=temperature, seed=seed, strip=True)))

    assert text(1, 1.0) == text(1, 1.0)
    assert len({text(seed, 1.0) for seed in range(5)}) > 2
    assert text(1, 0.0) == text(2, 0.0)


@pytest.mark.parametrize("small", [1e-9, 1e-46, 5e-324])
@pytest.mark.parametrize("setting", ["top_p", "temperature"])
def test_however_small_top_p_or_temperature_is_the_likeliest_token_is_drawn(bpe_engine: Engine, setting: str, small: float) -> None:
    def text(**settings: Any) -> str:
        return "".join(bpe_engine.stream([5, 300, 17], Settings(max_new_tokens=20, strip=True, **settings)))

    usual = {"temperature": 1.0, "seed": 3}
    assert text(**{**usual, setting: small}) == text(temperature=0.0) != text(**usual)


def test_an_engine_computes_without_gradients_and_in_evaluation(pico: Path) -> None:
    loaded = load_model(find_model(str(pico)), dtype="float32")
    loaded.model.train()
    engine = Engine(loaded)
    assert not engine.model.training
    seen = SimpleNamespace(grad=None)
    handle = engine.model.get_decoder().register_forward_hook(lambda *args: setattr(seen, "grad", torch.is_inference_mode_enabled()))
    engine.score([Branches([5], [[6]])])
    handle.remove()
    assert seen.grad is True
