"""Every error that a user can meet: one line that says what happened, a hint that says what to do, an exit code.

The command line prints ``error: MESSAGE (HINT)`` on stderr and ends with ``exit_code``; JSON output carries ``code``.
Code that embeds the package catches :class:`MplugError`.
"""

from __future__ import annotations


class MplugError(Exception):
    """Base of all errors with a message for the user.

    ``message`` says what is wrong, ``hint`` what to do about it, ``code`` is a stable word for programs.
    """

    exit_code = 1
    default_code = "failure"

    def __init__(self, message: str, hint: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = " ".join(str(message).split())
        self.hint = " ".join(hint.split()) if hint else None
        self.code = code or self.default_code

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(MplugError):
    """The command line, or a call, is itself wrong."""

    exit_code = 2
    default_code = "usage"


class RecipeError(MplugError):
    """A recipe has faults; ``message`` lists all of them."""

    exit_code = 3
    default_code = "recipe"


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


class Preempted(MplugError):
    """The run was asked to stop, and its state is saved."""

    exit_code = 75
    default_code = "preempted"


SOME_INPUTS_FAILED = 4
INTERRUPTED = 130
