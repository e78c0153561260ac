"""Error lines: short, in one line, without what is secret in addresses."""

from __future__ import annotations

import pickle
import time

import pytest

from mplug_core.errors import (
    LINE,
    DataError,
    ImageError,
    MplugError,
    NotFiniteError,
    shortened,
    shown_address,
    values_without_secrets,
    without_secrets,
)


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("https://me:secret@host/a.jpg", "https://***@host/a.jpg"),
        ("https://secret@host:8080/a.jpg", "https://***@host:8080/a.jpg"),
        ("http://me:se@cret@host/a", "http://***@host/a"),
        ("http://me:secret/x@host/a", "http://***@host/a"),
        ("http://me:secret?x@host/a", "http://***@host/a"),
        ("https://host/a.jpg?token=secret", "https://host/a.jpg?***"),
        ("https://host/a.jpg?width=5&X-Amz-Signature=secret", "https://host/a.jpg?***"),
        ("https://host/a.jpg?sv=1&sig=secret", "https://host/a.jpg?***"),
        ("https://host/a.jpg?access_token=secret&id=1", "https://host/a.jpg?***"),
        ("https://host/a.jpg?secret", "https://host/a.jpg?***"),
        ("https://host/a.jpg?id=" + "s" * 65, "https://host/a.jpg?***"),
        ("https://host/a.jpg#access_token=secret", "https://host/a.jpg"),
        ("s3://key:secret@bucket/pack", "s3://***@bucket/pack"),
        ("https://host/a b/café.jpg?id=3&w=100", "https://host/a b/café.jpg?id=3&w=100"),
        ("https://host/npm/pkg@1.2/a.jpg", "https://host/npm/pkg@1.2/a.jpg"),
        ("http://[::1]:80/a@b", "http://[::1]:80/a@b"),
        ("photos/a?b.jpg", "photos/a?b.jpg"),
    ],
)
def test_what_of_an_address_is_shown(written: str, shown: str) -> None:
    assert shown_address(written) == shown
    assert shown_address(shown) == shown
    if " " not in written:
        assert without_secrets(f"{written}: no, ({written}).") == f"{shown}: no, ({shown})."
        error = ImageError(f"{written} can't be had", f"look at {written}")
        assert "secret" not in f"{error} {error!r} {error.args}"


def test_pathlib_spelling() -> None:
    assert without_secrets("there is no https:/me:secret@host/x?sig=1.") == "there is no https:/***@host/x?***."
    assert without_secrets("C:/me@x and file:/a@b") == "C:/me@x and file:/a@b"


def test_values() -> None:
    values = {"a": ["https://u:p@h/x", 1, None], "b": {"c": "x"}}
    assert values_without_secrets(values) == {"a": ["https://***@h/x", 1, None], "b": {"c": "x"}}


@pytest.mark.parametrize("length", [10, 200, 292, 293, 294, 300, 40_000])
@pytest.mark.parametrize("hint", [0, 20, 119, 121, 500])
def test_lines_have_a_length(length: int, hint: int) -> None:
    error = MplugError("begin" + "x" * length + "end", ("h" * hint) or None)
    line = f"error: {error}"
    assert len(line) <= LINE and line.startswith("error: begin")
    if length + hint < 250:
        assert " ... " not in line
    elif not hint:
        assert line.endswith("end")


def test_shortened_keeps_both_ends() -> None:
    assert shortened("a" * 300) == "a" * 300
    cut = shortened("begin" + "x" * 1000 + "end", 60)
    assert len(cut) == 60 and cut.startswith("begin") and cut.endswith("end")


def test_long_texts_take_no_time() -> None:
    start = time.perf_counter()
    for text in (
        "a.b-" * 100_000 + "://",
        "://" * 100_000,
        "http://" + "a:" * 100_000,
        "http://h/" + ".,;" * 100_000 + "x",
    ):
        without_secrets(text)
        shown_address(text)
    assert time.perf_counter() - start < 3


def test_errors_travel_between_processes() -> None:
    error = pickle.loads(pickle.dumps(DataError("https://u:p@h/x is broken", "hint", "word")))
    assert (error.message, error.hint, error.code) == ("https://***@h/x is broken", "hint", "word")


def test_what_is_not_a_number_is_said_once_however_often_it_is_told() -> None:
    """Errors are rebuilt of their message and hint, by other processes and by pickle."""
    error = NotFiniteError.of("the answer")
    for again in (NotFiniteError(error.message, error.hint), pickle.loads(pickle.dumps(error))):
        assert again.message == error.message == "the answer is not a number" and again.code == "not_finite"
