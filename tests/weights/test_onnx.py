"""ONNX graphs: equal to PyTorch at sizes that they were not made at, and enough to caption without PyTorch."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mplug_core.data.text import Tokenizer, build_vocabulary
from mplug_core.errors import MplugError
from mplug_core.generation import Decoding, generate
from mplug_core.model.mplug import MplugModel
from mplug_core.tasks.caption import CaptionTask
from mplug_core.tasks.vqa import VqaTask
from mplug_core.weights import onnx
from mplug_core.weights.onnx import decoder_graphs, export_onnx, graphs_of, largest_difference, write_graph
from tests.small import CLASSIFIERS, CNN, small_config, small_model

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in onnx.PACKAGES), reason="onnx, onnxscript, onnxruntime"
)
SMALL = {"text_layers": 1, "fusion_layers": 2, "decoder_layers": 1}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(build_vocabulary(["a red ball on a green table", "two dogs run on the grass"]))


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> MplugModel:
    return small_model(vocab_size=tokenizer.vocab_size, vision=CNN, classifiers=CLASSIFIERS, summary_tokens=2, **SMALL)


def test_a_missing_package_is_one_line(
    model: MplugModel, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    with pytest.raises(MplugError, match=r"ONNX needs onnx, onnxscript, onnxruntime \(pip install 'mplug\[onnx\]'\)"):
        export_onnx(tmp_path / "out", model, tokenizer, "")
    assert not list(tmp_path.iterdir())


def test_graphs_are_those_of_the_model(model: MplugModel, tokenizer: Tokenizer) -> None:
    names = [graph.name for graph in graphs_of(model)]
    assert names == [
        "image_encoder", "text_encoder", "fusion", "decoder_memory", "decoder", "classifier_statement",
        "classifier_entailment",
    ]  # fmt: skip
    dual = small_model(vocab_size=tokenizer.vocab_size, fusion="none", fusion_layers=0, decoder_layers=0)
    assert [graph.name for graph in graphs_of(dual)] == ["image_encoder", "text_encoder"]


@pytest.mark.parametrize(
    ("fields", "names", "gone"),
    [
        ({"absent": ["matching", "masked"]}, {"text_encoder", "fusion", "decoder"}, {"matching_logits"}),
        (
            {"absent": ["contrastive", "masked"]},
            {"text_encoder", "fusion", "decoder"},
            {"image_feature", "text_feature"},
        ),
        (
            {"absent": ["text", "contrastive", "matching", "masked"], "fusion": "none", "fusion_layers": 0},
            {"decoder"},
            {"image_feature", "text_feature", "matching_logits"},
        ),
    ],
)
def test_parts_that_a_model_lacks_are_in_no_graph(fields: dict[str, Any], names: set[str], gone: set[str]) -> None:
    graphs = graphs_of(small_model(**fields))
    assert {graph.name for graph in graphs} == {"image_encoder", "decoder_memory", *names}
    assert {"image_feature", "text_feature", "matching_logits"} - {n for g in graphs for n in g.outputs} == gone
    for graph in graphs:
        values = graph.module(*onnx._nested(graph, graph.example(onnx.CHECKED[2], torch.Generator().manual_seed(0))))
        assert isinstance(values, tuple) and len(values) == len(graph.outputs)


@needs_onnx
@pytest.mark.parametrize("fault", ["load", "run"])
def test_faults_of_onnxruntime_are_one_line(
    model: MplugModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    import onnxruntime

    class Broken:
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            if fault == "load":
                self.run()

        def run(self, *arguments: Any) -> None:
            raise RuntimeError("first\nsecond")

    monkeypatch.setattr(onnxruntime, "InferenceSession", Broken)
    with pytest.raises(MplugError, match=rf"onnxruntime can't {fault} graph decoder: first \("):
        largest_difference(decoder_graphs(model)[1], tmp_path / "decoder.onnx")


def test_meta_says_how_the_model_itself_reads_and_writes(tokenizer: Tokenizer) -> None:
    config = small_config(vocab_size=tokenizer.vocab_size)
    assert onnx.describe(config, tokenizer, [], {}, 18)["text"]["text_end"] is True
    own = {"text_end": False, "decoding": {"vqa": {"strategy": "released", "beams": 7}}}
    meta = onnx.describe(small_config(vocab_size=tokenizer.vocab_size, **own), tokenizer, [], {}, 18)
    assert meta["text"]["text_end"] is False
    assert meta["decoding"]["caption"] == CaptionTask.decoding.model_dump(mode="json")
    assert meta["decoding"]["vqa"] == {**VqaTask.decoding.model_dump(mode="json"), "strategy": "released", "beams": 7}


def test_a_graph_that_differs_is_not_written(
    model: MplugModel, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx, "require_packages", lambda: None)
    monkeypatch.setattr(onnx, "write_graph", lambda graph, file, opset: file.write_bytes(b"x"))
    for difference in (2e-3, float("nan")):
        monkeypatch.setattr(onnx, "largest_difference", lambda graph, file, d=difference: d)
        with pytest.raises(MplugError, match="graph image_encoder differs from PyTorch by"):
            export_onnx(tmp_path / "out", model, tokenizer, "")
    assert not list(tmp_path.iterdir())


@needs_onnx
def test_step_of_the_decoder(model: MplugModel, tmp_path: Path) -> None:
    """At the start, where there is no past, and later."""
    graph = decoder_graphs(model)[1]
    write_graph(graph, tmp_path / "decoder.onnx", onnx.OPSET)
    assert largest_difference(graph, tmp_path / "decoder.onnx") < 1e-4
    with torch.no_grad():
        model.decoder.head.bias.add_(0.1)
    try:
        assert largest_difference(graph, tmp_path / "decoder.onnx") == pytest.approx(0.1, abs=1e-3)
    finally:
        with torch.no_grad():
            model.decoder.head.bias.sub_(0.1)


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize("subcells", [1, 2])
def test_an_encoder_with_levels_takes_any_batch(subcells: int, tmp_path: Path) -> None:
    """:data:`onnx.CHECKED` has batches of 1, 2 and 3; the graph is made with 2."""
    graph = graphs_of(small_model(vision={**CNN, "levels": [1, 2], "subcells": subcells}, **SMALL))[0]
    assert {sizes["batch"] for sizes in onnx.CHECKED} == {1, 2, 3} and graph.name == "image_encoder"
    write_graph(graph, tmp_path / "image_encoder.onnx", onnx.OPSET)
    assert largest_difference(graph, tmp_path / "image_encoder.onnx") < 1e-4


@pytest.mark.slow
def test_an_encoder_with_levels_does_not_fix_the_batch() -> None:
    """The same without ONNX's packages: what torch.export says of the batch."""
    graph = graphs_of(small_model(vision={**CNN, "levels": [1, 2], "subcells": 2}, **SMALL))[0]
    pixels = graph.example(onnx.TRACED, torch.Generator().manual_seed(0))
    shapes = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(graph.module, tuple(pixels), dynamic_shapes=shapes, strict=False)
    expected = graph.module(torch.zeros(3, *pixels[0].shape[1:]))
    for found, value in zip(exported.module()(torch.zeros(3, *pixels[0].shape[1:])), expected, strict=True):
        assert torch.allclose(found, value, atol=1e-5)


@needs_onnx
@pytest.mark.slow
def test_the_embedded_model(tmp_path: Path) -> None:
    """Its image encoder, for which the exporter needs minutes on one busy core, and the step of its decoder."""
    from mplug_core.weights.export import build, read_source

    chosen = {graph.name: graph for graph in graphs_of(build(read_source(None)))}
    for name in ("image_encoder", "decoder"):
        write_graph(chosen[name], tmp_path / f"{name}.onnx", onnx.OPSET)
        assert largest_difference(chosen[name], tmp_path / f"{name}.onnx") < onnx.TOLERANCE


@pytest.fixture(scope="module")
def folder(model: MplugModel, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("graphs") / "onnx"
    differences = export_onnx(place, model, tokenizer, "# card\n")
    assert max(differences.values()) < 1e-4
    return place


class Sessions:
    """The graphs of a folder, run by onnxruntime as meta.json says."""

    def __init__(self, folder: Path) -> None:
        import onnxruntime

        self.meta = json.loads((folder / "meta.json").read_text())
        self.sessions = {
            name: onnxruntime.InferenceSession(str(folder / graph["file"]), providers=["CPUExecutionProvider"])
            for name, graph in self.meta["graphs"].items()
        }

    def run(self, graph: str, **inputs: Any) -> dict[str, Any]:
        names = list(self.meta["graphs"][graph]["outputs"])
        return dict(zip(names, self.sessions[graph].run(names, inputs), strict=True))

    def caption(self, pixels: Any, min_tokens: int, max_tokens: int) -> list[int]:
        """Ids of the greedy caption of one image [1, 3, S, S]."""
        text = self.meta["text"]
        images = self.run("image_encoder", pixels=pixels)
        memory = self.run("decoder_memory", memory=images["image_tokens"])
        inputs = self.meta["graphs"]["decoder"]["inputs"]
        past = {
            name: np.zeros([1 if axis == "batch" else 0 if isinstance(axis, str) else axis for axis in value["shape"]],
                           np.float32)
            for name, value in inputs.items() if ".decoder." in name
        }  # fmt: skip
        ids: list[int] = []
        token = text["start"]
        while len(ids) < max_tokens:
            fed = {"input_ids": np.array([[token]]), "memory_mask": images["image_mask"], **past, **memory}
            out = self.run("decoder", **fed)
            logits = out.pop("logits")[0, -1]
            logits[text["forbidden"]] = -np.inf
            if len(ids) < min_tokens:
                logits[text["end"]] = -np.inf
            token = int(logits.argmax())
            ids.append(token)
            if token == text["end"]:
                break
            past = {name.replace("present", "past_key_values"): value for name, value in out.items()}
        return ids


@needs_onnx
@pytest.mark.slow
def test_captions_without_pytorch(folder: Path, model: MplugModel, tokenizer: Tokenizer) -> None:
    sessions = Sessions(folder)
    decoding = Decoding(strategy="greedy", min_tokens=4, max_tokens=12)
    different = set()
    for seed in range(6):
        pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
        images = model.encode_image(pixels)
        ((expected,),) = generate(
            model.decoder, images.tokens, images.mask, decoding, start=tokenizer.cls_id, end=tokenizer.sep_id,
            forbidden=sessions.meta["text"]["forbidden"],
        )  # fmt: skip
        assert sessions.caption(pixels.numpy(), 4, 12) == expected.ids
        different.add(tuple(expected.ids))
    assert len(different) > 1, "the captions know their image"


@needs_onnx
@pytest.mark.slow
def test_answers_and_scores_without_pytorch(folder: Path, model: MplugModel) -> None:
    """A question goes through the fusion; its memory decodes, matches and classifies as in PyTorch."""
    sessions = Sessions(folder)
    pixels = torch.randn(2, 3, 32, 32)
    ids, mask = torch.randint(5, model.config.vocab_size, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    images = sessions.run("image_encoder", pixels=pixels.numpy())
    text = sessions.run("text_encoder", input_ids=ids.numpy(), attention_mask=mask.numpy())
    fused = sessions.run(
        "fusion", image_tokens=images["image_tokens"], image_mask=images["image_mask"],
        text_tokens=text["text_tokens"], text_mask=mask.numpy(),
    )  # fmt: skip
    labels = sessions.run("classifier_entailment", fused=fused["fused_text"][:, 0])["logits"]
    with torch.no_grad():
        known = model.encode_image(pixels)
        encoded = model.encode_text(ids, mask)
        image, fused_text = model.fuse(known, encoded, mask)
        pairs = [
            (images["image_feature"] @ text["text_feature"].T, known.feature @ model.text_feature(encoded, mask).T),
            (fused["fused_image"], image), (fused["fused_text"], fused_text),
            (fused["matching_logits"], model.matching_logits(fused_text)),
            (labels, model.classify("entailment", [fused_text])),
        ]  # fmt: skip
    for found, value in pairs:
        assert np.abs(found - value.numpy()).max() < 1e-4


@needs_onnx
@pytest.mark.slow
def test_folder_says_how_it_is_used(folder: Path, tokenizer: Tokenizer) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    assert (folder / "README.md").read_text() == "# card\n"
    assert Tokenizer.load(folder / "vocab.txt").pieces == tokenizer.pieces
    assert meta["image"]["size"] == 32 and meta["image"]["mean"] == [0.5, 0.5, 0.5]
    assert meta["text"]["start"] == tokenizer.cls_id and meta["text"]["end"] == tokenizer.sep_id
    import onnxruntime

    for graph in meta["graphs"].values():
        session = onnxruntime.InferenceSession(str(folder / graph["file"]), providers=["CPUExecutionProvider"])
        assert [i.name for i in session.get_inputs()] == list(graph["inputs"])
        for told, value in zip(graph["inputs"].values(), session.get_inputs(), strict=True):
            assert len(told["shape"]) == len(value.shape) and told["dtype"][:3] == value.type[7:10].replace(
                "flo", "flo"
            )
            assert all(a == b for a, b in zip(told["shape"], value.shape, strict=True) if isinstance(a, int))
        assert graph["max_difference_to_pytorch"] < 1e-4


@needs_onnx
@pytest.mark.slow
def test_captioner_without_any_text_encoder(tokenizer: Tokenizer, tmp_path: Path) -> None:
    absent = ["text", "contrastive", "matching", "masked"]
    model = small_model(
        vocab_size=tokenizer.vocab_size, absent=absent, **{**SMALL, "fusion": "none", "fusion_layers": 0}
    )
    differences = export_onnx(tmp_path / "onnx", model, tokenizer, "")
    assert set(differences) == {"image_encoder", "decoder_memory", "decoder"}
    assert max(differences.values()) < 1e-4


@needs_onnx
@pytest.mark.slow
def test_transformer_and_shared_memory(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = small_model(vocab_size=tokenizer.vocab_size, fusion="co", **SMALL)
    differences = export_onnx(tmp_path / "onnx", model, tokenizer, "", opset=20)
    assert set(differences) == {"image_encoder", "text_encoder", "fusion", "decoder_memory", "decoder"}
    assert max(differences.values()) < 1e-4
