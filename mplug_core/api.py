"""mPLUG in Python: :func:`load` gives an :class:`Mplug`, which captions, answers, ranks, finds and judges.

>>> import mplug_core
>>> model = mplug_core.load()
>>> print(model.caption("examples/coffee.jpg"))
a close up of a bowl of food

**Images** are whatever a program has of them (:data:`ImageSource`): a path, an http(s) address, a ``data:`` URL or
base64, the bytes of a file, an open binary file, a dict ``{"bytes", "path"}``, a Pillow image, a uint8 array [H, W, 3],
a uint8 tensor [3, H, W], a float tensor [3, S, S] of normalised pixels, or a :class:`Picture` of :meth:`Mplug.encode`.
One image has one result; several (a list or another iterable of images, an array or tensor with a batch dimension in
front) have a list of results in their order. Files are opened in threads while the
model computes. An image is encoded once in a call however many texts come with it, and once for several calls if it is
encoded before them.

**Errors** are :class:`~mplug_core.errors.MplugError`: ImageError for the first image that can't be used, which it
names; UsageError for a call that makes no sense; CheckpointError for a model that is none, or that lacks a part.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, overload

import torch
from PIL import Image
from torch import Tensor

from mplug_core.allocator import keep_freed_memory
from mplug_core.cpu import settle_threads
from mplug_core.data.images import placed_transform
from mplug_core.data.pictures import ImageSource, Picture, is_one_image, open_picture
from mplug_core.data.text import clean_caption
from mplug_core.device import choose_device
from mplug_core.errors import CheckpointError, MplugError, NotFiniteError, UsageError
from mplug_core.generation import Answer, Decoding, DecodingOptions, seed_of
from mplug_core.limits import MOST_AT_ONCE
from mplug_core.model.mplug import ImageEncoding
from mplug_core.recipe import CLASSES
from mplug_core.tasks.answering import MOSTLY_UNKNOWN, AnswerBatch, Asked, Request, answer_requests, unknown_note
from mplug_core.tasks.task import need
from mplug_core.weights.destination import check_destination
from mplug_core.weights.folder import Loaded, load_model, texts_beside, write_folder
from mplug_core.weights.quantised import computes_int8, to_float_layers

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "Answer", "Box", "ImageSource", "Images", "Judgement", "Mplug", "Picture", "RankedText", "UnknownTextWarning",
    "load",
]  # fmt: skip

R = TypeVar("R")

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SEEDS = (-(2**63), 2**64 - 1)
"""What PyTorch takes for a seed, the least and the largest."""

OFFLINE_VARIABLE = "MPLUG_OFFLINE"

Images: TypeAlias = Iterable[ImageSource]
"""Several images; of an array or a tensor the first dimension."""


@dataclass(frozen=True)
class Box:
    """Corners in pixels of the upright picture, x from the left and y from the top, and how sure the model is: how
    probable it is, or without a calibration how probable the model thinks it, that the box overlaps the true one by
    half; None where half or more of the phrase is ``unknown`` to the vocabulary, by its pieces."""

    x0: float
    y0: float
    x1: float
    y1: float
    confidence: float | None
    unknown: float = 0.0

    @property
    def corners(self) -> tuple[float, float, float, float]:
        """``(x0, y0, x1, y1)``, as Pillow's drawing takes them."""
        return self.x0, self.y0, self.x1, self.y1

    def __str__(self) -> str:
        return " ".join(f"{round(value, 1):g}" for value in self.corners)


@dataclass(frozen=True)
class Judgement:
    """The label that is most probable, and the probabilities of all, calibrated where the model is.

    ``probability`` is None where half or more of the text is ``unknown`` to the vocabulary, by its pieces:
    ``probabilities`` are then what the model computes of what is left of it.
    """

    label: str
    probability: float | None
    probabilities: dict[str, float]
    unknown: float = 0.0

    def __str__(self) -> str:
        return self.label


@dataclass(frozen=True)
class RankedText:
    """A text, its place in what was given (``number``, from 0), the score that it is ranked by, the cosine similarity
    of image and text, the logit "match" where matching has looked at the two, and the share of the text's pieces that
    are ``unknown`` to the vocabulary."""

    text: str
    number: int
    score: float
    similarity: float
    match: float | None = None
    unknown: float = 0.0

    def __str__(self) -> str:
        return self.text


class UnknownTextWarning(UserWarning):
    """Half or more of a text's pieces are unknown to the model's vocabulary, so that answers to it mean little."""


@dataclass(frozen=True)
class _Question:
    text: str = ""
    classifier: str = ""


@dataclass(frozen=True)
class _Source:
    """One given image; equal keys are the same image. ``name`` is what errors call it if it has no name."""

    key: Hashable
    value: Any = field(compare=False)
    name: str = field(compare=False)


class Mplug(Loaded):
    """A model and what it can do, in evaluation mode.

    ``model`` is the network (a ``torch.nn.Module``, tensors in, tensors out), ``tokenizer`` and ``config`` belong to
    it, ``device`` and ``dtype`` are where and in what it computes, ``folder`` is what it was read from.
    """

    @classmethod
    def from_pretrained(
        cls,
        spec: str | os.PathLike[str] | None = None,
        *,
        revision: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        image_size: int | None = None,
        local_files_only: bool = False,
        without: Iterable[str] = (),
    ) -> Mplug:
        """Read a model.

        Args:
            spec: what ``--model`` of the command line takes. Default: ``$MPLUG_MODEL``, else the embedded model.
            revision: branch, tag or commit of a repository: the same as ``spec@revision``.
            device: ``cpu``, ``cuda``, ``cuda:N`` or ``mps``. Default: CUDA where there is any, else the CPU.
            dtype: of weights and computation, a ``torch.dtype`` or its name. Default: ``$MPLUG_DTYPE``, else bfloat16
                on CUDA and for vision transformers on a CPU with matrix units for it (AMX), float32 elsewhere.
            image_size: side in pixels of the square that images are brought to. Default: the model's own.
            local_files_only: take what was downloaded before, and no network.
            without: parts (``text``, ``fusion``, ``decoder``) to leave out of memory; what needs them fails.

        On a CPU the process then computes with the cores that it may use, see :func:`~mplug_core.cpu.settle_threads`,
        and keeps memory that was freed for the next batch.

        Raises:
            CheckpointError: there is no such model, or it is damaged; MplugError: this machine has no such device.

        >>> Mplug.from_pretrained("runs/mine", device="cpu").config.vision.image_size
        256
        """
        name = None if spec is None else os.fspath(spec)
        if revision is not None:
            if not name or not name.lower().startswith(("hf:", "ms:")) or "@" in name:
                raise UsageError(f"a revision is one of a repository, not of {name}", "hf:org/name or ms:org/name")
            name = f"{name}@{revision}"
        if image_size is not None:
            _whole_number("image_size", image_size, 1)
        where = choose_device(None if device is None else str(device))
        settle_threads()
        if where == "cpu":
            keep_freed_memory()
        with _offline(local_files_only):
            loaded = load_model(name, where, _dtype(dtype), without, image_size)
        return cls(**{part.name: getattr(loaded, part.name) for part in fields(loaded)})

    def save_pretrained(self, folder: str | os.PathLike[str], *, dtype: torch.dtype | str | None = None) -> Path:
        """Write a model folder that :func:`load` and ``--model`` read, whole or not at all; returns it.

        Weights are stored as ``dtype`` (default: as they are, so that the folder gives the very same answers;
        ``"bfloat16"`` halves a float32 model). The model card and the recipe go along. A model folder that is there is
        replaced; MplugError for any other that is not empty, for a model that was loaded without some part, or where
        the folder can't be written.

        >>> model.save_pretrained("my-model", dtype="bfloat16")
        PosixPath('my-model')
        """
        check_destination(folder, force=True)
        hollow = [name for name, value in self.model.state_dict().items() if value.is_meta]
        if hollow:
            raise CheckpointError(f"{self.name} has no weights of {hollow[0].split('.')[0]}", "load the whole model")
        texts, kind = texts_beside(self.folder), _dtype(dtype) or self.dtype
        write_folder(folder, self.config, self.tokenizer, self.model.state_dict(), kind, texts)
        return Path(folder)

    def push_to_hub(
        self,
        target: str,
        *,
        private: bool = False,
        revision: str | None = None,
        message: str | None = None,
        licence: str | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> str:
        """Upload the model with a model card, in one commit; returns its address.

        ``target`` is ``org/name`` on Hugging Face, or ``ms:org/name`` on ModelScope; ``dtype`` as in
        :meth:`save_pretrained`. MplugError, in one line, for what a hub or the network says.

        >>> model.push_to_hub("org/name", private=True, licence="apache-2.0")
        'https://huggingface.co/org/name/commit/...'
        """
        from mplug_core.weights.publish import prepare, push
        from mplug_core.weights.target import Target

        place = Target.parse(target if target.startswith(("hf:", "ms:")) else f"hf:{target}")
        with tempfile.TemporaryDirectory() as folder:
            saved = self.save_pretrained(Path(folder) / "model", dtype=dtype)
            return push(prepare(str(saved), place, private, revision, message, licence))

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | str | None = None) -> Mplug:
        """Move the network to a device, and have it compute in ``dtype``; returns this object.

        The type stays as it is where none is named: a model that was loaded on the CPU computes in float32 on a GPU.
        Int8 weights become floats where that device and type can't compute with them.

        >>> model = model.to("cuda", "bfloat16")
        """
        where = self.device if device is None else torch.device(choose_device(str(device)))
        kind = _dtype(dtype) or self.dtype

        def moved(tensor: Tensor) -> Tensor:
            if tensor.is_meta:  # of a part that was left out
                return tensor
            return tensor.to(where, kind) if tensor.is_floating_point() else tensor.to(where)

        if not computes_int8(where, kind):
            to_float_layers(self.model)
        self.model._apply(moved)  # Module.to refuses parts on the meta device
        return self

    def eval(self) -> Mplug:
        """Put the network back into evaluation mode, after it was trained; returns this object."""
        self.model.eval()
        return self

    @overload
    def caption(
        self, images: ImageSource, *, n: int = ..., seed: int | None = ..., batch_size: int = ...,
        **decoding: Unpack[DecodingOptions],
    ) -> Answer: ...  # fmt: skip
    @overload
    def caption(
        self, images: Images, *, n: int = ..., seed: int | None = ..., batch_size: int = ...,
        **decoding: Unpack[DecodingOptions],
    ) -> list[Answer]: ...  # fmt: skip
    def caption(
        self,
        images: ImageSource | Images,
        *,
        n: int = 1,
        seed: int | None = None,
        batch_size: int = 16,
        **decoding: Unpack[DecodingOptions],
    ) -> Answer | list[Answer]:
        """Describe images in a sentence each.

        Args:
            images: one, or several.
            n: captions for each image; the best has the next ones in its ``others``.
            seed: repeats what ``strategy="sample"`` draws: the k-th caption of a picture depends on the seed, the
                picture as the model sees it, and k, not on the batch or its other pictures.
            batch_size: images computed at once.
            decoding: ``strategy``, ``beams``, ``min_tokens``, ``max_tokens``, ``length_penalty``, ``no_repeat``,
                ``top_p``, ``temperature`` of :class:`~mplug_core.generation.Decoding`. Default: 6 beams, 5 to 25 tokens
                (:attr:`CaptionTask.decoding`).

        >>> model.caption("examples/coffee.jpg").text
        'a close up of a bowl of food'
        """
        return self._ask(images, None, self.captioner(n=n, seed=seed, **decoding), batch_size)

    @overload
    def answer(
        self, images: ImageSource, questions: str, *, choices: Sequence[str] | None = ..., n: int = ...,
        seed: int | None = ..., batch_size: int = ..., **decoding: Unpack[DecodingOptions],
    ) -> Answer: ...  # fmt: skip
    @overload
    def answer(
        self, images: ImageSource | Images, questions: str | Sequence[str], *, choices: Sequence[str] | None = ...,
        n: int = ..., seed: int | None = ..., batch_size: int = ..., **decoding: Unpack[DecodingOptions],
    ) -> list[Answer]: ...  # fmt: skip
    def answer(
        self,
        images: ImageSource | Images,
        questions: str | Sequence[str],
        *,
        choices: Sequence[str] | None = None,
        n: int = 1,
        seed: int | None = None,
        batch_size: int = 16,
        **decoding: Unpack[DecodingOptions],
    ) -> Answer | list[Answer]:
        """Answer questions on images in a word or a few.

        One image with several questions, several images with one question, and as many images as questions (the first
        with the first) have a list of answers.

        Args:
            images: one, or several.
            questions: one, or several.
            choices: choose among these instead of writing; confidences are then probabilities among them, calibrated
                where the model is for ``choices``.
            n: answers to each question; the best has the next ones in its ``others``.
            seed: repeats what ``strategy="sample"`` draws, by the picture and the question; see :meth:`caption`.
            batch_size: images, and questions, computed at once.
            decoding: as of :meth:`caption`. Default: greedy, 1 to 10 tokens (:attr:`VqaTask.decoding`).

        >>> model.answer("examples/cat.jpg", "what animal is this?").text
        'cat'
        """
        choices = None if choices is None else _choices(choices)
        answer = self.answerer(choices=choices, n=n, seed=seed, **decoding)
        self._warn_of_unknown(choices or ())
        return self._ask(images, questions, answer, batch_size)

    @overload
    def ground(
        self, images: ImageSource, phrases: str, *, draws: int | None = ..., batch_size: int = ...
    ) -> Box: ...  # fmt: skip
    @overload
    def ground(
        self, images: ImageSource | Images, phrases: str | Sequence[str], *, draws: int | None = ...,
        batch_size: int = ...,
    ) -> list[Box]: ...  # fmt: skip
    def ground(
        self,
        images: ImageSource | Images,
        phrases: str | Sequence[str],
        *,
        draws: int | None = None,
        batch_size: int = 16,
    ) -> Box | list[Box]:
        """Find what phrases mean on images; images and phrases go together as in :meth:`answer`.

        ``draws`` boxes are drawn of which the safest is the answer, 0: greedy (default:
        :data:`~mplug_core.tasks.grounding.DRAWS`). Boxes are in pixels of the image as given: of a file those of the
        upright picture in its full size, of normalised pixels those of the square.

        >>> print(model.ground("examples/scenes/second.jpg", "the large blue square"))
        121.8 39.2 200.3 117.7
        """
        return self._ask(images, phrases, self.grounder(draws=draws), batch_size)

    @overload
    def reason(
        self, images: ImageSource, second: ImageSource | None = ..., *, statement: str | None = ...,
        hypothesis: str | None = ..., batch_size: int = ...,
    ) -> Judgement: ...  # fmt: skip
    @overload
    def reason(
        self, images: ImageSource | Images, second: ImageSource | Images | None = ..., *,
        statement: str | Sequence[str] | None = ..., hypothesis: str | Sequence[str] | None = ...,
        batch_size: int = ...,
    ) -> list[Judgement]: ...  # fmt: skip
    def reason(
        self,
        images: ImageSource | Images,
        second: ImageSource | Images | None = None,
        *,
        statement: str | Sequence[str] | None = None,
        hypothesis: str | Sequence[str] | None = None,
        batch_size: int = 16,
    ) -> Judgement | list[Judgement]:
        """Judge a statement on one image or two, or a hypothesis on one.

        Of a ``statement`` the label is ``"true"`` or ``"false"``; of a ``hypothesis`` ``"entailment"``, ``"neutral"``
        or ``"contradiction"``. One of the two is given. Several images, each with its ``second``, and several texts go
        together as in :meth:`answer`.

        >>> left, right = "examples/scenes/first.jpg", "examples/scenes/second.jpg"
        >>> model.reason(left, right, statement="only the right image contains a blue object").label
        'true'
        >>> model.reason(right, hypothesis="there is a blue square").label
        'entailment'
        """
        if (statement is None) == (hypothesis is None):
            raise UsageError("either a statement or a hypothesis is judged", "give one of the two")
        classifier, texts = ("statement", statement) if hypothesis is None else ("entailment", hypothesis)
        if second is not None and hypothesis is not None:
            raise UsageError("a hypothesis is about one image", "leave the second out")
        need(classifier in self.config.classifiers, f"classifier {classifier}")
        return self._ask(images, texts, self.reasoner(), batch_size, second, classifier)

    @overload
    def rank(
        self, images: ImageSource, texts: Sequence[str], *, rerank: Literal["itc", "itm", "itm+itc"] | None = ...,
        candidates: int | None = ..., top: int | None = ..., batch_size: int = ...,
    ) -> list[RankedText]: ...  # fmt: skip
    @overload
    def rank(
        self, images: Images, texts: Sequence[str], *, rerank: Literal["itc", "itm", "itm+itc"] | None = ...,
        candidates: int | None = ..., top: int | None = ..., batch_size: int = ...,
    ) -> list[list[RankedText]]: ...  # fmt: skip
    def rank(
        self,
        images: ImageSource | Images,
        texts: Sequence[str],
        *,
        rerank: Literal["itc", "itm", "itm+itc"] | None = None,
        candidates: int | None = None,
        top: int | None = None,
        batch_size: int = 32,
    ) -> list[RankedText] | list[list[RankedText]]:
        """Order texts by how well they suit an image, the best first; for several images a list of such lists.

        Args:
            images: one, or several.
            texts: what to order. They are encoded once for all images.
            rerank: the score. ``"itc"``: cosine similarity of the contrastive features. ``"itm"``: the best by ITC are
                ordered by the matching head, which looks at image and text together. ``"itm+itc"``: by the sum of
                both. Default: ``"itm"``, or ``"itc"`` for a model whose matching is not made for it.
            candidates: how many of the best by ITC, at least ``top``, are re-ranked; the others stand behind them.
                Default: as many as the model's configuration says, or all where ``rerank`` asks more of it.
            top: how many to list. Default: all.
            batch_size: images computed at once.

        >>> [ranked.text for ranked in model.rank("examples/cat.jpg", ["two boys play soccer", "a cat lying down"])]
        ['a cat lying down', 'two boys play soccer']
        """
        if not isinstance(texts, str):
            texts = list(texts)
        rank = self.ranker(texts, rerank=rerank, candidates=candidates, top=top)
        self._warn_of_unknown(texts)
        return self._ask(images, None, rank, batch_size)

    @overload
    def encode(self, images: ImageSource, *, batch_size: int = ...) -> Picture: ...
    @overload
    def encode(self, images: Images, *, batch_size: int = ...) -> list[Picture]: ...
    def encode(self, images: ImageSource | Images, *, batch_size: int = 32) -> Picture | list[Picture]:
        """Look at images once, for several calls: a :class:`Picture`, or a list of them, to give in their place.

        Its ``encoding`` is the network's :class:`~mplug_core.model.mplug.ImageEncoding` with one row, and belongs to
        this model.

        >>> picture = model.encode("examples/cat.jpg")
        >>> str(model.caption(picture)), str(model.answer(picture, "what animal is this?"))
        ('a cat sitting on top of a bed', 'cat')
        """

        def seen(encoding: ImageEncoding, asked: list[Asked]) -> list[Picture]:
            rows = [torch.tensor([one.rows[0]], device=self.device) for one in asked]
            return [replace(one.pictures[0], encoding=encoding[row]) for one, row in zip(asked, rows, strict=True)]

        return self._ask(images, None, seen, batch_size)

    def encode_image(self, images: ImageSource | Images, *, batch_size: int = 32) -> Tensor:
        """Contrastive features of unit length: [E] of one image, [n, E] of several; float32, on the CPU.

        >>> similarity = model.encode_image(["a.jpg", "b.jpg"]) @ model.encode_text(["a cat", "a dog", "a bird"]).T
        >>> similarity.shape
        torch.Size([2, 3])
        """

        need(self.model.image_projection is not None, "contrastive head")

        def feature(encoding: ImageEncoding, asked: list[Asked]) -> list[Tensor]:
            return list(encoding.feature[_rows(asked, self.device)].float().cpu())

        found = self._ask(images, None, feature, batch_size)
        if isinstance(found, Tensor):
            return found.clone()  # one that autograd takes
        return torch.stack(found) if found else torch.empty(0, self.config.embed_dim)

    def encode_text(self, texts: str | Sequence[str], *, batch_size: int = 256) -> Tensor:
        """Contrastive features of unit length: [E] of one text, [n, E] of several; float32, on the CPU.

        >>> model.encode_text("a cat").shape
        torch.Size([384])
        """
        from mplug_core.tasks.ranking import encode_texts

        _whole_number("batch_size", batch_size, 1, MOST_AT_ONCE)
        listed = [clean_caption(text) for text in _texts(texts, "text")]
        found = encode_texts(self, listed, keep_tokens=False, batch_size=batch_size).feature.clone()
        if not found.isfinite().all():
            raise NotFiniteError.of("the feature of a text")
        self._warn_of_unknown(listed)
        return found[0] if isinstance(texts, str) else found

    # What follows answers batches of an encoding: for programs that read, batch or stream their own way, see
    # mplug_core.tasks.answering.

    def open(self, image: ImageSource, name: str = "the image") -> Picture:
        """One image as this model will see it, not yet encoded; ``name`` is what errors call an image without name."""
        return open_picture(image, placed_transform(self.config.vision), name)

    def place(self, picture: Image.Image) -> Picture:
        """An upright RGB picture that is open already, as this model will see it."""
        return Picture.placed(picture, placed_transform(self.config.vision))

    def captioner(
        self, *, n: int = 1, seed: int | None = None, **decoding: Unpack[DecodingOptions]
    ) -> AnswerBatch[Answer]:
        """Captions of the first image of each question; arguments as of :meth:`caption`."""
        from mplug_core.tasks.caption import CaptionTask, describe

        chosen = self.decoding("caption", CaptionTask.decoding).asked(n, self.room, **decoding)
        _check_seed(seed, chosen)

        def caption(images: ImageEncoding, asked: list[Asked]) -> list[Answer]:
            found = describe(self, images[_rows(asked, self.device)], chosen, _seeds(seed, asked))
            return [_best(answers, n) for answers in found]

        return caption

    def answerer(
        self,
        *,
        choices: Sequence[str] | None = None,
        n: int = 1,
        seed: int | None = None,
        **decoding: Unpack[DecodingOptions],
    ) -> AnswerBatch[Answer]:
        """Answers to questions (their ``text``); arguments as of :meth:`answer`."""
        from mplug_core.tasks import vqa

        need(self.model.decoder is not None, "decoder")
        chosen = self.decoding("vqa", vqa.VqaTask.decoding).asked(n, self.room, **decoding)
        if choices is not None and any(value is not None for value in decoding.values()):
            raise UsageError("choices are ranked, and decoding options are for writing", "leave one of them out")
        if choices is not None:
            choices = _choices(choices)
        shares = {choice: self.unknown_share(choice) for choice in choices or ()}
        _check_seed(seed, chosen)

        def answer(images: ImageEncoding, asked: list[Asked]) -> list[Answer]:
            rows, texts = [one.rows[0] for one in asked], [one.question.text for one in asked]
            if choices is not None:
                found = vqa.rank_answers(self, images, rows, texts, choices)
            else:
                found = vqa.answer_questions(self, images, rows, texts, chosen, _seeds(seed, asked))
            asked_of = map(self.unknown_share, texts)
            return [
                _best([_less_sure(a, max(share, shares.get(a.text, 0.0))) for a in answers[:n]], n)
                for answers, share in zip(found, asked_of, strict=True)
            ]

        return answer

    def grounder(self, *, draws: int | None = None) -> AnswerBatch[Box]:
        """Boxes of phrases (the ``text`` of questions); arguments as of :meth:`ground`."""
        from mplug_core.tasks import grounding

        need(self.model.decoder is not None, "decoder")
        need(self.tokenizer.bins, "box tokens")
        settings = {} if draws is None else {"draws": _whole_number("draws", draws, 0, MOST_AT_ONCE)}

        def ground(images: ImageEncoding, asked: list[Asked]) -> list[Box]:
            rows, texts = [one.rows[0] for one in asked], [one.question.text for one in asked]
            boxes, confidences = grounding.find_boxes(self, images, rows, texts, **settings)
            return [
                _less_sure(_in_pixels(one.pictures[0], box, confidence), self.unknown_share(one.question.text))
                for one, box, confidence in zip(asked, boxes.tolist(), confidences.tolist(), strict=True)
            ]

        return ground

    def reasoner(self) -> AnswerBatch[Judgement]:
        """Labels of statements and hypotheses: of the ``text`` of questions by the classifier that they name.

        A question for a classifier that the model lacks has a CheckpointError as its result.
        """
        from mplug_core.tasks.reasoning import LABELS, judge

        known = {name for name in CLASSES if name in self.config.classifiers}

        def reason(images: ImageEncoding, asked: list[Asked]) -> list[Judgement | MplugError]:
            results: list[Judgement | MplugError] = [
                CheckpointError(f"this model has no classifier {one.question.classifier}") for one in asked
            ]
            for classifier in known:
                mine = [place for place, one in enumerate(asked) if one.question.classifier == classifier]
                if not mine:
                    continue
                rows, texts = [asked[place].rows for place in mine], [asked[place].question.text for place in mine]
                found = judge(self, classifier, images, rows, texts).tolist()
                for place, probabilities in zip(mine, found, strict=True):
                    by_label = dict(zip(LABELS[classifier], probabilities, strict=True))
                    label = max(by_label, key=by_label.__getitem__)
                    share = self.unknown_share(asked[place].question.text)
                    sure = by_label[label] if share < MOSTLY_UNKNOWN else None
                    results[place] = Judgement(label, sure, by_label, share)
            return results

        return reason

    def ranker(
        self,
        texts: Sequence[str],
        *,
        rerank: Literal["itc", "itm", "itm+itc"] | None = None,
        candidates: int | None = None,
        top: int | None = None,
    ) -> AnswerBatch[list[RankedText]]:
        """Texts in order for the first image of each question; arguments as of :meth:`rank`."""
        from mplug_core.search.gallery import find_texts
        from mplug_core.tasks.ranking import default_candidates, encode_texts

        if isinstance(texts, str):
            raise UsageError("several texts are ranked", "give a list of them")
        need(self.model.image_projection is not None, "contrastive head")
        listed = _texts(texts, "text")
        if rerank not in (None, "itc", "itm", "itm+itc"):
            raise UsageError(f"no rerank {rerank!r}", "itc, itm or itm+itc")
        if candidates is None and rerank != "itc":
            candidates = default_candidates(self) or (len(listed) if rerank else 0)
        if rerank == "itc":
            candidates = 0
        need(not candidates or self.model.matching_head is not None, "matching head")
        encoded = encode_texts(self, [clean_caption(text) for text in listed], keep_tokens=candidates > 0)
        how = "itm+itc" if rerank == "itm+itc" else "itm"
        shares = [self.unknown_share(text) for text in listed]

        def rank(images: ImageEncoding, asked: list[Asked]) -> list[list[RankedText]]:
            rows = _rows(asked, self.device)
            found = find_texts(self, images[rows], encoded, top=top, candidates=candidates, rerank=how)
            return [
                [
                    RankedText(
                        listed[hit.number], hit.number, hit.score, hit.similarity, hit.match, shares[hit.number]
                    )
                    for hit in hits
                ]
                for hits in found
            ]

        return rank

    def _ask(
        self,
        images: ImageSource | Images,
        texts: str | Sequence[str] | None,
        answer: AnswerBatch[R],
        batch_size: int,
        second: ImageSource | Images | None = None,
        classifier: str = "",
    ) -> Any:
        """The result of one image and one text (or none), or a list of results in the order of the images, or texts."""
        _whole_number("batch_size", batch_size, 1, MOST_AT_ONCE)
        columns = [_sources(images, "images"), *([] if second is None else [_sources(second, "second")])]
        columns.append(_questions(texts, classifier))
        lists = [column for column in columns if isinstance(column, list)]
        counts = {len(column) for column in lists}
        if len(counts) > 1:
            raise UsageError(f"{' and '.join(map(str, sorted(counts)))} do not go together", "give as many of each")
        count = counts.pop() if lists else 1
        # by images, so that one that is named again has all of its questions at once
        places: dict[tuple[_Source, ...], list[int]] = {}
        questions: dict[tuple[_Source, ...], list[_Question]] = {}
        whole = [column if isinstance(column, list) else [column] * count for column in columns]
        for place, (*sources, question) in enumerate(zip(*whole, strict=True)):
            places.setdefault(tuple(sources), []).append(place)
            questions.setdefault(tuple(sources), []).append(question)
        requests = [Request(sources, tuple(asked)) for sources, asked in questions.items()]
        self._warn_of_unknown(question.text for asked in questions.values() for question in asked if question.text)
        results: list[Any] = [None] * count

        def read(source: _Source) -> Picture:
            return self.open(source.value, source.name)

        for batch in answer_requests(self, requests, read, answer, batch_size):
            for answered in batch:
                for place, result in zip(places[answered.request.images], answered.results, strict=True):
                    if isinstance(result, MplugError):
                        raise result
                    results[place] = result
        return results if lists else results[0]

    def _warn_of_unknown(self, texts: Iterable[str]) -> None:
        """An :class:`UnknownTextWarning` for each text of which the vocabulary knows little."""
        for text in dict.fromkeys(texts):
            if (share := self.unknown_share(text)) >= MOSTLY_UNKNOWN:
                warnings.warn(unknown_note(text, share), UnknownTextWarning, stacklevel=3)

    __eq__, __hash__ = object.__eq__, object.__hash__

    def __repr__(self) -> str:
        int8 = [buffer for buffer in self.model.buffers() if buffer.dtype == torch.int8]
        millions = sum(values.numel() for values in [*self.model.parameters(), *int8]) / 1e6
        return f"Mplug({self.name!r}, {millions:.1f} million parameters, {self.device}, {self.dtype})"


def load(
    spec: str | os.PathLike[str] | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    image_size: int | None = None,
) -> Mplug:
    """Read a model: what ``--model`` takes, by default ``$MPLUG_MODEL``, else the embedded one.

    Arguments and errors as of :meth:`Mplug.from_pretrained`.

    >>> model = mplug_core.load("runs/mine", device="cuda:0")
    """
    return Mplug.from_pretrained(spec, device=device, dtype=dtype, image_size=image_size)


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None:
        return None
    found = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype), None)
    if found not in FLOATS:
        raise UsageError(f"no dtype {dtype!r}", "float32, bfloat16 or float16")
    return found


def _check_seed(seed: int | None, decoding: Decoding) -> None:
    """UsageError for a seed that is none, or of what draws nothing."""
    if seed is not None and decoding.strategy != "sample":
        raise UsageError("seed is for drawing", "add strategy='sample'")
    if seed is not None:
        _whole_number("seed", seed, *SEEDS)


def _seeds(seed: int | None, asked: Sequence[Asked]) -> list[int] | None:
    """The seeds of the draws for each of these questions: of its picture and text, whatever is asked beside it."""
    return None if seed is None else [seed_of(seed, one.pictures[0].content(), one.question.text) for one in asked]


def _whole_number(name: str, value: int, least: int, most: int | None = None) -> int:
    """``value``; UsageError unless it is an int in this range."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise UsageError(f"{name} is an int, not a {type(value).__name__}", f"give one of {least} or more")
    if value < least or (most is not None and value > most):
        raise UsageError(f"{name}={value} is out of range", f"from {least}" + ("" if most is None else f" to {most}"))
    return value


def _choices(choices: Sequence[str]) -> list[str]:
    """Answers to choose among, as a list; UsageError for what is no list of texts."""
    listed = [] if isinstance(choices, str) else list(choices)
    if isinstance(choices, str) or not all(isinstance(choice, str) for choice in listed):
        raise UsageError("choices are several texts", "give a list of them")
    return listed


@contextmanager
def _offline(wanted: bool) -> Iterator[None]:
    """Have whatever would download know that it must not. Not ``HF_HUB_OFFLINE``: that is read once a process."""
    before = os.environ.get(OFFLINE_VARIABLE)
    if wanted:
        os.environ[OFFLINE_VARIABLE] = "1"
    try:
        yield
    finally:
        if wanted and before is None:
            del os.environ[OFFLINE_VARIABLE]
        elif wanted:
            os.environ[OFFLINE_VARIABLE] = before


def _sources(images: ImageSource | Images, name: str) -> _Source | list[_Source]:
    """One image, or several. Equal paths are one image, and so are equal bytes; of the rest the same objects."""
    if is_one_image(images) or not isinstance(images, Iterable):
        return _source(images, "the image")  # opening it says what is wrong
    listed = list(images)
    if not isinstance(images, (list, tuple)) and listed and not any(map(is_one_image, listed)):
        return _source(images, "the image")  # such as a range
    return [_source(image, f"{name}[{place}]") for place, image in enumerate(listed)]


def _source(image: Any, name: str) -> _Source:
    if isinstance(image, (str, os.PathLike)):
        return _Source(os.fspath(image), image, name)
    return _Source(image if isinstance(image, bytes) else id(image), image, name)


def _questions(texts: str | Sequence[str] | None, classifier: str) -> _Question | list[_Question]:
    if texts is None:
        return _Question()
    what = {"": "text", "statement": "statement", "entailment": "hypothesis"}[classifier]
    listed = [_Question(text, classifier) for text in _texts(texts, what)]
    return listed[0] if isinstance(texts, str) else listed


def _texts(texts: str | Sequence[str], what: str) -> list[str]:
    """The texts of a call as a list; UsageError for one without a word, of which a model could see nothing."""
    listed = [texts] if isinstance(texts, str) else list(texts)
    for text in listed:
        if not isinstance(text, str):
            raise UsageError(f"a {what} is expected, not a {type(text).__name__}", "give a str")
        if not any(c.isalnum() for c in text):
            raise UsageError(f"the {what} {text!r} has no word", "give one")
    return listed


def _rows(asked: list[Asked], device: torch.device) -> Tensor:
    return torch.tensor([one.rows[0] for one in asked], device=device)


def _best(answers: list[Answer], n: int) -> Answer:
    return replace(answers[0], others=tuple(answers[1:n]))


def _less_sure(result: R, share: float) -> R:
    """An answer or box that says which share of the text is unknown; without a confidence where that is too much."""
    if not share:
        return result
    unsure = {"confidence": None} if share >= MOSTLY_UNKNOWN else {}
    return replace(result, unknown=share, **unsure)


def _in_pixels(picture: Picture, box: list[float], confidence: float) -> Box:
    """A box of the model's square in pixels of the upright picture."""
    width, height = picture.size
    x0, y0, x1, y1 = picture.placement.to_picture(box)
    return Box(x0 * width, y0 * height, x1 * width, y1 * height, confidence)
