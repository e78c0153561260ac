"""Model folders to model hubs: Hugging Face by ``huggingface_hub``, ModelScope by ``modelscope_hub``.

A push is one commit of the folder's own files and a card. Nothing of the folder is changed; what else a repository
holds stays.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from mplug_core.errors import CheckpointError, MplugError, RecipeError, UsageError
from mplug_core.model.config import MplugConfig
from mplug_core.recipe import check_recipe, read_yaml
from mplug_core.weights.card import Card, published_card, read_card
from mplug_core.weights.folder import EMBEDDED, find_model
from mplug_core.weights.huggingface import quiet_hub
from mplug_core.weights.quantised import QUANTISATION
from mplug_core.weights.summary import read_heads
from mplug_core.weights.target import HUBS, Target

FILES = ("config.json", "model.safetensors", "vocab.txt", "recipe.yaml", QUANTISATION)
"""What is published of a model folder, beside the card."""
REQUIRED = ("config.json", "model.safetensors", "vocab.txt")


@dataclass
class Push:
    """What goes where: ``files`` as they are, and the ``card`` as README.md."""

    target: Target
    folder: Path
    files: list[Path]
    card: Card
    private: bool = False
    revision: str | None = None
    message: str = ""
    notes: list[str] = field(default_factory=list)


def prepare(
    spec: str | None,
    target: Target,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    licence: str | None = None,
    force: bool = False,
) -> Push:
    """Check a model folder and write its card, without any network; CheckpointError where it is not complete.

    ``licence`` is an identifier such as apache-2.0 for the card's front matter. UsageError where it allows what the
    card does not, unless ``force``: then that is a note.
    """
    folder = find_model(spec)
    if not folder.is_dir() or any(not (folder / name).is_file() for name in REQUIRED):
        raise CheckpointError(f"{folder} is no model folder", "make one of it: mplug model export")
    config = MplugConfig.load(folder / "config.json")
    read_heads(folder / "model.safetensors")  # a file that nobody could read is not worth its upload
    notes: list[str] = []
    recipe = None
    if (folder / "recipe.yaml").is_file():
        try:
            recipe = check_recipe(read_yaml(folder / "recipe.yaml"))
        except RecipeError as error:
            notes.append(f"recipe.yaml is not understood, the card says nothing of it: {error.message}")
        text = (folder / "recipe.yaml").read_text("utf-8", errors="replace")
        places = re.findall(r"(?:^|[\s'\":])(/[\w.-]+/[^\s'\",]+|~/[^\s'\",]+)", text)
        if places:
            notes.append(f"recipe.yaml is published, too, and names folders of this machine, such as {places[0]}")
    name = target.repository.partition("/")[2]
    own = read_card(folder)
    card = published_card(own, name, config, recipe, str(target))
    if licence:
        said = licence_against(licence, own) if own is not None else None
        if said is None and recipe is not None and recipe.start.model:
            said = _licence_of_start(licence, recipe.start.model)
        if said is not None and not force:
            raise UsageError(f"--license {licence}, and {said}", "correct README.md or the licence, or --force")
        if said is not None:
            notes.append(f"published as {licence}, and {said}")
        card.fields["license"] = licence
    elif "license" not in card.fields:
        notes.append("the card states no licence, so nobody may use the model: give --license")
    files = [folder / name for name in FILES if (folder / name).is_file()]
    return Push(target, folder, files, card, private, revision, message or f"Upload {name}", notes)


def licence_against(licence: str, card: Card, whose: str = "the card") -> str | None:
    """What a card says that an identifier of a licence is against; None where it says nothing of the kind."""
    stated = card.fields.get("license")
    stated = [str(one) for one in stated] if isinstance(stated, list) else [] if stated is None else [str(stated)]
    if stated and licence.lower() not in [one.lower() for one in stated]:
        return f"{whose} states {', '.join(stated)}"
    if re.search(r"(?:^|-)nc(?:-|$)|non-?commercial", licence.lower()):
        return None
    found = _NOT_COMMERCIAL.search(card.body)
    return f"{whose} says {' '.join(found[0].split())!r}" if found else None


_NOT_COMMERCIAL = re.compile(
    r"non[\s-]?commercial|\b(?:not|no)\b[^.,:;\n]{0,20}\bcommercial"
    r"|\b(?:research|academic|scientific)(?:\s+(?:use|purposes))?\s+only",
    re.IGNORECASE,
)
"""Words by which cards say that a model may not be used for money."""


def _licence_of_start(licence: str, start: str) -> str | None:
    """What the card of the model that a run started from says against a licence, if that model is on this machine."""
    try:
        place = EMBEDDED if start == "mini" else Path(start)
        card = read_card(place) if place.is_dir() else None
    except (CheckpointError, OSError):
        return None
    return licence_against(licence, card, f"the card of {start}, which it started from,") if card else None


def push(plan: Push, note: Callable[[str], None] = lambda text: None) -> str:
    """Upload; returns the address of what was made. MplugError, in one line, for whatever a hub or the network says."""
    return _push_ms(plan) if plan.target.hub == "ms" else _push_hf(plan, note)


def _push_hf(plan: Push, note: Callable[[str], None]) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    repository = plan.target.repository
    # read now, not when the package was imported
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
    if get_token() is None:
        raise MplugError(f"no token to write to {plan.target}", "hf auth login, or set HF_TOKEN", "token")
    with _hub_errors(plan.target), quiet_hub():
        try:
            known = api.repo_info(repository)
        except RepositoryNotFoundError:
            api.create_repo(repository, private=plan.private)
        else:
            if plan.private and not known.private:
                raise MplugError(f"{plan.target} exists and is public", "push without --private, or to another name")
            note(f"{plan.target} exists: this is a further commit, and its other files stay")
        if plan.revision:
            api.create_branch(repository, branch=plan.revision, exist_ok=True)
        operations = [CommitOperationAdd(file.name, str(file)) for file in plan.files]
        operations.append(CommitOperationAdd("README.md", plan.card.text.encode("utf-8")))
        made = api.create_commit(repository, operations, commit_message=plan.message, revision=plan.revision)
    return str(made.commit_url)


@contextmanager
def _hub_errors(target: Target) -> Iterator[None]:
    """Whatever the hub or the way there says, as one line that says what to do."""
    try:
        yield
    except MplugError:
        raise
    except Exception as error:  # of the hub's package and of the HTTP package that it happens to use
        raise _as_one_line(error, target) from error


def _as_one_line(error: BaseException, target: Target) -> MplugError:
    chain: list[BaseException] = []
    step: BaseException | None = error
    while step is not None and step not in chain:
        chain.append(step)
        step = step.__cause__ or step.__context__
    for link in chain:
        response = getattr(link, "response", None)
        status = getattr(response, "status_code", None) or getattr(link, "status_code", None)
        if isinstance(status, int):
            said = getattr(link, "server_message", None) or next(iter(str(link).splitlines()), "")
            return _refused(status, said, target)
    names = {type(link).__name__ for link in chain}
    if "OfflineModeIsEnabled" in names:
        return MplugError("HF_HUB_OFFLINE is set", "unset it to push", "network")
    network = ("Connect", "Timeout", "Connection", "Network", "Protocol", "gaierror", "ReadError", "WriteError")
    if any(word in name for name in names for word in network):
        return MplugError(f"{HUBS[target.hub]} can't be reached", "is there network?", "network")
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return MplugError(f"{target} could not be written: {reason}", "try again")


def _refused(status: int, said: str, target: Target) -> MplugError:
    """An answer of the hub that is none of success."""
    if status == 401:
        return MplugError(f"{HUBS[target.hub]} does not accept the token", "log in again, or set HF_TOKEN", "token")
    if status == 403:
        return MplugError(
            f"the token may not write to {target}", "take a token with write access to that name", "forbidden"
        )
    if status == 404:
        return MplugError(f"{target} is not there, or the token may not see it", "check the name", "missing")
    if status == 409:
        return MplugError(f"{target} exists, or was changed meanwhile", "try again", "conflict")
    again = "try again later" if status >= 500 or status == 429 else "check the name and the card"
    return MplugError(f"{HUBS[target.hub]} answers {status}: {said}", again)


def _push_ms(plan: Push) -> str:
    if importlib.util.find_spec("modelscope_hub") is None:
        raise MplugError("pushing to ModelScope needs modelscope-hub", "pip install modelscope-hub")
    from modelscope_hub.api import HubApi

    repository = plan.target.repository
    with _hub_errors(plan.target), tempfile.TemporaryDirectory(prefix="mplug-push-") as place:
        staged = Path(place)
        for file in plan.files:
            _link(file, staged / file.name)
        (staged / "README.md").write_text(plan.card.text, encoding="utf-8")
        api = HubApi()
        if not api.repo_exists(repository, "model"):
            api.create_repo(repository, "model", visibility="private" if plan.private else "public")
        elif plan.private:
            raise MplugError(f"{plan.target} exists", "push without --private, or to another name")
        api.upload_folder(
            repository, "model", staged, commit_message=plan.message, revision=plan.revision, disable_tqdm=True,
            use_cache=False,
        )  # fmt: skip
    return f"https://modelscope.cn/models/{repository}"


def _link(file: Path, target: Path) -> None:
    """The same file under another name, without a copy where the system can."""
    try:
        os.symlink(file.resolve(), target)
    except OSError:
        shutil.copyfile(file, target)
