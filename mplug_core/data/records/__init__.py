"""Data sets in: every supported layout becomes a list of typed records, one reader a task.

A reader finds the file (a file, or a folder and a split), recognises its format by looking into it, and returns
:class:`Records`: what is usable, and beside it every image that is not there and every entry that is broken, each named
by file, place, field and what was expected there. Nothing is replaced or dropped without being in that list; a data
set with nothing usable is an error. Images are looked for, not opened: a damaged one shows when it is read.

- ``types``: the records, and the names of the formats
- ``captions``, ``questions``, ``phrases``, ``statements``, ``entailments``: the layouts of each, one kind a file
- ``finding``: from a path and a split to a file and its format
- ``reading``: entries, images, faults; ``files``: opening
- ``pickled_refs``: RefCOCO's pickles, read without running them
- ``entities``: Flickr30k Entities, which captions and phrases share
- ``inspection``: what was understood of a path, for people

docs/data.md has every layout. Nothing here needs torch.
"""

from __future__ import annotations

from mplug_core.data.records.captions import read_captions
from mplug_core.data.records.entailments import read_entailments
from mplug_core.data.records.phrases import read_phrases
from mplug_core.data.records.questions import read_questions
from mplug_core.data.records.statements import read_statements
from mplug_core.data.records.types import (
    ENTAILMENT_LABELS,
    FORMATS,
    CaptionData,
    CaptionRecord,
    EntailmentRecord,
    Format,
    PhraseRecord,
    QuestionRecord,
    Records,
    StatementRecord,
)

__all__ = [
    "ENTAILMENT_LABELS",
    "FORMATS",
    "CaptionData",
    "CaptionRecord",
    "EntailmentRecord",
    "Format",
    "PhraseRecord",
    "QuestionRecord",
    "Records",
    "StatementRecord",
    "read_captions",
    "read_entailments",
    "read_phrases",
    "read_questions",
    "read_statements",
]
