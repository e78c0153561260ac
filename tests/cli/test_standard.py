"""Standard streams that are closed, full or terminals; no home folder; nothing unprintable on a terminal."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import warnings

import pytest

from mplug_cli import app, show, standard
from mplug_cli.streams import json_line, write_line, write_text

NASTY = "a\x1b[31m\x07b\u202ec\u2066d\x9b1me\udcfff\u2028g\x7fh"


@pytest.mark.parametrize("text", ["a cat", "un café", "日本", "👩‍🚀", "نمی‌خواهم", "a\u00a0b", "\u3000"])
def test_what_people_write_is_printable(text):
    assert show.printable(text) == text


def test_what_moves_colours_or_reorders_is_an_escape():
    assert show.printable(NASTY) == r"a\x1b[31m\x07b\u202ec\u2066d\x9b1me\xfff\u2028g\x7fh"
    assert show.printable("\U000e0041\r\n\t") == r"\U000e0041\x0d\x0a\x09"
    assert show.printable("a\tb\x1b", keep="\t") == "a\tb\\x1b"


def test_json_is_printable_and_comes_back():
    line = json_line({NASTY: [NASTY, "é", 1]})
    assert line.isprintable() and "é" in line
    assert json.loads(line) == {NASTY: [NASTY, "é", 1]}


@pytest.fixture
def on_terminal(monkeypatch):
    """Call a function while ``stream`` (stdout or stderr) is a terminal; what it shows."""

    def call(stream, function, *arguments):
        ours, theirs = os.openpty()
        with open(theirs, "w", encoding="utf-8", errors="surrogateescape") as terminal, monkeypatch.context() as patch:
            patch.setattr(sys, stream, terminal)
            patch.setenv("TERM", "xterm")
            function(*arguments)
            terminal.flush()
            shown = os.read(ours, 100_000)
        os.close(ours)
        return shown.decode("utf-8")

    return call


def test_a_terminal_gets_escapes_and_a_pipe_the_content_in_one_line(on_terminal, capfdbinary):
    shown = on_terminal("stdout", write_line, f"0.5\t{NASTY}\nx")
    assert shown == "0.5\t" + show.printable(NASTY) + "\\x0ax\r\n"
    write_line("a\x1bb\nc\rd\udcff")
    write_text("x: 1\ny: 2")
    assert capfdbinary.readouterr().out == b"a\x1bb\\nc\\rd\xff\nx: 1\ny: 2\n"


@pytest.mark.parametrize("say", [show.error, show.note, show.warning, show.line])
def test_notes_are_printable(on_terminal, capsys, say):
    for shown in (on_terminal("stderr", say, NASTY), (say(NASTY), capsys.readouterr().err)[1]):
        assert show.printable(NASTY) in shown and "\x9b" not in shown and "[31m\x07" not in shown


def test_tables_take_no_orders_from_names(on_terminal):
    def draw():
        from rich.console import Console

        table = show.table(["[red]name", NASTY])
        table.add_row(*show.cells(["[b]", "\x1b[2J"]))
        Console(file=sys.stdout, width=200).print(table)

    shown = on_terminal("stdout", draw)
    assert all(text in shown for text in ("[red]name", show.printable(NASTY), "[b]", "\\x1b[2J"))
    assert "\x1b[2J" not in shown


def test_libraries_say_nothing_on_stderr(monkeypatch, capfd):
    def run(arguments):
        warnings.warn("a warning", stacklevel=1)
        logging.getLogger("matplotlib.font_manager").warning("is building the font cache")
        return 0

    monkeypatch.setattr(app, "_run", run)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    assert app.main([]) == 0
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["recipe", "ls"], ["recipe", "show", "--help"],
                                       ["--show-completion"]])  # fmt: skip
def test_a_full_disk_is_one_line(monkeypatch, capfd, arguments):
    monkeypatch.setattr("typer.completion._get_shell_name", lambda: "bash")  # whatever has started the tests
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert app.main(arguments) == 1
    error = capfd.readouterr().err
    assert error == "error: the results can't be written: No space left on device (check where they go)\n"


def test_a_full_stderr_stops_nothing(monkeypatch, capfd):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        show.note("x")
        assert app.main(["recipe", "ls"]) == 0
        assert app.main(["captoin"]) == 2
        standard.drop_unwritten()
    assert "pretrain/tiny" in capfd.readouterr().out


@pytest.mark.parametrize("stream", ["stdout", "stderr", "stdin"])
def test_streams_that_are_not_there(monkeypatch, capfd, stream):
    monkeypatch.setattr(sys, stream, None)
    code = app.main(["recipe", "ls"])
    assert code == (1 if stream == "stdout" else 0)
    out, error = capfd.readouterr()
    assert (out == "", "closed" in error) == (stream == "stdout", stream == "stdout")


CASES = (
    # redirection, exit code, what stdout and stderr begin with
    (">&-", 1, b"", b"error: the results can't be written: standard output is closed"),
    ("2>&-", 0, b"ablation/fusion", b""),
    ("<&-", 0, b"ablation/fusion", b""),
    ("<&- 2>&-", 0, b"ablation/fusion", b""),
    ("2>/dev/full", 0, b"ablation/fusion", b""),
    (">/dev/full", 1, b"", b"error: the results can't be written: No space left"),
)


@pytest.mark.slow
@pytest.mark.parametrize(("redirection", "code", "out", "error"), CASES)
def test_closed_and_full_streams_of_a_process(redirection, code, out, error):
    command = f'"{sys.executable}" -m mplug_cli.app recipe ls {redirection}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, check=False)
    assert done.returncode == code
    assert done.stdout.startswith(out) and bool(done.stdout) == bool(out)
    assert done.stderr.startswith(error) and done.stderr.count(b"\n") == bool(error)


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_for_a_closed_stdout_is_an_error(flag):
    command = f'"{sys.executable}" -m mplug_cli.app {flag} >&-'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1) and "standard output is closed" in done.stderr
