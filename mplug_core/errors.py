"""Every error that a user can meet: one line that says what happened, a hint that says what to do, an exit code.

The command line prints ``error: MESSAGE (HINT)`` on stderr and ends with ``exit_code``; JSON output carries ``code``.
Code that embeds the package catches :class:`MplugError`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

LINE = 300
"""Characters that an error's line has at most, with ``error: `` in front."""
_BEFORE = len("error: ")
_HINT = 120
"""Characters that stay of a hint where the line is too long."""

# begins where a word does: each word is looked through once, however long it is
_ADDRESS = re.compile(r"""(?<![a-z0-9+.-])(?:[a-z][a-z0-9+.-]*://|(?:https?|s3):/)[^\s"'<>]*""", re.IGNORECASE)
# Parameters of a query that say what is asked for. Any other may be a password, a token or a signature.
_ORDINARY = frozenset((
    "id", "ids", "name", "file", "filename", "filepath", "path", "page", "n", "index", "number", "type", "format", "fm",
    "f", "v", "version", "revision", "recursive", "download", "raw", "w", "h", "width", "height", "size", "q",
    "quality", "dpr", "crop", "fit", "auto", "lang",
))  # fmt: skip


def shortened(text: str, limit: int = LINE) -> str:
    """``text`` in at most ``limit`` characters: of a longer one the beginning and the end stay."""
    if len(text) <= limit:
        return text
    end = (limit - 5) // 3
    return f"{text[: limit - 5 - end]} ... {text[len(text) - end :]}"


def shown_address(address: str) -> str:
    """An address as it may be read by others: without user and password, and without a query that may be secret.

    >>> shown_address("https://me:secret@host/a.jpg?token=1")
    'https://***@host/a.jpg?***'
    """
    scheme, found, rest = address.strip().partition("://")
    if not found:
        return address
    rest, _, fragment = rest.partition("#")
    before, asked, query = rest.partition("?")
    authority, slash, path = before.partition("/")
    if "@" not in authority and "@" in path + query + fragment and re.match(r"[^:\[]+:.*\D", authority):
        # no port: a password with one of / ? #, which ends where the host begins
        authority, slash, path = f"@{(path + query + fragment).rpartition('@')[2]}".partition("/")
        asked = query = fragment = ""
    if "@" in authority:
        authority = f"***@{authority.rpartition('@')[2]}"
    if asked and not _is_ordinary(query):
        query = "***"
    kept = f"#{fragment}" if fragment.lower().startswith("sha256=") else ""
    return f"{scheme}://{authority}{slash}{path}{asked}{query}{kept}"


def _is_ordinary(query: str) -> bool:
    pairs = [pair.partition("=") for pair in query.split("&")]
    return all(name.lower() in _ORDINARY and len(value) <= 64 for name, _, value in pairs)


def without_secrets(text: str) -> str:
    """``text`` with every address in it as :func:`shown_address` has it."""
    if ":/" not in text:
        return text

    def shown(match: re.Match[str]) -> str:
        address = match[0].rstrip("):;,.")  # which the sentence goes on with
        tail = match[0][len(address) :]
        if "://" in address:
            return shown_address(address) + tail
        return shown_address(address.replace(":/", "://", 1)).replace("://", ":/", 1) + tail  # pathlib's spelling

    return _ADDRESS.sub(shown, text)


def values_without_secrets(values: Any) -> Any:
    """JSON's kinds of values, with every text as :func:`without_secrets` has it."""
    if isinstance(values, str):
        return without_secrets(values)
    if isinstance(values, dict):
        return {key: values_without_secrets(value) for key, value in values.items()}
    if isinstance(values, list):
        return [values_without_secrets(value) for value in values]
    return values


class MplugError(Exception):
    """Base of all errors with a message for the user.

    ``message`` says what is wrong, ``hint`` what to do about it, ``code`` is a stable word for programs. Addresses in
    them have lost their passwords. ``str`` is one line, of at most :data:`LINE` characters.
    """

    exit_code = 1
    default_code = "failure"

    def __init__(self, message: str, hint: str | None = None, code: str | None = None) -> None:
        self.message = shortened(without_secrets(" ".join(str(message).split())), LINE - _BEFORE)
        self.hint = shortened(without_secrets(" ".join(hint.split())), LINE - _BEFORE) if hint else None
        self.code = code or self.default_code
        super().__init__(self.message)

    def __str__(self) -> str:
        room = LINE - _BEFORE
        if self.hint is None:
            return shortened(self.message, room)
        hint = self.hint if len(self.message) + len(self.hint) + 3 <= room else shortened(self.hint, _HINT)
        return f"{shortened(self.message, room - len(hint) - 3)} ({hint})"


class UsageError(MplugError):
    """The command line, or a call, is itself wrong."""

    exit_code = 2
    default_code = "usage"


class RecipeError(MplugError):
    """A recipe can't be used. ``faults`` are all that is wrong in it, of which ``message`` has the first."""

    exit_code = 3
    default_code = "recipe"
    faults: tuple[str, ...] = ()

    @classmethod
    def of(cls, name: str, faults: Sequence[str]) -> RecipeError:
        """The error of the recipe ``name`` that has these ``faults``; what doesn't fit into a line is counted."""
        hint = "mplug recipe show NAME prints a valid one"
        name = shortened(name, 80)
        head = f"{name}: 1 fault: " if len(faults) == 1 else f"{name}: {len(faults)} faults: "
        room = LINE - _BEFORE - len(head) - len(hint) - 3
        told = "; ".join(faults)
        if len(told) > room and len(faults) > 1:
            hint = "mplug recipe validate shows all"
            room = LINE - _BEFORE - len(head) - len(hint) - 3 - len("; and 1000 more")
            fit = 1
            while len("; ".join(faults[: fit + 1])) <= room:
                fit += 1
            told = f"{shortened('; '.join(faults[:fit]), room)}; and {len(faults) - fit} more"
        error = cls(head + told, hint)
        error.faults = tuple(faults)
        return error


class DataError(MplugError):
    """A data set or record is missing, malformed or empty."""

    exit_code = 3
    default_code = "data"


class ImageError(MplugError):
    """One image can't be used: ``code`` is one of missing, empty, unreadable, not_an_image, broken, too_large."""

    exit_code = 1
    default_code = "broken"


class CheckpointError(MplugError):
    """A checkpoint or model folder is missing, damaged, or does not fit."""

    exit_code = 5
    default_code = "checkpoint"


class Diverged(MplugError):
    """Weights or what an optimizer keeps of them are not finite: training has diverged."""

    default_code = "diverged"


class NotFiniteError(MplugError):
    """What a model computes for one input is not a number: numbers of its type have overflowed, or its weights are not
    sound."""

    exit_code = 4
    default_code = "not_finite"

    @classmethod
    def of(cls, what: str) -> NotFiniteError:
        return cls(f"{what} is not a number", "try --dtype float32 (dtype='float32', MPLUG_DTYPE)")


class Preempted(MplugError):
    """The run was asked to stop, and its state is saved."""

    exit_code = 75
    default_code = "preempted"


SOME_INPUTS_FAILED = 4
INTERRUPTED = 130
