"""Tasks by name."""

from __future__ import annotations

from typing import Any

from mplug_core.errors import UsageError
from mplug_core.recipe import nearest
from mplug_core.tasks.caption import CaptionTask
from mplug_core.tasks.grounding import GroundingTask
from mplug_core.tasks.pretrain import PretrainTask
from mplug_core.tasks.reasoning import EntailmentTask, ReasoningTask, StatementTask
from mplug_core.tasks.retrieval import RetrievalTask
from mplug_core.tasks.vqa import VqaTask

TASKS: dict[str, Any] = {
    task.name: task
    for task in (
        PretrainTask(), CaptionTask(), VqaTask(), RetrievalTask(), GroundingTask(), StatementTask, EntailmentTask,
        ReasoningTask(),
    )
}  # fmt: skip
EVALUATED = ("caption", "vqa", "retrieval", "grounding", "statements", "entailment", "reasoning")


def evaluated_task(name: str) -> Any:
    """The task of this name; UsageError names the nearest one."""
    if name not in EVALUATED:
        raise UsageError(f"no task {name!r} to evaluate{nearest(name, EVALUATED)}", f"tasks: {', '.join(EVALUATED)}")
    return TASKS[name]
