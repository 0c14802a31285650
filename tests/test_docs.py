"""What the documents say about the data is what a command finds there."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_the_coverage_table_is_what_its_command_prints(shared_data: Path) -> None:
    templates = shared_data.parent / "promptsource-0.1.0"
    if not templates.is_dir():
        pytest.skip("the templates of promptsource 0.1.0 are not beside this checkout")
    command = [sys.executable, "scripts/coverage.py", str(shared_data / "train"), str(templates), str(shared_data / "p3")]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed.count("\n") == 2 + 38 + 1
    assert printed in (ROOT / "docs" / "mixture.md").read_text(encoding="utf-8")
