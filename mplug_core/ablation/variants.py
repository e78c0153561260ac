"""The fusion networks that are compared: the paper's four kinds, skip-connected ones with several strides, both rules.

Two descriptions may be the same network: of six layers a stride of 6 connects none, which is the asymmetric one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from mplug_core.errors import UsageError
from mplug_core.model.config import MplugConfig
from mplug_core.recipe import nearest

T = TypeVar("T")

STRIDES = (1, 2, 3, 6)


@dataclass(frozen=True)
class Variant:
    """``fields`` are those of a recipe's ``model`` section that make it this network."""

    name: str
    title: str
    fields: dict[str, Any] = field(compare=False)

    def configure(self, config: MplugConfig) -> MplugConfig:
        """``config`` with this fusion."""
        return config.model_copy(update=self.fields)

    def layout(self, config: MplugConfig) -> str:
        """A letter a layer: c(o-attention), j(oint: connected), a(symmetric)."""
        config = self.configure(config)
        if config.fusion == "co":
            return "c" * config.fusion_layers
        return "".join("j" if k in config.connected_layers else "a" for k in range(config.fusion_layers))


VARIANTS = (
    Variant("co", "co-attention", {"fusion": "co"}),
    Variant("connected", "connected in every layer", {"fusion": "connected"}),
    Variant("asymmetric", "asymmetric co-attention", {"fusion": "asymmetric"}),
    *(
        Variant(f"skip{s}-{rule}", f"skip-connected, S={s}, {rule} rule", {"fusion": "skip", "stride": s, "rule": rule})
        for s in STRIDES
        for rule in ("paper", "released")
    ),
)


def chosen(names: Iterable[str] | None) -> list[Variant]:
    """The variants of these names, in the order of :data:`VARIANTS` (None: all); UsageError for an unknown one."""
    known = {variant.name: variant for variant in VARIANTS}
    names = list(known) if names is None else list(names)
    for name in names:
        if name not in known:
            raise UsageError(f"no fusion {name!r}{nearest(name, known)}", f"one of {', '.join(known)}")
    return [variant for variant in VARIANTS if variant.name in names]


def distinct(variants: Sequence[Variant], config: MplugConfig) -> dict[Variant, list[Variant]]:
    """Each different network by the first variant that is it, with all variants that are it."""
    found: dict[str, list[Variant]] = {}
    for variant in variants:
        found.setdefault(variant.layout(config), []).append(variant)
    return {same[0]: same for same in found.values()}


def of_all(networks: Mapping[Variant, Sequence[Variant]], found: Mapping[str, T]) -> dict[str, T]:
    """What was ``found`` of each of the :func:`distinct` networks, by the name of every variant that is it."""
    return {variant.name: found[first.name] for first, same in networks.items() for variant in same}
