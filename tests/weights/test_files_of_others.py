"""Checkpoints as people have them: wrapped, in several files, with numpy's numbers; and files that ask for too much."""

from __future__ import annotations

import argparse
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mplug_core.data.text import Tokenizer
from mplug_core.errors import LINE, CheckpointError
from mplug_core.model.config import MplugConfig
from mplug_core.weights.card import Card, read_card
from mplug_core.weights.folder import load_model, read_model, save_model
from mplug_core.weights.modelscope import read_settings
from mplug_core.weights.modelscope_hub import ModelScopeModel
from mplug_core.weights.official import unwrap
from mplug_core.weights.pickled import read_pickled
from mplug_core.weights.pretrained import read_tensors, weights_in
from mplug_core.weights.repository import model_in, wanted_files
from mplug_core.weights.summary import summarise
from mplug_core.weights.tensor_names import WRAPPED, plain_name
from tests.released import released, write_alicemind
from tests.small import small_model


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return dict(read_model(str(write_alicemind(tmp_path_factory.mktemp("plain") / "mplug.pth", released()))).state)


# -- wrappers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", sorted(WRAPPED))
@pytest.mark.parametrize("where", ["first", "twice", "inside", "every", "last"])
def test_wrapped_names(tmp_path: Path, plain: dict[str, torch.Tensor], wrapper: str, where: str) -> None:
    def wrapped(name: str) -> str:
        parts = name.split(".")
        if where == "every":
            return ".".join(f"{wrapper}.{part}" for part in parts)
        at = {"first": 0, "twice": 0, "inside": 1, "last": len(parts) - 1}[where]
        return ".".join([*parts[:at], *([wrapper] * (2 if where == "twice" else 1)), *parts[at:]])

    file = write_alicemind(tmp_path / "mplug.pth", {wrapped(name): value for name, value in released().items()})
    assert same(read_model(str(file)).state, plain)
    assert read_tensors(file).keys() == read_tensors(write_alicemind(tmp_path / "x" / "m.pth", released())).keys()


def test_plain_names() -> None:
    assert plain_name("module._orig_mod.visual.blocks.0._fsdp_wrapped_module.mlp.bias") == "visual.blocks.0.mlp.bias"
    assert plain_name("my_module.modules.x") == "my_module.modules.x"
    with pytest.raises(CheckpointError, match="too long"):
        plain_name("x" * 10_000)
    with pytest.raises(CheckpointError, match="two different"):
        unwrap({"module.a": torch.ones(1), "_orig_mod.a": torch.zeros(1)})


# -- numpy -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    "value", [np.float64(0.5), np.float32(2), np.int64(7), np.bool_(True), np.uint8(3), np.float16(1), np.arange(4.0)]
)
def test_numbers_of_numpy(tmp_path: Path, plain: dict[str, torch.Tensor], value: Any, old: bool) -> None:
    file = tmp_path / "mplug.pth"
    write_alicemind(file, released())
    content = torch.load(file, weights_only=True)
    torch.save({**content, "best": value, "log": [{"lr": value}]}, file, _use_new_zipfile_serialization=not old)
    assert same(read_model(str(file)).state, plain)
    assert np.array_equal(read_pickled(file)["best"], value)
    assert len(read_tensors(file)) == len(content["model"])


def test_what_a_program_allows_itself_stays_allowed(tmp_path: Path) -> None:
    file, own = tmp_path / "numbers.pth", [np.ndarray, type(np.dtype("float64"))]
    torch.save({"w": torch.ones(1), "best": np.float64(0.5)}, file)
    read_pickled(file)
    torch.serialization.add_safe_globals(own)
    try:
        read_pickled(file)
        assert set(own) <= set(torch.serialization.get_safe_globals())
    finally:
        torch.serialization.clear_safe_globals()


def repacked(file: Path, data: bytes, packed: int = zipfile.ZIP_STORED) -> Path:
    """A copy of an archive of torch.save with other pickled bytes."""
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(file.with_suffix(".new.pth"), "w", packed) as target:
        for name in source.namelist():
            target.writestr(name, data if name.endswith("data.pkl") else source.read(name))
    return file.with_suffix(".new.pth")


def test_numbers_as_numpy_1_pickled_them(tmp_path: Path) -> None:
    torch.save({"a": np.float64(0.5)}, tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth") as archive:
        data = archive.read("x/data.pkl")
    old = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    new = data.replace(b"numpy.core.multiarray", b"numpy._core.multiarray")
    assert old != new
    for one in (old, new):
        assert read_pickled(repacked(tmp_path / "x.pth", one)) == {"a": 0.5}


@pytest.mark.parametrize("old", [False, True])
def test_state_dicts_of_modules(tmp_path: Path, old: bool) -> None:
    """They are ordered, and have attributes."""
    state = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).state_dict()
    torch.save({"model": state, "plain": state}, tmp_path / "x.pth", _use_new_zipfile_serialization=not old)
    assert same(read_tensors(tmp_path / "x.pth"), state)
    torch.save(state, tmp_path / "y.pth", _use_new_zipfile_serialization=not old)
    assert same(read_tensors(tmp_path / "y.pth"), state)


@pytest.mark.parametrize("value", [np.array(["a"]), np.array([None]), np.str_("a"), argparse.Namespace(a=1)])
def test_what_else_is_pickled_is_refused(tmp_path: Path, value: Any) -> None:
    torch.save({"model": {"a": torch.ones(1)}, "args": value}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"numpy|Namespace"):
        read_pickled(tmp_path / "x.pth")


# -- several files ---------------------------------------------------------------------------------------------------


def shard(folder: Path, tensors: Mapping[str, torch.Tensor], kind: str, parts: int = 3) -> Path:
    """Tensors in several files with their index, as Hugging Face writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    stem, suffix = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    names = list(tensors)
    places = {}
    for number in range(parts):
        file = f"{stem}-{number + 1:05d}-of-{parts:05d}.{suffix}"
        part = {name: tensors[name].contiguous().clone() for name in names[number::parts]}
        save_file(part, folder / file) if kind == "safetensors" else torch.save(part, folder / file)
        places |= dict.fromkeys(part, file)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


@pytest.fixture
def sharded(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    write_alicemind(tmp_path / "mplug.pth", released())
    (tmp_path / "mplug.pth").unlink()
    return shard(tmp_path, released(), request.param)


@pytest.mark.parametrize("sharded", ["safetensors", "bin"], indirect=True)
def test_checkpoints_in_several_files(sharded: Path, plain: dict[str, torch.Tensor]) -> None:
    first = next(iter(sorted(sharded.parent.glob("*-00001-of-*"))))
    for place in (sharded.parent, sharded, first):
        assert same(read_model(str(place)).state, plain), place
    assert read_tensors(weights_in(sharded.parent, ("model.safetensors",))).keys() == released().keys()
    assert summarise(str(sharded.parent)).kind == "released checkpoint"
    first.unlink()
    with pytest.raises(CheckpointError, match="1 of 3 files are not there, first .*-00001-of-00003"):
        read_model(str(sharded.parent))


def test_a_native_folder_in_several_files(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = small_model(vocab_size=tokenizer.vocab_size)
    save_model(tmp_path / "one", model, tokenizer, dtype=None)
    state = read_model(str(tmp_path / "one")).state
    shard(tmp_path / "many", state, "safetensors")
    for name in ("config.json", "vocab.txt"):
        (tmp_path / "many" / name).write_bytes((tmp_path / "one" / name).read_bytes())
    one, many = (load_model(str(tmp_path / name)).model.state_dict() for name in ("one", "many"))
    assert same(many, one)
    assert summarise(str(tmp_path / "many")).kind == "model folder"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "nested"),
        ("{}", "no \"weight_map\""),
        ('{"weight_map": {"a": "../../x.bin"}}', "no file beside it"),
        ('{"weight_map": {"a": 3}}', "no file beside it"),
        ('{"weight_map": {"b": "model-00001-of-00003.safetensors"}}', "no tensor b"),
    ],
)
def test_an_index_that_makes_no_sense(tmp_path: Path, text: str, said: str) -> None:
    index = shard(tmp_path, {"a": torch.ones(1), "c": torch.ones(1), "d": torch.ones(1)}, "safetensors")
    index.write_text(text)
    with pytest.raises(CheckpointError, match=said):
        read_tensors(index)


def test_downloads_take_all_files(tmp_path: Path) -> None:
    parts = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    listed = ["config.json", "model.safetensors.index.json", *parts, "other-00001-of-00002.bin"]
    assert wanted_files(listed, "hf:a/b") == ["config.json", *parts, "model.safetensors.index.json"]
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert model_in(tmp_path) == tmp_path


# -- files that ask for too much -------------------------------------------------------------------------------------

MEMO = b"\x80\x02]r\xff\xff\xff\xff."
DEEP = b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."


def itself() -> dict[str, Any]:
    made: dict[str, Any] = {"a": torch.ones(1)}
    made["model"] = {"state_dict": made}
    return made


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (itself(), "holds itself"),
        ({"model": {"a": torch.ones(1).expand(10**10)}}, "larger than what the file holds"),
        ({"model": {"module": {"model": {"module": {"model": {"module": {"model": {"module": {"model": {}}}}}}}}}},
         "no tensors|8 mappings"),
    ],
)  # fmt: skip
def test_checkpoints_without_end(tmp_path: Path, content: Any, said: str, old: bool) -> None:
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=not old)
    for read in (read_tensors, lambda file: unwrap(read_pickled(file))):
        with pytest.raises(CheckpointError, match=said):
            read(tmp_path / "x.pth")


@pytest.mark.parametrize("data", [DEEP, b"", b"\x80\x02N.", b"\x80\x02}N" + b"2\x86" * 60 + b"Ns."])
def test_pickles_inside_archives(tmp_path: Path, data: bytes) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError):
        read_tensors(repacked(tmp_path / "x.pth", data))
    scripted(tmp_path / "s.pt")
    with pytest.raises(CheckpointError):
        read_tensors(repacked(tmp_path / "s.pt", data))


def scripted(file: Path) -> None:
    module = torch.nn.Linear(2, 2)
    with pytest.warns(match="."):
        torch.jit.trace(module, torch.ones(1, 2)).save(str(file))


def test_packed_archives(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1000)}, tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth") as archive:
        data = archive.read("x/data.pkl")
    with pytest.raises(CheckpointError, match="packed"):
        read_pickled(repacked(tmp_path / "x.pth", data, zipfile.ZIP_DEFLATED))
    scripted(tmp_path / "s.pt")
    with pytest.raises(CheckpointError, match="packed"):
        read_tensors(repacked(tmp_path / "s.pt", data, zipfile.ZIP_DEFLATED))


# -- settings --------------------------------------------------------------------------------------------------------

FINE = MplugConfig.named("tiny").model_dump(mode="json")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"text_layers": 10**9}, "text_layers"),
        ({"decoder_layers": 10**30}, "decoder_layers"),
        ({"width": 10**6, "heads": 1}, "width"),
        ({"width": 16384, "heads": 16, "text_layers": 200, "intermediate": 65536}, "billion parameters"),
        ({"vocab_size": 10**9}, "vocab_size"),
        ({"layer_norm_eps": -1}, "layer_norm_eps"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps"),
        ({"temperature": float("inf")}, "temperature"),
        ({"vision": {"image_size": 100_000}}, "image_size"),
        ({"vision": {"mean": [float("nan"), 0, 0]}}, "mean"),
        ({"vision": {"std": [0, 1, 1]}}, "std"),
        ({"vision": {"std": [1, -1, 1]}}, "std"),
        ({"vision": {"levels": list(range(17))}}, "levels"),
        ({"vision": {"options": {"checkpoint_path": "/etc/passwd"}}}, "checkpoint_path: not allowed"),
        ({"vision": {"options": {"features_only": True}}}, "features_only: not allowed"),
        ({"vision": {"options": {"pretrained": True}}}, "pretrained: not allowed"),
        ({"vision": {"options": {"act_layer": "nonsense"}}}, "act_layer"),
        ({"vision": {"options": {"depth": 10**9}}}, "depth"),
        ({"vision": {"options": {"embed_dim": [1] * 99}}}, "embed_dim"),
        ({"vision": {"options": {"mlp_ratio": float("nan")}}}, "mlp_ratio"),
        ({"vision": {"image_size": 2048, "options": {"patch_size": 1}}}, "patches"),
        ({"classifiers": {"x": {"labels": ["y"] * 200_000}}}, "labels"),
    ],
)
def test_configurations_that_make_no_model(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    values = {**FINE, **change, "vision": {**FINE["vision"], **change.get("vision", {})}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError) as caught:
        MplugConfig.load(tmp_path / "config.json")
    assert named in str(caught.value) and len(str(caught.value)) <= LINE


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"width": ' + "9" * 5000 + "}", "\xff", '{"a":' * 70 + "1" + "}" * 70, "3", "[]"]
)
def test_configurations_that_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin1")
    with pytest.raises(CheckpointError):
        MplugConfig.load(tmp_path / "config.json")
    (tmp_path / "configuration.json").write_text(text, encoding="latin1")
    with pytest.raises(CheckpointError):
        read_settings(tmp_path)


@pytest.mark.parametrize(
    "text", ["a: 2024-13-45\n- b", "[" * 5000, "image_res: 2024-01-01", "beam_size: !!int x", "x: &a [*a]"]
)
def test_settings_that_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "configuration.json").write_text('{"task": "image-captioning"}')
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(CheckpointError):
        read_settings(tmp_path)


def test_cards_take_no_time(tmp_path: Path) -> None:
    worst = [
        "| a/a/" + "x" * 100_000, "|" + " " * 100_000, "`x`: " + ", split " * 20_000, "---\n" + "a\n" * 50_000,
        "-" * 100_000,
    ]  # fmt: skip
    for text in worst:
        (tmp_path / "README.md").write_text(text)
        card = read_card(tmp_path)
        assert card is not None and card.scores() == [] and card.tables() is not None
    fine = "---\nlicense: mit\ndate: 2024-13-45\n---\n| a/b/c | 0.5 |\n\n`a`: D, split s, the first 9.\n"
    (score,) = Card.parse(fine).scores()
    assert (score.task, score.data, score.split, score.limit, score.value) == ("b", "D", "s", 9, 0.5)
    with pytest.raises(CheckpointError, match="front matter"):
        Card.parse("---\na: " + "[" * 5000 + "\n---\n")


@pytest.mark.parametrize(
    "entry",
    [
        {"Path": 3}, {"Path": ""}, {"Path": "a\nb.bin"}, {"Path": "x.bin", "Size": "many"},
        {"Path": "x.bin", "Size": -1},
        {"Path": "x.bin", "Size": 10**40}, {"Path": "x.bin", "Size": 1.5}, {"Path": "x.bin", "Sha256": 7},
        {"Path": "x.bin", "Sha256": "zz"}, {}, {"Path": ["x"]}, {"Path": "x.bin", "Size": True}, 3, None,
    ],
)  # fmt: skip
def test_listings_with_odd_values(entry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = {"Success": True, "Data": {"Files": [entry]}}
    monkeypatch.setattr("mplug_core.weights.modelscope_hub.read_listing", lambda *_: answer)
    with pytest.raises(CheckpointError):
        ModelScopeModel("ms:a/b").pull(lambda *_: None)
