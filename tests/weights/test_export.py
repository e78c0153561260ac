"""Exports that are models again: number types, int8 weights, other image sizes; and what may be replaced by one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mplug_core.data.text import Tokenizer, build_vocabulary
from mplug_core.errors import CheckpointError, MplugError
from mplug_core.model.mplug import MplugModel
from mplug_core.training.start import fill_from
from mplug_core.weights import quantised
from mplug_core.weights.conversion import convert_model
from mplug_core.weights.export import DTYPES, build, export_int8, export_safetensors, read_source
from mplug_core.weights.faults import without_parts
from mplug_core.weights.folder import CARD, EMBEDDED, RECIPE, load_model, read_model, save_model, write_folder
from mplug_core.weights.quantised import Int8Linear, computes_int8, dequantise, quantise, quantise_rows
from tests.released import released, write_alicemind
from tests.small import CLASSIFIERS, CNN, small_model

CPU = torch.device("cpu")
needs_int8 = pytest.mark.skipif(not computes_int8(CPU, torch.float32), reason="no int8 kernels on this CPU")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(build_vocabulary(["a red ball on a green table"], box_bins=4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A model with every kind of part, its texts beside it."""
    model = small_model(
        vocab_size=tokenizer.vocab_size, box_bins=4, classifiers=CLASSIFIERS, vision=CNN, summary_tokens=2,
        text_layers=1, fusion_layers=2, decoder_layers=1,
    )  # fmt: skip
    place = tmp_path_factory.mktemp("models") / "m"
    save_model(place, model, tokenizer, card="# mine\n", dtype=torch.float32)
    (place / "recipe.yaml").write_text("name: as it was # kept\n", encoding="utf-8")
    return place


@pytest.fixture(scope="module")
def int8(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("exports") / "int8"
    export_int8(read_source(str(folder)), place, "fp32", "# card\n")
    return place


def outputs(model: MplugModel) -> dict[str, torch.Tensor]:
    """What every part says of one image and one text."""
    generator = torch.Generator().manual_seed(3)
    size = model.config.vision.image_size
    with torch.no_grad():
        images = model.encode_image(torch.randn(2, 3, size, size, generator=generator))
        ids = torch.randint(5, model.config.vocab_size, (2, 6), generator=generator)
        mask = torch.ones_like(ids)
        text = model.encode_text(ids, mask)
        memory, memory_mask = model.memory(images, text, mask)
        fused = memory[:, -6:]
        return {
            "tokens": images.tokens, "image": images.feature, "text": model.text_feature(text, mask), "fused": fused,
            "matching": model.matching_logits(fused), "logits": model.decode(ids, memory, memory_mask),
            "label": model.classify("entailment", [fused]),
        }  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_number_types(folder: Path, tmp_path: Path, dtype: str) -> None:
    target = tmp_path / "deep" / "out"
    export_safetensors(read_source(str(folder)), target, dtype, "# card\n")
    stored, original = load_file(target / "model.safetensors"), load_file(folder / "model.safetensors")
    assert stored.keys() == original.keys()
    for name, value in stored.items():
        expected = original[name].to(DTYPES[dtype]) if original[name].is_floating_point() else original[name]
        assert value.dtype == expected.dtype and torch.equal(value, expected), name
    assert (target / "README.md").read_text() == "# card\n"
    assert (target / "recipe.yaml").read_text() == "name: as it was # kept\n"
    loaded = load_model(str(target))
    assert loaded.dtype == torch.float32 and loaded.config == load_model(str(folder)).config


def test_what_does_not_fit_fp16_is_named(folder: Path, tmp_path: Path) -> None:
    source = read_source(str(folder))
    source.state["temperature"] = torch.tensor([1e5])
    with pytest.raises(CheckpointError, match="temperature holds numbers beyond the range of fp16"):
        export_safetensors(source, tmp_path / "out", "fp16", "")
    assert not (tmp_path / "out").exists()


def test_rows_are_quantised_to_half_a_step() -> None:
    weight = torch.randn(7, 33) * torch.logspace(-3, 2, 7)[:, None]
    weight[3] = 0
    rows, scale = quantise_rows(weight)
    assert rows.dtype == torch.int8 and scale.dtype == torch.float32 and rows.abs().max() == 127
    error = (rows.float() * scale[:, None] - weight).abs().amax(1)
    assert (error <= scale * 0.5001).all()
    again, same = quantise_rows(rows.float() * scale[:, None])
    assert torch.equal(again, rows) and torch.allclose(same, scale), "to quantise twice changes nothing"


def test_int8_folder_holds_int8_rows_and_says_so(folder: Path, int8: Path) -> None:
    stored, original = load_file(int8 / "model.safetensors"), load_file(folder / "model.safetensors")
    with torch.device("meta"):
        model = MplugModel(read_model(str(folder)).config)
    weighted = {f"{n}.weight" for n, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Embedding)}
    assert {name for name, value in stored.items() if value.dtype == torch.int8} == weighted
    assert stored.keys() - original.keys() == {f"{name}_scale" for name in weighted}
    for name in original.keys() - weighted:
        assert torch.equal(stored[name], original[name]), name
    said = json.loads((int8 / "quantization.json").read_text())
    assert said["method"] == "int8" and set(said["tensors"]) == weighted


def test_int8_takes_a_quarter_of_fp32(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = small_model(vocab_size=tokenizer.vocab_size, width=128, intermediate=512)
    save_model(tmp_path / "m", model, tokenizer, dtype=torch.float32)
    export_int8(read_source(str(tmp_path / "m")), tmp_path / "q", "bf16", "")
    before, after = (len((tmp_path / n / "model.safetensors").read_bytes()) for n in ("m", "q"))
    assert after < 0.3 * before


@needs_int8
def test_int8_computes_in_int8_and_nearly_the_same(folder: Path, int8: Path) -> None:
    loaded = load_model(str(int8))
    layers = [layer for layer in loaded.model.modules() if isinstance(layer, Int8Linear)]
    assert layers and not any(isinstance(layer, nn.Linear) for layer in loaded.model.modules())
    expected, found = outputs(load_model(str(folder)).model), outputs(loaded.model)
    for name, value in expected.items():
        alike = nn.functional.cosine_similarity(found[name].flatten(), value.flatten(), 0)
        assert alike > 0.95, (name, float(alike))
        assert not torch.equal(found[name], value), name
    rows = dict(loaded.model.named_buffers())["text.layers.0.attention.qkv.weight"]
    assert torch.equal(rows, load_file(int8 / "model.safetensors")["text.layers.0.attention.qkv.weight"])


@needs_int8
def test_int8_layer_is_the_float_layer_of_the_same_rows() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 48), torch.randn(3, 5, 64)
    layer = Int8Linear(64, 48, True)
    layer.weight, layer.weight_scale = quantise_rows(linear.weight.detach())
    layer.bias.data.copy_(linear.bias.data)
    exact = nn.functional.linear(x, layer.weight.float() * layer.weight_scale[:, None], linear.bias)
    step = (x.max() - x.min()) / 127  # of the activations
    bound = float(step) * (layer.weight.float() * layer.weight_scale[:, None]).abs().sum(1).max() / 2
    assert (layer(x) - exact).abs().max() <= bound
    bare = Int8Linear(64, 48, False)
    bare.weight, bare.weight_scale = layer.weight, layer.weight_scale
    assert torch.allclose(bare(x), layer(x) - linear.bias, atol=1e-5)


def test_int8_is_floats_where_nothing_computes_in_int8(
    folder: Path, int8: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mplug_core.weights.folder.computes_int8", lambda device, dtype: False)
    loaded = load_model(str(int8))
    assert not any(isinstance(layer, Int8Linear) for layer in loaded.model.modules())
    state = dequantise(load_file(int8 / "model.safetensors"))
    assert all(torch.equal(value, state[name]) for name, value in loaded.model.state_dict().items())
    assert state.keys() == load_file(folder / "model.safetensors").keys()


def test_engines_and_types_that_compute_in_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not computes_int8(torch.device("cuda"), torch.float32) and not computes_int8(CPU, torch.bfloat16)
    monkeypatch.setattr(quantised, "ENGINES", ())
    assert not computes_int8(CPU, torch.float32)


@needs_int8
def test_int8_without_parts(int8: Path) -> None:
    loaded = load_model(str(int8), without=("text", "fusion"))
    assert all(t.is_meta for t in [*loaded.model.text.parameters(), *loaded.model.text.buffers()])
    with torch.no_grad():
        tokens = loaded.model.encode_image(torch.randn(1, 3, 32, 32)).tokens
        assert loaded.model.decode(torch.tensor([[2, 7]]), tokens).isfinite().all()


def test_training_starts_from_int8(int8: Path, tokenizer: Tokenizer) -> None:
    stored = read_model(str(int8))
    model = MplugModel(stored.config)
    assert "from nothing" not in fill_from(model, tokenizer, stored)
    state = dequantise(stored.state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_int8_is_exported_to_floats_again(int8: Path, tmp_path: Path) -> None:
    export_safetensors(read_source(str(int8)), tmp_path / "back", "fp32", "")
    assert not (tmp_path / "back" / "quantization.json").exists()
    state = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(value, state[n]) for n, value in dequantise(load_file(int8 / "model.safetensors")).items())


def test_another_quantisation_is_refused(int8: Path, tmp_path: Path) -> None:
    import shutil

    place = Path(shutil.copytree(int8, tmp_path / "q"))
    (place / "quantization.json").write_text('{"method": "int3"}')
    with pytest.raises(CheckpointError, match="quantised by 'int3'"):
        load_model(str(place))
    (place / "quantization.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot read .*quantization\.json"):
        load_model(str(place))


def test_no_quantised_tensor_is_left_over() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    state = quantise(model, model.state_dict())
    assert sorted(state) == ["0.bias", "0.weight", "0.weight_scale", "1.bias", "1.weight"]
    assert dequantise(state).keys() == model.state_dict().keys()


class TestImageSize:
    def test_transformer(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        save_model(tmp_path / "m", small_model(vocab_size=tokenizer.vocab_size), tokenizer, dtype=torch.float32)
        export_safetensors(read_source(str(tmp_path / "m"), 48), tmp_path / "out", "fp32", "")
        loaded = load_model(str(tmp_path / "out"))
        assert loaded.config.vision.image_size == 48
        with torch.no_grad():
            assert loaded.model.encode_image(torch.randn(1, 3, 48, 48)).tokens.shape[1] == 37
        old, new = (load_file(tmp_path / n / "model.safetensors")["visual.backbone.pos_embed"] for n in ("m", "out"))
        assert torch.equal(old[:, 0], new[:, 0]) and new.shape == (1, 37, 32)
        with pytest.raises(CheckpointError, match="image size 50 is not a multiple of the patches' 8"):
            read_source(str(tmp_path / "m"), 50)

    def test_convolutional_network(self, folder: Path, tmp_path: Path) -> None:
        export_int8(read_source(str(folder), 64), tmp_path / "out", "fp32", "")
        loaded = load_model(str(tmp_path / "out"))
        with torch.no_grad():
            tokens = loaded.model.encode_image(torch.randn(1, 3, 64, 64)).tokens
        assert tokens.shape[1] == loaded.model.visual.grid[0] ** 2 + 2
        assert read_source(str(folder), 32).state["grid_positions"].shape == (4, 32), "its own size changes nothing"


class TestTarget:
    def test_only_a_model_folder_is_replaced_and_only_when_told_to(self, folder: Path, tmp_path: Path) -> None:
        source, place = read_source(str(folder)), tmp_path / "out"
        place.mkdir()
        export_safetensors(source, place, "bf16", "# one\n")  # an empty folder is free
        with pytest.raises(MplugError, match="--force"):
            export_safetensors(source, place, "bf16", "# two\n")
        assert (place / "README.md").read_text() == "# one\n"
        export_safetensors(source, place, "bf16", "# two\n", force=True)
        assert (place / "README.md").read_text() == "# two\n"
        assert [p.name for p in tmp_path.iterdir()] == ["out"], "nothing is left beside it"

    def test_the_model_itself_stays(self, folder: Path) -> None:
        for target in (folder, folder.parent):
            with pytest.raises(MplugError, match="where the model is"):
                export_safetensors(read_source(str(folder)), target, "bf16", "", force=True)


def test_weights_of_another_model_are_not_exported(folder: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = read_source(str(folder))
    del source.state["fusion.layers.0.text.attention.qkv.weight"]
    with pytest.raises(CheckpointError, match=r"lacks fusion\.layers\.0"):
        export_safetensors(source, tmp_path / "out", "fp32", "")
    source = read_source(str(folder))
    source.state["stray"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match="unknown tensor stray"):
        export_int8(source, tmp_path / "out", "fp32", "")
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_masked_head_stays_one(folder: Path, tmp_path: Path) -> None:
    """As it comes from a released checkpoint of a task."""
    source = read_source(str(folder))
    config, state = without_parts(source.config, source.state, {"masked"})
    write_folder(tmp_path / "m", config, source.stored.tokenizer, state)
    assert outputs(load_model(str(tmp_path / "m")).model).keys()
    source = read_source(str(tmp_path / "m"))
    export_int8(source, tmp_path / "q", "fp32", "")
    assert outputs(load_model(str(tmp_path / "q")).model).keys()
    assert build(source).masked_head is None


def test_a_native_model_without_fusion_keeps_all_it_has(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = small_model(vocab_size=tokenizer.vocab_size, fusion="none", fusion_layers=0)
    save_model(tmp_path / "m", model, tokenizer, dtype=torch.float32)
    export_safetensors(read_source(str(tmp_path / "m")), tmp_path / "out", "fp32", "")
    stored, original = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "m"))
    assert stored.keys() == original.keys() and any(name.startswith("masked_head.") for name in stored)
    assert load_model(str(tmp_path / "out")).config == model.config


@pytest.mark.parametrize("fault", ["matching", "nan"])
def test_what_can_not_be_loaded_or_converted_is_not_exported(tmp_path: Path, fault: str) -> None:
    tensors = {name: value for name, value in released().items() if fault != "matching" or "itm_head" not in name}
    if fault == "nan":
        tensors["temp"] = torch.full_like(tensors["temp"], torch.nan)
    file = write_alicemind(tmp_path / "mplug.pth", tensors)
    with pytest.raises(CheckpointError, match="the matching head is not there|not finite"):
        read_source(str(file))


def test_a_converted_native_folder_keeps_its_texts(folder: Path, tmp_path: Path) -> None:
    convert_model(str(folder), tmp_path / "m", dtype=torch.bfloat16)
    assert all((tmp_path / "m" / name).read_text() == (folder / name).read_text() for name in (CARD, RECIPE))
    (tmp_path / "m" / RECIPE).write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"recipe\.yaml: not UTF-8 text"):
        convert_model(str(tmp_path / "m"), tmp_path / "n")


@needs_int8
def test_int8_is_the_same_wherever_it_is_stored_again(int8: Path, tmp_path: Path) -> None:
    original = load_file(int8 / "model.safetensors")
    loaded = load_model(str(int8))
    save_model(tmp_path / "saved", loaded.model, loaded.tokenizer, dtype=torch.bfloat16)
    convert_model(str(int8), tmp_path / "as it is")
    for place in (tmp_path / "saved", tmp_path / "as it is"):
        stored = load_file(place / "model.safetensors")
        rows = [name for name, value in stored.items() if value.dtype == torch.int8]
        assert rows and json.loads((place / "quantization.json").read_text())["tensors"] == sorted(rows)
        assert all(torch.equal(stored[f"{name}_scale"], original[f"{name}_scale"]) for name in rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_is_converted_to_floats(int8: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    convert_model(str(int8), tmp_path / "m", dtype=dtype)
    stored, floats = load_file(tmp_path / "m" / "model.safetensors"), dequantise(load_file(int8 / "model.safetensors"))
    assert stored.keys() == floats.keys() and not (tmp_path / "m" / "quantization.json").exists()
    assert all(torch.equal(stored[name], value.to(dtype)) for name, value in floats.items())


def test_the_embedded_model_with_its_batch_norms(tmp_path: Path) -> None:
    export_int8(read_source(None), tmp_path / "q", "bf16", "")
    small, whole = tmp_path / "q" / "model.safetensors", EMBEDDED / "model.safetensors"
    assert small.stat().st_size < 0.6 * whole.stat().st_size
    assert load_model(str(tmp_path / "q")).config == load_model(None).config
