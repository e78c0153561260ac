"""Released checkpoints as they lie on the disk: every layout gives the same model, every damage is named."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mplug_core.errors import CheckpointError
from mplug_core.model.vision import resize_positions
from mplug_core.weights.conversion import convert_model
from mplug_core.weights.folder import find_model, load_model, read_model, save_model
from mplug_core.weights.mapped import MappedPages
from mplug_core.weights.pickled import read_pickled
from tests.released import BASE, SMALL, released, vocabulary, with_twins, write_alicemind, write_modelscope
from tests.small import CNN, small_model

ROOT = Path(__file__).parent.parent.parent
Change = Callable[[dict[str, Tensor]], dict[str, Any]]
HEADS = ("vision_proj", "text_proj", "itm_head", "temp", "fusion_encoder.cls", "image_queue", "text_queue")


def without(*prefixes: str) -> dict[str, Tensor]:
    return {name: value for name, value in released().items() if not name.startswith(prefixes)}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture(scope="module")
def want(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The state of the model, loaded from AliceMind's file."""
    return load_model(str(write_alicemind(tmp_path_factory.mktemp("w") / "mplug.pth", released()))).model.state_dict()


class TestLayouts:
    @pytest.mark.parametrize("wrapper", ["model", "module"])
    def test_file_and_folder_with_one(self, tmp_path: Path, want: dict[str, Tensor], wrapper: str) -> None:
        file = write_alicemind(tmp_path / "a" / "mplug.pth", with_twins(released()), wrapper)
        for place in (file, file.parent):
            loaded = load_model(str(place))
            assert equal(loaded.model.state_dict(), want)
            assert (loaded.config.stride, loaded.config.rule, loaded.config.heads) == (2, "released", 2)
            # texts are read without [SEP], and written with it
            assert loaded.tokenizer.sep_id not in loaded.texts.read(["a"])[0]
            assert loaded.texts.encode(["a"])[0][0, -1] == loaded.tokenizer.sep_id

    def test_old_format_and_safetensors(self, tmp_path: Path, want: dict[str, Tensor]) -> None:
        file = write_alicemind(tmp_path / "a" / "mplug.pth", {})
        torch.save({"model": released()}, file, _use_new_zipfile_serialization=False)
        assert equal(load_model(str(file)).model.state_dict(), want)
        file.unlink()
        save_file({name: value.clone() for name, value in released().items()}, file.with_suffix(".safetensors"))
        assert equal(load_model(str(file.parent)).model.state_dict(), want)

    @pytest.mark.parametrize("task", ["image-captioning", "visual-question-answering", "image-text-retrieval", "new"])
    def test_modelscope(self, tmp_path: Path, want: dict[str, Tensor], task: str) -> None:
        folder = write_modelscope(tmp_path / "m", released(), task, image_res=16, beam_size=3, max_length=6)
        loaded = load_model(str(folder))
        assert equal(loaded.model.state_dict(), want) and loaded.config.stride == 2
        stored = read_model(str(folder))
        assert (stored.layout, stored.task, stored.name) == ("modelscope", task, "m")
        assert loaded.texts.read(["a"])[0][0, -1] == loaded.tokenizer.sep_id  # BERT's own tokenizer
        written = {"image-captioning": "caption", "visual-question-answering": "vqa"}.get(task)
        assert set(loaded.config.decoding) == ({written} if written else set())

    def test_another_programs_config_json(self, tmp_path: Path, want: dict[str, Tensor]) -> None:
        folder = write_modelscope(tmp_path / "m", released(), "image-captioning")
        file = write_alicemind(tmp_path / "a" / "mplug.pth", released())
        for place in (folder, file.parent):
            (place / "config.json").write_text("{}")
            assert equal(load_model(str(place)).model.state_dict(), want)
        file.unlink()
        with pytest.raises(CheckpointError, match="pieces in vocab.txt"):
            load_model(str(file.parent))  # one of ours without its weights

    def test_modelscopes_image_size_and_beams(self, tmp_path: Path) -> None:
        from mplug_core.tasks.vqa import VqaTask

        folder = write_modelscope(
            tmp_path / "m", released(), "visual-question-answering", image_res=32, beam_size=3, min_length=2
        )
        loaded = load_model(str(folder))
        assert loaded.config.vision.image_size == 32 and loaded.model.visual.grid == (4, 4)
        decoding = loaded.decoding("vqa", VqaTask.decoding)
        assert (decoding.strategy, decoding.beams, decoding.min_tokens) == ("released", 3, 2)
        assert decoding.max_tokens == VqaTask.decoding.max_tokens
        assert load_model(str(folder), image_size=24).config.vision.image_size == 24

    @pytest.mark.parametrize(
        ("file", "text", "words"),
        [
            ("config.yaml", "image_res: [", "config.yaml: it is not YAML"),
            ("config.yaml", "image_res: many", "image_res is 'many'"),
            ("config.yaml", "image_res: 0", "image_res is 0, and must be 1 or more"),
            ("config.yaml", "beam_size: 0", "beam_size is 0, and must be 1 or more"),
            ("config.yaml", "max_length: 0", "max_length is 0, and must be 1 or more"),
            ("config.yaml", "{min_length: 9, max_length: 4}", "min_length 9 is above max_length 4"),
            ("config.yaml", "- 1", "it is no mapping"),
            ("config_bert.json", '{"layer_norm_eps": "nan"}', "layer_norm_eps is 'nan'"),
            ("config_bert.json", '{"layer_norm_eps": Infinity}', "layer_norm_eps is inf"),
            ("config_bert.json", "{", "config_bert.json: it is not JSON"),
            ("config_bert.json", '{"hidden_size": 32}', "hidden_size 32, and text_encoder"),
            ("config_bert.json", '{"num_attention_heads": 3}', "width 16 is not a multiple of heads 3"),
            ("config_bert.json", '{"stride_layer": "x"}', "stride_layer is 'x'"),
            ("config.yaml", "image_res: 20", "image size 20 is not a multiple of the patches' 8"),
        ],
    )
    def test_settings_with_faults(self, tmp_path: Path, file: str, text: str, words: str) -> None:
        folder = write_modelscope(tmp_path / "m", released(), "image-captioning")
        (folder / file).write_text(text)
        with pytest.raises(CheckpointError, match=re.escape(words)):
            load_model(str(folder))

    @pytest.mark.parametrize("text", [b"- a\n- b\n", b"image_res: big", b"image_res: 0", b"a: [", b"\xff\xfe", b"x: 1"])
    def test_config_that_is_anybodys(self, tmp_path: Path, text: bytes) -> None:
        """Beside a file of AliceMind's config.yaml may be of another program; config_bert.json is the model's."""
        file = write_alicemind(tmp_path / "mplug.pth", released())
        (tmp_path / "config.yaml").write_bytes(text)
        assert read_model(str(file)).config.vision.image_size == 16
        (tmp_path / "config.yaml").write_bytes(b"image_res: 32")
        assert read_model(str(file)).config.vision.image_size == 32
        (tmp_path / "config_bert.json").write_text("{")
        with pytest.raises(CheckpointError, match="config_bert.json: it is not JSON"):
            read_model(str(file))

    def test_run_whose_model_is_in_a_checkpoint(self, tmp_path: Path) -> None:
        run = tmp_path / "run"
        folder = run / "checkpoints" / "step-00000002"
        convert_model(str(write_alicemind(tmp_path / "a.pth", released())), folder / "model")
        assert find_model(str(folder)) == folder / "model"
        (run / "checkpoints" / "latest").write_text("step-00000002\n")
        assert find_model(str(run)) == folder / "model"

    def test_task_models_lack_the_heads_of_others(self, tmp_path: Path) -> None:
        file = write_alicemind(tmp_path / "vqa.pth", without(*HEADS))
        loaded = load_model(str(file))
        assert set(loaded.config.absent) == {"contrastive", "matching", "masked"}
        images = loaded.model.encode_image(torch.randn(2, 3, 16, 16))
        assert images.feature.shape == (2, 0) and len(images[torch.tensor([0, 0])]) == 2
        ids = torch.tensor([[2, 5]])
        text = loaded.model.encode_text(ids, torch.ones_like(ids))
        with pytest.raises(CheckpointError, match="no contrastive head"):
            loaded.model.text_feature(text, torch.ones_like(ids))
        captioner = write_alicemind(tmp_path / "caption.pth", without(*HEADS, "text_encoder", "fusion_encoder"))
        loaded = load_model(str(captioner))
        assert loaded.model.text is None and loaded.config.fusion == "none"
        memory, mask = loaded.model.memory(loaded.model.encode_image(torch.randn(1, 3, 16, 16)))
        assert loaded.model.decode(ids, memory, mask).isfinite().all()
        with pytest.raises(CheckpointError, match="no text encoder"):
            loaded.model.encode_text(ids, torch.ones_like(ids))

    def test_groundings_cut_text_encoder_and_untrained_projections(self, tmp_path: Path) -> None:
        tensors = without("itm_head", "temp", "fusion_encoder.cls", "image_queue", "text_queue", "idx", "queue_ptr")
        tensors = {n: v for n, v in tensors.items() if not n.startswith("text_encoder.encoder.layer.1.")}
        tensors |= {"prefix_ids": torch.zeros(1), "target_ids": torch.zeros(3), "bbox_prob_mask": torch.zeros(30)}
        stored = read_model(str(write_alicemind(tmp_path / "g.pth", tensors)))
        assert stored.config.text_layers == 1 and len(stored.missing["contrastive"]) == 5
        reasons = set(stored.account.dropped.values())
        assert "projection that was never trained" in reasons and "unknown" not in reasons


class TestImageSize:
    def test_of_a_released_file(self, tmp_path: Path) -> None:
        file = write_alicemind(tmp_path / "a.pth", released())
        loaded = load_model(str(file), image_size=32)
        positions = resize_positions(released()["visual_encoder.visual.positional_embedding"], (4, 4))
        assert torch.equal(loaded.model.visual.backbone.pos_embed[0], positions)
        assert loaded.model.encode_image(torch.randn(1, 3, 32, 32)).tokens.shape[1] == 17
        with pytest.raises(CheckpointError, match="30 is not a multiple of the patches' 8 \\(32 is\\)"):
            load_model(str(file), image_size=30)

    @pytest.mark.parametrize("vision", [None, CNN])
    def test_of_a_native_folder(self, tmp_path: Path, vision: dict[str, Any] | None) -> None:
        from mplug_core.data.text import Tokenizer

        (tmp_path / "vocab.txt").write_text(vocabulary(64))
        model = small_model(**({"vision": vision} if vision else {}))
        save_model(tmp_path / "m", model, Tokenizer.load(tmp_path / "vocab.txt"), dtype=torch.float32)
        loaded = load_model(str(tmp_path / "m"), image_size=64)
        assert loaded.config.vision.image_size == 64
        assert loaded.model.encode_image(torch.randn(1, 3, 64, 64)).tokens.isfinite().all()
        before = model.visual.backbone.pos_embed[0] if vision is None else model.grid_positions
        after = loaded.model.visual.backbone.pos_embed[0] if vision is None else loaded.model.grid_positions
        assert torch.equal(after, resize_positions(before, loaded.model.visual.grid, int(vision is None)))
        assert equal(load_model(str(tmp_path / "m"), image_size=32).model.state_dict(), model.state_dict())


def text_as_checkpoint(file: Path) -> None:
    file.write_text("this is no checkpoint\n")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5000])


def scribbled(file: Path) -> None:
    """The archive's table of contents is whole, its pickle isn't."""
    data = file.read_bytes()
    begin = data.index(b"data.pkl") + 100
    file.write_bytes(data[:begin] + b"\xff" * 200 + data[begin + 200 :])


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda file: file.write_bytes(b""), "it is empty"),
    "text": (text_as_checkpoint, "it is no file of torch.save"),
    "cut off": (cut, "it is cut off or damaged"),
    "scribbled": (scribbled, "cannot read"),
    "a list": (lambda file: torch.save([1, 2], file), "holds no tensors by name"),
    "another model": (lambda file: torch.save({"model": {"a.weight": torch.ones(2, 2)}}, file), "is it a released"),
    "sparse": (
        lambda file: torch.save({"model": {**released(), "temp": torch.eye(3).to_sparse()}}, file), "no plain tensor"
    ),
    "meta": (
        lambda file: torch.save({"model": {**released(), "vision_proj.bias": torch.ones(8, device="meta")}}, file),
        "vision_proj.bias has a shape and no values",
    ),
    "whole numbers": (
        lambda file: torch.save({"model": {**released(), "itm_head.bias": torch.zeros(2, dtype=torch.int64)}}, file),
        "holds torch.int64",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    file = write_alicemind(tmp_path / "a" / "mplug.pth", released())
    spoil, words = DAMAGES[damage]
    spoil(file)
    with pytest.raises(CheckpointError, match=words) as caught:
        convert_model(str(file), tmp_path / "native")
    assert caught.value.exit_code == 5 and str(file) in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def changed(pattern: str, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    found = {n: change(v) if re.search(pattern, n) else v for n, v in released().items()}
    assert any(re.search(pattern, name) for name in found)
    return found


FAULTS: dict[str, tuple[dict[str, Tensor] | Callable[[], dict[str, Tensor]], str]] = {
    "no fusion": (
        lambda: without("fusion_encoder"),
        "the fusion encoder is not there, and what it makes of the text is for the decoder and the matching head",
    ),
    "no text": (lambda: without("text_encoder"), "the text encoder is not there, and contrastive and fusion"),
    "nothing that answers": (lambda: without(*HEADS, "text_decoder"), "the decoder is not there, nor is a head"),
    "half a decoder": (
        lambda: without("text_decoder.bert.encoder.layer.1.intermediate"),
        r"the decoder lacks decoder\.layers\.1\.feed_forward\.up\.weight and 1 more",
    ),
    "half a text encoder": (lambda: without("text_encoder.encoder.layer.1"), r"the text encoder lacks text\.layers\.1"),
    "zero positions": (
        lambda: changed("visual.positional_embedding", torch.zeros_like), "position embeddings of zeros"
    ),
    "norms as at first": (
        lambda: {
            **released(),
            **{n: torch.ones_like(v) for n, v in released().items() if re.search(r"text_decoder.*LayerNorm.weight", n)},
            **{n: torch.zeros_like(v) for n, v in released().items() if re.search(r"text_decoder.*LayerNorm.bias", n)},
        },
        "the decoder has layer norms of ones and zeros only",
    ),
    "not a number": (
        lambda: changed(r"itm_head.weight", lambda v: torch.full_like(v, torch.nan)), "numbers that are not finite"
    ),
    "constant": (lambda: changed(r"vision_proj.weight", torch.zeros_like), "is 0 everywhere: it was never trained"),
    "another architecture": (
        lambda: {**released(), **{f"text_encoder.extra.{k}.weight": torch.ones(2) for k in range(4)}},
        "4 tensors of parts in use have unknown names",
    ),
    "no matching": (lambda: without("itm_head"), "the matching head is not there, and contrastive is"),
    "no contrast": (lambda: without("text_proj", "vision_proj"), "the contrastive head is not there, and matching is"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_named_and_nothing_is_written(tmp_path: Path, fault: str) -> None:
    make, words = FAULTS[fault]
    file = write_alicemind(tmp_path / "a" / "mplug.pth", make())
    with pytest.raises(CheckpointError, match=words) as caught:
        convert_model(str(file), tmp_path / "native")
    assert caught.value.exit_code == 5
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    if fault not in ("not a number", "constant"):  # numbers are looked at when they are stored
        with pytest.raises(CheckpointError):
            load_model(str(file))


@pytest.mark.parametrize(
    ("task", "gone", "part"),
    [
        ("image-captioning", "text_decoder", "the decoder"),
        ("image-text-retrieval", "itm_head", "the matching head"),
        ("visual-question-answering", "fusion_encoder", "the fusion encoder"),
    ],
)
def test_task_of_a_folder_needs_its_parts(tmp_path: Path, task: str, gone: str, part: str) -> None:
    folder = write_modelscope(tmp_path / "m", without(gone), task)
    with pytest.raises(CheckpointError, match=f"{part} is not there"):
        load_model(str(folder))


def test_every_wrong_shape_is_an_error(tmp_path: Path) -> None:
    """Or is of a tensor that is dropped: never a traceback, never a model."""
    from mplug_core.weights.official import convert

    tensors = released()
    used = convert(tensors, SMALL.bert).used
    seen: set[str] = set()
    for name, value in tensors.items():
        kind = re.sub(r"\.\d+\.", ".N.", name)
        if kind in seen or name not in used:
            continue
        seen.add(kind)
        other = torch.ones(3, 5) if len(seen) % 2 else torch.ones(*value.shape, 2)
        try:
            convert({**tensors, name: other}, SMALL.bert)
        except CheckpointError:
            continue
        pytest.fail(f"{name} of shape {tuple(other.shape)} is taken")
    assert len(seen) > 80


def test_few_strangers_are_reported(tmp_path: Path) -> None:
    tensors = {**released(), "text_encoder.extra.weight": torch.ones(2), "mine": torch.ones(1)}
    account = convert_model(str(write_alicemind(tmp_path / "a.pth", tensors)), tmp_path / "native")
    assert list(account.dropped["unknown"].names) == ["text_encoder.extra.weight", "mine"]


def test_account_is_of_every_tensor(tmp_path: Path) -> None:
    tensors = with_twins(released())
    account = convert_model(str(write_alicemind(tmp_path / "a.pth", tensors)), tmp_path / "native").as_dict()
    named = [name for section in ("used", "dropped") for group in account[section].values() for name in group["names"]]
    assert sorted(named) == sorted(tensors) and not account["missing"]
    total = sum(group["bytes"] for section in ("used", "dropped") for group in account[section].values())
    assert total == sum(value.numel() * value.element_size() for value in tensors.values())
    assert account["dropped"]["momentum teacher"]["tensors"] == len(tensors) - len(released())


class TestAllowedToBeMissing:
    @pytest.mark.parametrize(
        ("gone", "allowed", "absent"),
        [
            ("itm_head", {"matching"}, {"matching"}),
            ("fusion_encoder", {"fusion"}, {"matching", "masked"}),
            ("text_encoder", {"text"}, {"text", "contrastive", "matching", "masked"}),
            ("text_decoder.bert.encoder.layer.1", {"decoder"}, set()),
            ("text_proj.bias", {"contrastive"}, {"contrastive"}),
        ],
    )
    def test_goes_with_what_rests_on_it(self, tmp_path: Path, gone: str, allowed: set[str], absent: set[str]) -> None:
        file = write_alicemind(tmp_path / "a.pth", without(gone))
        with pytest.raises(CheckpointError, match="--allow-missing"):
            convert_model(str(file), tmp_path / "native")
        account = convert_model(str(file), tmp_path / "native", allow_missing=allowed)
        assert account.allowed == sorted(allowed) and allowed <= set(account.missing)
        loaded = load_model(str(tmp_path / "native"))
        assert set(loaded.config.absent) == absent
        assert (loaded.model.decoder is None) == (allowed == {"decoder"})
        assert (loaded.config.fusion == "none") == (allowed in ({"fusion"}, {"text"}))


class TestConverted:
    def test_is_the_same_model(self, tmp_path: Path, want: dict[str, Tensor]) -> None:
        convert_model(str(write_alicemind(tmp_path / "a.pth", released())), tmp_path / "native")
        assert equal(load_model(str(tmp_path / "native")).model.state_dict(), want)
        files = sorted(file.name for file in (tmp_path / "native").iterdir())
        assert files == ["config.json", "model.safetensors", "vocab.txt"]

    def test_types(self, tmp_path: Path) -> None:
        half = {name: value.half() if value.dim() > 1 else value for name, value in released().items()}
        file = str(write_alicemind(tmp_path / "a.pth", half))
        convert_model(file, tmp_path / "native")
        stored = load_file(tmp_path / "native" / "model.safetensors")
        assert {value.dtype for value in stored.values()} == {torch.float16, torch.float32}
        convert_model(file, tmp_path / "native", dtype=torch.bfloat16, force=True)
        stored = load_file(tmp_path / "native" / "model.safetensors")
        assert {value.dtype for value in stored.values()} == {torch.bfloat16}

    def test_weights_stand_for_their_folder(self, tmp_path: Path) -> None:
        convert_model(str(write_alicemind(tmp_path / "a.pth", released())), tmp_path / "native")
        file = tmp_path / "native" / "model.safetensors"
        assert read_model(str(file)).path == tmp_path / "native"
        (tmp_path / "native" / "config.json").unlink()
        assert find_model(str(file)) == file

    def test_native_to_native(self, tmp_path: Path) -> None:
        convert_model(str(write_alicemind(tmp_path / "a.pth", released())), tmp_path / "one")
        account = convert_model(str(tmp_path / "one"), tmp_path / "two", image_size=32)
        assert account.layout == "native" and not account.dropped and not account.missing
        assert load_model(str(tmp_path / "two")).config.vision.image_size == 32

    def test_full_disk_leaves_nothing(self, tmp_path: Path) -> None:
        """Files are cut at a size, as on a disk with so much space."""
        resource = pytest.importorskip("resource")
        file = str(write_alicemind(tmp_path / "a" / "a.pth", released()))
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        try:
            with pytest.raises(CheckpointError, match="cannot write .*native: File too large"):
                convert_model(file, tmp_path / "native")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert [p.name for p in tmp_path.iterdir()] == ["a"]

    def test_full_file_system(self, tmp_path: Path) -> None:
        disk = tmp_path / "disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
        if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("file systems can't be mounted here")
        try:
            file = str(write_alicemind(tmp_path / "a" / "a.pth", released()))
            with pytest.raises(CheckpointError, match="cannot write .*native: No space left on device"):
                convert_model(file, disk / "native")
            assert not list(disk.iterdir())
        finally:
            subprocess.run(["umount", str(disk)], check=True)


class Bomb:
    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("layout", ["zip", "old", "modelscope"])
def test_pickled_code_is_named_and_not_run(tmp_path: Path, layout: str) -> None:
    tensors = {**released(), "config": Bomb(tmp_path / "executed")}
    if layout == "modelscope":
        place = write_modelscope(tmp_path / "m", tensors, "image-captioning")
    else:
        place = write_alicemind(tmp_path / "m" / "mplug.pth", {})
        torch.save({"model": tensors}, place, _use_new_zipfile_serialization=layout == "zip")
    with pytest.raises(CheckpointError, match=r"holds posix\.mkdir, which is no tensor; nothing of it was run"):
        convert_model(str(place), tmp_path / "native")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    # the bomb is real
    torch.load(place / "pytorch_model.bin" if place.is_dir() else place, weights_only=False)
    assert (tmp_path / "executed").exists()


def test_folders_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no model"):
        load_model(str(tmp_path))
    write_alicemind(tmp_path / "a.pth", released())
    write_alicemind(tmp_path / "b.pth", released())
    with pytest.raises(CheckpointError, match=r"holds 2 checkpoints: a\.pth, b\.pth \(give one of them\)"):
        load_model(str(tmp_path))
    (write_modelscope(tmp_path / "m", released(), "image-captioning") / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"holds no pytorch_model\.bin"):
        load_model(str(tmp_path / "m"))


def test_pages_are_given_back_and_come_again(tmp_path: Path) -> None:
    if not Path("/proc/self/maps").exists():
        pytest.skip("no /proc")

    def resident(file: Path) -> int:
        """Kilobytes of a file that this process holds."""
        text = Path("/proc/self/smaps").read_text(errors="surrogateescape")
        parts = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", text)
        mine = [part for part in parts if part.split("\n")[0].endswith(str(file))]
        assert mine
        return sum(int(re.search(r"Rss:\s+(\d+)", part)[1]) for part in mine)

    value = torch.arange(1 << 20, dtype=torch.float32)
    torch.save({"a": value, "b": torch.ones(1 << 18)}, tmp_path / "t.pth")
    loaded = read_pickled(tmp_path / "t.pth")
    pages = MappedPages(tmp_path / "t.pth")
    assert torch.equal(loaded["a"], value) and resident(tmp_path / "t.pth") > 4000
    pages.release(loaded["a"])
    assert resident(tmp_path / "t.pth") < 300 and torch.equal(loaded["a"], value)
    # what is no file's is never touched
    copy = loaded["a"].clone()
    pages.release(copy)
    assert torch.equal(copy, value)


def test_loading_takes_the_weights_and_little_more(tmp_path: Path) -> None:
    """Half precision on the disk, twins and CLIP's text side in the file; memory of a process of its own."""
    from dataclasses import replace

    sizes = replace(SMALL, width=384, heads=6, feed=1536, visual=384, words=4000, positions=64, depth=4, queue=4096)
    sizes = replace(sizes, clip_words=20000, clip_width=256, patch=8, grid=4)
    file = write_alicemind(tmp_path / "a.pth", with_twins(released(sizes, torch.float16, 0.02)), sizes=sizes)
    found = peak_of_loading(file)
    assert found["weights"] > 90e6
    assert found["peak"] < 1.3 * found["weights"], found


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["alicemind", "modelscope", "native"])
def test_full_size_base(tmp_path: Path, layout: str) -> None:
    """A base model of 1 GB in half precision: what it takes to load, and that it is base."""
    task, tensors = "visual-question-answering", released(BASE, torch.float16, 0.02)
    place = write_modelscope(tmp_path / "m", tensors, task, BASE, image_res=384)
    if layout == "alicemind":
        place = write_alicemind(tmp_path / "a" / "mplug.pth", tensors, sizes=BASE)
    if layout == "native":
        convert_model(str(place), tmp_path / "native")
        place = tmp_path / "native"
    config = read_model(str(place)).config
    assert (config.vision.backbone, config.vision.options) == ("vit_base_patch16_clip_quickgelu_224", {})
    assert (config.vision.image_size, config.stride, config.connected_layers) == (384, 3, [3])
    found = peak_of_loading(place)
    assert found["weights"] > 1.38e9
    assert found["peak"] < 1.3 * found["weights"], found


def peak_of_loading(place: Path) -> dict[str, int]:
    """Bytes of the weights, and by how much the resident set grew at most, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(place)], capture_output=True, text=True, cwd=ROOT, check=True
    )  # fmt: skip
    return json.loads(done.stdout)


PEAK = """
import json, sys
from pathlib import Path
import torch
from mplug_core.weights.folder import load_model
def status(name):
    return next(int(l.split()[1]) * 1024 for l in open('/proc/self/status') if l.startswith(name))
before = status('VmRSS')
Path('/proc/self/clear_refs').write_text('5')
loaded = load_model(sys.argv[1])
peak = status('VmHWM') - before
print(json.dumps({'peak': peak, 'weights': sum(p.numel() * p.element_size() for p in loaded.model.parameters())}))
"""
