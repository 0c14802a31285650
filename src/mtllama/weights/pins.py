"""The small files of another tool's delta as the restored model needs them: every token id inside the embedding.

Deltas of 2023 name special tokens that stand in no vocabulary (`[UNK]`), or none (`""`), and ids that are no token's (a pad
id of -1). A tokenizer of today gives such a token a new id behind the last row of the embedding; and it needs a package of
its own for a vocabulary in `tokenizer.model`, puts no BOS before a text and loses a leading blank. So tokens and ids are
pinned here, and a `tokenizer.json` is written that gives the ids of `tokenizer.model` to the letter. Only JSON and
protobuf are read, both as data.
"""

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtllama.weights.shards import small_files

_MAX_MODEL_BYTES, _MAX_PIECE = 1 << 24, 256
"""Bounds of a `tokenizer.model`: its bytes, the characters of a piece. The time that merges take grows with both."""
_CONFIG, _GENERATION = "config.json", "generation_config.json"
_SETTINGS, _SPECIAL, _ADDED, _FAST, _MODEL = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.json",
    "tokenizer.model",
)
_ORDER = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The order in which transformers gives new ids to special tokens that are in no vocabulary; others follow."""
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_LLAMA = ("LlamaTokenizer", "LlamaTokenizerFast", "LLaMATokenizer", None)
"""Tokenizer classes that do nothing but what `tokenizer.json` can say (None: not named)."""
_DECODER = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]

Object = dict[str, Any]
"""A JSON object of a stranger: nothing is known of its values."""


def pinned(folder: Path, rows: int) -> dict[str, bytes]:
    """The small files of a delta of another tool, by name, as they belong to a model of `rows` embedding rows.

    A file in which nothing is wrong keeps its bytes. If there is no tokenizer, or one that cannot be understood (broken JSON,
    a vocabulary larger than the embedding), all files do. Else:

    * a special token in no vocabulary becomes the vocabulary's own of that role (unk: always, which is what the tokenizers
      of the time answered; others: if no row is left for them), and goes where there is none;
    * added tokens behind the last row go;
    * ids in config.json and generation_config.json are those of the tokenizer's tokens;
    * a LLaMA-style `tokenizer.model` alone gets a `tokenizer.json`, and a tokenizer_config.json that names its class.
    """
    files = {path.name: path.read_bytes() for path in small_files(folder)}
    try:
        changed = _pin(files, rows)
    except ValueError:  # what cannot be understood is left alone; whoever loads the tokenizer says what is wrong
        return files
    return files | {name: _to_bytes(name, value) for name, value in changed.items()}


def _to_bytes(name: str, value: Object) -> bytes:
    return (json.dumps(value, indent=None if name == _FAST else 2) + "\n").encode()  # indenting a whole vocabulary takes a second


@dataclass(frozen=True)
class _Piece:
    """One entry of a SentencePiece vocabulary."""

    text: str
    score: float
    kind: int


_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6
"""Kinds of pieces."""


@dataclass(frozen=True)
class _SentencePiece:
    """What a `tokenizer.model` says."""

    pieces: list[_Piece]
    own: dict[str, str]
    """Its own special tokens, by role (`bos_token`, ...)."""
    plain: bool
    """Whether it is BPE without normalisation, the kind that can be said in a `tokenizer.json`."""
    dummy_prefix: bool
    """Whether it puts a blank before every text."""


def _pin(files: dict[str, bytes], rows: int) -> dict[str, Object]:
    """The files that must change, as JSON. Raises ValueError for what cannot be understood."""
    settings, special, added = (_object(files, name) for name in (_SETTINGS, _SPECIAL, _ADDED))
    fast = _object(files, _FAST) if _FAST in files else None
    model = None
    try:
        model = _read_model(files[_MODEL]) if _MODEL in files else None
    except ValueError:
        if fast is None:
            raise  # else it is not needed: some of that name are of another format
    own = dict(model.own) if model else {}
    if fast is not None:
        ids = _vocabulary(fast, own)
    elif model is not None:
        ids = {piece.text: number for number, piece in enumerate(model.pieces)}
    else:
        raise ValueError("no vocabulary")
    if max(ids.values(), default=rows) >= rows:
        raise ValueError("the vocabulary is larger than the embedding")
    own = {role: token for role, token in own.items() if token in ids}
    ids |= {token: number for token, number in _added(fast, settings, added) if token not in ids and number < rows}

    tokens = _special_tokens(settings, special)
    if fast is None:
        tokens = {**own, **tokens}  # as the LLaMA classes have them by default
    for role in sorted(tokens, key=lambda role: _ORDER.index(role) if role in _ORDER else len(_ORDER)):
        tokens[role] = _settle(tokens[role], ids, rows, own.get(role), appended=role != "unk_token")
    for kept in (settings, special):
        for token in _listed(kept):
            _settle(token, ids, rows, None, appended=True)

    after = {_SETTINGS: _with_tokens(settings, tokens, ids), _SPECIAL: _with_tokens(special, tokens, ids)}
    after[_ADDED] = {token: number for token, number in added.items() if ids.get(token) == number}
    if fast is not None:
        after[_FAST] = _without_added(fast, rows)
    elif model is not None and settings.get("tokenizer_class") in _LLAMA:
        written = _tokenizer_json(model, ids, tokens, settings)
        if written is not None:
            after[_FAST] = written
            after[_SETTINGS] = _for_tokenizer_json(after[_SETTINGS], tokens)
    for name in (_CONFIG, _GENERATION):
        try:
            after[name] = _with_ids(_object(files, name), tokens, ids, rows)
        except ValueError:  # broken: it stays as it is, and nothing else depends on it
            continue
    return {name: value for name, value in after.items() if value != (_object(files, name) if name in files else {})}


def _object(files: dict[str, bytes], name: str) -> Object:
    """A JSON object among `files`; an empty one where the file is missing."""
    try:
        value = json.loads(files.get(name, b"{}"))
    except RecursionError as error:
        raise ValueError(f"{name} is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} is not a JSON object")
    return value


def _vocabulary(fast: Object, own: dict[str, str]) -> dict[str, int]:
    """Token -> id of a `tokenizer.json` without its added tokens; its own unk goes into `own`."""
    model = fast.get("model")
    if not isinstance(model, dict):
        raise ValueError("the tokenizer has no vocabulary")
    vocab = model.get("vocab")
    if isinstance(vocab, list) and all(isinstance(entry, list) and entry and isinstance(entry[0], str) for entry in vocab):
        vocab = {entry[0]: number for number, entry in enumerate(vocab)}  # unigram: a list of token and score
    if not isinstance(vocab, dict) or not all(map(_is_id, vocab.values())):
        raise ValueError("the tokenizer has no vocabulary")
    by_id = {number: token for token, number in vocab.items()}
    for unk in ("<unk>", by_id.get(_as_id(model.get("unk_id"))), model.get("unk_token")):  # the surest last
        if isinstance(unk, str) and unk in vocab:
            own["unk_token"] = unk
    return dict(vocab)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _as_id(value: Any) -> int:
    return value if _is_id(value) else -1


def _added(fast: Object | None, settings: Object, added: Object) -> Iterator[tuple[str, int]]:
    """Tokens that were added to a vocabulary, and their ids, from the three places that may name them."""
    entries = (fast or {}).get("added_tokens")
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict) and isinstance(entry.get("content"), str) and _is_id(entry.get("id")):
            yield entry["content"], entry["id"]
    decoder = settings.get("added_tokens_decoder")
    for key, value in decoder.items() if isinstance(decoder, dict) else ():
        if key.isdecimal() and isinstance(token := _content(value), str):
            yield token, int(key)
    for token, number in added.items():
        if _is_id(number):
            yield token, number


def _content(value: Any) -> str | None:
    """The text of a special token, which is written as text or as an object."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _special_tokens(settings: Object, special: Object) -> dict[str, str | None]:
    """Role -> special token, as a tokenizer takes them: the map of special tokens wins over all but newer settings."""
    sources = (settings,) if "added_tokens_decoder" in settings else (settings, special)
    return {key: _content(value) for source in sources for key, value in source.items() if _is_role(key, value)}


def _is_role(key: str, value: Any) -> bool:
    return key.endswith("_token") and (value is None or _content(value) is not None)


def _listed(settings: Object) -> list[str]:
    """Special tokens without a role."""
    found: list[str] = []
    for key in _LISTS:
        values = settings.get(key)
        values = list(values.values()) if isinstance(values, dict) else values
        found += [token for value in values if (token := _content(value))] if isinstance(values, list) else []
    return found


def _settle(token: str | None, ids: dict[str, int], rows: int, own: str | None, *, appended: bool) -> str | None:
    """The token that may stand: itself if it has an id, or (`appended`) gets one inside the embedding; else `own`."""
    if token is None or token in ids:
        return token
    if token and appended and max(ids.values()) + 1 < rows:
        ids[token] = max(ids.values()) + 1
        return token
    return own


def _with_tokens(settings: Object, tokens: dict[str, str | None], ids: dict[str, int]) -> Object:
    """Settings whose special tokens are `tokens`, and whose lists and tables name only tokens with an id."""
    result: Object = {}
    for key, value in settings.items():
        if _is_role(key, value) and value is not None:
            token = tokens[key] if key in tokens else _content(value)
            if token is None:
                continue
            value = {**value, "content": token} if isinstance(value, dict) else token
        elif key in _LISTS and isinstance(value, list):
            value = [each for each in value if _content(each) in ids]
        elif key in _LISTS and isinstance(value, dict):
            value = {name: each for name, each in value.items() if _content(each) in ids}
        elif key == "added_tokens_decoder" and isinstance(value, dict):
            value = {number: each for number, each in value.items() if str(ids.get(_content(each) or "")) == number}
        result[key] = value
    return result


def _without_added(fast: Object, rows: int) -> Object:
    """A `tokenizer.json` without added tokens behind the last row."""
    entries = fast.get("added_tokens")
    if not isinstance(entries, list):
        return fast
    return {**fast, "added_tokens": [each for each in entries if not isinstance(each, dict) or _as_id(each.get("id")) < rows]}


def _with_ids(config: Object, tokens: dict[str, str | None], ids: dict[str, int], rows: int) -> Object:
    """A config whose token ids are those of the tokenizer's tokens; one outside the embedding without a token is none."""
    result = dict(config)
    for role in {*tokens, "bos_token", "eos_token", "pad_token"}:
        key, token = f"{role}_id", tokens.get(role)
        value, real = config.get(key), None if token is None else ids.get(token)
        if isinstance(value, list):  # several ends: those inside stay
            inside = [number for number in value if _is_id(number) and number < rows]
            result[key] = inside if real is None or real in inside else [real, *inside]
        elif real is not None and value is not None:
            result[key] = real
        elif value is not None and not (_is_id(value) and value < rows):
            result[key] = None
    return result


def _tokenizer_json(model: _SentencePiece, ids: dict[str, int], tokens: dict[str, str | None], settings: Object) -> Object | None:
    """The same vocabulary as a `tokenizer.json`: BPE over the whole text, `▁` for blanks. None if that would not be the same."""
    added = sorted((number, token) for token, number in ids.items() if number >= len(model.pieces))
    if not model.plain or [number for number, _ in added] != list(range(len(model.pieces), len(ids))):
        return None
    special = [(number, piece.text) for number, piece in enumerate(model.pieces) if piece.kind in (_UNKNOWN, _CONTROL)] + added
    prefix: list[Object] = [{"type": "Prepend", "prepend": "▁"}] if model.dummy_prefix else []
    strip: list[Object] = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if model.dummy_prefix else []
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": token, **flags, "special": True} for number, token in special],
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": None,
        "post_processor": _post_processor(ids, tokens, settings),
        "decoder": {"type": "Sequence", "decoders": [*_DECODER, *strip]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": model.own.get("unk_token"),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": any(piece.kind == _BYTE for piece in model.pieces),
            "ignore_merges": False,
            "vocab": {piece.text: number for number, piece in enumerate(model.pieces)},
            "merges": _merges(model.pieces),
        },
    }


def _merges(pieces: list[_Piece]) -> list[list[str]]:
    """Pairs in the order in which SentencePiece joins them: by the score of what they make. Special pieces are never made."""
    numbers = {piece.text: number for number, piece in enumerate(pieces) if piece.kind == _NORMAL}
    found = []
    for text, number in numbers.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in numbers and right in numbers:
                found.append((-pieces[number].score, number, numbers[left], numbers[right], left, right))
    return [[left, right] for *_, left, right in sorted(found)]


def _post_processor(ids: dict[str, int], tokens: dict[str, str | None], settings: Object) -> Object | None:
    """BOS before a text unless the settings say no, as LLaMA's tokenizers did; EOS behind it if they say so."""
    bos = tokens.get("bos_token") if settings.get("add_bos_token", True) else None
    eos = tokens.get("eos_token") if settings.get("add_eos_token", False) else None

    def text(name: str, kind: int) -> list[Object]:
        before, after = ([{"SpecialToken": {"id": token, "type_id": kind}}] if token else [] for token in (bos, eos))
        return [*before, {"Sequence": {"id": name, "type_id": kind}}, *after]

    if not (bos or eos):
        return None
    named = {token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in (bos, eos) if token}
    return {"type": "TemplateProcessing", "single": text("A", 0), "pair": text("A", 0) + text("B", 1), "special_tokens": named}


def _for_tokenizer_json(settings: Object, tokens: dict[str, str | None]) -> Object:
    """Settings that name the general class, which takes `tokenizer.json` as it stands, and say what that class assumes else."""
    said: Object = {"clean_up_tokenization_spaces": False, "model_input_names": ["input_ids", "attention_mask"]}
    said |= {role: token for role, token in tokens.items() if token is not None}
    missing = {key: value for key, value in said.items() if key not in settings}
    return {**settings, **missing, "tokenizer_class": "PreTrainedTokenizerFast"}


def _read_model(data: bytes) -> _SentencePiece:
    """Read a SentencePiece model: its pieces, and the settings that matter. Raises ValueError for anything else."""
    if len(data) > _MAX_MODEL_BYTES:
        raise ValueError("the vocabulary is too large")
    pieces: list[_Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(data):
        if number == 1:
            pieces.append(_piece(dict(_fields(_bytes(value)))))
        elif number == 2:
            trainer.update(_fields(_bytes(value)))
        elif number == 3:
            normalizer.update(_fields(_bytes(value)))
    texts = {piece.text for piece in pieces}
    if not pieces or len(texts) < len(pieces) or not all(0 < len(text) <= _MAX_PIECE for text in texts):
        raise ValueError("the pieces are not a vocabulary")
    own = {}
    for role, field, default in (("unk_token", 40, 0), ("bos_token", 41, 1), ("eos_token", 42, 2)):
        position = trainer.get(field, default)
        if isinstance(position, int) and position < len(pieces) and pieces[position].kind in (_UNKNOWN, _CONTROL):
            own[role] = pieces[position].text
    bpe = trainer.get(3, 1) == 2
    blanks_kept = normalizer.get(4, 1) == 0 and normalizer.get(5, 1) == 1 and trainer.get(24, 0) == 0
    kinds_known = all(piece.kind in (_NORMAL, _UNKNOWN, _CONTROL, _BYTE) for piece in pieces)
    plain = bpe and kinds_known and not normalizer.get(2, b"") and blanks_kept
    return _SentencePiece(pieces, own, plain, dummy_prefix=normalizer.get(3, 1) == 1)


def _piece(fields: dict[int, int | bytes]) -> _Piece:
    score, kind = _bytes(fields.get(2, bytes(4))), fields.get(3, _NORMAL)
    if len(score) != 4 or not isinstance(kind, int):
        raise ValueError("a piece is damaged")
    return _Piece(_bytes(fields.get(1, b"")).decode(), struct.unpack("<f", score)[0], kind)


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number stands where a message is expected")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Fields of a protobuf message, in their order: number, and a whole number or the bytes of anything else."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = 0
        for shift in range(0, 70, 7):
            if at >= len(data):
                raise ValueError("the message is cut off")
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("a number is too long")

    sizes: dict[int, Callable[[], int]] = {1: lambda: 8, 2: varint, 5: lambda: 4}
    while at < len(data):
        key = varint()
        number, kind = key >> 3, key & 7
        if kind == 0:
            yield number, varint()
        elif kind in sizes:
            end = sizes[kind]() + at
            if end > len(data):
                raise ValueError("the message is cut off")
            yield number, data[at:end]
            at = end
        else:
            raise ValueError("the message is not protobuf")
