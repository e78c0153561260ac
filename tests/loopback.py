"""A server on this machine that stands for the web, Hugging Face and ModelScope, and fails as it is told to."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Page:
    """What is behind a path. ``cuts``: after how many bytes each of the next answers breaks off."""

    body: bytes = b""
    status: int = 200
    kind: str = "application/octet-stream"
    etag: str | None = None
    ranges: bool = True
    careless: bool = False
    """Whether If-Range is not looked at."""
    length: bool = True
    headers: dict[str, str] = field(default_factory=dict)
    cuts: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    """What the next answers say instead."""


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]


class Loopback:
    """``pages`` by path; ``requests`` that came."""

    def __init__(self) -> None:
        self.pages: dict[str, Page] = {}
        self.requests: list[Request] = []
        self.url = ""
        self.folders: dict[str, Callable[[str, dict[str, list[str]]], Page | None]] = {}
        self.meanwhile: Callable[[], None] = lambda: None
        """Called when an answer is about to be given."""

    def page(self, target: str) -> Page:
        path, query = unquote(urlsplit(target).path), parse_qs(urlsplit(target).query)
        for prefix, answer in self.folders.items():
            if path.startswith(prefix) and (found := answer(path.removeprefix(prefix), query)) is not None:
                return found
        return self.pages.get(path) or Page(b"nothing here", 404, "text/plain")

    def hugging_face(self, name: str, files: dict[str, bytes], commit: str = "1" * 40, **pages: Page) -> None:
        """A repository in the layout of the Hugging Face hub; ``pages`` (``large``) replace the answers for weights."""

        def is_large(file: str) -> bool:
            return file.endswith((".safetensors", ".bin", ".pth"))

        def sha256(file: str) -> str:
            return hashlib.sha256(files[file]).hexdigest()

        def information(rest: str, query: dict[str, list[str]]) -> Page | None:
            if rest not in ("", "/revision/main", f"/revision/{commit}"):
                return Page(b"{}", 404, headers={"X-Error-Code": "RevisionNotFound"})
            siblings: list[dict[str, Any]] = []
            for file, body in files.items():
                entry = {"rfilename": file, "size": len(body), "blobId": hashlib.sha1(body).hexdigest()}
                if is_large(file):
                    entry["lfs"] = {"size": len(body), "sha256": sha256(file), "pointerSize": 134}
                siblings.append(entry)
            answer = {"id": name, "modelId": name, "sha": commit, "siblings": siblings, "private": False, "tags": []}
            return Page(json.dumps(answer).encode(), kind="application/json")

        def resolve(rest: str, query: dict[str, list[str]]) -> Page | None:
            revision, _, file = rest.partition("/")
            if revision not in ("main", commit) or file not in files:
                return Page(b"", 404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            etag = f'"{sha256(file) if is_large(file) else hashlib.sha1(files[file]).hexdigest()}"'
            if is_large(file) and "large" in pages:
                pages["large"].headers["X-Repo-Commit"], pages["large"].etag = commit, etag
                return pages["large"]
            return Page(files[file], etag=etag, headers={"X-Repo-Commit": commit})

        self.folders[f"/api/models/{name}"] = information
        self.folders[f"/{name}/resolve/"] = resolve

    def model_scope(self, name: str, files: dict[str, bytes], **pages: Page) -> None:
        """A repository as ModelScope's file API shows it; ``pages`` (``large``) replace the answers for weights."""

        def answer(rest: str, query: dict[str, list[str]]) -> Page | None:
            if query.get("Revision") != ["master"]:
                return Page(json.dumps({"Code": 10010205001, "Success": False}).encode(), 404, "application/json")
            if rest == "/repo/files":
                entries = [
                    {
                        "Name": file.split("/")[-1], "Path": file, "Type": "blob", "Size": len(body),
                        "Sha256": hashlib.sha256(body).hexdigest(), "IsLFS": len(body) > 1000, "Revision": "0" * 40,
                    }
                    for file, body in files.items()
                ]  # fmt: skip
                entries.append({"Name": "assets", "Path": "assets", "Type": "tree", "Size": 0, "Sha256": ""})
                listing = {"Code": 200, "Data": {"Files": entries}, "Message": "success", "Success": True}
                return Page(json.dumps(listing).encode(), kind="application/json")
            file = query.get("FilePath", [""])[0]
            if rest != "/repo" or file not in files:
                return None
            if "large" in pages and file.endswith((".safetensors", ".bin", ".pth")):
                return pages["large"]
            return Page(files[file])

        self.folders[f"/api/v1/models/{name}"] = answer


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    web: Loopback

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        self.web.requests.append(Request(self.command, self.path, dict(self.headers)))
        self.web.meanwhile()
        page = self.web.page(self.path)
        status, content = page.status, page.body
        if page.statuses:
            status, content = page.statuses.pop(0), b""
        headers = dict(page.headers)
        wanted = self.headers.get("Range")
        condition = self.headers.get("If-Range")
        if wanted and page.ranges and status == 200 and (page.careless or condition in (None, page.etag)):
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            if start >= len(content):
                status, headers["Content-Range"], content = 416, f"bytes */{len(content)}", b""
            else:
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                status, content = 206, content[start:]
        self.send_response(status)
        self.send_header("Content-Type", page.kind)
        if page.length:
            self.send_header("Content-Length", str(len(content)))
        if page.etag:
            self.send_header("ETag", page.etag)
        for name, value in headers.items():
            self.send_header(name, value)
        cut = page.cuts.pop(0) if page.cuts and body else None
        if cut is not None or not page.length:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        if body:
            with suppress(ConnectionError):  # a client that has seen enough
                self.wfile.write(content[:cut])

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def loopback() -> Iterator[Loopback]:
    """A running server."""
    web = Loopback()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"web": web}))
    server.daemon_threads = True
    web.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def files_of(folder: Path) -> dict[str, bytes]:
    """The files of a flat folder, by name."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
