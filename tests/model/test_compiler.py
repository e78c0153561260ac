"""Putting the compiler off: it stays away where nobody needs it, and is all there for those who do."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_timm_is_imported_without_it_and_compiling_works_after_that():
    code = (
        "import sys, torch\n"
        "import mplug_core.model.vision\n"
        "print('torch._dynamo' in sys.modules)\n"
        "from torchvision.ops import roi_align\n"
        "print(tuple(roi_align(torch.ones(1, 1, 4, 4), torch.tensor([[0, 0, 0, 2, 2.]]), 2).shape))\n"
        "print(torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)).item())\n"
        "print('torch._dynamo' in sys.modules, hasattr(sys.modules['torch._dynamo'], '__path__'))\n"
    )
    assert run(code).splitlines() == ["False", "(1, 1, 2, 2)", "2.0", "True True"]


@pytest.mark.parametrize(
    "use",
    [
        pytest.param("import torch._dynamo; found = torch._dynamo.config.__name__", marks=pytest.mark.slow),
        pytest.param("from torch._dynamo import config; found = config.__name__", marks=pytest.mark.slow),
        "from torch._dynamo.utils import is_compile_supported as asked; asked('cpu'); import torch._dynamo.config; "
        "found = torch._dynamo.config.__name__",
    ],
)
def test_whoever_needs_it_within_has_it(use):
    code = (
        "import torch\nfrom mplug_core.model.compiler import without_compiler\n"
        f"with without_compiler():\n    {use}\nprint(found)"
    )
    assert run(code) == "torch._dynamo.config"


def test_disabled_functions_are_functions():
    code = (
        "import sys, torch\nfrom mplug_core.model.compiler import without_compiler\n"
        "with without_compiler():\n"
        "    plain = torch.compiler.disable(lambda x: x + 1)\n"
        "    made = torch.compiler.disable(recursive=False)(lambda x: x + 2)\n"
        "print(plain(1), made(1), 'torch._dynamo' in sys.modules)\n"
        "import torch._dynamo\n"
        "print(plain(1), made(1))"
    )
    assert run(code).splitlines() == ["2 3 False", "2 3"]
