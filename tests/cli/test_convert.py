"""``mplug model convert``: the account for people and for programs, what is refused, and what comes of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.released import released, with_twins, write_alicemind, write_modelscope


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_alicemind(tmp_path / "a" / "mplug.pth", with_twins(released()))


def test_account_for_people(mplug, checkpoint, tmp_path):
    done = mplug("model", "convert", checkpoint, tmp_path / "native")
    assert done.code == 0 and "images of 16 pixels" in done.err
    rows = {line.split("  ")[0]: line for line in done.lines}
    assert set(rows) == {"", "used", "dropped"}
    found = [line for line in done.lines if "momentum teacher" in line]
    assert len(found) == 1 and found[0].split()[-5] == str(len(with_twins(released())) - len(released()))
    for part in ("visual", "text", "fusion", "decoder", "contrastive", "matching", "masked"):
        assert any(line.startswith(f"used     {part} ") for line in done.lines), part


def test_account_for_programs(mplug, checkpoint, tmp_path):
    done = mplug("model", "convert", checkpoint, tmp_path / "native", "--json", "-q", "--dtype", "bf16")
    assert (done.code, done.err) == (0, "")
    (account,) = done.objects
    names = [name for key in ("used", "dropped") for group in account[key].values() for name in group["names"]]
    assert sorted(names) == sorted(with_twins(released()))
    assert account["layout"] == "alicemind" and account["missing"] == {} and account["config"]["stride"] == 2
    assert account["bytes"] == (tmp_path / "native" / "model.safetensors").stat().st_size


def test_answers_are_those_of_the_checkpoint(mplug, tmp_path, photo):
    folder = write_modelscope(
        tmp_path / "m", released(), "image-captioning", image_res=32, beam_size=2, min_length=3, max_length=5
    )
    assert mplug("model", "convert", folder, tmp_path / "native", "-q").code == 0
    assert json.loads((tmp_path / "native" / "config.json").read_text())["vision"]["image_size"] == 32
    before, after = (mplug("caption", photo, "--json", "--model", place) for place in (folder, tmp_path / "native"))
    assert before.code == 0 and before.out == after.out
    assert 3 <= len(before.objects[0]["caption"].split()) <= 5
    longer = mplug("caption", photo, "--json", "--model", folder, "--min-tokens", "7", "--max-tokens", "9").objects
    assert len(longer[0]["caption"].split()) >= 7


def test_model_of_one_task_says_what_it_is_not_for(mplug, tmp_path, photo):
    heads = ("vision_proj", "text_proj", "itm_head", "temp", "fusion_encoder.cls")
    vqa = {name: value for name, value in released().items() if not name.startswith(heads)}
    folder = write_modelscope(tmp_path / "m", vqa, "visual-question-answering")
    done = mplug("model", "convert", folder, tmp_path / "native")
    assert done.code == 0 and [line.split()[1] for line in done.lines if line.startswith("missing")] == [
        "contrastive", "matching", "masked",
    ]  # fmt: skip
    for place in (folder, tmp_path / "native"):
        assert mplug("vqa", photo, "what is it", "--model", place).code == 0
        done = mplug("retrieve", "a ball", photo, "--model", place)
        assert done.code == 5 and "no contrastive head" in done.error
    assert mplug("caption", photo, "--model", tmp_path / "native").code == 0


def test_missing_part(mplug, tmp_path):
    lost = {name: value for name, value in released().items() if not name.startswith("fusion_encoder")}
    file = write_alicemind(tmp_path / "a" / "mplug.pth", lost)
    done = mplug("model", "convert", file, tmp_path / "native")
    assert (done.code, done.out) == (5, "") and "the fusion encoder is not there" in done.error
    assert "--allow-missing fusion" in done.error and not (tmp_path / "native").exists()
    done = mplug("model", "convert", file, tmp_path / "native", "--allow-missing", "fusion", "--json")
    assert done.code == 0 and done.objects[0]["allowed"] == ["fusion"]


def test_unknown_tensors_are_a_warning(mplug, tmp_path):
    file = write_alicemind(tmp_path / "a" / "mplug.pth", {**released(), "mine": released()["temp"]})
    done = mplug("model", "convert", file, tmp_path / "native")
    assert done.code == 0 and "warning: 1 tensor has an unknown name, left out: mine" in done.err


def test_what_is_there_is_not_lost(mplug, checkpoint, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one").write_text("dear")
    done = mplug("model", "convert", checkpoint, tmp_path / "photos", "--force")
    assert done.code == 1 and "exists and is no model folder" in done.error
    done = mplug("model", "convert", checkpoint, checkpoint, "--force")
    assert done.code == 2 and checkpoint.stat().st_size > 1000
    assert mplug("model", "convert", checkpoint, tmp_path / "native").code == 0
    done = mplug("model", "convert", checkpoint, tmp_path / "native", "--image-size", "32")
    assert done.code == 1 and "--force replaces it" in done.error
    assert json.loads((tmp_path / "native" / "config.json").read_text())["vision"]["image_size"] == 16
    assert mplug("model", "convert", checkpoint, tmp_path / "native", "--image-size", "32", "--force").code == 0
    assert json.loads((tmp_path / "native" / "config.json").read_text())["vision"]["image_size"] == 32
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "native", "photos"]


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--allow-missing", "desision", "no part 'desision'"),
        ("--allow-missing", "visual", "no part 'visual'"),
        ("--dtype", "fp8", "no dtype 'fp8', did you mean"),
        ("--image-size", "0", "--image-size"),
    ],
)
def test_usage(mplug, checkpoint, tmp_path, option, value, words):
    done = mplug("model", "convert", checkpoint, tmp_path / "native", option, value)
    assert done.code == 2 and words in done.error and not (tmp_path / "native").exists()


@pytest.mark.parametrize("content", [b"", b"text\n", b"PK\x03\x04 not really", b"\x80\x02}q\x00"])
def test_damaged_file(mplug, tmp_path, content):
    (tmp_path / "bad.pth").write_bytes(content)
    done = mplug("model", "convert", tmp_path / "bad.pth", tmp_path / "native")
    assert (done.code, done.out) == (5, "") and str(tmp_path / "bad.pth") in done.error
    assert [p.name for p in tmp_path.iterdir()] == ["bad.pth"]


def test_no_such_checkpoint(mplug, tmp_path):
    assert mplug("model", "convert", tmp_path / "none.pth", tmp_path / "native").code == 5
    assert mplug("model", "convert", tmp_path / "none.pth").code == 2
