"""``mplug bench``: the table, the object, the file, and mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mplug_cli import bench_decode, bench_report, bench_rerank, bench_train
from mplug_core.bench import decode, rerank, train
from mplug_core.bench.measure import Machine, Report
from mplug_core.errors import MplugError


@pytest.fixture
def reported(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Measures nothing; holds what would have been measured."""
    seen: dict[str, object] = {}

    def instead(config, *arguments, advance, **options):
        seen.update(options, config=config, threads=torch.get_num_threads())
        advance("mplug")
        report = Report("rerank", "A title", ("way", "s"), Machine.here(), [("mPLUG", "1"), ("other one", "2")])
        report.notes.append("a note")
        return report

    monkeypatch.setattr(rerank, "bench_rerank", instead)
    return seen


def test_table_object_and_file(mplug, reported, tmp_path: Path) -> None:
    done = mplug("bench", "rerank", "--size", "small", "--repeats", "2", "--against", "plain", "--threads", "1")
    assert (done.code, done.err) == (0, "note: measuring re-ranking, 10 turns\n")
    assert done.lines[:6] == ["A title", "", "way        s", "mPLUG      1", "other one  2", ""]
    assert done.lines[6] == "- a note" and "1 thread of" not in done.lines[6]
    assert reported["against"] == ["plain"] and reported["repeats"] == 2 and reported["threads"] == 1
    assert reported["config"].vision.image_size == 384
    file = tmp_path / "report.md"
    done = mplug("bench", "rerank", "--json", "--markdown", file)
    assert json.loads(done.out)["benchmark"] == "rerank" and "| other one | 2 |" in file.read_text()
    assert reported["against"] == ["hf-blip", "plain"]


def test_threads_are_as_before_afterwards(mplug, reported) -> None:
    before = torch.get_num_threads()
    mplug("bench", "rerank", "--threads", str(before + 1))
    assert reported["threads"] == before + 1 and torch.get_num_threads() == before


def test_train_really(mplug) -> None:
    done = mplug("bench", "train", "--size", "tiny", "--batch", "2", "--repeats", "1", "--against", "mlm", "--json")
    assert (done.code, done.err) == (0, "note: measuring training steps, 4 turns\n")
    found = done.objects[0]
    assert found["benchmark"] == "train" and found["batch"] == 2
    assert [step["step"] for step in found["steps"]] == ["mplug", "mlm"]


def test_compiling_is_measured_only_when_it_is_named(mplug, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def instead(config, pretraining, names, repeats, advance):
        seen.append(names)
        return Report("train", "A title", ("step",), Machine.here())

    monkeypatch.setattr(train, "bench_train", instead)
    mplug("bench", "train", "--size", "tiny")
    mplug("bench", "train", "--size", "tiny", "--against", "compile")
    assert seen == [list(bench_train.OPPONENTS[:-1]), ["compile"]] and "naive" in seen[0]


def test_decode_really(mplug) -> None:
    done = mplug("bench", "decode", "--size", "tiny", "--repeats", "1", "--against", "plain", "--json")
    assert done.code == 0
    found = done.objects[0]
    assert found["image_tokens"] == 36 and found["same_ids"] == {"plain": True}
    assert [(entry["images"], entry["decoder"]) for entry in found["seconds"]] == [
        (1, "mplug"), (1, "plain"), (4, "mplug"), (4, "plain"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size", "bse"], ["no model size 'bse'", "base"]),
        (["--against", "hf-blib"], ["--against hf-blib", "hf-blip"]),
        (["--repeats", "0"], ["--repeats"]),
        (["--threads", "0"], ["--threads"]),
        (["--device", "gpu"], ["no device 'gpu'"]),
    ],
)
@pytest.mark.parametrize("command", ["decode", "rerank"])
def test_mistakes_are_one_line(mplug, command: str, arguments: list[str], words: list[str]) -> None:
    done = mplug("bench", command, *arguments)
    assert done.code == 2 and done.out == ""
    assert all(word in done.error for word in words)


def test_a_report_that_can_t_be_written(mplug, reported, tmp_path: Path) -> None:
    done = mplug("bench", "rerank", "--markdown", tmp_path / "no" / "x.md")
    assert done.code == 1 and "can't be written" in done.error


def test_opponents_are_those_that_can_be_measured() -> None:
    assert set(bench_decode.OPPONENTS) == set(decode.OPPONENTS)
    assert set(bench_rerank.OPPONENTS) == set(rerank.OPPONENTS)
    assert bench_report.chosen(["plain", "plain"], bench_decode.OPPONENTS) == ["plain"]


def test_load_reads_a_folder(mplug, model_folder, make_photo, tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        make_photo(name)
    done = mplug("bench", "load", "--data", tmp_path, "--images", "2", "--repeats", "1", "--json")
    assert done.code == 0 and done.objects[0]["images"] == 2


@pytest.mark.parametrize(("arguments", "code"), [(["--size", "640"], 2), (["--size", "0x4"], 2), (["--data", "no"], 3)])
def test_load_mistakes(mplug, arguments: list[str], code: int) -> None:
    done = mplug("bench", "load", *arguments)
    assert done.code == code and arguments[1] in done.error


def test_start_passes_what_is_asked(mplug, monkeypatch) -> None:
    from mplug_core.bench import start

    asked = []
    report = Report("start", "A title", ("process", "s"), Machine.here(), [("mplug", "1")])
    monkeypatch.setattr(start, "bench_start", lambda *arguments: asked.append(arguments[:2]) or report)
    assert mplug("bench", "start", "--model", "x", "--repeats", "2").code == 0
    assert asked == [("x", 2)]


@pytest.mark.parametrize("name", ["decode", "load", "rerank", "start", "train"])
def test_quiet_is_quiet(mplug, monkeypatch, name):
    """What is measured is said, and with -q it isn't; errors always are."""

    def stop(*arguments, **options):
        raise MplugError("that is enough")

    monkeypatch.setattr(f"mplug_core.bench.{name}.bench_{name}", stop)
    error = "error: that is enough\n"
    said = mplug("bench", name, "--repeats", "1").err
    assert said.startswith("note: measuring ") and said.endswith(error)
    assert mplug("bench", name, "--repeats", "1", "-q").err == error
