"""A model hub on this machine that takes uploads as Hugging Face does: repositories, branches, large files, commits."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

TOKEN = "hf_of_this_test"


@dataclass
class Repository:
    """Files by branch."""

    private: bool = False
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    messages: list[str] = field(default_factory=list)


class UploadHub:
    """``refuse`` is (part of a path, status): requests for it fail."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.refuse: tuple[str, int] | None = None
        self.requests: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, method: str, path: str, body: bytes, token: str) -> tuple[int, Any]:
        """Status and JSON of a request."""
        path = path.partition("?")[0]
        self.requests.append(f"{method} {path}")
        if self.refuse and self.refuse[0] in path:
            return self.refuse[1], {"error": "no"}
        if path.startswith("/lfs/"):
            self.blobs[path.removeprefix("/lfs/")] = body
            return 200, {}
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials in Authorization header"}
        if path == "/api/repos/create":
            values = json.loads(body)
            name = f"{values['organization']}/{values['name']}"
            if name in self.repositories:
                return 409, {"error": "exists"}
            private = values.get("private") or values.get("visibility") == "private"
            self.repositories[name] = Repository(private=bool(private))
            return 200, {"url": f"{self.address}/{name}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        match = re.match(r"/(?:api/models/)?([^/]+/[^/.]+)(?:\.git)?(/.*)?$", path)
        if match is None or match[1] not in self.repositories:
            return 404, {"error": "Repository not found"}
        return self._of_repository(match[1], match[2] or "", body)

    def _of_repository(self, name: str, rest: str, body: bytes) -> tuple[int, Any]:
        repository = self.repositories[name]
        if rest == "":
            return 200, {"id": name, "modelId": name, "private": repository.private, "tags": [], "downloads": 0,
                         "likes": 0, "siblings": []}  # fmt: skip
        if rest.startswith("/branch/"):
            repository.branches.setdefault(rest.removeprefix("/branch/"), {})
            return 200, {}
        if rest.startswith("/preupload/"):
            if rest.removeprefix("/preupload/") not in repository.branches:
                return 404, {"error": "no branch"}
            files = json.loads(body)["files"]
            large = lambda path: path.endswith(".safetensors")  # noqa: E731
            listed = [{"path": f["path"], "uploadMode": "lfs" if large(f["path"]) else "regular",
                       "shouldIgnore": False, "oid": None} for f in files]  # fmt: skip
            return 200, {"files": listed}
        if rest == "/info/lfs/objects/batch":
            objects = json.loads(body)["objects"]
            actions = lambda oid: {"upload": {"href": f"{self.address}/lfs/{oid}", "header": {}}}  # noqa: E731
            return 200, {"transfer": "basic", "objects": [{**o, "actions": actions(o["oid"])} for o in objects]}
        if rest.startswith("/commit/"):
            branch = repository.branches[rest.removeprefix("/commit/")]
            for line in body.splitlines():
                item = json.loads(line)
                value = item["value"]
                if item["key"] == "header":
                    repository.messages.append(value["summary"])
                elif item["key"] == "file":
                    branch[value["path"]] = base64.b64decode(value["content"])
                elif item["key"] == "lfsFile":
                    blob = self.blobs[value["oid"]]
                    assert hashlib.sha256(blob).hexdigest() == value["oid"]
                    branch[value["path"]] = blob
            oid = "0" * 40
            return 200, {"success": True, "commitOid": oid, "commitUrl": f"{self.address}/{name}/commit/{oid}"}
        return 404, {"error": f"no {rest}"}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _answer(self) -> None:
                size = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(size) if size else b"".join(self._chunks())
                token = self.headers.get("Authorization", "")
                status, values = hub.answer(self.command, self.path, body, token)
                content = json.dumps(values).encode()
                self.send_response(status)
                if status == 404 and "Repository" in values["error"]:
                    self.send_header("X-Error-Code", "RepoNotFound")
                if status == 401:
                    self.send_header("X-Error-Message", values["error"])
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def _chunks(self) -> Any:
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return
                while size := int(self.rfile.readline(), 16):
                    yield self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()

            do_GET = do_POST = do_PUT = _answer

            def log_message(self, *arguments: Any) -> None:
                pass

        return Handler


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch, home: Path) -> Iterator[UploadHub]:
    """A hub that ``huggingface_hub`` takes for the real one, with a token that it accepts and none in ``home``."""
    constants = pytest.importorskip("huggingface_hub.constants")
    hub = UploadHub()
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    try:
        yield hub
    finally:
        hub.close()
