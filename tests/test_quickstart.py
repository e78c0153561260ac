"""The Python of the README runs as it stands, and prints what its comments say."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
_PRINTED = re.compile(r"^print\(.*\)  # (.*)$", re.MULTILINE)


def quickstart() -> str:
    """The first Python block of the README that loads a model."""
    blocks = _BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    found = [block for block in blocks if "mplug_core.load(" in block]
    if not found:
        pytest.skip("README.md has no Python that loads a model")
    return found[0]


def test_the_quickstart_prints_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = quickstart()
    monkeypatch.delenv("MPLUG_MODEL", raising=False)
    # what it writes is written elsewhere
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    expected = _PRINTED.findall(code)
    assert expected, "no line of it says what it prints"
    assert printed.getvalue().splitlines() == expected
