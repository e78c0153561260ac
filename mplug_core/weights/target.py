"""The repository on a model hub that a push goes to. Importing this module does not import torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mplug_core.errors import UsageError

HUBS = {"hf": "Hugging Face", "ms": "ModelScope"}
_REPOSITORY = re.compile(r"[\w][\w.-]{0,95}/[\w][\w.-]{0,95}")


@dataclass(frozen=True)
class Target:
    """A repository on a hub (``hf`` or ``ms``)."""

    hub: str
    repository: str

    @classmethod
    def parse(cls, text: str) -> Target:
        """``hf:org/name`` or ``ms:org/name``; UsageError for anything else."""
        hub, colon, repository = text.partition(":")
        if hub not in HUBS or not colon:
            raise UsageError(f"{text!r} names no hub", "hf:org/name or ms:org/name")
        if "@" in repository:
            raise UsageError(f"{text!r} has a revision", "give it by --revision")
        if not _REPOSITORY.fullmatch(repository) or ".." in repository or "--" in repository:
            raise UsageError(f"{repository!r} is no repository", f"{hub}:org/name")
        return cls(hub, repository)

    def __str__(self) -> str:
        return f"{self.hub}:{self.repository}"
