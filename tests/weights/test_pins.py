"""Token ids of restored models: inside the embedding, the vocabulary's own, and without a further package."""

import contextlib
import json
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import sentencepiece
from hypothesis import strategies
from miniature import PAD, VOCABULARY, Release, alpaca, fastchat, mt_llama, sentencepiece_model
from safetensors.torch import save_file
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from mtllama.errors import UserError
from mtllama.model.find import find_model
from mtllama.model.load import load_model
from mtllama.weights import pins
from mtllama.weights.pins import pinned

RELEASES: dict[str, Callable[[Path], Release]] = {
    "mt-llama": mt_llama,
    "fastchat v0": lambda folder: fastchat(folder, "v0"),
    "fastchat v1.1": fastchat,
    "alpaca": alpaca,
}
SMALL = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


@pytest.fixture(params=RELEASES)
def release(request: pytest.FixtureRequest, tmp_path: Path) -> Release:
    return RELEASES[request.param](tmp_path / "release")


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def restored(release: Release, folder: Path) -> Path:
    """The restored model's folder, its tokenizer pinned."""
    write(folder, pinned(release.delta, release.rows))
    save_file(release.target, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def edit(folder: Path, name: str, **values: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    path = folder / name
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({key: value for key, value in {**before, **values}.items() if value is not None}))


def load(files: dict[str, bytes], name: str) -> dict[str, Any]:
    return dict(json.loads(files[name]))


def largest_id(tokenizer: Any) -> int:
    return max(*tokenizer.get_vocab().values(), *tokenizer.all_special_ids)


def raw(text: str) -> list[int]:
    return list(sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model()).encode(text))


def test_without_pinning_an_id_of_the_release_lies_outside_the_embedding(tmp_path: Path) -> None:
    release = mt_llama(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(release.delta)
    assert largest_id(tokenizer) == release.rows and tokenizer.unk_token == "[UNK]"
    assert AutoConfig.from_pretrained(release.delta).pad_token_id == -1


def test_pinned_every_special_id_lies_inside_the_embedding(release: Release, tmp_path: Path) -> None:
    folder = restored(release, tmp_path / "restored")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert largest_id(tokenizer) < release.rows and len(tokenizer) <= release.rows
    assert len(tokenizer.all_special_ids) >= 2
    for config in (AutoConfig.from_pretrained(folder), GenerationConfig.from_pretrained(folder)):
        for role in ("bos", "eos", "pad"):
            assert getattr(config, f"{role}_token_id") == getattr(tokenizer, f"{role}_token_id")
            assert 0 <= getattr(config, f"{role}_token_id") < release.rows


def test_the_releases_tokens_have_their_published_ids(tmp_path: Path) -> None:
    release = mt_llama(tmp_path / "release")
    tokenizer = AutoTokenizer.from_pretrained(restored(release, tmp_path / "restored"))
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("</s>", "</s>")
    ids = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id
    assert ids == (2, 2, PAD, 0)
    assert load(pinned(release.delta, release.rows), "added_tokens.json") == {"[PAD]": PAD}
    assert tokenizer("Hello").input_ids == [2, *raw("Hello")]
    assert tokenizer.padding_side == "right" and tokenizer.model_max_length == 512


def test_the_restored_release_loads_and_the_unpinned_one_is_refused(tmp_path: Path) -> None:
    release = mt_llama(tmp_path / "release")
    folder = restored(release, tmp_path / "restored")
    loaded = load_model(find_model(str(folder)), dtype="float32")
    assert loaded.model.get_input_embeddings().weight.shape[0] == release.rows
    ids = loaded.tokenizer("Hello [PAD]", return_tensors="pt").input_ids
    assert ids.max() == PAD
    assert loaded.model.generate(ids, max_new_tokens=3).shape[1] > ids.shape[1]
    for name in ("tokenizer.json", *SMALL):
        (folder / name).unlink()
        if (release.delta / name).exists():
            shutil.copy(release.delta / name, folder)
    with pytest.raises(UserError, match="outside the embedding"):
        load_model(find_model(str(folder)), dtype="float32")


def test_pinned_files_load_without_the_package_that_the_release_needs(
    release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = restored(release, tmp_path / "restored")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ValueError, match="tiktoken"):
        AutoTokenizer.from_pretrained(release.delta)
    assert AutoTokenizer.from_pretrained(folder)("Hello").input_ids[1:] == raw("Hello")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("pinned")
    return AutoTokenizer.from_pretrained(restored(mt_llama(folder / "release"), folder / "restored"))


TEXTS = strategies.text() | strategies.text(alphabet=" \t\n▁abehtn<>0xA1é東") | strategies.text(alphabet="the and of")


@hypothesis.settings(max_examples=400)
@hypothesis.given(TEXTS)
def test_ids_of_text_are_those_of_the_raw_vocabulary(tokenizer: Any, text: str) -> None:
    assert tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids == raw(text)
    if not any(token in text for token in tokenizer.get_added_vocab()):
        assert tokenizer(text).input_ids == [2, *raw(text)]


@pytest.mark.parametrize("text", ["Hello world", "  two  blanks ", "a\nb", "naïve 東京 🙂", "<s> no <0x0A> byte </s>", "▁", ""])
def test_ids_of_awkward_texts_are_those_of_the_raw_vocabulary(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    assert ids == raw(text) and bool(ids) == bool(text)
    assert tokenizer.decode(ids) == text.replace("▁", " ")


def test_a_vocabulary_is_read_as_its_own_library_reads_it() -> None:
    theirs = sentencepiece_model_pb2.ModelProto.FromString(sentencepiece_model())
    ours = pins._read_model(sentencepiece_model())
    assert [(piece.text, piece.score, piece.kind) for piece in ours.pieces] == [(p.piece, p.score, p.type) for p in theirs.pieces]
    assert len(ours.pieces) == VOCABULARY and ours.plain and ours.dummy_prefix
    assert ours.own == {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def test_what_is_right_keeps_its_bytes(release: Release, tmp_path: Path) -> None:
    once = pinned(release.delta, release.rows)
    assert pinned(write(tmp_path / "once", once), release.rows) == once
    assert once["tokenizer.model"] == sentencepiece_model()
    if release.rows == VOCABULARY:  # Vicuna v1.1 has every token and id right
        changed = {
            name for name, data in once.items() if not (release.delta / name).exists() or (release.delta / name).read_bytes() != data
        }
        assert changed == {"tokenizer.json", "tokenizer_config.json"}
        before = json.loads((release.delta / "tokenizer_config.json").read_text())
        after = load(once, "tokenizer_config.json")
        assert {key for key in before if before[key] != after[key]} == {"tokenizer_class"}


def test_the_small_files_are_all_but_weights_hidden_files_and_folders(tmp_path: Path) -> None:
    release = mt_llama(tmp_path)
    for name in ("README.md", "LICENSE", ".gitattributes", "model.safetensors", "training_args.bin", "model.safetensors.index.json"):
        (release.delta / name).write_bytes(b"\x00 any bytes")
    (release.delta / "original").mkdir()
    files = pinned(release.delta, release.rows)
    assert set(files) == {*SMALL, "tokenizer.model", "tokenizer.json", "README.md", "LICENSE"}
    assert files["README.md"] == b"\x00 any bytes"


def test_a_folder_without_a_tokenizer_passes_through(tmp_path: Path) -> None:
    release = mt_llama(tmp_path)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        (release.delta / name).unlink()
    files = pinned(release.delta, release.rows)
    assert files == {name: (release.delta / name).read_bytes() for name in ("config.json", "generation_config.json")}


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("tokenizer.model", b""),
        ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 499723\n"),
        ("tokenizer.model", sentencepiece_model()[:-3]),
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b'{"model": {"vocab": [[["a"]], 7]}}'),
        ("tokenizer_config.json", b"{"),
        ("special_tokens_map.json", b"\xff\xfe\xfd"),
        ("added_tokens.json", b"[" * 100_000),
        ("added_tokens.json", b"[]"),
    ],
)
def test_a_tokenizer_that_cannot_be_understood_passes_through(name: str, data: bytes, tmp_path: Path) -> None:
    release = mt_llama(tmp_path)
    assert pinned(release.delta, release.rows) != {path.name: path.read_bytes() for path in pins.small_files(release.delta)}
    (release.delta / name).write_bytes(data)
    files = pinned(release.delta, release.rows)
    assert files == {path.name: path.read_bytes() for path in pins.small_files(release.delta)} and files[name] == data


def test_a_vocabulary_larger_than_the_embedding_passes_through(tmp_path: Path) -> None:
    release = mt_llama(tmp_path)
    assert pinned(release.delta, VOCABULARY - 1) == {path.name: path.read_bytes() for path in pins.small_files(release.delta)}


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_broken_config_passes_through_and_the_tokenizer_is_pinned_all_the_same(name: str, tmp_path: Path) -> None:
    release = mt_llama(tmp_path)
    (release.delta / name).write_bytes(b'{"bos_token_id": 0, "eos')
    files = pinned(release.delta, release.rows)
    assert files[name] == b'{"bos_token_id": 0, "eos'
    assert load(files, "special_tokens_map.json")["unk_token"] == "<unk>"


def test_a_token_without_a_row_goes_and_its_id_with_it(tmp_path: Path) -> None:
    release = fastchat(tmp_path / "release", "v1.1")
    edit(release.delta, "added_tokens.json", **{"[PAD]": PAD})
    edit(release.delta, "special_tokens_map.json", pad_token="[PAD]", additional_special_tokens=["<x>", "<s>"])
    edit(release.delta, "generation_config.json", pad_token_id=PAD)
    files = pinned(release.delta, VOCABULARY)
    assert load(files, "added_tokens.json") == {}
    assert "pad_token" not in load(files, "special_tokens_map.json")
    assert load(files, "special_tokens_map.json")["additional_special_tokens"] == ["<s>"]
    assert load(files, "generation_config.json")["pad_token_id"] is None
    tokenizer = AutoTokenizer.from_pretrained(write(tmp_path / "pinned", files))
    assert len(tokenizer) == VOCABULARY and tokenizer.pad_token is None


def test_a_token_in_no_vocabulary_takes_a_row_that_is_left(tmp_path: Path) -> None:
    release = mt_llama(tmp_path / "release")
    (release.delta / "added_tokens.json").unlink()
    tokenizer = AutoTokenizer.from_pretrained(write(tmp_path / "pinned", pinned(release.delta, release.rows)))
    assert tokenizer.pad_token_id == PAD and len(tokenizer) == release.rows
    more = AutoTokenizer.from_pretrained(write(tmp_path / "more", pinned(release.delta, release.rows + 5)))
    assert more.unk_token_id == 0 and len(more) == release.rows  # an unknown token of its own is never wanted


def test_of_several_ends_those_inside_stay_and_the_tokenizers_own_is_among_them(tmp_path: Path) -> None:
    release = mt_llama(tmp_path)
    for before, after in (([7, 2], [7, 2]), ([7, PAD + 1], [2, 7]), ([-1], [2])):
        edit(release.delta, "generation_config.json", eos_token_id=before)
        assert load(pinned(release.delta, release.rows), "generation_config.json")["eos_token_id"] == after


def test_newer_settings_are_pinned_too(tmp_path: Path) -> None:
    release = mt_llama(tmp_path / "release")
    (release.delta / "added_tokens.json").unlink()
    (release.delta / "special_tokens_map.json").unlink()
    entries = {str(number): {"content": token, "special": True} for number, token in ((0, "<unk>"), (PAD, "[PAD]"), (PAD + 1, "[UNK]"))}
    edit(release.delta, "tokenizer_config.json", added_tokens_decoder=entries, unk_token={"__type": "AddedToken", "content": "[UNK]"})
    files = pinned(release.delta, release.rows)
    settings = load(files, "tokenizer_config.json")
    assert sorted(settings["added_tokens_decoder"]) == ["0", str(PAD)]
    assert settings["unk_token"] == {"__type": "AddedToken", "content": "<unk>"}
    tokenizer = AutoTokenizer.from_pretrained(write(tmp_path / "pinned", files))
    assert tokenizer.unk_token_id == 0 and largest_id(tokenizer) < release.rows


def test_a_tokenizer_json_with_a_token_outside_is_pinned_and_else_kept(tmp_path: Path) -> None:
    release = mt_llama(tmp_path / "release")
    AutoTokenizer.from_pretrained(release.delta).save_pretrained(release.delta)  # what a newer tool makes of the release
    assert largest_id(AutoTokenizer.from_pretrained(release.delta)) >= release.rows
    before = json.loads((release.delta / "tokenizer.json").read_text())
    files = pinned(release.delta, release.rows)
    after = load(files, "tokenizer.json")
    assert [entry for entry in before["added_tokens"] if entry not in after["added_tokens"]] == [before["added_tokens"][-1]]
    assert after == {**before, "added_tokens": after["added_tokens"]}
    tokenizer = AutoTokenizer.from_pretrained(write(tmp_path / "pinned", files))
    assert tokenizer.unk_token_id == 0 and largest_id(tokenizer) < release.rows
    (release.delta / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")  # of another format, and not needed
    again = pinned(release.delta, release.rows)
    assert again == files | {"tokenizer.model": b"IQ== 0\nIg== 1\n"}


def with_spec(change: Callable[[Any], None]) -> bytes:
    model = sentencepiece_model_pb2.ModelProto.FromString(sentencepiece_model())
    change(model)
    return bytes(model.SerializeToString())


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.trainer_spec, "model_type", 1),
        lambda model: setattr(model.normalizer_spec, "precompiled_charsmap", b"\x01\x02"),
        lambda model: setattr(model.normalizer_spec, "remove_extra_whitespaces", True),
        lambda model: setattr(model.normalizer_spec, "escape_whitespaces", False),
        lambda model: setattr(model.trainer_spec, "treat_whitespace_as_suffix", True),
        lambda model: setattr(model.pieces[300], "type", 4),
    ],
)
def test_a_vocabulary_of_another_kind_is_not_rewritten_but_its_tokens_are_pinned(change: Callable[[Any], None], tmp_path: Path) -> None:
    release = mt_llama(tmp_path)
    (release.delta / "tokenizer.model").write_bytes(with_spec(change))
    files = pinned(release.delta, release.rows)
    assert "tokenizer.json" not in files
    assert load(files, "tokenizer_config.json")["tokenizer_class"] == "LlamaTokenizer"
    assert load(files, "tokenizer_config.json")["unk_token"] == "<unk>"


def test_a_vocabulary_without_a_blank_in_front_stays_so(tmp_path: Path) -> None:
    release = mt_llama(tmp_path / "release")
    data = with_spec(lambda model: setattr(model.normalizer_spec, "add_dummy_prefix", False))
    (release.delta / "tokenizer.model").write_bytes(data)
    tokenizer = AutoTokenizer.from_pretrained(write(tmp_path / "pinned", pinned(release.delta, release.rows)))
    theirs = sentencepiece.SentencePieceProcessor(model_proto=data)
    for text in ("Hello world", " the"):
        assert tokenizer(text, add_special_tokens=False).input_ids == theirs.encode(text) != raw(text)


def test_a_missing_bos_stays_missing_where_the_settings_say_so(tmp_path: Path) -> None:
    release = fastchat(tmp_path / "release")
    edit(release.delta, "tokenizer_config.json", add_bos_token=False, add_eos_token=True)
    tokenizer = AutoTokenizer.from_pretrained(write(tmp_path / "pinned", pinned(release.delta, release.rows)))
    assert tokenizer("Hello").input_ids == [*raw("Hello"), 2]


def test_a_message_of_a_stranger_is_read_within_bounds(tmp_path: Path) -> None:
    piece = b"\x0a\x01a\x15" + struct.pack("<f", 0.0)
    entry = b"\x0a" + bytes([len(piece)]) + piece
    for data in (
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f",  # a length of 2^62
        b"\xff" * 40,  # a number that does not end
        b"\x0b\x0c",  # groups, which protobuf gave up
        entry + entry,  # one piece twice
        b"\x0a\x02\x08\x01",  # a number in place of a text
        b"\x08\x01",  # a number in place of a piece
        b"\x0a\x04\x0a\x02\xff\xfe",  # not UTF-8
        bytes((1 << 24) + 1),
    ):
        with pytest.raises(ValueError):
            pins._read_model(data)
    assert [each.text for each in pins._read_model(entry).pieces] == ["a"]


@hypothesis.settings(max_examples=200)
@hypothesis.given(strategies.data())
def test_no_damage_to_the_vocabulary_is_more_than_a_value_error(data: strategies.DataObject) -> None:
    model = bytearray(sentencepiece_model())
    for _ in range(data.draw(strategies.integers(1, 4))):
        model[data.draw(strategies.integers(0, len(model) - 1) | strategies.integers(0, 60))] = data.draw(strategies.integers(0, 255))
    with contextlib.suppress(ValueError):
        pins._read_model(bytes(model[: data.draw(strategies.integers(0, len(model)))]))


JSON = strategies.recursive(
    strategies.none()
    | strategies.booleans()
    | strategies.integers()
    | strategies.floats()
    | strategies.sampled_from(["", "a", "</s>", "\ud800"]),
    lambda values: (
        strategies.lists(values, max_size=3)
        | strategies.dictionaries(strategies.sampled_from(["content", "vocab", "model", "id", "1", "x"]), values, max_size=3)
    ),
    max_leaves=6,
)
KEYS = {
    "config.json": ["bos_token_id", "eos_token_id", "pad_token_id"],
    "tokenizer_config.json": ["bos_token", "unk_token", "x_token", "added_tokens_decoder", "extra_special_tokens", "tokenizer_class"],
    "special_tokens_map.json": ["pad_token", "unk_token", "additional_special_tokens"],
    "added_tokens.json": ["[PAD]", "", "</s>"],
    "tokenizer.json": ["model", "added_tokens"],
}


@pytest.fixture(scope="module")
def mangled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mt_llama(tmp_path_factory.mktemp("mangled")).delta


@hypothesis.settings(max_examples=150)
@hypothesis.given(strategies.data())
def test_no_json_of_a_stranger_is_more_than_passed_through(mangled: Path, data: strategies.DataObject) -> None:
    originals = {path: path.read_bytes() for path in pins.small_files(mangled)}
    name = data.draw(strategies.sampled_from(sorted(KEYS)))
    before = json.loads(originals.get(mangled / name, b"{}"))
    if name == "tokenizer.json":
        before = {"model": {"vocab": {"a": 0, "b": 1}, "unk_token": "a"}}
    values = data.draw(strategies.dictionaries(strategies.sampled_from(KEYS[name]), JSON))
    try:
        (mangled / name).write_text(json.dumps({**before, **values}))
        files = pinned(mangled, VOCABULARY + 1)
        assert set(files) >= {path.name for path in originals}
        for name in ("config.json", "generation_config.json"):
            assert isinstance(load(files, name), dict)
    finally:
        (mangled / "tokenizer.json").unlink(missing_ok=True)
        for path, content in originals.items():
            path.write_bytes(content)
