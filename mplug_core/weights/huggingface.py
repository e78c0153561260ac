"""Models of the Hugging Face hub, by its own package, in its own cache (``HF_HOME``, ``HF_ENDPOINT``, ``HF_TOKEN``)."""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mplug_core.errors import CheckpointError
from mplug_core.weights.download import Report, is_disk_error, no_place, sha256_of, unreachable
from mplug_core.weights.repository import RepositoryName, model_in, wanted_files

TIMEOUT = 10.0
"""Seconds for the hub to answer what a model has; it is small, and says whether there is a network."""
_HTTP_PACKAGES = ("httpx", "httpx2", "requests", "urllib3")
"""What huggingface_hub, depending on its version, lets the errors of through."""


class HuggingFaceModel:
    """``hf:org/name[/file][@revision]``. The revision is ``main`` by default."""

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self.repository = RepositoryName.parse("hf", spec.removeprefix("hf:"))
        self.revision = self.repository.revision or "main"

    @property
    def endpoint(self) -> str:
        return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")

    @property
    def place(self) -> Path:
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE) / f"models--{self.repository.name.replace('/', '--')}"

    @property
    def by_hand(self) -> str:
        return f"download {self.endpoint}/{self.repository.name} elsewhere into a folder and give --model FOLDER"

    def cached(self) -> Path | None:
        """The model in the cache, without asking anybody; None where it isn't whole."""
        from huggingface_hub import snapshot_download, try_to_load_from_cache
        from huggingface_hub.utils import EntryNotFoundError

        name, file = self.repository.name, self.repository.file
        if file is not None:
            found = try_to_load_from_cache(name, file, revision=self.revision)
            return Path(found) if isinstance(found, str) else None
        try:
            # one small file asks for no more than the folder; its weights come last, so they tell that all is there
            folder = snapshot_download(name, revision=self.revision, local_files_only=True, allow_patterns="vocab.txt")
        except (EntryNotFoundError, ValueError, OSError):
            return None
        return model_in(Path(folder))

    def pull(self, report: Report) -> Path:
        """The model as the hub has it now; CheckpointError where it can't be had."""
        with self._errors(), quiet_hub():
            from huggingface_hub import HfApi

            info = HfApi(endpoint=self.endpoint).model_info(
                self.repository.name, revision=self.revision, files_metadata=True, timeout=TIMEOUT
            )
            listed = {entry.rfilename: entry for entry in info.siblings or ()}
            if self.repository.file is not None:
                return self._file(self.repository.file, info.sha, listed, report)
            paths = [self._file(name, info.sha, listed, report) for name in wanted_files(listed, self.spec)]
        if len({path.parent for path in paths}) > 1:
            raise CheckpointError(f"{self.spec} changed while it was downloaded", "pull it again", "checksum")
        found = model_in(paths[-1].parent)
        assert found is not None, paths
        return found

    def _file(self, name: str, commit: str | None, listed: dict[str, Any], report: Report) -> Path:
        """One file in the cache; what has just come is compared with the checksum that the hub knows."""
        from huggingface_hub import hf_hub_download, try_to_load_from_cache

        had = isinstance(try_to_load_from_cache(self.repository.name, name, revision=commit), str)
        options: dict[str, Any] = {"revision": self.revision, "endpoint": self.endpoint}
        if "tqdm_class" in inspect.signature(hf_hub_download).parameters:  # older versions take none for one file
            options["tqdm_class"] = _bar(name, report)
        entry = listed.get(name)
        size = getattr(entry, "size", None)
        if not had:
            report(name, 0, size)
        path = Path(hf_hub_download(self.repository.name, name, **options))
        if had:
            return path
        report(name, path.stat().st_size, size)
        expected = getattr(getattr(entry, "lfs", None), "sha256", None)
        if expected and sha256_of(path) != expected:
            path.resolve().unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            raise CheckpointError(
                f"{self.spec}: {name} has another SHA-256 than the hub says",
                "it was damaged on its way and is not kept: pull it again",
                "checksum",
            )
        return path

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Errors of the hub's package become one line each."""
        from huggingface_hub import utils as errors  # versions before 0.25 have them only there

        where = f"{self.endpoint}/{self.repository.name}"
        try:
            yield
        except CheckpointError:
            raise
        except errors.GatedRepoError as error:
            raise CheckpointError(
                f"{self.spec} is gated", f"accept its conditions at {where} and set HF_TOKEN", "denied"
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise CheckpointError(
                f"there is no {where}, or it is private", "check the name, or set HF_TOKEN", "not_found"
            ) from error
        except errors.RevisionNotFoundError as error:
            raise CheckpointError(f"{where} has no revision {self.revision}", "check it there", "not_found") from error
        except errors.HfHubHTTPError as error:
            status = getattr(error.response, "status_code", None)
            if status in (401, 403):
                raise CheckpointError(f"{where} may not be read (status {status})", "set HF_TOKEN", "denied") from error
            if status == 404:
                raise CheckpointError(f"{where} has no such file", "check the name", "not_found") from error
            raise unreachable(where, f"status {status}", self.by_hand) from error
        except errors.HFValidationError as error:
            raise CheckpointError(f"{self.spec} names no model: {error}", "hf:org/name", "bad_name") from error
        except Exception as error:
            if is_disk_error(error):
                raise no_place(self.place, error, "HF_HOME") from error
            from_network = type(error).__module__.split(".")[0] in _HTTP_PACKAGES
            if not from_network and not isinstance(error, (OSError, ValueError)):
                raise
            inner = error.__cause__ or error
            reason = re.sub(r"^\[Errno -?\d+\] ", "", str(inner)) or type(inner).__name__
            if isinstance(error, json.JSONDecodeError):
                reason = "it answers with no list of files"
            raise unreachable(where, reason, self.by_hand) from error


@contextmanager
def quiet_hub() -> Iterator[None]:
    """No bars and no warnings of the hub's package: what is to be said we say."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
        logging,
    )

    had, level = not are_progress_bars_disabled(), logging.get_verbosity()
    disable_progress_bars()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if had:
            enable_progress_bars()


def _bar(name: str, report: Report) -> type:
    """A class that the hub's package takes for tqdm, and which hands on what it is told."""
    from tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.counts_bytes = kwargs.get("unit") == "B"
            self.done = kwargs.get("initial") or 0
            super().__init__(*args, **(kwargs | {"disable": True}))
            self.total = kwargs.get("total")

        def update(self, n: float | None = 1) -> bool | None:
            self.done += int(n or 0)
            if self.counts_bytes:
                report(name, self.done, self.total)
            return None

    return Bar
