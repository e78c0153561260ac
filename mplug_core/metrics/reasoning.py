"""Scores of reasoning: accuracy, NLVR2's consistency, accuracy per label; and predictions as NLVR2's evaluation reads.

What has no label (a hidden test split) takes part in no score.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from mplug_core.errors import DataError
from mplug_core.metrics.intervals import Measure, clusters_of, mean, means_by_kind, values


def score_labels(
    predicted: Sequence[str],
    labels: Sequence[str | None],
    groups: Sequence[str] | None = None,
    per_label: bool = False,
    kinds: Sequence[str] | None = None,
) -> dict[str, float]:
    """``accuracy``: the share of examples with the right label; empty if there is no label at all.

    With ``groups`` (a name per example, empty for none; NLVR2: one sentence on several pairs) also ``consistency``, the
    share of groups of which every example is right (Suhr et al. 2019, section 5). With ``per_label``
    ``accuracy_LABEL`` of the examples whose right label it is, with ``kinds`` ``accuracy_KIND`` of those of a kind.
    """
    return values(label_measures(predicted, labels, range(len(labels)), groups, per_label, kinds))


def label_measures(
    predicted: Sequence[str],
    labels: Sequence[str | None],
    images: Sequence[Hashable],
    groups: Sequence[str] | None = None,
    per_label: bool = False,
    kinds: Sequence[str] | None = None,
) -> dict[str, Measure]:
    """The metrics of :func:`score_labels` as sums over examples; those of one image, or of one group, are a cluster."""
    groups = groups or [""] * len(labels)
    clusters = clusters_of(images, groups)
    right = [None if label is None else float(said == label) for said, label in zip(predicted, labels, strict=True)]
    found = means_by_kind("accuracy", clusters, right, kinds or [""] * len(labels))
    if per_label:
        each = [label or "" for label in labels]
        found |= {
            f"accuracy_{label}": mean(clusters, [r or 0.0 for r in right], [label == one for one in each])
            for label in dict.fromkeys(each)
            if label
        }
    grouped: dict[str, list[int]] = defaultdict(list)
    for place, (group, value) in enumerate(zip(groups, right, strict=True)):
        if group and value is not None:
            grouped[group].append(place)
    if grouped:
        whole = [all(right[place] for place in places) for places in grouped.values()]
        found["consistency"] = mean([clusters[places[0]] for places in grouped.values()], whole)
    return dict(sorted(found.items()))


def submission(predictions: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """``identifier,True`` lines, as NLVR2's evaluation reads them, of an evaluation's predictions on statements."""
    for prediction in predictions:
        if not prediction.get("identifier"):
            raise DataError("a prediction has no identifier", "records of NLVR2 have one each")
        yield f"{prediction['identifier']},{str(prediction['label']).capitalize()}"
