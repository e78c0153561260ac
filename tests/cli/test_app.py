"""The entry point: help and usage without torch, one line for every error, exit codes, closed pipes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from mplug_cli import app
from mplug_core.errors import CheckpointError, DataError, Preempted


def test_help_and_usage_errors_do_without_torch():
    lines = [
        ["--help"], ["caption", "--help"], ["eval", "-h"], ["recipe", "ls"], ["data", "scenes", "--help"],
        ["captoin"], ["caption", "--bem", "3"], ["caption"], ["eval", "--task", "x", "--data", "x"],
        ["pretrain", "--recipe", "no-such-recipe"], ["caption", "--device", "gpu", "x.jpg"],
        ["vqa", "--help"], ["vqa"], ["vqa", "x.jpg"], ["ground", "x.jpg"], ["ground", "x.jpg", "a", "--draw", "x"],
        ["reason"], ["reason", "x.jpg", "y.jpg"], ["reason", "x.jpg", "--hypothesis", " "],
        ["model", "--help"], ["model", "info", "--help"], ["model", "export", "x", "y", "--format", "z"],
        ["model", "export", "x", "y", "--format", "onnx", "--dtype", "bf16"], ["model", "push", "x", "org/name"],
        ["bench", "--help"], ["bench", "decode", "--help"], ["bench", "decode", "--size", "x"],
        ["bench", "rerank", "--against", "x"], ["bench", "rerank", "--device", "x"],
        ["bench", "train", "--against", "x"], ["bench", "train", "--size", "x"], ["bench", "train", "--help"],
    ]  # fmt: skip
    code = (
        "import sys; from mplug_cli.app import main\n"
        f"for line in {lines!r}: main(line)\n"
        "heavy = {'torch', 'timm', 'transformers', 'deepspeed', 'numpy', 'PIL'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "imported" not in done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["caption", "--help"], ["recipe", "show", "--help"]])
def test_help_is_plain_text_on_stdout(mplug, arguments):
    done = mplug(*arguments)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("Usage: mplug") and "\x1b" not in done.out and "─" not in done.out


@pytest.mark.parametrize("name", app.COMMANDS)
def test_help_lists_each_command_with_the_first_line_of_its_own_help(name):
    assert app.COMMANDS[name][1] == app.load_command(name).get_short_help_str(limit=1000)


def test_a_command_imports_no_other_command():
    code = "import sys; from mplug_cli.app import main; main(['caption', '--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = done.stdout.split()
    assert "mplug_cli.caption" in modules
    assert not {"mplug_cli.eval", "mplug_core.recipe"} & set(modules)


@pytest.mark.parametrize("arguments", [[], ["recipe"], ["data"], ["bench"]])
def test_a_group_alone_shows_its_help_and_is_a_usage_error(mplug, arguments):
    done = mplug(*arguments)
    assert done.code == 2 and done.out == "" and "Commands:" in done.err


def test_version(mplug):
    assert mplug("--version").out.startswith("mplug ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["captoin", "x.jpg"], ["'captoin'", "'caption'"]),
        (["caption", "--bem", "3"], ["--bem", "--beam", "mplug caption --help"]),
        (["caption", "--n", "three", "x.jpg"], ["--n"]),
        (["caption", "--n", "0", "x.jpg"], ["--n", "1"]),
        (["caption", "--beam"], ["--beam", "argument"]),
        (["pretrain"], ["--recipe"]),
        (["recipe", "shw"], ["'show'"]),
    ],
)
def test_usage_errors_are_one_line_that_names_what_is_meant(mplug, arguments, words):
    done = mplug(*arguments)
    assert (done.code, done.out) == (2, "")
    assert all(word in done.error for word in words), done.error


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run(arguments: list[str]) -> int:
        raise error

    monkeypatch.setattr(app, "_run", run)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (DataError("no captions in x", "give some"), 3, "error: no captions in x (give some)"),
        (CheckpointError("no model\nfolder x"), 5, "error: no model folder x"),
        (Preempted("saved"), 75, "error: saved"),
        (KeyError("x"), 1, "error: internal: KeyError: 'x' (set MPLUG_DEBUG=1 for the traceback)"),
        (AssertionError(), 1, "error: internal: AssertionError (set MPLUG_DEBUG=1 for the traceback)"),
        (ValueError("two\nlines"), 1, "error: internal: ValueError: two lines (set MPLUG_DEBUG=1 for the traceback)"),
    ],
)
def test_errors_have_one_line_and_a_code(mplug, monkeypatch, error, code, line):
    fail_with(monkeypatch, error)
    done = mplug()
    assert (done.code, done.out, done.error) == (code, "", line)


def test_debug_shows_the_traceback(mplug, monkeypatch):
    monkeypatch.setenv("MPLUG_DEBUG", "1")
    fail_with(monkeypatch, ValueError("x"))
    assert "Traceback" in mplug().err


def test_an_interrupt_is_quiet(mplug, monkeypatch):
    fail_with(monkeypatch, KeyboardInterrupt())
    done = mplug()
    assert (done.code, done.out, done.err) == (130, "", "")


def test_control_characters_do_not_reach_the_terminal(mplug, monkeypatch):
    fail_with(monkeypatch, DataError("a\x1b[31mb"))
    assert "\x1b" not in mplug().error


@pytest.mark.parametrize("arguments", [["--help"], ["recipe", "ls"]])
def test_a_closed_pipe_is_quiet(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "mplug_cli.app", *arguments], stdout=closed, stderr=subprocess.PIPE, check=False
        )
    assert (done.returncode, done.stderr) == (0, b"")


def test_colours_on_a_terminal_alone(monkeypatch):
    from mplug_cli import show

    for no_colour in (False, True):
        ours, theirs = os.openpty()
        with open(theirs, "w") as terminal:
            monkeypatch.setattr(sys, "stderr", terminal)
            monkeypatch.setenv("TERM", "xterm")
            monkeypatch.setenv("NO_COLOR", "1") if no_colour else monkeypatch.delenv("NO_COLOR", raising=False)
            show.error("it [b]failed[/b] " + "for a long reason " * 10)
            terminal.flush()
            text = os.read(ours, 10_000)
        os.close(ours)
        assert (b"\x1b[1;31m" in text) is not no_colour
        assert b"[b]failed[/b]" in text and text.count(b"\n") == 1
