"""A model as ONNX graphs for other runtimes, each compared with PyTorch before anything is written.

``image_encoder`` gives the tokens of images, ``text_encoder`` those of texts, ``fusion`` both after they have seen each
other. The decoder is two graphs: ``decoder_memory`` computes the keys and values of what it looks at, once; then
``decoder`` takes the next tokens of each sequence with the keys and values of those before. ``meta.json`` says how they
go together. Packages ``onnx``, ``onnxscript`` and ``onnxruntime`` are needed: ``pip install 'mplug[onnx]'``.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mplug_core.atomic import whole_folder
from mplug_core.data.text import Tokenizer
from mplug_core.errors import CheckpointError, MplugError
from mplug_core.json_text import to_json
from mplug_core.model.attention import DecoderCache
from mplug_core.model.config import MplugConfig
from mplug_core.model.mplug import MplugModel
from mplug_core.tasks.caption import CaptionTask, forbidden_tokens
from mplug_core.tasks.task import own_decoding
from mplug_core.tasks.vqa import VqaTask

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPSET = 18
TOLERANCE = 1e-3
"""Largest difference to PyTorch that a graph may show anywhere in its outputs."""
META = "meta.json"
OPERATORS = ("opset", "operator", "nsupported", "decompos", "No ONNX function")
"""Words of the exporter's errors that another set of operators may answer."""
REPORT = "another torch, onnx or onnxruntime may do it; please report it with the model's config.json"


class ImageGraph(nn.Module):
    """Pixels [B, 3, S, S] to tokens [B, N, W], mask [B, N], and the contrastive feature [B, E] where there is one."""

    def __init__(self, model: MplugModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        images = self.model.encode_image(pixels)
        features = () if self.model.image_projection is None else (images.feature,)
        return images.tokens, images.mask.long(), *features


class TextGraph(nn.Module):
    """Ids and mask [B, T] to tokens [B, T, W], and the contrastive feature [B, E] where there is one."""

    def __init__(self, model: MplugModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        text = self.model.encode_text(input_ids, attention_mask)
        return (text,) if self.model.text_projection is None else (text, self.model.text_feature(text, attention_mask))


class FusionGraph(nn.Module):
    """Tokens and masks of images and texts to the fused streams, and the matching logits [B, 2] where there are any."""

    def __init__(self, model: MplugModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, image_tokens: Tensor, image_mask: Tensor, text_tokens: Tensor, text_mask: Tensor
    ) -> tuple[Tensor, ...]:
        image, text = self.model.fusion(image_tokens, text_tokens, image_mask, text_mask)
        return (image, text) if self.model.matching_head is None else (image, text, self.model.matching_logits(text))


class MemoryGraph(nn.Module):
    """A memory [B, N, W] to the cross-attention keys and values [B, H, N, D] of every layer."""

    def __init__(self, model: MplugModel) -> None:
        super().__init__()
        self.layers = model.decoder.layers

    def forward(self, memory: Tensor) -> tuple[Tensor, ...]:
        return tuple(t for layer in self.layers for t in layer.cross.keys_values(memory))


class DecoderGraph(nn.Module):
    """The next tokens [B, T] of sequences, given the keys and values of those before, to logits [B, T, V]."""

    def __init__(self, model: MplugModel) -> None:
        super().__init__()
        self.decoder = model.decoder

    def forward(
        self, input_ids: Tensor, memory_mask: Tensor, past: list[Tensor], memory: list[Tensor]
    ) -> tuple[Tensor, ...]:
        cache = DecoderCache(len(self.decoder.layers))
        for number, layer in enumerate(cache.layers):
            layer.prefix = (past[2 * number], past[2 * number + 1])
            layer.memory = (memory[2 * number], memory[2 * number + 1])
        hidden = self.decoder(input_ids, None, memory_mask, cache)
        return (self.decoder.logits(hidden), *(t for layer in cache.layers for t in layer.prefix))


class ClassifierGraph(nn.Module):
    """The fused [CLS] of each image of an example, joined [B, images * W], to logits [B, labels]."""

    def __init__(self, model: MplugModel, name: str) -> None:
        super().__init__()
        self.classifier = model.classifiers[name]

    def forward(self, fused: Tensor) -> Tensor:
        return self.classifier(fused)


@dataclass
class Graph:
    """One graph: the module, names and shapes of what goes in and comes out; axes with a name are dynamic.

    ``axes`` of an input or output name its dimensions, numbers being fixed. ``integers`` are ids and masks.
    """

    name: str
    module: nn.Module
    inputs: dict[str, tuple[str | int, ...]]
    outputs: dict[str, tuple[str | int, ...]]
    ranges: dict[str, int] = field(default_factory=dict)

    def example(self, sizes: dict[str, int], generator: torch.Generator) -> list[Tensor]:
        """Random inputs with dynamic axes of ``sizes``; an integer input is below its ``ranges``."""
        values = []
        for name, axes in self.inputs.items():
            shape = [sizes[axis] if isinstance(axis, str) else axis for axis in axes]
            if name in self.ranges:
                values.append(torch.randint(0, self.ranges[name], shape, generator=generator))
            else:
                values.append(torch.randn(shape, generator=generator))
        for name, value in zip(self.inputs, values, strict=True):
            if self.ranges.get(name) == 2 and value.numel():  # a mask: something is always real
                value[:, 0] = 1
        return values


def graphs_of(model: MplugModel) -> list[Graph]:
    """The graphs that a model consists of, without parts and outputs that it lacks."""
    config = model.config
    width, embed, size = config.width, config.embed_dim, config.vision.image_size
    with torch.no_grad():
        count = model.encode_image(torch.zeros(1, 3, size, size)).tokens.shape[1]
    image, text = ("batch", count, width), ("batch", "text_length", width)
    contrastive, matching = model.text_projection is not None, model.matching_head is not None
    graphs = [
        Graph(
            "image_encoder", ImageGraph(model), {"pixels": ("batch", 3, size, size)},
            {
                "image_tokens": image, "image_mask": ("batch", count),
                **({"image_feature": ("batch", embed)} if contrastive else {}),
            },
        )
    ]  # fmt: skip
    if model.text is not None:
        graphs.append(
            Graph(
                "text_encoder", TextGraph(model),
                {"input_ids": ("batch", "text_length"), "attention_mask": ("batch", "text_length")},
                {"text_tokens": text, **({"text_feature": ("batch", embed)} if contrastive else {})},
                {"input_ids": config.vocab_size, "attention_mask": 2},
            )
        )  # fmt: skip
    if config.fusion != "none" and model.text is not None:
        graphs.append(
            Graph(
                "fusion", FusionGraph(model),
                {
                    "image_tokens": image, "image_mask": ("batch", count),
                    "text_tokens": text, "text_mask": ("batch", "text_length"),
                },
                {
                    "fused_image": image, "fused_text": text,
                    **({"matching_logits": ("batch", 2)} if matching else {}),
                },
                {"image_mask": 2, "text_mask": 2},
            )
        )  # fmt: skip
    if model.decoder is not None:
        graphs += decoder_graphs(model)
    for name, classifier in config.classifiers.items():
        graphs.append(
            Graph(
                f"classifier_{name}", ClassifierGraph(model, name),
                {"fused": ("batch", classifier.images * width)}, {"logits": ("batch", len(classifier.labels))},
            )
        )  # fmt: skip
    return graphs


def decoder_graphs(model: MplugModel) -> list[Graph]:
    """The decoder's memory, and its step."""
    config, layers = model.config, model.decoder.layers
    heads = layers[0].attention.heads
    head = (config.decoder_width or config.width) // heads
    past = {
        f"past_key_values.{k}.decoder.{kind}": ("batch", heads, "past_length", head)
        for k in range(len(layers))
        for kind in ("key", "value")
    }
    present = {
        name.replace("past_key_values", "present"): ("batch", heads, "past_length + length", head) for name in past
    }
    memory = {
        f"past_key_values.{k}.encoder.{kind}": ("batch", heads, "memory_length", head)
        for k in range(len(layers))
        for kind in ("key", "value")
    }
    return [
        Graph("decoder_memory", MemoryGraph(model), {"memory": ("batch", "memory_length", config.width)}, memory),
        Graph(
            "decoder", DecoderGraph(model),
            {"input_ids": ("batch", "length"), "memory_mask": ("batch", "memory_length"), **past, **memory},
            {"logits": ("batch", "length", config.vocab_size), **present},
            {"input_ids": config.vocab_size, "memory_mask": 2},
        ),
    ]  # fmt: skip


TRACED = {"batch": 2, "text_length": 5, "length": 3, "past_length": 4, "memory_length": 7}
"""Sizes of the dynamic axes when a graph is made. None is 0 or 1, which would become part of it."""
CHECKED = (
    {"batch": 1, "text_length": 9, "length": 1, "past_length": 0, "memory_length": 12},
    {"batch": 3, "text_length": 2, "length": 1, "past_length": 6, "memory_length": 5},
    {"batch": 2, "text_length": 6, "length": 4, "past_length": 2, "memory_length": 9},
)
"""Other sizes, on which its outputs are compared with PyTorch's."""


def require_packages() -> None:
    """MplugError where a package that exports and checks graphs is not installed."""
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        raise MplugError(f"ONNX needs {', '.join(absent)}", "pip install 'mplug[onnx]'")


def export_onnx(
    folder: Path, model: MplugModel, tokenizer: Tokenizer, card: str, opset: int = OPSET
) -> dict[str, float]:
    """Write a folder of graphs of ``model`` (fp32, in evaluation mode), with ``meta.json``, whole or not at all.

    Returns the largest difference to PyTorch of each graph. MplugError where a package is missing, an operator has no
    counterpart in ``opset``, or a difference is above :data:`TOLERANCE`.
    """
    require_packages()
    graphs = graphs_of(model)
    differences: dict[str, float] = {}
    try:
        with whole_folder(folder) as beside:
            for graph in graphs:
                write_graph(graph, beside / f"{graph.name}.onnx", opset)
                differences[graph.name] = largest_difference(graph, beside / f"{graph.name}.onnx")
                if not differences[graph.name] <= TOLERANCE:
                    raise MplugError(
                        f"graph {graph.name} differs from PyTorch by {differences[graph.name]:.2g}",
                        f"the limit is {TOLERANCE:g}; {REPORT}",
                    )
            about = describe(model.config, tokenizer, graphs, differences, opset)
            (beside / META).write_text(to_json(about, indent=1))
            tokenizer.save(beside / "vocab.txt")
            (beside / "README.md").write_text(card, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"cannot write {folder}: {error.strerror or error}", "check the disk") from error
    return differences


def write_graph(graph: Graph, file: Path, opset: int) -> None:
    """Export one graph; MplugError where the exporter can't."""
    generator = torch.Generator().manual_seed(0)
    values = graph.example(TRACED, generator)
    axes = {axis for shape in graph.inputs.values() for axis in shape if isinstance(axis, str)}
    dims = {axis: torch.export.Dim(axis) for axis in axes}
    shapes = [
        {k: dims[axis] for k, axis in enumerate(shape) if isinstance(axis, str)} for shape in graph.inputs.values()
    ]
    try:
        with _quiet():
            torch.onnx.export(
                graph.module, _nested(graph, values), file, input_names=list(graph.inputs),
                output_names=list(graph.outputs), dynamic_shapes=_nested(graph, shapes), opset_version=opset,
                dynamo=True, external_data=True, verbose=False,
            )  # fmt: skip
    except torch.onnx.OnnxExporterError as error:
        cause = error.__cause__ or error
        reason = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        hint = "try another --opset" if any(word in str(cause) for word in OPERATORS) else REPORT
        raise MplugError(f"graph {graph.name} can't be exported: {reason}", hint) from error


def _nested(graph: Graph, values: list[Any]) -> tuple[Any, ...]:
    """Values of the inputs as the module takes them: those of the caches in two lists."""
    named = dict(zip(graph.inputs, values, strict=True))
    if graph.name != "decoder":
        return tuple(named.values())
    past, memory = (
        [value for name, value in named.items() if name.startswith("past_key_values.") and f".{side}." in name]
        for side in ("decoder", "encoder")
    )
    return named["input_ids"], named["memory_mask"], past, memory


@torch.inference_mode()
def largest_difference(graph: Graph, file: Path) -> float:
    """Of all outputs on all :data:`CHECKED` sizes: how far onnxruntime's are from PyTorch's."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own exceptions have no common base
        reason = str(error).splitlines()[0]
        hint = f"try another --opset; {REPORT}"
        raise MplugError(f"onnxruntime can't load graph {graph.name}: {reason}", hint) from error
    generator = torch.Generator().manual_seed(1)
    worst = 0.0
    for sizes in CHECKED:
        values = graph.example(sizes, generator)
        expected = graph.module(*_nested(graph, values))
        expected = expected if isinstance(expected, tuple) else (expected,)
        fed = {name: value.numpy() for name, value in zip(graph.inputs, values, strict=True)}
        try:
            computed = session.run(list(graph.outputs), fed)
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise MplugError(f"onnxruntime can't run graph {graph.name}: {reason}", REPORT) from error
        for found, value in zip(computed, expected, strict=True):
            if found.shape != tuple(value.shape):
                raise MplugError(
                    f"graph {graph.name} gives {found.shape} where PyTorch gives {tuple(value.shape)}",
                    REPORT,
                )
            if value.numel():
                worst = max(worst, float((torch.from_numpy(found).float() - value.float()).abs().max()))
    return worst


def describe(
    config: MplugConfig, tokenizer: Tokenizer, graphs: list[Graph], differences: dict[str, float], opset: int
) -> dict[str, Any]:
    """What ``meta.json`` says: how pictures and texts become inputs, the graphs, and how to decode."""
    vision = config.vision
    caption = own_decoding(config, "caption", CaptionTask.decoding)
    vqa = own_decoding(config, "vqa", VqaTask.decoding)
    return {
        "format": 1,
        "opset": opset,
        "image": {
            "size": vision.image_size, "fit": vision.fit, "resample": "bicubic", "mean": list(vision.mean),
            "std": list(vision.std), "layout": "NCHW, RGB, 0 .. 1 before mean and std",
        },
        "text": {
            "vocabulary": "vocab.txt", "lower_case": True, "max_positions": config.max_positions,
            "pad": tokenizer.pad_id, "start": tokenizer.cls_id, "end": tokenizer.sep_id,
            "forbidden": forbidden_tokens(tokenizer), "box_bins": config.box_bins,
            "text_end": config.text_end,
        },
        "classifiers": {name: c.model_dump() for name, c in config.classifiers.items()},
        "calibration": {name: c.model_dump() for name, c in config.calibration.items()},
        "decoding": {"caption": caption.model_dump(mode="json"), "vqa": vqa.model_dump(mode="json")},
        "graphs": {
            graph.name: {
                "file": f"{graph.name}.onnx",
                "inputs": _described(graph.inputs),
                "outputs": _described(graph.outputs),
                "max_difference_to_pytorch": differences[graph.name],
            }
            for graph in graphs
        },
        "use": {
            "caption": "memory = image_tokens, memory_mask = image_mask",
            "vqa": "memory = fused_image then fused_text of the question, memory_mask = image_mask then text_mask",
            "decoder": "first call: input_ids = start, past of length 0; then the chosen token with present as past; "
            "positions follow from the length of the past",
            "retrieval": "dot product of image_feature and text_feature; matching: softmax of matching_logits, index 1",
            "classifier": "fused_text[:, 0] of each image of the example, joined on the last axis",
            "calibration": "statement, entailment, choices: softmax(scores / temperature); vqa, grounding: "
            "sigmoid(log(p / (1 - p)) / temperature + bias) of the probability p of the whole text, or of an overlap",
        },
    }  # fmt: skip


def _described(values: dict[str, tuple[str | int, ...]]) -> dict[str, Any]:
    """Shapes and types of inputs or outputs: ids and masks are integers."""
    return {
        name: {"shape": list(shape), "dtype": "int64" if name.endswith(("_ids", "_mask")) else "float32"}
        for name, shape in values.items()
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's progress and warnings are not for users."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
