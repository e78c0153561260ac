"""``mplug runs``: text, JSON, pictures and pages of run folders, whole and broken ones."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mplug_cli.runs import as_object, sparkline, summary
from mplug_cli.streams import json_line
from mplug_core.training.history import Curve, read_run
from mplug_core.training.journal import Journal


def make_run(folder: Path, steps: int = 40, name: str = "mine", **figures: Any) -> Path:
    """A finished run that went on from step 20 and left a step out."""
    folder.mkdir(parents=True)
    lines = []
    for n in range(1, steps + 1):
        lines.append({
            "stage": "first" if n <= steps // 2 else "second", "step": n, "stage_step": n, "stage_steps": steps,
            "loss": 4.0 / n, "itc": 2.0 / n, "mlm": 2.0 / n, "grad_norm": 1.0 + n % 3, "lr": 1e-4, "visual_lr": 1e-5,
            "images_per_second": 50.0, "mfu": 0.3, "seconds": 2.0 * n, "skipped_steps": int(n > 12), **figures,
        })  # fmt: skip
        if n % 10 == 0:
            lines.append({"stage": "first", "step": n, "evaluation": {"val/vqa/accuracy": n / 100, "val/vqa/n": 7.0}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "recipe.yaml").write_text(f"name: {json.dumps(name)}\nrun: {{best: val/vqa/accuracy}}\n")
    journal = Journal(folder)
    journal.begin(0, resumed=False, steps=steps)
    journal.begin(20, resumed=True, steps=steps)
    journal.write("warning", step=13, text="step 13 left out")
    journal.write("finished", step=steps)
    place = folder / "checkpoints" / f"step-{steps:08d}"
    place.mkdir(parents=True)
    meta = {"progress": {"total": steps}, "world": 2, "stage": "second"}
    (place / "meta.json").write_text(json.dumps(meta))
    (place / "manifest.json").write_text(json.dumps({"files": {"meta.json": {"size": len(json.dumps(meta))}}}))
    (folder / "checkpoints" / "latest").write_text(place.name)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "runs" / "a")


def rows(lines: list[str]) -> dict[str, list[str]]:
    """The lines of the text by their first word."""
    return {line.split()[0]: line.split()[1:] for line in lines if line.strip()}


def test_show(mplug, run):
    done = mplug("runs", "show", run)
    assert (done.code, done.err) == (0, "")
    found = rows(done.lines)
    assert done.lines[0] == str(run)
    assert found["recipe"] == ["mine"] and found["state"] == ["finished"] and found["step"] == ["40/40", "(100%)"]
    assert found["stage"] == ["second,", "step", "40", "of", "40"] and found["resumed"] == ["at", "20"]
    assert found["skipped"] == ["steps", "1", "(by", "step", "13)"]
    assert found["best"] == ["val/vqa/accuracy", "0.4000", "at", "step", "40"]
    assert found["warning"] == ["step", "13:", "step", "13", "left", "out"]
    assert found["loss"][:3] == ["0.1", "0.1", "4"] and found["loss"][3][0] == "█" and found["loss"][3][-8:] == "▁" * 8
    assert found["lr"][:3] == ["0.0001"] * 3 and found["lr"][3] == "▁" * 24
    assert found["val/vqa/accuracy"] == ["0.4", "0.1", "0.4", "▁▃▆█", "step", "40"]
    (listed,) = [line for line in done.lines if "step-00000040" in line]
    assert listed.split()[1:3] == ["(latest)", "(best)"] and listed.split()[-3:] == ["2", "second", "sound"]


def test_sparkline():
    assert sparkline(Curve([1, 2, 3, 4], [0.0, 7.0, math.nan, 3.5])) == "▁█ ▅"
    assert sparkline(Curve([1, 2, 3], [0.3, 0.1 + 0.2, 0.3])) == "▁▁▁", "rounding is no course"
    assert sparkline(Curve([1], [math.nan])) == "" == sparkline(Curve())


def test_json(mplug, run):
    (found,) = mplug("runs", "show", run, "--json").objects
    assert (found["recipe"], found["state"], found["step"], found["steps"]) == ("mine", "finished", 40, 40)
    assert found["last"]["loss"] == 0.1 and found["best"]["value"] == 0.4 and found["resumes"] == [20]
    assert found["evaluations"]["val/vqa/accuracy"] == {"value": 0.4, "step": 40}
    assert found["rises"] == {"skipped_steps": [[13, 1]]}
    assert found["checkpoints"][0]["condition"] == "sound" and found["checkpoints"][0]["latest"] is True


def test_json_has_no_nan(mplug, tmp_path):
    folder = make_run(tmp_path / "a", 3, loss=float("nan"), odd=float("inf"))
    done = mplug("runs", "show", folder, "--json")
    found = json.loads(done.out, parse_constant=lambda word: pytest.fail(word))
    assert found["last"]["loss"] is None
    assert mplug("runs", "show", folder).code == 0


def test_ls(mplug, run, tmp_path, monkeypatch):
    make_run(tmp_path / "runs" / "b", 10, name="other")
    (tmp_path / "runs" / "no run").mkdir()
    monkeypatch.chdir(tmp_path)
    done = mplug("runs", "ls")
    assert done.code == 0 and [line.split()[:4] for line in done.lines] == [
        ["runs/a", "mine", "finished", "40/40"], ["runs/b", "other", "finished", "10/10"]
    ]  # fmt: skip
    assert "loss 0.1" in done.lines[0] and "val/vqa/accuracy 0.4000" in done.lines[0]
    assert [found["recipe"] for found in mplug("runs", "ls", "runs", "--json").objects] == ["mine", "other"]
    (tmp_path / "runs" / "c" / "metrics.jsonl").mkdir(parents=True)
    done = mplug("runs", "ls")
    assert len(done.lines) == 2 and done.err.startswith("warning: cannot read runs/c/metrics.jsonl")


def test_ls_of_nothing(mplug, tmp_path):
    done = mplug("runs", "ls", tmp_path)
    assert (done.code, done.out) == (0, "") and "no runs" in done.err
    assert mplug("runs", "ls", tmp_path / "none").code == 3


def colours(content: bytes) -> set[tuple[int, ...]]:
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == "PNG" and min(image.size) > 300
        return {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}


BLUE, ORANGE, RED = (31, 119, 180), (255, 127, 14), (214, 39, 40)


def test_png(mplug, run, tmp_path):
    done = mplug("runs", "show", run, "--png", tmp_path / "x.png")
    assert done.lines == [str(tmp_path / "x.png")]
    seen = colours((tmp_path / "x.png").read_bytes())
    assert {BLUE, ORANGE, RED} <= seen, "curves, and red ticks at skipped steps"


def test_png_on_stdout(run):
    command = [sys.executable, "-m", "mplug_cli.app", "runs", "show", str(run), "--png", "-"]
    done = subprocess.run(command, capture_output=True, check=True)
    assert BLUE in colours(done.stdout)


class Page(HTMLParser):
    """The words of a page, and what it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loaded: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [v for k, v in attributes if k in ("src", "href", "xlink:href") and v and not v.startswith("#")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_html(mplug, tmp_path):
    folder = make_run(
        tmp_path / "a", name="<script>alert(1)</script> $x_1$ & \x1b[31m", **{"$b_ad$ <b>": 1.0, "_x": 2.0}
    )
    done = mplug("runs", "show", folder, "--html", tmp_path / "x.html")
    assert done.code == 0, done.err
    text = (tmp_path / "x.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.loaded == [] and "script" not in page.tags and "link" not in page.tags and "<script>" not in text
    assert page.tags.count("svg") == 1 and "table" in page.tags
    words = " ".join(page.words)
    for wanted in ("$x_1$", "$b_ad$ <b>", "val/vqa/accuracy", "step-00000040", "learning rate", "finished", "second"):
        assert wanted in words


def test_a_comparison(mplug, run, tmp_path):
    other = make_run(tmp_path / "runs" / "b", 30, name="other", box=1.5)
    done = mplug("runs", "show", run, other, "--png", tmp_path / "x.png")
    assert done.code == 0 and {BLUE, ORANGE} <= colours((tmp_path / "x.png").read_bytes())
    lines = mplug("runs", "show", run, other).lines
    found = rows(lines)
    assert found["loss"] == ["0.1", "0.1333"] and found["box"] == ["-", "1.5"]
    assert ["a", "b"] in [line.split() for line in lines] and found["val/vqa/accuracy"] == ["0.4", "0.3"]
    assert len(mplug("runs", "show", run, other, "--json").lines) == 2
    mplug("runs", "show", run, other, "--html", tmp_path / "x.html")
    page = Page((tmp_path / "x.html").read_text())
    assert page.loaded == [] and {"box", "mlm", "images/s"} <= set(page.words)


def test_the_same_run_once_and_the_same_name_twice(mplug, run, tmp_path):
    assert len(mplug("runs", "show", run, run, "--json").lines) == 1
    twin = make_run(tmp_path / "elsewhere" / "a", 10)
    assert any(line.split() == [str(run), str(twin)] for line in mplug("runs", "show", run, twin).lines)


def test_half_a_line_and_junk(mplug, run):
    with open(run / "metrics.jsonl", "ab") as log:
        log.write(b"\x00\xff\n" + b'{"stage": "second", "step": 4')
    done = mplug("runs", "show", run)
    assert done.code == 0 and rows(done.lines)["step"] == ["40/40", "(100%)"]
    assert done.err.startswith("note: ") and "2 unreadable" in done.err and done.err.count("\n") == 1


def test_a_run_without_a_step(mplug, tmp_path):
    folder = tmp_path / "young"
    folder.mkdir()
    (folder / "metrics.jsonl").write_bytes(b"")
    done = mplug("runs", "show", folder)
    assert done.code == 0 and "unknown: nothing is logged yet" in done.out
    done = mplug("runs", "show", folder, "--png", tmp_path / "x.png")
    assert done.code == 1 and "nothing to draw" in done.error and not (tmp_path / "x.png").exists()
    assert mplug("runs", "show", folder, "--html", tmp_path / "x.html").code == 0
    assert mplug("runs", "ls", tmp_path).lines[0].split()[1:3] == ["?", "unknown"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["none"], 3, "no folder none"),
        (["."], 3, "holds no run"),
        (["run/metrics.jsonl"], 3, "is no folder"),
        (["run", "--png", "none/x.png"], 1, "can't be written"),
        (["run", "--png", "-", "--json"], 2, "only one thing"),
        ([], 2, "missing argument"),
    ],
)
def test_faults(mplug, tmp_path, monkeypatch, arguments, code, words):
    make_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    done = mplug("runs", "show", *arguments)
    assert done.code == code and words in done.error and done.out == ""


def test_without_matplotlib(mplug, run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in mplug("runs", "show", run, "--png", tmp_path / "x.png").error
    assert mplug("runs", "show", run).code == 0


def test_needs_no_torch(run):
    code = (
        "import sys; from mplug_cli.app import main; main(['runs', 'show', sys.argv[1], '--html', '-']);"
        "print({'torch', 'timm', 'transformers'} & set(sys.modules), 'matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set() False"


ODD = [
    None, True, -1, 10**30, -(10**400), 1e308, -1e308, math.nan, math.inf, "", "x\x1b[31m", [], [1, [2]], {}, {"a": 1},
]  # fmt: skip
NAMES = ["step", "stage", "stage_step", "stage_steps", "seconds", "eta_seconds", "loss", "skipped_steps", "lr", "new",
         "evaluation", "event", "steps", "resumed", "pid", "host", "why", "time", "started", "text"]  # fmt: skip


def test_logs_of_any_json(mplug, tmp_path):
    """Each field with each odd value, in lines that are good otherwise; and lines that are something else."""
    good = {"step": 1, "stage": "s", "stage_step": 1, "stage_steps": 9, "loss": 1.0, "seconds": 1.0, "skipped_steps": 1}
    lines = [good | {"step": n, name: value} for n, (name, value) in enumerate((k, v) for k in NAMES for v in ODD)]
    lines += [good | {"evaluation": {"val/vqa/accuracy": value}} for value in ODD]
    events = [{"event": "begin", "step": 0, "pid": 1, "host": "x"} | {k: v} for k in NAMES for v in ODD]
    folder = make_run(tmp_path / "runs" / "odd")
    text = "".join(json.dumps(line) + "\n" for line in [*lines, *ODD]) + "9" * 5000 + "\n[" * 3
    (folder / "metrics.jsonl").write_text(text)
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    make_run(tmp_path / "runs" / "sound")
    for arguments in (["show", folder], ["show", folder, "--json"], ["show", folder, tmp_path / "runs" / "sound"]):
        done = mplug("runs", *arguments, "-q")
        assert (done.code, done.err) == (0, ""), done.err
        assert "NaN" not in done.out and "Infinity" not in done.out and "\x1b" not in done.out
    done = mplug("runs", "ls", tmp_path / "runs")
    assert (done.code, done.err, len(done.lines)) == (0, "", 2)


def test_logs_that_end_in_an_odd_value(tmp_path):
    """What is shown of a run is of its last line and its last event."""
    folder = make_run(tmp_path / "odd", steps=2)
    good = (folder / "metrics.jsonl").read_text()
    for name in ("step", "stage", "stage_step", "stage_steps", "seconds", "loss", "skipped_steps", "resumed"):
        for value in ODD:
            line = {"step": 3, "stage": "s", "loss": 1.0, "seconds": 1.0, "skipped_steps": 5} | {name: value}
            text = "".join(json.dumps(values) + "\n" for values in (line, line | {"step": 4}))
            (folder / "metrics.jsonl").write_text(good + text)
            (folder / "events.jsonl").write_text(json.dumps({"event": "begin", name: value}) + "\n")
            run = read_run(folder)
            assert summary({"odd": run}) and json_line(as_object(run)), (name, value)


FILES = ["metrics.jsonl", "events.jsonl", "recipe.yaml", "checkpoints/latest", "checkpoints/step-00000040/meta.json",
         "checkpoints/step-00000040/manifest.json"]  # fmt: skip


@pytest.mark.parametrize(
    "what", ["folder", "pipe", "loop", "bytes", "deep", "null", "list", "numbers", "date", "device"]
)
def test_any_file_in_a_run_folder(mplug, tmp_path, what):
    root = tmp_path / "runs"
    make_run(root / "sound", steps=2)
    for number, name in enumerate(FILES):
        folder = make_run(root / f"odd{number}", steps=2)
        (folder / "checkpoints" / "step-00000002").rename(folder / "checkpoints" / "step-00000040")
        if (name, what) != ("recipe.yaml", "deep"):
            put(folder / name, what)
        done = mplug("runs", "show", folder)
        assert done.code in (0, 3) and "internal" not in done.err and done.err.count("\n") <= 1, name
    done = mplug("runs", "ls", root)
    assert done.code == 0 and "sound" in done.out and "internal" not in done.err
    assert mplug("runs", "ls", root, "--json").code == 0


def put(file: Path, what: str) -> None:
    """Something else in a file's place."""
    file.unlink()
    content = {
        "bytes": bytes(range(256)), "deep": b"[" * 100_000, "null": b"null", "list": b"[1, {}]", "date": b"2020-99-99",
        "numbers": b'{"progress": {"total": -5}, "world": true, "stage": 3, "files": {"x": 1, "meta.json": {}},'
                   b'"run": {"best": 5}, "name": 7, "stages": [{"name": [1]}, 3]}',
    }  # fmt: skip
    if what == "folder":
        file.mkdir()
    elif what == "pipe":
        os.mkfifo(file)
    elif what == "loop":
        file.symlink_to(file.name)
    elif what == "device":
        file.symlink_to("/dev/zero")
    else:
        file.write_bytes(content[what])
