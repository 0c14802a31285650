"""delta.json: what a delta was made from and what it restores. Its form is specified in docs/delta-format.md."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mtllama import folders
from mtllama.errors import UserError
from mtllama.weights.shards import DTYPE_NAMES, DTYPES, TensorInfo

FORMAT = "mtllama-delta"
FORMAT_VERSION = 3
DELTA_JSON = "delta.json"
FILES = "files"
"""Folder of the target's other files."""
Mode = Literal["bits", "add"]
MODES: tuple[Mode, ...] = ("bits", "add")
KINDS = ("equal", "difference", "sum")
SAMPLES = 16
"""Values in the sample of a tensor."""


@dataclass(frozen=True)
class BaseTensor:
    """The tensor of the base that one of the target is built on."""

    name: str
    info: TensorInfo
    sha256: str
    sample: bytes
    """A few of its values, evenly spaced: to tell at once whether another model is another, and how."""


@dataclass(frozen=True)
class Entry:
    """One tensor of the target."""

    kind: str
    """`equal` to the base's, or the base's and a coded `difference`, or the `sum` of both."""
    info: TensorInfo
    sha256: str
    base: BaseTensor | None
    restored_sha256: str
    """Of what comes back: another than the target's where a `sum` is not exact."""
    num_equal: int
    """Weights whose bits are the base's."""
    num_inexact: int
    """Weights that will not come back exact."""
    norm: float
    """Euclidean norm of the difference, and of the base."""
    base_norm: float

    def to_json(self) -> dict[str, Any]:
        """As delta.json has it."""
        found: dict[str, Any] = {"kind": self.kind, **_info(self.info), "sha256": self.sha256}
        if self.restored_sha256 != self.sha256:
            found["restored_sha256"] = self.restored_sha256
        if self.base is not None:
            found["base"] = {"name": self.base.name, **_info(self.base.info), "sha256": self.base.sha256, "sample": self.base.sample.hex()}
        found["num_equal"], found["num_inexact"] = self.num_equal, self.num_inexact
        found["norm"], found["base_norm"] = self.norm, self.base_norm
        return found

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Entry":
        """The inverse; any other form raises KeyError, TypeError or ValueError."""
        base = value.get("base")
        known = base and BaseTensor(_str(base["name"]), _to_info(base), _str(base["sha256"]), bytes.fromhex(base["sample"]))
        if known and len(known.sample) != known.info.dtype.itemsize * SAMPLES * bool(known.info.size):
            raise ValueError("sample")
        if value["kind"] not in KINDS or (value["kind"] == "equal" and not known):
            raise ValueError("kind")
        sha256 = _str(value["sha256"])
        counts, norms = (int(value[key]) for key in ("num_equal", "num_inexact")), (float(value[key]) for key in ("norm", "base_norm"))
        return cls(value["kind"], _to_info(value), sha256, known, _str(value.get("restored_sha256", sha256)), *counts, *norms)


@dataclass(frozen=True)
class Manifest:
    """The whole of delta.json."""

    mode: str
    base_name: str
    base_files: dict[str, str]
    """SHA-256 of the base's config and tokenizer files."""
    base_config: Any
    files: dict[str, str]
    """SHA-256 of the target's other files, which are in the delta."""
    entries: dict[str, Entry]
    base_unused: list[str]
    """Tensors of the base that the target has not."""
    versions: dict[str, str]

    def write(self, folder: Path) -> None:
        """Write delta.json."""
        value = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "mode": self.mode,
            "base_name": self.base_name,
            "base_files": self.base_files,
            "base_config": self.base_config,
            "versions": self.versions,
            "base_unused": self.base_unused,
            "files": self.files,
            "tensors": {name: entry.to_json() for name, entry in self.entries.items()},
        }
        folders.write_json(folder / DELTA_JSON, {**value, "sha256": sha256_json(value)})

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read and check it; errors say what the folder is instead."""
        path = folder / DELTA_JSON
        if not path.is_file():
            what = " (is it a model, or a delta of another tool?)" if (folder / "config.json").is_file() else ""
            raise UserError(f"{folder} has no {DELTA_JSON}{what}; this needs a folder made by: mtllama delta make")
        value = folders.read_json(path)
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise UserError(f"{path} is not a manifest of {FORMAT}")
        if value.get("format_version") != FORMAT_VERSION:
            version = value.get("format_version")
            older = isinstance(version, int) and version < FORMAT_VERSION
            mend = "make the delta again" if older else "update it"
            raise UserError(f"{path} has format version {version}; this mtllama reads {FORMAT_VERSION}: {mend}")
        if value.pop("sha256", None) != sha256_json(value):
            raise UserError(f"{path} is damaged (its SHA-256 differs); fetch or make the delta again")
        name = ""
        try:
            entries = {}
            for name, entry in value["tensors"].items():
                entries[name] = Entry.from_json(entry)
            name = ""
            files = {_str(key): _str(digest) for key, digest in value["files"].items()}
            if value["mode"] not in MODES or not entries:
                raise ValueError("mode")
            manifest = cls(
                value["mode"],
                _str(value["base_name"]),
                dict(value["base_files"]),
                value["base_config"],
                files,
                entries,
                list(value["base_unused"]),
                dict(value["versions"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError):
            what = f"the entry of {name} is damaged" if name else "it names no base, no files or no tensors"
            raise UserError(f"{path}: {what}; fetch or make the delta again") from None
        for file in manifest.files:
            if Path(file).name != file:
                raise UserError(f"{path}: the file name {file!r} leaves its folder; refused")
        return manifest


def sha256_json(value: Any) -> str:
    """SHA-256 of a JSON value, whatever its layout, as hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _info(info: TensorInfo) -> dict[str, Any]:
    return {"dtype": DTYPE_NAMES[info.dtype], "shape": list(info.shape)}


def _to_info(value: Mapping[str, Any]) -> TensorInfo:
    shape = tuple(value["shape"])
    if not all(type(length) is int and length >= 0 for length in shape):
        raise ValueError("shape")
    return TensorInfo(DTYPES[value["dtype"]], shape)


def _str(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("text is needed")
    return value
