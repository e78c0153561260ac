"""What a training run shows: in place on a terminal, a line an interval elsewhere, whatever figures there are."""

from __future__ import annotations

import io
from typing import Any

import pytest

from mplug_cli import watch

FIGURES = {
    "stage": "train", "step": 120, "stage_step": 20, "stage_steps": 100, "loss": 2.5, "itc": 1.25, "mlm": 1.5,
    "grad_norm": 3.14159, "grad_norm_max": 9.0, "lr": 1e-4, "visual_lr": 1e-5, "images_per_second": 81.26,
    "tokens_per_second": 2048.4, "mfu": 0.3141, "memory_gb": 12.34, "seconds": 60.0, "eta_seconds": 3725.0,
    "skipped_steps": 0, "bad_images": 3, "itm_skipped": 2,
}  # fmt: skip
BARE = {"stage": "train", "step": 1, "stage_step": 1, "stage_steps": 2}


def display(width: int, **options: Any) -> tuple[watch.LiveDisplay, Any, io.StringIO]:
    """A display on a terminal of a width, its live area and what it has written."""
    from rich.console import Console
    from rich.live import Live

    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=width, height=24, color_system=None, **options)
    live = Live(console=console, auto_refresh=False)
    return watch.LiveDisplay(live), live, written


def drawn(width: int, figures: dict[str, Any], steps: int | None = None) -> list[str]:
    from rich.console import Console

    shown, _, _ = display(width)
    shown("begin", {"steps": steps})
    console = Console(file=io.StringIO(), width=width, color_system=None)
    with console.capture() as captured:
        console.print(shown.panel(figures))
    return captured.get().splitlines()


def test_a_line_has_what_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    watch.plain("step", FIGURES)
    line = capsys.readouterr().err
    for words in ("train 20/100  loss 2.500  itc 1.250  mlm 1.500  lr 1.00e-04  visual lr 1.00e-05  grad 3.14",
                  "grad 3.14  81.3 img/s",
                  "2048 tok/s", "MFU 31.4%", "12.3 GB", "1:02:05 left", "3 bad images", "2 itm skipped"):  # fmt: skip
        assert words in line
    assert "skipped steps" not in line and line.count("\n") == 1


def test_what_is_absent_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    watch.plain("step", BARE)
    assert capsys.readouterr().err == "train 1/2\n"
    watch.plain("step", {**BARE, "mfu": None, "lr": 1e-3, "seconds": 5.0})
    assert capsys.readouterr().err == "train 1/2  lr 1.00e-03  0:00:05 left\n"
    watch.plain("step", {**BARE, "lr": 1e-3, "visual_lr": 1e-3})
    assert capsys.readouterr().err == "train 1/2  lr 1.00e-03\n"
    watch.plain("begin", {"step": 0})
    watch.plain("later versions may have more", {})
    assert capsys.readouterr().err == ""


def test_notes_and_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    watch.plain("note", {"text": "resumed"})
    watch.plain("note", {"text": "image \x1b[31m broken", "level": "warning"})
    assert capsys.readouterr().err == "note: resumed\nwarning: image \\x1b[31m broken\n"


def features(done: int, seconds: float) -> dict[str, Any]:
    return {
        "of": "images", "done": done, "total": 2000, "images_per_second": done / seconds, "seconds": seconds,
        "eta_seconds": (2000 - done) * seconds / done,
    }  # fmt: skip


def test_features_are_told_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    with watch.watching() as shown:
        for second in range(1, 101):
            shown("features", features(20 * second, second))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "features of images 20/2000  20.0 img/s  0:01:39 left"
    assert lines[-1] == "features of images 2000/2000  20.0 img/s  0:00:00 left" and len(lines) == 5


def test_features_have_a_bar() -> None:
    shown, live, _ = display(80)
    shown("features", features(500, 25))
    from rich.console import Console

    console = Console(file=io.StringIO(), width=80, color_system=None)
    with console.capture() as captured:
        console.print(live.get_renderable())
    first, second = captured.get().splitlines()
    assert first.startswith("features") and "500/2000  25%" in first and second.strip() == "20.0 img/s  0:01:15 left"


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with watch.watching(quiet=True) as shown:
        for kind, figures in (("note", {"text": "x", "level": "warning"}), ("step", FIGURES), ("end", {}),
                              ("features", features(1, 1))):  # fmt: skip
            shown(kind, figures)
    assert capsys.readouterr() == ("", "")


def test_panel() -> None:
    lines = drawn(120, FIGURES, steps=400)
    assert lines[0].split()[0] == "train" and lines[0].endswith("20/100  20%")
    assert lines[1].split()[0] == "run" and lines[1].rstrip().endswith("120/400  30%")
    assert lines[2] == "loss 2.500  itc 1.250  mlm 1.500"
    assert lines[3].startswith("lr 1.00e-04") and lines[3].endswith("1:02:05 left")
    assert lines[4] == "3 bad images  2 itm skipped"
    # one stage is the run
    assert not any(line.startswith("run") for line in drawn(120, FIGURES, steps=100))


@pytest.mark.parametrize("width", [80, 40, 24, 12])
def test_a_narrow_terminal_breaks_between_figures(width: int) -> None:
    lines = drawn(width, FIGURES, steps=400)
    assert all(len(line) <= width for line in lines)
    text = "  ".join(line.strip() for line in lines)
    if width >= 24:
        for cell in ("loss 2.500", "visual lr 1.00e-05", "81.3 img/s", "MFU 31.4%", "20/100  20%", "3 bad images"):
            assert cell in text
    assert drawn(width, BARE)


def test_drawn_in_place_with_notes_above() -> None:
    """The panel is drawn over itself; what is told stands once, in order, above the last panel."""
    pyte = pytest.importorskip("pyte")
    shown, live, written = display(60)
    with live:
        for step in range(1, 40):
            shown("step", {**FIGURES, "stage_step": step, "bad_images": step // 20})
            if step % 10 == 0:
                shown("note", {"text": f"note of {step} [bold]"})
                shown("evaluation", {"step": step, "evaluation": {"val/a": 0.5, "val/b": 0.25}})
        before = written.tell()
        shown("start", {"stage": "train", "step": 0, "steps": 9})
        assert written.tell() == before, "nothing is drawn between two intervals"
        shown("scores", {"last": {"val/a": 0.5}, "best": {}, "at": {"last": 39}})
        shown("end", {"seconds": 60.0, "folder": "runs/x"})
    screen = pyte.HistoryScreen(60, 24, history=500)
    pyte.Stream(screen).feed(written.getvalue().replace("\n", "\r\n"))
    top = ["".join(row[i].data for i in range(60)).rstrip() for row in screen.history.top]
    lines = [line for line in (*top, *map(str.rstrip, screen.display)) if line]
    assert [line for line in lines if line.startswith(("note", "step"))] == [
        words for n in (10, 20, 30) for words in (f"note: note of {n} [bold]", f"step {n}: val/a 0.500  val/b 0.250")
    ]
    assert sum(line.startswith("loss ") for line in lines) == 1 and sum("/100" in line for line in lines) == 1
    assert "done after 0:01:00: runs/x" in lines and any("39/100" in line for line in lines)
    assert "1 bad images  2 itm skipped" in lines


def test_no_terminal_no_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    with watch.watching() as shown:
        for kind, figures in (("begin", {}), ("step", FIGURES), ("note", {"text": "x"})):
            shown(kind, figures)
    assert "\x1b" not in capsys.readouterr().err


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("FORCE_COLOR", "1")  # for rich what is captured here is a terminal then
    monkeypatch.setattr("mplug_cli.show.on_terminal", lambda: True)
    with watch.watching() as shown:
        assert isinstance(shown, watch.Lines)
