"""The README and the config.json of a delta folder: how to restore, under which licence, and that this is no model."""

import re
from pathlib import Path

from mtllama import folders
from mtllama.weights.manifest import FILES, Manifest

MARKER = "mtllama_delta"
"""Key in the config.json of an arithmetic delta, which other tools must be able to open as a checkpoint."""
MODEL_TYPE = "mtllama-delta"
"""Model type in the config.json of any other: transformers refuses it by this name."""


def write(folder: Path, manifest: Manifest, base_dir: Path) -> None:
    """Write both into a new delta folder."""
    about = {
        "mode": manifest.mode,
        "base": manifest.base_name,
        "restore": f"mtllama delta apply --base BASE --delta {folder.name} --out MODEL",
    }
    config: dict[str, object] = {"model_type": MODEL_TYPE, MARKER: about}
    if manifest.mode == "add":  # FastChat loads it as a model, subtracts nothing and adds the base
        for file in sorted((folder / FILES).iterdir()):
            if file.name == "config.json":
                config = {**folders.read_json(file), MARKER: about}
            elif file.name != "README.md" and file.name != folders.MANIFEST:
                (folder / file.name).write_bytes(file.read_bytes())
    folders.write_json(folder / "config.json", config)
    folders.write_text(folder / "README.md", _card(manifest, _licence(base_dir)))


def _licence(base_dir: Path) -> str | None:
    """What the base's own card or files say."""
    card = base_dir / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace")[:100_000] if card.is_file() else ""
    front = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, flags=re.S)
    named: dict[str, str] = (
        dict(re.findall(r"^(license|license_name):\s*[\"']?([\w. +-]{1,80}?)[\"']?\s*$", front[1], flags=re.M)) if front else {}
    )
    if named.get("license") not in (None, "other", "unknown"):
        return named["license"]
    if "license_name" in named:
        return f"called {named['license_name']}"
    files = sorted(path.name for path in base_dir.iterdir() if re.match(r"(?i)(licen[cs]e|use_policy)", path.name) and path.is_file())
    return f"as in the base's {', '.join(files)}" if files else None


def _card(manifest: Manifest, licence: str | None) -> str:
    infos = [entry.info for entry in manifest.entries.values()]
    num_weights = sum(info.size for info in infos)
    known = licence and re.fullmatch(r"[a-z0-9][a-z0-9.-]+", licence)
    front = [f"license: {licence}"] if known else []
    hub_id = [f"base_model: {manifest.base_name}"] if re.fullmatch(r"[\w.-]+/[\w.-]+", manifest.base_name) else []
    terms = (
        f"The base's licence is {licence}: it holds for what is restored, too."
        if licence
        else "The base's folder names no licence. Its terms hold for what is restored: look them up before you publish this."
    )
    inexact = sum(entry.num_inexact for entry in manifest.entries.values())
    exact = (
        "Every weight and every file comes back bit for bit; the base is checked before, the result after (SHA-256)."
        if manifest.mode == "bits"
        else f"The sum is rounded: {inexact:,} of {num_weights:,} weights do not come back exact."
    )
    lines = [
        "---",
        *front,
        *hub_id,
        "tags:",
        "- weight-delta",
        "---",
        "",
        f"# Weight delta for {manifest.base_name}",
        "",
        f"This is not a model: it is the difference of one from {manifest.base_name} ({len(infos)} tensors, {num_weights:,} weights).",
        "With the base at hand, restore it:",
        "",
        "```",
        "pip install mtllama",
        "mtllama delta apply --base BASE --delta THIS_FOLDER --out MODEL",
        "```",
        "",
        "or use it without restoring: `mtllama chat --base BASE --delta THIS_FOLDER`.",
        "",
        exact,
        "",
        "## Licence",
        "",
        terms,
    ]
    return "\n".join(lines) + "\n"
