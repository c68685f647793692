"""What the package shows, says and promises."""

import inspect
import re
from pathlib import Path

import pytest

import lorax_jax as lj
from lorax_jax.transform import table

REPO = Path(__file__).parents[2]


def test_the_front_door_is_one_screen():
    text = Path(lj.__file__).read_text().splitlines()
    assert len(text) <= 66
    imported = [line for line in text if line.startswith("from .")]
    assert all(re.search(r"(\w+) as \1( |$)", line) for line in imported)


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("plan", ["config", "params", "fn", "args", "kwargs", "*roles"]),
        ("init", ["plan", "params", "*key"]),
        ("prepare", ["plan", "params", "fn", "batches", "*loss", "*mask"]),
        ("bind", ["params", "adapters", "*weights", "*key"]),
        ("adapt", ["fn", "*materialize", "*custom"]),
        ("merge", ["params", "adapters", "*weights", "*report", "*safe"]),
        ("fold", ["params", "adapter"]),
        ("to_lora", ["adapter", "*rank"]),
        ("capture_grad", ["loss", "plan", "*size"]),
        ("allocate", ["plan", "spectra", "*budget"]),
        ("save_adapter", ["dir", "adapter", "*plan", "*names"]),
        ("load_adapter", ["dir", "params", "*plan", "*names", "*strict"]),
        ("export_merged", ["base_dir", "adapter", "out_dir"]),
        ("count", ["params", "adapter"]),
        ("audit", ["fn", "params", "adapter", "args", "*max_constant", "kwargs"]),
        ("functional", ["module"]),
    ],
)
def test_the_contract(name, parameters):
    """Names and call shapes that others build on."""
    found = [
        f"*{p.name}" if p.kind is p.KEYWORD_ONLY else p.name
        for p in inspect.signature(getattr(lj, name)).parameters.values()
    ]
    assert found[: len(parameters)] == parameters


def test_every_public_name_is_documented():
    for name in dir(lj):
        value = getattr(lj, name)
        if not name.startswith("_") and not inspect.ismodule(value):
            assert inspect.getdoc(value), name


def test_the_table_of_rules_is_the_registry():
    text = table.README.read_text()
    assert text == table.renewed(text), "run `python -m lorax_jax.transform.table`"


def test_versions_agree():
    text = (REPO / "pyproject.toml").read_text()
    version = re.search(r'^version = "(.*)"', text, re.M).group(1)
    from importlib import metadata

    assert metadata.version("lorax-jax") == version
    changelog = (REPO / "CHANGELOG.md").read_text()
    assert changelog.splitlines()[2] == "## Unreleased"
