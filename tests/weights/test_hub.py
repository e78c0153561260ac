"""Models by name: from a server that behaves, from one that doesn't, and from the cache."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mplug_core.errors import CheckpointError
from mplug_core.weights import download, hub
from mplug_core.weights.cache import home, is_offline, place_of_url
from mplug_core.weights.folder import find_model
from mplug_core.weights.registry import RELEASED
from mplug_core.weights.released import released_file
from mplug_core.weights.repository import RepositoryName, model_in, wanted_files
from tests.loopback import Loopback, Page, loopback

WEIGHTS = bytes(range(256)) * 12_000  # more than one chunk
OTHER = WEIGHTS[::-1]
NATIVE = {"config.json": b"{}", "vocab.txt": b"[PAD]\n", "README.md": b"card", "model.safetensors": WEIGHTS}


@pytest.fixture
def web() -> Iterator[Loopback]:
    with loopback() as server:
        yield server


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, a network that may be used, and no waiting between attempts."""
    from huggingface_hub import constants

    for name in ("MPLUG_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT", "MODELSCOPE_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(download, "PAUSE", 0.01)
    monkeypatch.setenv("MPLUG_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def remains(folder: Path) -> list[str]:
    """What is in the cache but for locks."""
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file() and f.suffix != ".lock")


def fault(spec: str, offline: bool = False) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        hub.pull(spec, offline)
    assert caught.value.exit_code == 5 and "\n" not in str(caught.value)
    return caught.value


# -- names -------------------------------------------------------------------------------------------------------------


def test_cache_is_where_it_is_told_to_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert home() == tmp_path / "cache"
    monkeypatch.delenv("MPLUG_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert home() == tmp_path / "xdg" / "mplug"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert home() == Path.home() / ".cache" / "mplug"


@pytest.mark.parametrize("name", ["MPLUG_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_variables_forbid_downloads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_offline()
    monkeypatch.setenv(name, "0")
    assert not is_offline()
    monkeypatch.setenv(name, "1")
    assert is_offline()


def test_place_of_a_url_is_inside_the_cache_and_its_own() -> None:
    plain = place_of_url("https://host:81/a/b.pth")
    assert plain == home() / "models/url/host%3A81/a/b.pth"
    evil = place_of_url("https://u:p@host/../%2e%2e/%2Fetc/.b.pth")
    assert evil.is_relative_to(home() / "models/url/host") and ".." not in evil.parts
    assert evil.name == "%2Eb.pth"
    asked = place_of_url("https://host:81/a/b.pth?version=2")
    assert asked.name == "b.pth" and asked != plain and asked != place_of_url("https://host:81/a/b.pth?version=3")


def test_repository_names() -> None:
    assert RepositoryName.parse("hf", "org/na.me-1") == RepositoryName("org/na.me-1", None, None)
    assert RepositoryName.parse("hf", "org/name@v1/x") == RepositoryName("org/name", None, "v1/x")
    assert RepositoryName.parse("hf", "org/name/a/b.pth@1") == RepositoryName("org/name", "a/b.pth", "1")
    bad = ("", "name", "org/", "org/..", "../name", "org/name@", "org/name@a b", "org/name/../x", "/org/name", "o\nr/g")
    for text in bad:
        with pytest.raises(CheckpointError, match="names no model"):
            RepositoryName.parse("hf", text)


def test_files_that_make_a_model() -> None:
    files = [*NATIVE, "pytorch_model.bin", "onnx/model.onnx", "onnx/config.json", ".gitattributes", "photo.jpg"]
    assert wanted_files(files, "hf:o/n") == ["README.md", "config.json", "vocab.txt", "model.safetensors"]
    assert wanted_files(["pytorch_model.bin", "config.yaml"], "hf:o/n") == ["config.yaml", "pytorch_model.bin"]
    assert wanted_files(["x.pth"], "hf:o/n") == ["x.pth"]
    with pytest.raises(CheckpointError, match=r"holds several: a.pth, b.pth \(name one: hf:o/n/a.pth\)"):
        wanted_files(["a.pth", "b.pth"], "hf:o/n@1")
    with pytest.raises(CheckpointError, match="no weights"):
        wanted_files(["README.md"], "hf:o/n")


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt", ".th", ".safetensors"])
def test_files_that_are_read_are_files_that_are_downloaded(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"x{suffix}").touch()
    (tmp_path / f".hidden{suffix}").touch()
    assert model_in(tmp_path) == released_file(tmp_path) == tmp_path / f"x{suffix}"
    assert wanted_files([f"x{suffix}"], "hf:o/n") == [f"x{suffix}"]
    assert hub.UrlModel(f"https://host/x{suffix}").place.name == f"x{suffix}"


def test_model_in_a_folder(tmp_path: Path) -> None:
    assert model_in(tmp_path / "absent") is None and model_in(tmp_path) is None
    (tmp_path / "x.pth").touch()
    assert model_in(tmp_path) == tmp_path / "x.pth"
    (tmp_path / "y.pth").touch()
    assert model_in(tmp_path) is None
    (tmp_path / "model.safetensors").touch()
    assert model_in(tmp_path) == tmp_path


def test_every_short_name_leads_somewhere() -> None:
    for name, released in RELEASED.items():
        assert hub.is_remote(name) and released.sources and released.task and "Apache-2.0" in released.licence
        places = [source.place for source in hub.sources(name)]
        assert len(set(places)) == len(released.sources)
        assert all(place.is_relative_to(home()) for place in places)
        assert hub.cached(name) is None


@pytest.mark.parametrize(
    "spec", ["https://host/a.zip", "https://host/", "http:///a.pth", "https://host:x/a.pth", "https://host/a.pth#sha256=1",
             "hf:name", "ms:org/name/"]
)  # fmt: skip
def test_names_that_name_nothing(spec: str) -> None:
    assert fault(spec).code == "bad_name"


@pytest.mark.parametrize(
    ("spec", "hint"),
    [("mplug-bsae", "is it mplug-base"), ("org/name", "Hugging Face: hf:org/name"),
     ("mlug", "hf:org/name, or mplug model ls")],
)
def test_what_is_neither_path_nor_name(spec: str, hint: str) -> None:
    with pytest.raises(CheckpointError, match=f"no model folder {spec} .*{hint}"):
        find_model(spec)


def test_a_path_comes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mplug-base").mkdir()
    assert find_model("mplug-base") == Path("mplug-base")


@pytest.mark.parametrize(
    ("path", "name"),
    [("cache/models/ms/org/name/v1", "org/name"), ("hf/models--o--na--me/snapshots/1", "o/na--me"), ("mine", "mine")],
)
def test_name_of_a_model(path: str, name: str, tmp_path: Path) -> None:
    assert hub.name_of(tmp_path / path) == name


# -- files behind URLs -------------------------------------------------------------------------------------------------


def test_url_is_downloaded_once(web: Loopback, cache: Path) -> None:
    web.pages["/a/mplug base.pth"] = Page(WEIGHTS)
    spec = f"{web.url}/a/mplug base.pth"
    heard: list[tuple[str, int, int | None]] = []
    with hub.reported(lambda *news: heard.append(news)):
        path = find_model(spec)
    assert path.read_bytes() == WEIGHTS and path.name == "mplug base.pth" and path.is_relative_to(cache)
    assert heard[-1] == ("mplug base.pth", len(WEIGHTS), len(WEIGHTS))
    assert [done for _, done, _ in heard] == sorted(done for _, done, _ in heard)
    assert find_model(spec) == hub.pull(spec) == hub.pull(spec, offline=True) == path
    assert len(web.requests) == 1
    assert remains(cache) == [str(path.relative_to(cache))]


def test_url_leads_on(web: Loopback) -> None:
    web.pages["/x.pth"] = Page(status=302, headers={"Location": "/elsewhere"})
    web.pages["/elsewhere"] = Page(WEIGHTS)
    assert hub.pull(f"{web.url}/x.pth").read_bytes() == WEIGHTS


def test_url_leads_to_no_web_address(web: Loopback, cache: Path) -> None:
    web.pages["/x.pth"] = Page(status=302, headers={"Location": "file:///etc/passwd"})
    web.pages["/y.pth"] = Page(status=302, headers={"Location": "ftp://127.0.0.1/x"})
    fault(f"{web.url}/x.pth")
    fault(f"{web.url}/y.pth")
    assert remains(cache) == []


def test_a_broken_connection_is_gone_on_with(web: Loopback, cache: Path) -> None:
    web.pages["/x.pth"] = Page(WEIGHTS, etag='"1"', cuts=[1_000_000, 500_000])
    assert hub.pull(f"{web.url}/x.pth").read_bytes() == WEIGHTS
    ranges = [request.headers.get("Range") for request in web.requests]
    assert ranges == [None, "bytes=1000000-", "bytes=1500000-"]
    assert web.requests[1].headers["If-Range"] == '"1"'
    assert len(remains(cache)) == 1


def test_another_process_goes_on_where_one_was_stopped(
    web: Loopback, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    page = web.pages["/x.pth"] = Page(WEIGHTS, etag='"1"', cuts=[1_000_000, 0])
    assert "broke after 1,000,000 of" in fault(f"{web.url}/x.pth").message
    assert sorted(Path(name).suffix for name in remains(cache)) == [".json", ".part"]
    page.cuts.clear()
    assert hub.pull(f"{web.url}/x.pth").read_bytes() == WEIGHTS
    assert web.requests[-1].headers["Range"] == "bytes=1000000-"
    assert len(remains(cache)) == 1


@pytest.mark.parametrize("careless", [False, True])
def test_files_of_two_versions_are_not_spliced(web: Loopback, careless: bool) -> None:
    page = web.pages["/x.pth"] = Page(WEIGHTS, etag='"1"', cuts=[1_000_000], careless=careless)

    def change() -> None:
        if len(web.requests) == 2:
            page.body, page.etag = OTHER, '"2"'

    web.meanwhile = change
    assert hub.pull(f"{web.url}/x.pth").read_bytes() == OTHER


@pytest.mark.parametrize("page", [Page(WEIGHTS, etag='"1"', ranges=False, cuts=[9]), Page(WEIGHTS, cuts=[9])])
def test_a_server_without_parts_or_etags_starts_anew(web: Loopback, page: Page) -> None:
    web.pages["/x.pth"] = Page(**{**vars(page), "cuts": list(page.cuts)})
    assert hub.pull(f"{web.url}/x.pth").read_bytes() == WEIGHTS
    assert len(web.requests) == 2


def test_a_part_longer_than_the_file_is_thrown_away(web: Loopback) -> None:
    page = web.pages["/x.pth"] = Page(WEIGHTS, etag='"1"', cuts=[1_000_000])

    def shrink() -> None:
        if len(web.requests) == 2:
            page.body = b"short"

    web.meanwhile = shrink
    assert hub.pull(f"{web.url}/x.pth").read_bytes() == b"short"


def test_checksum_in_the_url(web: Loopback, cache: Path) -> None:
    web.pages["/x.pth"] = Page(WEIGHTS)
    spec = f"{web.url}/x.pth#sha256={digest(WEIGHTS).upper()}"
    path = hub.pull(spec)
    assert path.read_bytes() == WEIGHTS and "#" not in str(path)
    wrong = f"{web.url}/x.pth#sha256={digest(OTHER)}"
    assert hub.cached(wrong) is None
    assert "another SHA-256" in fault(wrong, offline=True).message
    error = fault(wrong)
    assert error.code == "checksum" and digest(WEIGHTS)[:16] in error.message
    assert path.read_bytes() == WEIGHTS and not [name for name in remains(cache) if "part" in name]
    os.utime(path, (1, 1))  # looked at again where it was touched
    assert hub.cached(spec) == path
    path.write_bytes(OTHER)
    assert hub.cached(spec) is None and hub.pull(spec).read_bytes() == WEIGHTS


def test_parts_of_two_files_are_told_by_the_checksum(web: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    page = web.pages["/x.pth"] = Page(OTHER, cuts=[1_000_000])

    def change() -> None:
        page.body = WEIGHTS if len(web.requests) > 1 else OTHER

    web.meanwhile = change  # no ETag tells that the file changed
    assert hub.pull(f"{web.url}/x.pth#sha256={digest(WEIGHTS)}").read_bytes() == WEIGHTS
    assert [request.headers.get("Range") for request in web.requests] == [None, "bytes=1000000-", None]


def test_a_file_put_there_by_hand_is_taken(web: Loopback) -> None:
    spec = f"{web.url}/x.pth"
    error = fault(spec, offline=True)
    assert error.code == "offline" and not web.requests
    place = place_of_url(spec)
    assert f"fetch it by hand as {place}" in str(error)
    place.parent.mkdir(parents=True)
    place.write_bytes(WEIGHTS)
    assert hub.pull(spec, offline=True) == find_model(spec) == place
    assert find_model(f"{spec}#sha256={digest(WEIGHTS)}") == place
    assert not web.requests


@pytest.mark.parametrize(
    ("page", "code", "words"),
    [
        (Page(status=404), "not_found", "there is no .*404"),
        (Page(status=401), "denied", "may not be read .*401"),
        (Page(status=403), "denied", "may not be read .*403"),
        (Page(status=451), "unreachable", "status 451"),
        (Page(status=503), "unreachable", "status 503"),
        (Page(b"<html>log in</html>", kind="text/html; charset=utf-8"), "no_file", "web page.*login or a proxy"),
        (Page(b"\n<!DOCTYPE html><p>log in"), "no_file", "web page"),
        (Page(b"version https://git-lfs.github.com/spec/v1\noid"), "no_file", "git-lfs pointer"),
        (Page(b"x" * 100, headers={"Content-Encoding": "gzip"}), "no_file", "compressed"),
        (Page(b"x" * 100, length=False), "no_file", "where the file ends.*#sha256"),
    ],
)
def test_answers_that_are_no_file(web: Loopback, cache: Path, page: Page, code: str, words: str) -> None:
    web.pages["/x.pth"] = page
    error = fault(f"{web.url}/x.pth")
    assert error.code == code
    with pytest.raises(CheckpointError, match=words):
        raise error
    assert not [name for name in remains(cache) if name.endswith(".pth")]


def test_a_busy_server_is_asked_again(web: Loopback) -> None:
    web.pages["/x.pth"] = Page(WEIGHTS, statuses=[503, 429])
    assert hub.pull(f"{web.url}/x.pth").read_bytes() == WEIGHTS


def test_no_network_is_one_line_at_once(cache: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        spec = f"http://127.0.0.1:{unused.getsockname()[1]}/x.pth"
        started = time.monotonic()
        error = fault(spec)
    assert time.monotonic() - started < 2
    assert error.code == "unreachable" and "refused" in error.message and str(place_of_url(spec)) in str(error)
    assert remains(cache) == []


def test_a_silent_server_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        started = time.monotonic()
        assert "timed out" in fault(f"http://127.0.0.1:{deaf.getsockname()[1]}/x.pth").message
    assert time.monotonic() - started < 2


def test_the_proxy_of_the_environment_is_used(web: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    web.pages["/x.pth"] = Page(WEIGHTS)
    monkeypatch.setenv("http_proxy", web.url)
    monkeypatch.setenv("no_proxy", "")
    assert hub.pull("http://models.invalid/x.pth").read_bytes() == WEIGHTS
    assert web.requests[0].path == "http://models.invalid/x.pth"


def test_a_full_disk_is_known_before(web: Loopback, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    web.pages["/x.pth"] = Page(WEIGHTS)
    usage = shutil.disk_usage(cache.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    error = fault(f"{web.url}/x.pth")
    assert error.code == "disk" and "0.0 GB are free" in error.message and "MPLUG_HOME" in str(error)
    assert remains(cache) == []


def test_a_disk_that_gets_full(web: Loopback, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    web.pages["/x.pth"] = Page(WEIGHTS, etag='"1"')
    real, calls = os.fsync, []

    def full(handle: int) -> None:
        calls.append(handle)
        if os.fstat(handle).st_size > 1_000_000:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    assert fault(f"{web.url}/x.pth").code == "disk" and calls
    assert not [name for name in remains(cache) if name.endswith(".pth")]
    monkeypatch.setattr(os, "fsync", real)
    assert hub.pull(f"{web.url}/x.pth").read_bytes() == WEIGHTS


def test_a_cache_that_is_no_folder(web: Loopback, cache: Path) -> None:
    web.pages["/x.pth"] = Page(WEIGHTS)
    cache.write_text("a file")
    assert fault(f"{web.url}/x.pth").code == "disk"
    assert not web.requests


def test_a_cache_that_may_only_be_read(web: Loopback, cache: Path) -> None:
    web.pages["/x.pth"] = web.pages["/y.pth"] = Page(WEIGHTS)
    path = hub.pull(f"{web.url}/x.pth")
    path.parent.chmod(0o555)
    if os.access(path.parent, os.W_OK):
        pytest.skip("this user may write everywhere")
    try:
        assert hub.pull(f"{web.url}/x.pth#sha256={digest(WEIGHTS)}") == path
        assert fault(f"{web.url}/y.pth").code == "disk"
    finally:
        path.parent.chmod(0o755)


def _pull(spec: str) -> None:
    hub.pull(spec)


def test_two_processes_download_once(web: Loopback) -> None:
    web.pages["/x.pth"] = Page(WEIGHTS)
    web.meanwhile = lambda: time.sleep(0.3)
    spec = f"{web.url}/x.pth"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_pull, args=(spec,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(web.requests) == 1 and hub.cached(spec).read_bytes() == WEIGHTS


def test_a_thread_waits_for_another_and_says_so(web: Loopback) -> None:
    web.pages["/x.pth"] = Page(WEIGHTS)
    begun, heard = threading.Event(), []

    def slow() -> None:
        begun.set()
        time.sleep(0.3)

    web.meanwhile = slow
    first = threading.Thread(target=_pull, args=(f"{web.url}/x.pth",))
    first.start()
    assert begun.wait(5)
    with hub.reported(lambda what, done, total: heard.append(what)):
        hub.pull(f"{web.url}/x.pth")
    first.join()
    assert heard == ["x.pth (another process downloads it)"] and len(web.requests) == 1


# -- ModelScope --------------------------------------------------------------------------------------------------------


@pytest.fixture
def model_scope(web: Loopback, monkeypatch: pytest.MonkeyPatch) -> Loopback:
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", web.url + "/")
    web.model_scope("damo/mplug", NATIVE | {"description/a.png": b"x", "photo.jpg": b"x"})
    return web


def test_model_scope(model_scope: Loopback, cache: Path) -> None:
    folder = find_model("ms:damo/mplug")
    assert folder == cache / "models/ms/damo/mplug/master"
    shown = {file.name: file.read_bytes() for file in folder.iterdir() if not file.name.startswith(".")}
    assert shown == NATIVE
    asked = len(model_scope.requests)
    assert asked == 1 + len(NATIVE)
    assert find_model("ms:damo/mplug") == hub.pull("ms:damo/mplug", offline=True) == folder
    assert len(model_scope.requests) == asked
    assert hub.pull("ms:damo/mplug") == folder and len(model_scope.requests) == asked + 1
    assert not [name for name in remains(cache) if ".part" in name or ".new" in name]


def test_model_scope_update_is_whole_or_not_at_all(
    model_scope: Loopback, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hub.pull("ms:damo/mplug")
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    changed = {"config.json": b'{"new": 1}', "vocab.txt": NATIVE["vocab.txt"], "model.safetensors": OTHER}
    model_scope.model_scope("damo/mplug", changed, large=Page(OTHER, cuts=[1_000_000]))
    fault("ms:damo/mplug")
    assert (folder / "config.json").read_bytes() == b"{}" and (folder / "model.safetensors").read_bytes() == WEIGHTS
    before = len(model_scope.requests)
    assert hub.pull("ms:damo/mplug") == folder
    assert {f.name: f.read_bytes() for f in folder.iterdir() if not f.name.startswith(".")} == changed
    assert len(model_scope.requests) == before + 2  # the list, and what was missing of the weights
    assert model_scope.requests[-1].headers["Range"] == "bytes=1000000-"
    assert hub.pull("ms:damo/mplug") == folder and len(model_scope.requests) == before + 3


def test_model_scope_file_of_another_checksum(model_scope: Loopback, cache: Path) -> None:
    model_scope.model_scope("damo/mplug", NATIVE, large=Page(OTHER))
    assert fault("ms:damo/mplug").code == "checksum"
    assert hub.cached("ms:damo/mplug") is None
    model_scope.model_scope("damo/mplug", NATIVE, large=Page(OTHER[:-1]))
    assert "3,072,000 were announced" in fault("ms:damo/mplug").message


def test_model_scope_single_file(model_scope: Loopback, cache: Path) -> None:
    model_scope.model_scope("damo/files", {"a.pth": WEIGHTS, "b.pth": OTHER})
    assert "name one: ms:damo/files/a.pth" in str(fault("ms:damo/files"))
    path = find_model("ms:damo/files/b.pth")
    assert path.read_bytes() == OTHER and path.name == "b.pth"
    assert hub.cached("ms:damo/files/b.pth") == path and hub.cached("ms:damo/files") is None
    assert fault("ms:damo/files/c.pth").code == "not_found"
    model_scope.model_scope("damo/one", {"a.pth": WEIGHTS, "README.md": b"card"})
    assert find_model("ms:damo/one").name == "a.pth"


def test_model_scope_absent(model_scope: Loopback) -> None:
    assert f"there is no {model_scope.url}/models/damo/nothing" in fault("ms:damo/nothing").message
    assert "at revision v9" in fault("ms:damo/mplug@v9").message
    model_scope.pages["/api/v1/models/damo/odd/repo/files"] = Page(b'{"Success": false, "Message": "no"}')
    assert fault("ms:damo/odd").code == "not_found"
    model_scope.pages["/api/v1/models/damo/odd/repo/files"] = Page(b"<html>")
    assert fault("ms:damo/odd").code == "no_file"
    model_scope.pages["/api/v1/models/damo/odd/repo/files"] = Page(b'{"Data": 3}')
    assert fault("ms:damo/odd").code == "no_file"
    model_scope.pages["/api/v1/models/damo/odd/repo/files"] = Page(status=401)
    assert "wants a login" in fault("ms:damo/odd").message


@pytest.mark.parametrize("path", ["../evil.json", "/tmp/evil.json", "a/../../evil.json"])
def test_model_scope_names_don_t_leave_the_folder(model_scope: Loopback, cache: Path, path: str) -> None:
    model_scope.model_scope("damo/evil", {path: b"{}", "model.safetensors": WEIGHTS})
    assert sorted(f.name for f in hub.pull("ms:damo/evil").iterdir() if f.name[0] != ".") == ["model.safetensors"]


def test_model_scope_without_network(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    error = fault("ms:damo/mplug")
    assert time.monotonic() - started < 2
    place = cache / "models/ms/damo/mplug/master"
    assert "http://127.0.0.1:9/models/damo/mplug" in str(error) and str(place) in str(error)
    place.mkdir(parents=True)
    (place / "model.safetensors").write_bytes(WEIGHTS)
    assert hub.pull("ms:damo/mplug", offline=True) == place


def test_sources_of_a_short_name_are_tried_in_turn(model_scope: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    released = replace(RELEASED["mplug-base"], sources=(f"{model_scope.url}/gone.pth", "ms:damo/mplug"))
    monkeypatch.setitem(RELEASED, "mplug-base", released)
    folder = find_model("mplug-base")
    assert folder.name == "master" and hub.cached("mplug-base") == folder
    asked = len(model_scope.requests)
    assert hub.pull("mplug-base") == folder and len(model_scope.requests) == asked + 1  # first where it came from
    monkeypatch.setitem(RELEASED, "mplug-base", replace(released, sources=(released.sources[0], "ms:damo/gone")))
    error = fault("mplug-base")
    assert "gone.pth" in error.message and "damo/gone" in error.message


# -- Hugging Face ------------------------------------------------------------------------------------------------------


@pytest.fixture
def hugging_face(web: Loopback, monkeypatch: pytest.MonkeyPatch) -> Loopback:
    monkeypatch.setenv("HF_ENDPOINT", web.url)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    web.hugging_face("org/name", NATIVE | {"onnx/model.onnx": b"x", "pytorch_model.bin": b"x"})
    return web


def test_hugging_face(hugging_face: Loopback, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    heard: list[tuple[str, int, int | None]] = []
    with hub.reported(lambda *news: heard.append(news)):
        folder = find_model("hf:org/name")
    assert folder == tmp_path / "hf/models--org--name/snapshots" / ("1" * 40)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == NATIVE
    assert ("model.safetensors", len(WEIGHTS), len(WEIGHTS)) in heard
    asked = len(hugging_face.requests)
    assert find_model("hf:org/name") == hub.pull("hf:org/name", offline=True) == folder
    assert find_model("hf:org/name@" + "1" * 40) == folder
    assert len(hugging_face.requests) == asked
    assert capfd.readouterr() == ("", "")


def test_hugging_face_update(hugging_face: Loopback) -> None:
    old = hub.pull("hf:org/name")
    hugging_face.hugging_face("org/name", NATIVE | {"model.safetensors": OTHER}, commit="2" * 40)
    assert find_model("hf:org/name") == old
    new = hub.pull("hf:org/name")
    assert new != old and (new / "model.safetensors").read_bytes() == OTHER
    assert find_model("hf:org/name") == new and find_model("hf:org/name@" + "1" * 40) == old


def test_hugging_face_folder_without_weights_is_not_taken(hugging_face: Loopback) -> None:
    folder = hub.pull("hf:org/name")
    (folder / "model.safetensors").unlink()
    assert hub.cached("hf:org/name") is None
    assert fault("hf:org/name", offline=True).code == "offline"
    assert (find_model("hf:org/name") / "model.safetensors").read_bytes() == WEIGHTS


def test_hugging_face_checksum(hugging_face: Loopback) -> None:
    hugging_face.hugging_face("org/name", NATIVE, large=Page(OTHER))
    error = fault("hf:org/name")
    assert error.code == "checksum" and hub.cached("hf:org/name") is None
    hugging_face.hugging_face("org/name", NATIVE)
    assert (hub.pull("hf:org/name") / "model.safetensors").read_bytes() == WEIGHTS


def test_hugging_face_single_file(hugging_face: Loopback) -> None:
    hugging_face.hugging_face("org/files", {"large/a.pth": WEIGHTS, "b.pth": OTHER, "c.pth": OTHER})
    path = find_model("hf:org/files/large/a.pth")
    assert path.read_bytes() == WEIGHTS and hub.cached("hf:org/files/large/a.pth") == path
    assert "holds several" in fault("hf:org/files").message
    assert fault("hf:org/files/d.pth").code == "not_found"


@pytest.mark.parametrize(
    ("page", "code", "words"),
    [
        (Page(b"{}", 404, headers={"X-Error-Code": "RepoNotFound"}), "not_found", "HF_TOKEN"),
        (Page(b"{}", 401, headers={"X-Error-Code": "RepoNotFound"}), "not_found", "private"),
        (Page(b"{}", 403, headers={"X-Error-Code": "GatedRepo"}), "denied", "gated.*accept its conditions"),
        (Page(b"{}", 403), "denied", "HF_TOKEN"),
        (Page(b"{}", 500), "unreachable", "status 500"),
        (Page(b"<html>", kind="text/html"), "unreachable", "--model FOLDER"),
    ],
)
def test_hugging_face_says_no(hugging_face: Loopback, page: Page, code: str, words: str) -> None:
    hugging_face.pages["/api/models/org/none/revision/main"] = page
    error = fault("hf:org/none")
    assert error.code == code
    with pytest.raises(CheckpointError, match=words):
        raise error


def test_hugging_face_revision(hugging_face: Loopback) -> None:
    assert "no revision v9" in fault("hf:org/name@v9").message


def test_hugging_face_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    error = fault("hf:org/name")
    assert time.monotonic() - started < 3
    assert error.code == "unreachable" and "http://127.0.0.1:9/org/name" in error.message
    assert "--model FOLDER" in str(error)


def test_hugging_face_disk(hugging_face: Loopback, tmp_path: Path) -> None:
    (tmp_path / "hf").write_text("a file")
    error = fault("hf:org/name")
    assert error.code == "disk" and "HF_HOME" in str(error)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("runs/mine/x", "there is no runs here"),
        ("runs/mine", "there is no runs here"),
        ("./mine", "there is no mine here"),
        ("~/mine", "there is no ~ here"),
        ("mplug.pth", "there is no mplug.pth here"),
        ("nowhere/mplug.pth", "there is no nowhere here"),
        ("/nowhere/model", "there is no nowhere in /"),
        ("here/gone", "there is no gone in here"),
        ("hree/model", "is it here/model?"),
        ("here/modle", "is it here/model?"),
        ("here/modle/", "is it here/model?"),
        ("heer", "is it here?"),
    ],
)
def test_a_mistyped_path_gets_a_hint_at_the_path(tmp_path, monkeypatch, spec, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "model").mkdir(parents=True)
    with pytest.raises(CheckpointError) as caught:
        find_model(spec)
    assert words in str(caught.value) and "hf:" not in str(caught.value) and len(str(caught.value)) <= 300
