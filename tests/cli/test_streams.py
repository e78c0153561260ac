"""Addresses, splitting, JSON Lines."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from mplug_cli import streams
from mplug_core.data import web
from mplug_core.errors import ImageError


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_lines_do_not_depend_on_how_they_arrive(size):
    text = b"a b\r\n\n\xc3\xa9.jpg\nlast"
    chunks = [text[i : i + size] for i in range(0, len(text), size)]
    wanted = [b"a b\r", b"", b"\xc3\xa9.jpg", b"last"]
    assert list(streams._split(chunks, b"\n", 100)) == [(part, True) for part in wanted]
    cut = [(b"a b\r", True), (b"", True), (b"\xc3\xa9.jp", False), (b"last", True)]
    assert list(streams._split(chunks, b"\n", 5)) == cut


def test_names_between_nuls_keep_every_character():
    assert list(streams._split([b"a\r\n\0b\r\0"], b"\0", 100)) == [(b"a\r\n", True), (b"b\r", True)]
    found = streams._listed([b"a\r\n\0b\r\0"], b"\0", True)
    assert [item.name for item in found] == ["a\r\n", "b\r"]


def test_json_is_readable_and_survives_what_is_no_unicode():
    assert streams.json_line({"image": "é🙂"}) == '{"image": "é🙂"}'
    assert json.loads(streams.json_line({"image": "\udcff"})) == {"image": "\udcff"}


def test_plain_lines_keep_the_bytes_of_names(capfdbinary):
    streams.write_line("1.0\tcaf\udce9.jpg")
    streams.write_line("half \ud800")
    assert capfdbinary.readouterr().out == b"1.0\tcaf\xe9.jpg\nhalf \\ud800\n"


@pytest.fixture
def server(photo) -> Iterator[str]:
    """A web server on this machine with a photo, a page, and nothing else."""
    answers = {"/photo.jpg": photo.read_bytes(), "/page.jpg": b"<html>not here</html>", "/large": b"x" * 5000}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = answers.get(self.path)
            if self.path == "/away":
                self.send_response(302)
                self.send_header("Location", "file:///etc/passwd")
                self.end_headers()
                return
            self.send_response(200 if body else 404)
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


def test_an_address(mplug, model_folder, server, photo):
    done = mplug("caption", f"{server}/photo.jpg")
    assert (done.code, done.out) == (0, mplug("caption", photo).out)


def test_an_address_with_a_page(mplug, model_folder, server):
    done = mplug("caption", f"{server}/page.jpg")
    assert done.code == 1 and f"{server}/page.jpg is an HTML page" in done.error


@pytest.mark.parametrize(("place", "code", "words"), [("/none.jpg", "missing", "404"), ("/away", "unreadable", "302")])
def test_addresses_that_do_not_work(server, place, code, words):
    with pytest.raises(ImageError, match=words) as caught:
        web.download(server + place)
    assert caught.value.code == code


def test_a_download_has_a_limit(server, monkeypatch):
    monkeypatch.setattr(web, "MAX_BYTES", 1000)
    with pytest.raises(ImageError, match="more than") as caught:
        web.download(f"{server}/large")
    assert caught.value.code == "too_large"


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:1/x.jpg", "https://name.invalid/x.jpg", "http://[bad", "http://a b/"]
)
def test_no_network(address):
    with pytest.raises(ImageError) as caught:
        web.download(address)
    assert caught.value.code == "unreadable" and address in str(caught.value)
