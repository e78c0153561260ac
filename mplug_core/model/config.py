"""The architecture as data: :class:`MplugConfig`, and the named sizes in ``sizes.yaml``.

Importing this module does not import torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mplug_core.errors import CheckpointError
from mplug_core.recipe import ModelSection, named_size


class MplugConfig(ModelSection):
    """A complete architecture: what a recipe's ``model`` section says, with what follows from it."""

    @classmethod
    def named(cls, size: str, **overrides: Any) -> MplugConfig:
        """The configuration of a named size (tiny, small, base, large), with ``overrides`` of single fields."""
        return cls(**{**named_size(size), **overrides})

    @classmethod
    def load(cls, file: Path) -> MplugConfig:
        """Read ``config.json`` of a model folder."""
        try:
            return cls.model_validate(json.loads(Path(file).read_text(encoding="utf-8")))
        except OSError as error:
            raise CheckpointError(
                f"cannot read {file}: {error.strerror}", "give a model folder with a config.json"
            ) from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{file} is not JSON: {error}") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise CheckpointError(f"{file}: {where}: {first['msg']}") from error

    def save(self, file: Path) -> None:
        """Write ``config.json``."""
        Path(file).write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

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
