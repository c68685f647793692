"""Imports point down."""

import ast
from pathlib import Path

import pytest

import lorax_jax

ROOT = Path(lorax_jax.__file__).parent

# From the floor up. A module may import from its own level's line and from those above
# it in this list; rooms on one line do not import each other.
LEVELS = [
    {"_errors"},
    {"errors"},
    {"_paths", "_json", "_ranges", "_linalg", "_automatic"},
    {"structure", "statistics", "_names", "_parts", "_growth"},
    {"_peft", "_rule"},
    {"_config", "quant", "models", "_functional"},
    {"adapters", "replication"},
    {"transform"},
    {"initializers"},
    {"planning"},
    {"merging", "capturing", "allocating", "_count"},
    {"conversion"},
    {"checkpoint", "embedded", "auditing"},
    {"_load_adapted"},
    {"train"},
    {"cli"},
    {"__init__"},
]
RANK = {room: i for i, level in enumerate(LEVELS) for room in level}


def room_of(path):
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imports(path):
    """Rooms that a file imports from, with line numbers."""
    package = ["lorax_jax", *path.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("lorax_jax."):
                    yield alias.name.split(".")[1], node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            full = [*base, *(node.module or "").split(".")]
            full = [part for part in full if part]
            if full[:1] == ["lorax_jax"]:
                names = full[1:2] or [alias.name for alias in node.names]
                for name in names:
                    yield name, node.lineno


FILES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    here = room_of(path)
    assert here in RANK, f"{here} has no level: add it to LEVELS"
    for room, line in imports(path):
        if room not in RANK:  # a name of the package itself, such as `plan`
            room = "__init__"
        if room != here:
            assert RANK[room] < RANK[here], (
                f"{path.relative_to(ROOT)}:{line} imports {room}, which lies above it"
            )


def test_models_know_nothing_of_adapters():
    for path in (ROOT / "models").rglob("*"):
        if path.suffix in (".py", ".md"):
            text = path.read_text().lower()
            assert "lora" not in text.replace("lorax", ""), path
            assert "adapt" not in text, path


def test_private_jax_is_imported_in_one_file():
    for path in FILES:
        if path.name != "_jaxpr.py":
            assert "jax._src" not in path.read_text(), path
