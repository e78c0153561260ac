"""A BERT as the start of the text encoder, the fusion and the decoder (paper section 3.1).

Of L layers the text encoder takes the first T, the fusion the F behind them (the last F where L < T + F), the decoder
the first D, unless the recipe says which. Of each layer self-attention and feed-forward are taken, also into connected
layers; cross-attention is fresh. Words are picked by piece, so that a smaller or larger vocabulary keeps them. The
head that predicts words is BERT's own where its file has it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mplug_core.bounded import read_json
from mplug_core.data.text import Tokenizer, pad
from mplug_core.errors import CheckpointError
from mplug_core.model.config import MplugConfig
from mplug_core.model.mplug import MplugModel
from mplug_core.model.text import TextEncoder
from mplug_core.recipe import StartSection
from mplug_core.weights.faults import check_finite
from mplug_core.weights.official import Account
from mplug_core.weights.pretrained import Origin, bert_pieces, find_part, read_tensors, weights_in

FILES = ("model.safetensors", "pytorch_model.bin")
HEAD = "cls.predictions"
WORDS = "embeddings.word_embeddings.weight"


@dataclass
class Bert:
    """A BERT folder as read. ``used`` are the names of the tensors that some part of the model has taken."""

    name: str
    tensors: dict[str, Tensor]
    pieces: list[str]
    width: int
    heads: int
    depth: int
    warnings: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)

    @property
    def has_head(self) -> bool:
        """Whether it can predict words."""
        return f"{HEAD}.transform.dense.weight" in self.tensors

    def fit(self, part: str, width: int, heads: int) -> None:
        """CheckpointError unless a part of the model is as wide and has as many heads."""
        if (self.width, self.heads) != (width, heads):
            theirs = f"{self.name} is {self.width} wide with {self.heads} heads"
            hint = "set model.width and model.heads"
            raise CheckpointError(f"start.{part}: {theirs}, the model {width} with {heads}", hint)

    def layers(self, part: str, count: int, first: int, chosen: Sequence[int] | None) -> list[int]:
        """The ``count`` layers that a part takes: the ``chosen`` ones, else those from ``first`` or the last ones."""
        if self.depth < count:
            of = {"text": "the text encoder"}.get(part, f"the {part}")
            raise CheckpointError(
                f"start.{part}: {self.name} has {self.depth} layers, {of} {count}", f"set model.{part}_layers"
            )
        if chosen is None:
            first = min(first, self.depth - count)
            return list(range(first, first + count))
        if len(chosen) != count:
            raise CheckpointError(f"start.layers.{part}: {len(chosen)} layers for the {count} of model.{part}_layers")
        for number in chosen:
            if number >= self.depth:
                raise CheckpointError(
                    f"start.layers.{part}: {self.name} has no layer {number}", f"its layers are 0 to {self.depth - 1}"
                )
        return list(chosen)


def open_bert(name: str) -> Bert:
    """Read a BERT folder: ``config.json``, ``vocab.txt`` and ``model.safetensors`` or ``pytorch_model.bin``.

    Names may begin with ``bert.`` or not, and be those of BERT's first release (gamma, beta).
    """
    folder = find_part(name)
    try:
        config = read_json(folder / "config.json")
        width, heads, depth = (int(config[key]) for key in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
        tensors = read_tensors(weights_in(folder, FILES))
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        hint = "it has config.json, vocab.txt, and model.safetensors or pytorch_model.bin"
        raise CheckpointError(f"{name} is no BERT folder: {reason}", hint) from error
    if config.get("model_type", "bert") != "bert":
        raise CheckpointError(f"{name} is a {config['model_type']}, not a BERT", "give a BERT folder")
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise CheckpointError(
            f"{name} has {config['position_embedding_type']} positions", "give one with absolute ones"
        )
    clean = {_clean(key): value.float() for key, value in tensors.items() if value.is_floating_point()}
    for key, value in clean.items():
        check_finite(key, value, name)
    bert = Bert(name, clean, bert_pieces(name), width, heads, depth)
    if WORDS not in clean:
        raise CheckpointError(f"{name} lacks {WORDS}", "give a BERT folder")
    if len(bert.pieces) > len(clean[WORDS]):
        raise CheckpointError(f"{name}: {len(bert.pieces)} pieces in vocab.txt, {len(clean[WORDS])} rows of words")
    if config.get("hidden_act", "gelu") != "gelu":
        bert.warnings.append(f"{name} was trained with {config['hidden_act']}, the model computes gelu")
    return bert


def _clean(key: str) -> str:
    key = re.sub(r"^bert\.", "", key)
    return re.sub(r"LayerNorm\.(gamma|beta)$", lambda m: f"LayerNorm.{dict(gamma='weight', beta='bias')[m[1]]}", key)


@dataclass
class PartStart:
    """What a part of the model gets: whole tensors, and rows of those that have one for each piece."""

    origin: Origin
    state: dict[str, Tensor]
    rows: dict[str, tuple[list[int], Tensor]]

    def require(self, expected: Mapping[str, Tensor], prefixes: Sequence[str], fresh: str, name: str) -> None:
        """CheckpointError unless all of ``expected`` under ``prefixes`` is there and fits, but for what is fresh.

        ``fresh``: a pattern of names.
        """
        for target, value in expected.items():
            if not target.startswith(tuple(prefixes)) or re.search(fresh, target):
                continue
            if target in self.rows:
                shape = (len(value), *self.rows[target][1].shape[1:])
            elif target in self.state:
                shape = tuple(self.state[target].shape)
            else:
                raise CheckpointError(f"{name} lacks tensors of {target}", "its file is not whole: fetch it again")
            if shape != tuple(value.shape):
                raise CheckpointError(
                    f"{name} does not fit the model: {target} would be {_by(shape)}, and is {_by(value.shape)}",
                    "set the model's sizes to those of its config.json",
                )


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "one number"


class _Taking:
    """What a part takes from a BERT."""

    def __init__(self, bert: Bert, tokenizer: Tokenizer | None) -> None:
        self.bert = bert
        self.account = Account(bert.tensors)
        self.rows: dict[str, tuple[list[int], Tensor]] = {}
        ids = {piece: row for row, piece in enumerate(bert.pieces)}
        pieces = tokenizer.pieces if tokenizer is not None else ()
        # of each piece that both know, our row and theirs
        known = [(row, ids[piece]) for row, piece in enumerate(pieces) if piece in ids]
        self.ours, self.theirs = [row for row, _ in known], [row for _, row in known]
        self.words = f"words by piece: {len(known)} of {len(pieces)}" if pieces else "words by piece"

    def layer(self, number: int, target: str) -> None:
        self.account.bert_layer(f"encoder.layer.{number}", target, cross=False)

    def embeddings(self, target: str, positions: int) -> None:
        """Words by piece, the first ``positions`` positions, the first segment, the norm."""
        self.account.embeddings("embeddings", target)
        self.by_piece(f"{target}.words.weight")
        table = self.account.state.get(f"{target}.positions.weight")
        if table is not None and len(table) < positions:
            raise CheckpointError(
                f"{self.bert.name} knows {len(table)} positions, the model {positions}", "set model.max_positions"
            )
        if table is not None:
            self.account.state[f"{target}.positions.weight"] = table[:positions]

    def head(self, target: str) -> None:
        """The head that predicts words; its own output weights are the words, to which it is tied."""
        bias = self.bert.tensors.get(f"{HEAD}.decoder.bias")
        if bias is not None:  # newer files may call it so, and have either or both
            self.account.tensors = {f"{HEAD}.bias": bias, **self.account.tensors}
            self.account.used[f"{HEAD}.decoder.bias"] = f"{target}.bias"
        self.account.language_head(HEAD, target, WORDS)
        self.account.used[f"{HEAD}.decoder.weight"] = "tied"
        self.by_piece(f"{target}.bias")

    def by_piece(self, target: str) -> None:
        values = self.account.state.pop(target, None)
        if values is not None:
            self.rows[target] = (self.ours, values[self.theirs])

    def done(self, text: str) -> PartStart:
        self.bert.used |= self.account.used.keys()
        return PartStart(Origin(text), self.account.state, self.rows)


def text_start(
    bert: Bert,
    config: MplugConfig,
    tokenizer: Tokenizer | None,
    expected: Mapping[str, Tensor],
    chosen: Sequence[int] | None = None,
) -> PartStart:
    """Embeddings and the first layers; arguments as of :func:`language_starts`."""
    bert.fit("text", config.width, config.heads)
    layers = bert.layers("text", config.text_layers, 0, chosen)
    taking = _Taking(bert, tokenizer)
    taking.embeddings("text.embeddings", config.max_positions)
    for k, number in enumerate(layers):
        taking.layer(number, f"text.layers.{k}")
    start = taking.done(f"text: {_numbers(layers)} of {bert.name}, {taking.words}")
    start.require(expected, ["text."], "$^", bert.name)
    return start


def fusion_start(
    bert: Bert,
    config: MplugConfig,
    tokenizer: Tokenizer | None,
    expected: Mapping[str, Tensor],
    chosen: Sequence[int] | None = None,
    words: bool = True,
) -> PartStart:
    """The layers behind the text encoder's, and the head of masked words if ``words`` (the text's are this BERT's)."""
    bert.fit("fusion", config.width, config.heads)
    layers = bert.layers("fusion", config.layers_of("fusion"), config.text_layers, chosen)
    taking = _Taking(bert, tokenizer)
    for k, number in enumerate(layers):
        stream = "joint" if k in config.connected_layers else "text"
        taking.layer(number, f"fusion.layers.{k}.{stream}")
    parts, fresh = ["fusion."], []
    if any(".cross." in name for name in expected if name.startswith("fusion.")):
        fresh.append("cross-attention fresh")
    if any(".image." in name for name in expected if name.startswith("fusion.")):
        fresh.append("image stream fresh")
    if bert.has_head and words:
        taking.head("masked_head")
        parts.append("masked_head.")
        fresh.append("head of masked words taken")
    else:
        fresh.append("head of masked words fresh")
    start = taking.done(f"fusion: {_numbers(layers)} of {bert.name}, {', '.join(fresh)}")
    start.require(expected, parts, r"\.cross(_norm)?\.|\.image\.", bert.name)
    return start


def decoder_start(
    bert: Bert,
    config: MplugConfig,
    tokenizer: Tokenizer | None,
    expected: Mapping[str, Tensor],
    chosen: Sequence[int] | None = None,
) -> PartStart:
    """Embeddings, the first layers, and the head that predicts words."""
    width = config.decoder_width or config.width
    bert.fit("decoder", width, width * config.heads // config.width)
    layers = bert.layers("decoder", config.decoder_layers, 0, chosen)
    taking = _Taking(bert, tokenizer)
    taking.embeddings("decoder.embeddings", config.max_positions)
    for k, number in enumerate(layers):
        taking.layer(number, f"decoder.layers.{k}")
    fresh = r"\.cross(_norm)?\."
    if bert.has_head:
        taking.head("decoder.head")
    else:
        fresh += r"|^decoder\.head\."
    said = f"cross-attention fresh, {taking.words}, prediction head {'taken' if bert.has_head else 'fresh'}"
    start = taking.done(f"decoder: {_numbers(layers)} of {bert.name}, {said}")
    start.require(expected, ["decoder."], fresh, bert.name)
    return start


def _numbers(layers: Sequence[int]) -> str:
    if len(layers) > 1 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]}-{layers[-1]}"
    return f"layer{'' if len(layers) == 1 else 's'} {', '.join(map(str, layers))}"


def language_starts(
    start: StartSection, config: MplugConfig, tokenizer: Tokenizer | None, expected: Mapping[str, Tensor]
) -> list[PartStart]:
    """What text encoder, fusion and decoder start from, as far as the recipe says.

    ``tokenizer`` is None where the vocabulary is not known yet; of ``expected``, the model's tensors by name, only
    shapes matter. CheckpointError for a BERT that can't be read or doesn't fit.
    """
    makers: dict[str, Any] = {"text": text_start, "fusion": fusion_start, "decoder": decoder_start}
    berts: dict[str, Bert] = {}
    starts: list[PartStart] = []
    if faults := start.faults(config):
        raise CheckpointError("; ".join(faults), "the recipe's start does not fit the model")
    for part, maker in makers.items():
        name = start.bert(part)
        if name is None:
            continue
        if name not in berts:
            berts[name] = open_bert(name)
        # a head that predicts words is of use with the words that it was trained with
        extra = {"words": start.text == name} if part == "fusion" else {}
        starts.append(maker(berts[name], config, tokenizer, expected, getattr(start.layers, part), **extra))
    for bert in berts.values():
        starts[-1].origin.warnings += bert.warnings
        left = left_out(bert)
        if left:
            starts.append(PartStart(Origin(f"left out of {bert.name}: {left}"), {}, {}))
    return starts


def left_out(bert: Bert) -> str:
    """What no part of the model has taken, in words."""
    kinds: dict[str, list[str]] = {}
    layers: set[int] = set()
    for name in bert.tensors.keys() - bert.used:
        layer = re.match(r"encoder\.layer\.(\d+)\.(crossattention)?", name)
        if layer and not layer[2]:
            layers.add(int(layer[1]))
        elif layer:
            kinds.setdefault("cross-attention", []).append(name)
        elif name.startswith("pooler."):
            kinds.setdefault("pooler", []).append(name)
        elif name.startswith("cls.seq_relationship."):
            kinds.setdefault("next-sentence head", []).append(name)
        elif name.startswith(f"{HEAD}."):
            kinds.setdefault("head of masked words", []).append(name)
        elif name.startswith("embeddings."):
            kinds.setdefault("embeddings", []).append(name)
        else:
            kinds.setdefault(name, []).append(name)
    return ", ".join(([_numbers(sorted(layers))] if layers else []) + sorted(kinds))


@torch.no_grad()
def load_language(model: MplugModel, start: StartSection, tokenizer: Tokenizer) -> list[Origin]:
    """Fill text encoder, fusion and decoder as the recipe's ``start`` says; returns what came from where.

    With ``start.text`` alone the decoder gets its words, too, where it is as wide. Pieces that a BERT doesn't know,
    such as box tokens, stay as they are.
    """
    config, own = model.config, model.state_dict()
    starts = language_starts(start, config, tokenizer, own)
    for part in starts:
        for name, value in part.state.items():
            own[name].copy_(value)
        for name, (rows, values) in part.rows.items():
            own[name][rows] = values
    if start.text and not start.decoder and model.decoder is not None:
        words = model.text.embeddings.words.weight
        if model.decoder.embeddings.words.weight.shape == words.shape:
            model.decoder.embeddings.words.load_state_dict({"weight": words.detach()})
    if start.text and config.text_pooling == "mean" and config.embed_dim == config.width:
        # a sentence encoder's mean is its sentence embedding: the projection starts as the identity
        torch.nn.init.eye_(model.text_projection.weight)
        torch.nn.init.zeros_(model.text_projection.bias)
    return [part.origin for part in starts]


@torch.no_grad()
def class_name_features(config: MplugConfig, name: str) -> Tensor:
    """[classes, width] mean-pooled unit features of the ImageNet class names, by the BERT folder ``name``."""
    from timm.data import ImageNetInfo

    bert = open_bert(name)
    tokenizer = Tokenizer(bert.pieces)
    full = config.model_copy(update={"vocab_size": tokenizer.vocab_size})
    encoder = TextEncoder(full)
    own = {f"text.{key}": value for key, value in encoder.state_dict().items()}
    start = text_start(bert, full, tokenizer, own)
    for key, value in start.state.items():
        own[key].copy_(value)
    for key, (rows, values) in start.rows.items():
        own[key][rows] = values
    info = ImageNetInfo()
    # a class may have several names: the first is the common one
    names = [info.index_to_description(i).split(",")[0].lower() for i in range(config.image_head.classes)]
    ids, mask = pad([tokenizer.encode(f"a photo of a {name}") for name in names], tokenizer.pad_id)
    hidden = encoder.eval()(ids, mask) * mask[..., None]
    return F.normalize(hidden.sum(1) / mask.sum(1, keepdim=True), dim=-1)
