"""Scores of reasoning: accuracy, NLVR2's consistency, accuracy per label; and predictions as NLVR2's evaluation reads.

What has no label (a hidden test split) takes part in no score.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mplug_core.errors import DataError


def score_labels(
    predicted: Sequence[str], labels: Sequence[str | None], groups: Sequence[str] | None = None, per_label: bool = False
) -> dict[str, float]:
    """``accuracy``: the share of examples with the right label; empty if there is no label at all.

    With ``groups`` (a name per example, empty for none; NLVR2: one sentence on several pairs) also ``consistency``, the
    share of groups of which every example is right (Suhr et al. 2019, section 5). With ``per_label``
    ``accuracy_LABEL`` of the examples whose right label it is.
    """
    right: dict[str, list[bool]] = defaultdict(list)
    grouped: dict[str, list[bool]] = defaultdict(list)
    for said, label, group in zip(predicted, labels, groups or [""] * len(labels), strict=True):
        if label is None:
            continue
        right["accuracy"].append(said == label)
        if per_label:
            right[f"accuracy_{label}"].append(said == label)
        if group:
            grouped[group].append(said == label)
    if grouped:
        right["consistency"] = [all(examples) for examples in grouped.values()]
    return {name: sum(values) / len(values) for name, values in sorted(right.items())}


def submission(predictions: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """``identifier,True`` lines, as NLVR2's evaluation reads them, of an evaluation's predictions on statements."""
    for prediction in predictions:
        if not prediction.get("identifier"):
            raise DataError("a prediction has no identifier", "records of NLVR2 have one each")
        yield f"{prediction['identifier']},{str(prediction['label']).capitalize()}"
