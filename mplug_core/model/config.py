"""The architecture as data: :class:`MplugConfig`, and the named sizes in ``sizes.yaml``.

Importing this module does not import torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from mplug_core.bounded import Unreadable, read_json
from mplug_core.errors import CheckpointError
from mplug_core.recipe import ModelSection, Section, named_size


class Calibration(Section):
    """What makes a confidence the probability of being right; :mod:`mplug_core.tasks.confidence` applies it.

    The ``temperature`` divides the logits of a confidence; ``bias`` is added where the confidence is that of one text
    or box, not a share among several.
    """

    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)
    bias: float = Field(0.0, allow_inf_nan=False)


class MplugConfig(ModelSection):
    """A complete architecture: what a recipe's ``model`` section says, with what follows from it.

    ``calibration`` is measured on the trained weights, so no recipe has it, and training starts without it.
    """

    calibration: dict[Literal["vqa", "choices", "grounding", "statement", "entailment"], Calibration] = Field(
        default_factory=dict
    )

    @classmethod
    def named(cls, size: str, **overrides: Any) -> MplugConfig:
        """The configuration of a named size (tiny, small, base, large), with ``overrides`` of single fields."""
        return cls(**{**named_size(size), **overrides})

    @classmethod
    def load(cls, file: Path) -> MplugConfig:
        """Read ``config.json`` of a model folder."""
        try:
            return cls.model_validate(read_json(file))
        except Unreadable as error:
            raise CheckpointError(f"cannot read {file}: {error}", "give a model folder with a config.json") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise CheckpointError(f"{file}: {where}: {first['msg'].removeprefix('Value error, ')}") from error

    def save(self, file: Path) -> None:
        """Write ``config.json``."""
        Path(file).write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    def architecture(self) -> dict[str, Any]:
        """The fields that a recipe's ``model`` section has."""
        return self.model_dump(exclude={"calibration"})

    @property
    def connected_layers(self) -> list[int]:
        """Fusion layers in which both streams attend to each other (paper section 3.2; see ``rule``)."""
        layers = range(self.fusion_layers)
        if self.fusion == "connected":
            return list(layers)
        if self.fusion != "skip":
            return []
        if self.rule == "released":
            return [k for k in layers if k and k % self.stride == 0]
        return [k for k in layers if (k + 1) % (self.stride + 1) == 0]
