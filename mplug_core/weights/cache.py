"""Where downloaded models are kept, and whether there is to be a network at all.

``$MPLUG_HOME`` (default ``~/.cache/mplug``) has ``models/url/HOST/PATH`` for files behind URLs and
``models/ms/ORG/NAME/REVISION/`` for models of ModelScope. Models of Hugging Face are in its own cache.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from mplug_core.home import cache_home

HOME_VARIABLE = "MPLUG_HOME"
OFFLINE_VARIABLES = ("MPLUG_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_TRUE = ("1", "on", "yes", "true")


def home() -> Path:
    """``$MPLUG_HOME``, else ``mplug`` in ``$XDG_CACHE_HOME``, else ``~/.cache/mplug``."""
    if chosen := os.environ.get(HOME_VARIABLE):
        return Path(os.path.expanduser(chosen)).absolute()
    return cache_home() / "mplug"


def is_offline() -> bool:
    """Whether a variable says that nothing may be downloaded."""
    return any(os.environ.get(name, "").strip().lower() in _TRUE for name in OFFLINE_VARIABLES)


def place_of_url(url: str) -> Path:
    """Where the file behind a URL is kept. URLs that differ in host, path or query have places of their own."""
    parts = urlsplit(url)
    steps = [safe_name(unquote(step)) for step in parts.path.split("/") if step]
    if parts.query:
        steps.insert(len(steps) - 1, "query-" + hashlib.sha256(parts.query.encode()).hexdigest()[:12])
    return home().joinpath("models", "url", safe_name(parts.netloc.rpartition("@")[2].lower()), *steps)


def safe_name(text: str) -> str:
    """``text`` as the name of one file or folder on every system, and never one that leads elsewhere or is hidden."""
    name = quote(text, safe=" !#$&'()+,;=@[]^_`{}~-.", errors="surrogateescape")
    return "%2E" + name[1:] if name.startswith(".") else name
