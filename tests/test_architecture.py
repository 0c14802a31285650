"""The shape of the code itself: one-way imports, nothing of a machine in the tree, one version."""

import ast
import re
import subprocess
from pathlib import Path

import mtllama

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "mtllama"
COLUMNS = (
    ("errors",),
    ("folders", "progress", "config", "hub"),
    ("weights", "tasks"),
    ("data",),
    ("model",),
    ("train", "evaluate"),
    ("api",),
    ("serve",),
    ("quickstart", "doctor"),
    ("cli",),
    ("__main__",),
)
"""Rooms from left to right: a module imports only from columns to its left, or from its own room."""
COLUMN = {room: number for number, column in enumerate(COLUMNS) for room in column}


def imports(file: Path) -> set[tuple[str, ...]]:
    """Modules of this package that a file imports, lazily or not, as dotted parts after `mtllama`."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mtllama":
            module = (node.module or "").split(".")[1:]
            for alias in node.names:
                parts = (*module, alias.name)
                path = PACKAGE.joinpath(*parts)
                found.add(parts if path.is_dir() or path.with_suffix(".py").is_file() else tuple(module))
        elif isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")[1:]) for alias in node.names if alias.name.split(".")[0] == "mtllama"}
    return {parts for parts in found if parts}


def test_every_module_imports_only_from_columns_to_its_left() -> None:
    wrong, seen = [], 0
    for file in PACKAGE.rglob("*.py"):
        room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        assert room in COLUMN, f"{room} has no column: give it one here and in docs/architecture.md"
        for parts in imports(file):
            seen += 1
            if parts[0] != room and COLUMN[parts[0]] >= COLUMN[room]:
                wrong.append(f"{file.relative_to(PACKAGE)} imports {'.'.join(parts)}")
    assert not wrong
    assert seen > 50


def test_no_two_modules_of_a_room_import_each_other() -> None:
    graph = {file.relative_to(PACKAGE).with_suffix("").parts: imports(file) for file in PACKAGE.rglob("*.py")}
    assert len(graph) > 30

    def reaches(start: tuple[str, ...], goal: tuple[str, ...], seen: set[tuple[str, ...]]) -> bool:
        for each in graph.get(start, set()) - seen:
            seen.add(each)
            if each == goal or reaches(each, goal, seen):
                return True
        return False

    assert not [".".join(module) for module in graph if reaches(module, module, set())]


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


def test_no_file_names_a_machine_path_or_a_package_index() -> None:
    pattern = re.compile(r"(^|[\s\"'=])/(home|root|work|Users)/|index[-]url|find[-]links")
    files = [
        file for file in tracked_files() if file.suffix in {".py", ".md", ".yaml", ".toml", ".txt", ".sh", ""} and file != Path(__file__)
    ]
    assert len(files) > 50
    wrong = [f"{file.name}: {line}" for file in files for line in file.read_text(encoding="utf-8").splitlines() if pattern.search(line)]
    assert not wrong


def test_no_weights_are_tracked() -> None:
    suffixes = {".safetensors", ".bin", ".gguf", ".pt"}
    assert not [file for file in tracked_files() if file.suffix in suffixes or file.stat().st_size > 1_000_000]


def test_the_changelog_begins_with_the_version() -> None:
    heads = re.findall(r"^## \[?([0-9.]+)\]?", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.M)
    assert heads[0] == mtllama.__version__
