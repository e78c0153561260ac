"""The one writer of JSON: what JSON has no word for, numbers that are not finite, becomes null.

Readers of other languages refuse ``NaN`` and ``Infinity``, which Python writes by default.
"""

from __future__ import annotations

import json
import math
from typing import Any


def to_json(values: Any, **options: Any) -> str:
    """``values`` as JSON text; ``options`` as of :func:`json.dumps`. NaN and infinities are null."""
    try:
        return json.dumps(values, allow_nan=False, **options)
    except ValueError:  # also of a structure that holds itself, which raises again
        return json.dumps(_finite(values), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
