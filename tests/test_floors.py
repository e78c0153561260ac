"""The floors of the house: a module imports only from its own floor and those below it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = (
    (
        "mplug_core.errors", "mplug_core.home", "mplug_core.atomic", "mplug_core.json_text", "mplug_core.bounded",
        "mplug_core.download", "mplug_core.outputs", "mplug_core.limits",
    ),
    ("mplug_core.recipe", "mplug_core.device", "mplug_core.cpu", "mplug_core.allocator"),
    ("mplug_core.model",),
    ("mplug_core.objectives", "mplug_core.generation"),
    ("mplug_core.data",),
    ("mplug_core.tasks", "mplug_core.metrics"),
    ("mplug_core.weights",),
    ("mplug_core.training",),
    ("mplug_core.search",),
    ("mplug_core.api",),
    ("mplug_core.bench", "mplug_core.ablation"),
    ("mplug_cli",),
)
LIGHT = (
    "mplug_core.errors", "mplug_core.recipe", "mplug_core.device", "mplug_core.cpu", "mplug_core.model.config",
    "mplug_core", "mplug_cli.app",
)  # fmt: skip


def floor(module: str) -> int:
    """Number of the floor that a module is on."""
    for number, prefixes in enumerate(FLOORS):
        if any(module == prefix or module.startswith(prefix + ".") for prefix in prefixes):
            return number
    raise AssertionError(f"{module} is on no floor: add it to DESIGN's list and to FLOORS")


def modules() -> dict[str, Path]:
    """All modules of the two packages."""
    files = [file for package in ("mplug_core", "mplug_cli") for file in sorted((ROOT / package).rglob("*.py"))]
    names = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}
    return {name.removesuffix(".__init__"): file for name, file in names.items() if name != "mplug_core.__init__"}


def imports(module: str, file: Path) -> Iterator[tuple[int, str]]:
    """(line, module of ours) of every import in a file, also those inside functions."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] + "." if node.level else ""
            named = [(base + (node.module or "")).rstrip(".")]
            if named == ["mplug_core"]:
                named = [f"mplug_core.{alias.name}" for alias in node.names]
        else:
            continue
        for name in named:
            if name.startswith(("mplug_core.", "mplug_cli")):
                yield node.lineno, name


@pytest.mark.parametrize("module", modules())
def test_imports_nothing_from_above(module: str) -> None:
    file = modules()[module]
    above = [f"line {line}: {name}" for line, name in imports(module, file) if floor(name) > floor(module)]
    assert not above, f"{module} imports from a floor above its own: {above}"


def test_json_is_written_in_one_place() -> None:
    """Where NaN and infinities become null."""
    written = re.compile(r"\bjson\.dumps?\(|\bjson\.dumps?\b(?=[,)])|\bJSONEncoder\b|\bimport dumps?\b")
    elsewhere = {m: f for m, f in modules().items() if m != "mplug_core.json_text"}
    assert not [module for module, file in elsewhere.items() if written.search(file.read_text(encoding="utf-8"))]


def test_errors_and_recipe_import_nothing_above_themselves() -> None:
    assert not list(imports("mplug_core.errors", ROOT / "mplug_core/errors.py"))
    assert {name for _, name in imports("mplug_core.recipe", ROOT / "mplug_core/recipe.py")} == {
        "mplug_core.errors", "mplug_core.bounded", "mplug_core.limits"
    }  # fmt: skip


@pytest.mark.parametrize("module", LIGHT)
def test_is_imported_without_torch(module: str) -> None:
    heavy = "{'torch', 'timm', 'transformers', 'deepspeed'}"
    code = f"import sys, {module}; print(*({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == ""
