"""``mplug model``: pull and ls; and models by name in the other commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mplug_core.weights import download
from mplug_core.weights.registry import RELEASED
from tests.cli.conftest import Outcome, save_random
from tests.loopback import Loopback, Page, files_of, loopback

Mplug = Callable[..., Outcome]
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def web() -> Iterator[Loopback]:
    with loopback() as server:
        yield server


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, web: Loopback, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and ``web`` for the network."""
    from huggingface_hub import constants

    for name in ("MPLUG_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("MPLUG_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", web.url)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", web.url)
    monkeypatch.setattr(download, "PAUSE", 0.01)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a random model."""
    return files_of(save_random(tmp_path_factory.mktemp("models") / "random"))


def test_pull_prints_the_path_and_says_where_the_cache_is(mplug: Mplug, web: Loopback, cache: Path) -> None:
    web.pages["/x.pth"] = Page(b"weights")
    done = mplug("model", "pull", f"{web.url}/x.pth")
    assert done.code == 0 and done.err == f"note: cache: {cache}\n"
    assert Path(done.lines[0]).read_bytes() == b"weights" and len(done.lines) == 1
    quiet = mplug("model", "pull", "-q", f"{web.url}/x.pth")
    assert (quiet.code, quiet.out, quiet.err) == (0, done.out, "")


def test_pull_of_several_goes_on_after_a_failure(mplug: Mplug, web: Loopback) -> None:
    web.pages["/x.pth"] = Page(b"weights")
    done = mplug("model", "pull", f"{web.url}/gone.pth", f"{web.url}/x.pth", "-q")
    assert done.code == 4 and len(done.lines) == 1 and "there is no" in done.error
    assert mplug("model", "pull", f"{web.url}/gone.pth", f"{web.url}/lost.pth").code == 5


def test_pull_offline(mplug: Mplug, web: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    web.pages["/x.pth"] = Page(b"weights")
    spec = f"{web.url}/x.pth"
    done = mplug("model", "pull", "--offline", spec)
    assert done.code == 5 and "downloads are off" in done.error and not web.requests
    monkeypatch.setenv("MPLUG_OFFLINE", "1")
    assert mplug("model", "pull", spec).code == 5 and not web.requests
    monkeypatch.delenv("MPLUG_OFFLINE")
    assert mplug("model", "pull", spec).code == 0
    assert mplug("model", "pull", "--offline", spec).code == 0 and len(web.requests) == 1


def test_a_large_file_is_announced(mplug: Mplug, web: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mplug_cli.show.ANNOUNCED_BYTES", 1 << 20)
    web.pages["/x.pth"] = Page(bytes(3 << 20))
    done = mplug("model", "pull", f"{web.url}/x.pth")
    assert done.err.splitlines()[0] == "note: downloading x.pth, 0.00 GB"
    assert done.err.count("downloading") == 1


@pytest.mark.parametrize("command", ["info", "convert", "export", "push"])
def test_commands_announce_what_they_download(
    command: str, mplug: Mplug, web: Loopback, native: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mplug_cli.show.ANNOUNCED_BYTES", 0)
    web.hugging_face("org/name", native)
    rest = {"info": [], "push": ["hf:org/other", "--dry-run"]}.get(command, [tmp_path / "out"])
    done = mplug("model", command, "hf:org/name", *rest)
    assert done.code == 0 and "note: downloading model.safetensors" in done.err


def test_pull_without_names_is_a_usage_error(mplug: Mplug) -> None:
    assert mplug("model", "pull").code == 2


def test_ls(mplug: Mplug, web: Loopback, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = mplug("model", "ls")
    assert done.code == 0 and len(done.lines) == 1 + len(RELEASED) and not web.requests
    assert done.lines[1].startswith("mplug-base ") and "about 2.0 GB" in done.lines[1]
    assert f"note: cache: {cache}" in done.err and "Apache-2.0" in done.err
    web.pages["/x.pth"] = Page(b"weights")
    monkeypatch.setitem(RELEASED, "mplug-base", replace(RELEASED["mplug-base"], sources=(f"{web.url}/x.pth",)))
    path = mplug("model", "pull", "mplug-base").lines[0]
    rows = {row["name"]: row for row in mplug("model", "ls", "--json").objects}
    assert list(rows) == list(RELEASED)
    assert rows["mplug-base"]["path"] == path and rows["mplug-base"]["places"] == [path]
    assert rows["mplug-large"]["path"] is None and rows["mplug-large"]["image_size"] == 224
    assert " yes " in mplug("model", "ls").lines[1]


def test_names_are_listed_without_torch() -> None:
    code = "import sys; from mplug_cli.app import main; main(['model', 'ls']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1] == "False" and "mplug-large-vqa" in done.stdout


@pytest.mark.parametrize("scheme", ["hf", "ms"])
def test_caption_by_a_name(
    scheme: str, mplug: Mplug, web: Loopback, native: dict[str, bytes], photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.hugging_face("org/name", native)
    web.model_scope("org/name", native)
    done = mplug("caption", photo, "--model", f"{scheme}:org/name")
    assert done.code == 0 and done.lines and done.err == ""
    asked = len(web.requests)
    monkeypatch.setenv("MPLUG_OFFLINE", "1")
    assert mplug("caption", photo, "--model", f"{scheme}:org/name").out == done.out
    monkeypatch.setenv("MPLUG_MODEL", f"{scheme}:org/name")
    assert mplug("caption", photo).out == done.out
    assert len(web.requests) == asked
    missing = mplug("caption", photo, "--model", f"{scheme}:org/other")
    assert missing.code == 5 and "org/other is not in the cache" in missing.error


def test_caption_by_a_released_file_behind_a_url(mplug: Mplug, web: Loopback, photo: Path, tmp_path: Path) -> None:
    from tests.released import SMALL, released, vocabulary, write_alicemind

    write_alicemind(tmp_path / "tiny.pth", released())
    web.pages["/tiny.pth"] = Page((tmp_path / "tiny.pth").read_bytes(), etag='"1"', cuts=[10_000])
    path = Path(mplug("model", "pull", f"{web.url}/tiny.pth").lines[0])
    assert path.read_bytes() == (tmp_path / "tiny.pth").read_bytes() and len(web.requests) == 2
    (path.parent / "vocab.txt").write_text(vocabulary(SMALL.words))
    done = mplug("caption", photo, "--model", f"{web.url}/tiny.pth", "--max-tokens", "8")
    assert (done.code, len(done.lines)) == (0, 1), done.err
    assert len(web.requests) == 2


def test_eval_calls_the_model_by_its_name(mplug: Mplug, web: Loopback, native: dict[str, bytes], photo: Path) -> None:
    web.hugging_face("org/name", native)
    records = photo.parent / "captions.jsonl"
    records.write_text(json.dumps({"image": photo.name, "caption": "a red ball"}) + "\n")
    done = mplug("eval", "--task", "retrieval", "--data", records, "--model", "hf:org/name", "--json")
    assert done.code == 0, done.err
    assert done.objects[0]["model"] == "org/name"


def test_a_model_that_can_t_be_had_is_one_line(mplug: Mplug, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    for spec in ("hf:org/name", "ms:org/name", "http://127.0.0.1:9/x.pth"):
        done = mplug("caption", photo, "--model", spec)
        assert done.code == 5 and done.out == "" and "127.0.0.1:9" in done.error


def test_finetune_brings_its_start(mplug: Mplug, web: Loopback, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = mplug("finetune", "--recipe", "vqa_daquar", "--data", tmp_path, "--model", "hf:org/name", "--run", run)
    assert done.code == 5 and f"{web.url}/org/name" in done.error
    assert not run.exists()


@pytest.mark.slow
def test_a_process_of_its_own_and_its_variables(
    web: Loopback, native: dict[str, bytes], photo: Path, tmp_path: Path
) -> None:
    web.hugging_face("org/name", native)
    command = [sys.executable, "-m", "mplug_cli.app", "caption", str(photo), "--model", "hf:org/name"]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": web.url}
    first = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert (first.returncode, first.stderr) == (0, "") and first.stdout
    assert (tmp_path / "home/hub/models--org--name/refs/main").is_file()
    asked = len(web.requests)
    offline = {**environment, "HF_HUB_OFFLINE": "1"}
    second = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=offline)
    assert (second.returncode, second.stdout, second.stderr) == (0, first.stdout, "")
    assert len(web.requests) == asked
