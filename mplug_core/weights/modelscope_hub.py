"""Models of ModelScope, by its file API alone (``MODELSCOPE_ENDPOINT``), in the cache of :mod:`.cache`."""

from __future__ import annotations

import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from mplug_core.atomic import replace_folder
from mplug_core.errors import CheckpointError
from mplug_core.weights.cache import home, safe_name
from mplug_core.weights.download import (
    RemoteFile,
    Report,
    disk_errors,
    fetch_file,
    hidden,
    is_whole,
    locked,
    read_listing,
    transfer,
    unreachable,
)
from mplug_core.weights.repository import RepositoryName, model_in, wanted_files


class ModelScopeModel:
    """``ms:org/name[/file][@revision]``. The revision is ``master`` by default.

    The files of a model are gathered in a folder beside, which takes the place of the model's folder when it is whole.
    """

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self.repository = RepositoryName.parse("ms", spec.removeprefix("ms:"))
        self.revision = self.repository.revision or "master"

    @property
    def endpoint(self) -> str:
        return (os.environ.get("MODELSCOPE_ENDPOINT") or "https://modelscope.cn").rstrip("/")

    @property
    def page(self) -> str:
        """The address that people look at."""
        return f"{self.endpoint}/models/{self.repository.name}"

    @property
    def place(self) -> Path:
        """The model's folder, or the file; single files are kept apart from whole models."""
        name, file = self.repository.name, self.repository.file
        kept = home() / "models" / ("ms" if file is None else "ms_files") / name / safe_name(self.revision)
        return kept if file is None else kept / file

    @property
    def by_hand(self) -> str:
        return f"fetch {self.repository.file or 'its files'} by hand from {self.page} to {self.place}"

    def cached(self) -> Path | None:
        """The model in the cache, without asking anybody; None where there is none."""
        if self.repository.file is not None:
            return self.place if self.place.is_file() else None
        return model_in(self.place)

    def pull(self, report: Report) -> Path:
        """The model as ModelScope has it now; CheckpointError where it can't be had."""
        listed = self._listing()
        if self.repository.file is not None:
            if self.repository.file not in listed:
                raise CheckpointError(f"{self.spec}: there is no such file", "check the name", "not_found")
            fetch_file(listed[self.repository.file], self.place, report)
            return self.place
        wanted = {name: listed[name] for name in wanted_files(listed, self.spec)}
        with disk_errors(self.place):
            self.place.parent.mkdir(parents=True, exist_ok=True)
            with locked(self.place, report):
                if not self._is_current(wanted):
                    self._gather(wanted, report)
        found = model_in(self.place)
        assert found is not None, wanted
        return found

    def _listing(self) -> dict[str, RemoteFile]:
        """The files of the repository, by their paths in it."""
        api = f"{self.endpoint}/api/v1/models/{self.repository.name}/repo"
        url = f"{api}/files?{urlencode({'Revision': self.revision, 'Recursive': 'true'})}"
        try:
            answer = read_listing(url, self.by_hand)
        except CheckpointError as error:
            if error.code == "not_found":
                raise self._absent() from error
            if error.code == "denied":
                raise CheckpointError(f"{self.spec} wants a login", self.by_hand, "denied") from error
            if error.code == "unreachable":
                raise unreachable(self.page, error.__cause__, self.by_hand) from error
            raise
        try:
            if not answer.get("Success", True):
                raise self._absent()
            entries: list[dict[str, Any]] = answer["Data"]["Files"]
            return dict(self._listed(api, entry) for entry in entries if entry.get("Type") != "tree")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{url} answers with no list of files", self.by_hand, "no_file") from error

    def _listed(self, api: str, entry: dict[str, Any]) -> tuple[str, RemoteFile]:
        """Name and place of a file; ValueError for an entry that is none."""
        path, size, digest = entry["Path"], entry.get("Size"), entry.get("Sha256") or None
        if not isinstance(path, str) or not path or not path.isprintable():
            raise ValueError("a file without a name")
        if size is not None and (type(size) is not int or not 0 <= size < 1 << 50):
            raise ValueError(f"{path} has a size that is none")
        if digest is not None and not (isinstance(digest, str) and re.fullmatch(r"[0-9a-fA-F]{64}", digest)):
            raise ValueError(f"{path} has a checksum that is none")
        url = f"{api}?{urlencode({'Revision': self.revision, 'FilePath': path})}"
        return path, RemoteFile(url, self.by_hand, size, digest.lower() if digest else None)

    def _absent(self) -> CheckpointError:
        at = f" at revision {self.repository.revision}" if self.repository.revision else ""
        return CheckpointError(f"there is no {self.page}{at}", "check the name", "not_found")

    def _is_current(self, wanted: dict[str, RemoteFile]) -> bool:
        return self._has_only(self.place, wanted) and all(
            is_whole(self.place / name, remote) for name, remote in wanted.items()
        )

    @staticmethod
    def _has_only(folder: Path, wanted: dict[str, RemoteFile]) -> bool:
        return folder.is_dir() and {f.name for f in folder.iterdir() if not f.name.startswith(".")} <= wanted.keys()

    def _gather(self, wanted: dict[str, RemoteFile], report: Report) -> None:
        """Download what is missing or has changed, and change the folders."""
        beside = hidden(self.place, ".new")
        beside.mkdir(exist_ok=True)
        for name, remote in wanted.items():
            target = beside / name
            if is_whole(target, remote):
                continue
            old = self.place / name
            if is_whole(old, remote):
                target.unlink(missing_ok=True)
                _link(old, target)
            else:
                transfer(remote, target, report)
        for file in beside.iterdir():  # of an earlier attempt, when the model had other files
            if not file.name.startswith(".") and file.name not in wanted:
                file.unlink()
        replace_folder(beside, self.place)


def _link(source: Path, target: Path) -> None:
    """The same file under a second name, with its note; a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    with suppress(OSError):
        shutil.copy2(hidden(source, ".json"), hidden(target, ".json"))
