"""Python processes of their own, for what DeepSpeed leaves behind: a group, environment variables, a logger."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")


def without_launcher() -> dict[str, str]:
    """The environment without what a launcher, or DeepSpeed in this process, has set."""
    return {name: value for name, value in os.environ.items() if name not in LAUNCHER}


def result(*words: str) -> Any:
    """What ``python WORDS...`` says as JSON in its line ``RESULT ...``; it has to succeed."""
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT, env=without_launcher())
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))
