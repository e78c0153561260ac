"""Pushing a model folder: over real HTTP to a hub on this machine, and to ModelScope's package by its interface."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mplug_core.api import Mplug
from mplug_core.data.text import Tokenizer, build_vocabulary
from mplug_core.errors import CheckpointError, MplugError, UsageError
from mplug_core.weights.card import Card
from mplug_core.weights.folder import load_model, save_model
from mplug_core.weights.publish import prepare, push
from mplug_core.weights.target import Target
from tests.small import small_model
from tests.weights.upload_hub import UploadHub, serving

TARGET = Target("hf", "org/name")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = Tokenizer(build_vocabulary(["a red ball on a green table"]))
    folder = tmp_path_factory.mktemp("models") / "m"
    save_model(folder, small_model(vocab_size=tokenizer.vocab_size), tokenizer)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "m"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[UploadHub]:
    with serving(monkeypatch, tmp_path) as served:
        yield served


def test_a_push_is_one_commit_of_the_model_and_a_card(folder: Path, hub: UploadHub, tmp_path: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    address = push(prepare(str(folder), TARGET, private=True, message="first", licence="mit"))
    assert address == f"{hub.address}/org/name/commit/{'0' * 40}"
    repository = hub.repositories["org/name"]
    assert repository.private and repository.messages == ["first"]
    files = repository.branches["main"]
    assert sorted(files) == ["README.md", "config.json", "model.safetensors", "vocab.txt"], "and nothing else"
    assert files["model.safetensors"] == before["model.safetensors"]
    card = Card.parse(files["README.md"].decode())
    assert card.fields["license"] == "mit" and "--model hf:org/name" in card.body
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before, "the folder is as it was"
    back = tmp_path / "back"
    back.mkdir()
    for name, content in files.items():
        (back / name).write_bytes(content)
    assert load_model(str(back)).config == load_model(str(folder)).config


def test_from_python(folder: Path, hub: UploadHub) -> None:
    address = Mplug.from_pretrained(str(folder)).push_to_hub("org/name", licence="mit")
    files = hub.repositories["org/name"].branches["main"]
    assert "org/name" in address and b"license: mit" in files["README.md"]
    assert len(files["model.safetensors"]) >= 4 * 1000  # as it computes, in float32


def test_a_further_push_keeps_what_is_there(folder: Path, hub: UploadHub) -> None:
    push(prepare(str(folder), TARGET))
    hub.repositories["org/name"].branches["main"]["theirs.txt"] = b"kept"
    notes: list[str] = []
    push(prepare(str(folder), TARGET, message="second"), notes.append)
    assert hub.repositories["org/name"].messages == ["Upload name", "second"]
    assert hub.repositories["org/name"].branches["main"]["theirs.txt"] == b"kept"
    assert len(notes) == 1 and "hf:org/name exists" in notes[0]


def test_a_revision_is_a_branch(folder: Path, hub: UploadHub) -> None:
    push(prepare(str(folder), TARGET, revision="v2"))
    branches = hub.repositories["org/name"].branches
    assert branches["main"] == {} and "model.safetensors" in branches["v2"]


def test_private_is_not_pushed_into_a_public_repository(folder: Path, hub: UploadHub) -> None:
    push(prepare(str(folder), TARGET))
    count = len(hub.requests)
    with pytest.raises(MplugError, match="exists and is public"):
        push(prepare(str(folder), TARGET, private=True))
    assert hub.requests[count:] == ["GET /api/models/org/name"]


def test_without_a_token_nothing_is_asked(folder: Path, hub: UploadHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    with pytest.raises(MplugError, match="no token to write to hf:org/name") as caught:
        push(prepare(str(folder), TARGET))
    assert "HF_TOKEN" in str(caught.value) and hub.requests == []


def test_a_token_that_is_not_accepted(folder: Path, hub: UploadHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(MplugError, match="Hugging Face does not accept the token"):
        push(prepare(str(folder), TARGET))


@pytest.mark.parametrize(
    ("where", "status", "words"),
    [
        ("/api/repos/create", 403, "may not write to hf:org/name"),
        ("/commit/", 403, "may not write to hf:org/name"),
        ("/api/repos/create", 409, "exists"),
        ("/preupload/", 404, "is not there"),
        ("/info/lfs", 403, "may not write"),
        ("/api/repos/create", 400, "answers 400"),
    ],
)
def test_what_a_hub_refuses_is_one_line(
    folder: Path,
    hub: UploadHub,
    where: str,
    status: int,
    words: str,
) -> None:
    hub.refuse = (where, status)
    with pytest.raises(MplugError, match=words) as caught:
        push(prepare(str(folder), TARGET))
    assert "\n" not in str(caught.value) and caught.value.hint
    assert not hub.repositories.get("org/name") or hub.repositories["org/name"].branches["main"] == {}


def test_no_network_is_one_line(folder: Path, hub: UploadHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.close()
    with pytest.raises(MplugError, match="can't be reached"):
        push(prepare(str(folder), TARGET))


def test_offline_is_one_line(folder: Path, hub: UploadHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(MplugError, match=r"HF_HUB_OFFLINE|can't be reached"):
        push(prepare(str(folder), TARGET))


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "vocab.txt"])
def test_half_a_model_is_not_pushed(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(CheckpointError, match="no model folder"):
        prepare(str(folder), TARGET)


def test_damaged_weights_are_not_pushed(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot read"):
        prepare(str(folder), TARGET)


def test_what_a_recipe_tells_of_this_machine_is_noted(folder: Path) -> None:
    (folder / "recipe.yaml").write_text("name: x\ndata:\n  root: /home/me/data\nmodel: {size: tiny}\n")
    plan = prepare(str(folder), TARGET, licence="mit")
    assert [note for note in plan.notes if "/home/me/data" in note] and "recipe.yaml" in [f.name for f in plan.files]


@pytest.mark.parametrize("recipe", [b"name: x\nnonsense: 1\n", b"\xff\xfe\xff", b"a: [\n"])
def test_a_recipe_that_is_not_understood_is_noted(folder: Path, recipe: bytes) -> None:
    (folder / "recipe.yaml").write_bytes(recipe)
    assert any("not understood" in note for note in prepare(str(folder), TARGET).notes)


@pytest.mark.parametrize(
    "text", ["org/name", "hf:name", "hf:", "hf:a/b/c", "gh:a/b", "hf:a b/c", "hf:../x", "hf:a/b@main", "ms:/x"]
)
def test_targets_that_are_none(text: str) -> None:
    with pytest.raises(UsageError):
        Target.parse(text)


def test_targets() -> None:
    assert Target.parse("hf:org/a-model.v2") == Target("hf", "org/a-model.v2")
    assert str(Target.parse("ms:damo/x_y")) == "ms:damo/x_y"


class TestModelScope:
    TARGET = Target("ms", "org/name")

    def test_needs_its_package(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "modelscope_hub" else find(n, *a))
        with pytest.raises(MplugError, match="needs modelscope-hub"):
            push(prepare(str(folder), self.TARGET))

    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
        """The package, with an interface that writes down what it is asked."""
        calls: list[tuple[str, Any]] = []

        class HubApi:
            known = False

            def repo_exists(self, repo_id: str, repo_type: str) -> bool:
                return HubApi.known

            def create_repo(self, repo_id: str, repo_type: str, *, visibility: str) -> None:
                calls.append(("create", (repo_id, repo_type, visibility)))
                if repo_id.startswith("denied/"):
                    error = RuntimeError("no")
                    error.status_code = 403
                    raise error

            def upload_folder(self, repo_id: str, repo_type: str, folder_path: Path, **options: Any) -> None:
                files = {file.name: file.read_bytes() for file in Path(folder_path).iterdir()}
                calls.append(("upload", (repo_id, options["commit_message"], options["revision"], files)))

        package, api = types.ModuleType("modelscope_hub"), types.ModuleType("modelscope_hub.api")
        package.__spec__ = importlib.machinery.ModuleSpec("modelscope_hub", None)
        api.HubApi = HubApi
        monkeypatch.setitem(sys.modules, "modelscope_hub", package)
        monkeypatch.setitem(sys.modules, "modelscope_hub.api", api)
        self.api = HubApi
        return calls

    def test_makes_a_repository_and_uploads(self, folder: Path, calls: list[tuple[str, Any]]) -> None:
        address = push(prepare(str(folder), self.TARGET, private=True, revision="dev", message="m"))
        assert address == "https://modelscope.cn/models/org/name"
        assert calls[0] == ("create", ("org/name", "model", "private"))
        kind, (repository, message, revision, files) = calls[1]
        assert (kind, repository, message, revision) == ("upload", "org/name", "m", "dev")
        assert sorted(files) == ["README.md", "config.json", "model.safetensors", "vocab.txt"]
        assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()

    def test_refusals_are_one_line(self, folder: Path, calls: list[tuple[str, Any]]) -> None:
        with pytest.raises(MplugError, match="may not write to ms:denied/name"):
            push(prepare(str(folder), Target("ms", "denied/name")))
        self.api.known = True
        with pytest.raises(MplugError, match="exists"):
            push(prepare(str(folder), self.TARGET, private=True))

    def test_interface_is_the_real_package_s(self) -> None:
        api = pytest.importorskip("modelscope_hub.api")
        import inspect

        upload = inspect.signature(api.HubApi.upload_folder).parameters
        assert {
            "repo_id",
            "repo_type",
            "folder_path",
            "commit_message",
            "revision",
            "disable_tqdm",
            "use_cache",
        } <= set(upload)
        assert "visibility" in inspect.signature(api.HubApi.create_repo).parameters
        assert {"repo_id", "repo_type"} <= set(inspect.signature(api.HubApi.repo_exists).parameters)
