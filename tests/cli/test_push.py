"""``mplug model push``: to a hub on this machine, and dry."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.weights.upload_hub import UploadHub, serving


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[UploadHub]:
    with serving(monkeypatch, tmp_path) as served:
        yield served


def test_push_prints_the_address(mplug, hub, able_folder):
    done = mplug("model", "push", able_folder, "hf:org/name", "--license", "mit", "-m", "first")
    assert (done.code, done.err) == (0, "")
    assert done.lines == [f"{hub.address}/org/name/commit/{'0' * 40}"]
    assert hub.repositories["org/name"].messages == ["first"]
    again = mplug("model", "push", able_folder, "hf:org/name")
    assert (
        again.code == 0 and "note: hf:org/name exists" in again.err and "note: the card states no licence" in again.err
    )
    assert mplug("model", "push", able_folder, "hf:org/name", "-q").err == ""


def test_dry_run_uploads_nothing(mplug, hub, able_folder):
    done = mplug("model", "push", able_folder, "hf:org/name", "--dry-run", "--private", "--revision", "v1")
    assert done.code == 0 and hub.requests == []
    assert done.lines[0] == "hf:org/name, branch v1 (private): Upload name"
    assert any("model.safetensors" in line and "bytes" in line for line in done.lines)
    assert "mplug caption photo.jpg --model hf:org/name" in done.lines
    (found,) = mplug("model", "push", able_folder, "hf:org/name", "--dry-run", "--json").objects
    assert found["target"] == "hf:org/name" and found["card"].startswith("---\nlibrary_name: mplug\n")
    assert set(found["files"]) == {"README.md", "config.json", "model.safetensors", "vocab.txt"}


def test_dry_run_needs_no_token(mplug, hub, able_folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert mplug("model", "push", able_folder, "ms:org/name", "--dry-run").code == 0
    done = mplug("model", "push", able_folder, "hf:org/name", "-q")
    assert done.code == 1 and "no token" in done.error and "HF_TOKEN" in done.error


def test_refusals_are_one_line(mplug, hub, able_folder):
    hub.refuse = ("/api/repos/create", 403)
    done = mplug("model", "push", able_folder, "hf:org/name", "-q")
    assert done.code == 1 and "may not write to hf:org/name" in done.error and done.out == ""


@pytest.mark.parametrize("target", ["org/name", "hf:name", "gh:org/name", "hf:org/name@v1"])
def test_targets_that_are_none(mplug, able_folder, target):
    done = mplug("model", "push", able_folder, target)
    assert (done.code == 2 and "hf:" in done.error) or "--revision" in done.error


def test_json_is_for_dry_runs(mplug, able_folder):
    assert mplug("model", "push", able_folder, "hf:org/name", "--json").code == 2


def test_no_model_folder(mplug, tmp_path):
    done = mplug("model", "push", tmp_path, "hf:org/name")
    assert done.code == 5 and "mplug model export" in done.error


CARDS = {
    "nc": ("---\nlicense: cc-by-nc-4.0\n---\n# x\n", "the card states cc-by-nc-4.0"),
    "list": ("---\nlicense: [gpl-3.0, other]\n---\n", "the card states gpl-3.0, other"),
    "text": ("# x\n\nFor **non-commercial research** only.\n", "the card says 'non-commercial'"),
    "not": ("# x\n\nThis may not be used for commercial purposes.\n", "not be used for commercial"),
    "only": ("---\nlibrary_name: mplug\n---\nfor academic use only\n", "academic use only"),
}


@pytest.mark.parametrize("name", CARDS)
def test_a_licence_that_the_card_is_against(mplug, able_folder, tmp_path, name):
    folder = tmp_path / "model"
    shutil.copytree(able_folder, folder)
    text, said = CARDS[name]
    (folder / "README.md").write_text(text)
    call = ("model", "push", folder, "hf:org/name", "--license", "mit", "--dry-run")
    done = mplug(*call)
    assert (done.code, done.out) == (2, "") and said in done.error and "--force" in done.error
    forced = mplug(*call, "--force")
    assert forced.code == 0 and "note: published as mit" in forced.err and "license: mit" in forced.out


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("---\nlicense: MIT\n---\n", "mit"),
        ("For non-commercial research only.\n", "cc-by-nc-4.0"),
        ("# x\n\nCommercial use is welcome.\n", "apache-2.0"),
        ("# x\n\nOnly research has shown it.\n", "mit"),
    ],
)
def test_a_licence_that_the_card_allows(mplug, able_folder, tmp_path, text, licence):
    folder = tmp_path / "model"
    shutil.copytree(able_folder, folder)
    (folder / "README.md").write_text(text)
    done = mplug("model", "push", folder, "hf:org/name", "--license", licence, "--dry-run")
    assert (done.code, done.err) == (0, "")


def test_the_licence_of_the_model_that_a_run_started_from(mplug, able_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(able_folder, folder)
    (folder / "recipe.yaml").write_text("name: mine\nstart: {model: mini}\n")
    done = mplug("model", "push", folder, "hf:org/name", "--license", "mit", "--dry-run")
    assert done.code == 2 and "the card of mini, which it started from" in done.error
