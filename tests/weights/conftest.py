"""The pico after a little training, and the delta of the two."""

from pathlib import Path

import pytest
from checkpoints import add_noise, with_weights

from mtllama import folders
from mtllama.weights import delta


@pytest.fixture(scope="session")
def target(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise on the pico's weights, and every kind of file beside them."""
    folder = with_weights(pico, tmp_path_factory.mktemp("delta") / "target", add_noise)
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}\n", encoding="utf-8")
    (folder / "README.md").write_bytes("# Über\r\nmodel\n".encode())
    folders.write_manifest(folder, "model", name="pico + noise", format="mtllama")
    return folder


@pytest.fixture(scope="session")
def made(pico: Path, target: Path) -> Path:
    """Their delta in mode `bits`."""
    out = target.parent / "made"
    delta.make(pico, target, out, base_name="the pico")
    return out


@pytest.fixture(scope="session")
def added(pico: Path, target: Path) -> Path:
    """Their delta in mode `add`."""
    out = target.parent / "added"
    delta.make(pico, target, out, base_name="the pico", mode="add")
    return out
