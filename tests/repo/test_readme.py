"""Every block of code in the README runs, and prints what the README says."""

import contextlib
import io
import re
from pathlib import Path

import jax
import pytest

README = Path(__file__).parents[2] / "README.md"
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.S)


def blocks():
    """Pairs of a Python block and the text block that shows its output, if any."""
    found = BLOCK.findall(README.read_text())
    for i, (language, code) in enumerate(found):
        if language == "python":
            shown = found[i + 1] if i + 1 < len(found) else ("", "")
            yield code, shown[1] if shown[0] == "text" else None


def test_code_runs_and_prints_what_is_shown(tmp_path, monkeypatch, relaxed):
    monkeypatch.chdir(tmp_path)
    names = {}
    for code, shown in blocks():
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(README), "exec"), names)  # noqa: S102
        if shown is not None:
            assert printed.getvalue().strip() == shown.strip()
    jax.clear_caches()


def test_the_main_code_comes_early():
    lines = README.read_text().splitlines()
    assert lines.index("```python") < 35


@pytest.mark.parametrize(
    "target", re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text())
)
def test_links_lead_somewhere(target):
    assert (README.parent / target).exists()
