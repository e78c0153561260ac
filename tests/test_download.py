"""Addresses as people write them, and the one opener of them."""

from __future__ import annotations

import base64
import gzip
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mplug_core import download
from mplug_core.data.shards.download import download as download_for_pack
from mplug_core.data.web import download as download_image
from mplug_core.download import Address, Unavailable, fetch_bytes, fetch_to, is_address
from mplug_core.errors import CheckpointError, ImageError, MplugError
from mplug_core.weights import hub
from tests.loopback import Loopback, Page, loopback


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loopback]:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(download, "PAUSE", 0.01)
    with loopback() as server:
        yield server


@pytest.mark.parametrize(
    ("written", "url"),
    [
        ("http://host/a b.jpg", "http://host/a%20b.jpg"),
        ("  HTTP://Host/x.jpg \n", "http://host/x.jpg"),
        ("http://host/café/猫.jpg", "http://host/caf%C3%A9/%E7%8C%AB.jpg"),
        ("http://host/caf%C3%A9.jpg", "http://host/caf%C3%A9.jpg"),
        ("http://host/100%/50%zz%2f.jpg", "http://host/100%25/50%25zz%2f.jpg"),
        ("http://host/a?q=chat noir&l=é#top", "http://host/a?q=chat%20noir&l=%C3%A9"),
        ("http://host/[1]{2}|3\\4^.jpg", "http://host/%5B1%5D%7B2%7D%7C3%5C4%5E.jpg"),
        ("https://bücher.example/a", "https://xn--bcher-kva.example/a"),
        ("https://b%C3%BCcher.example/a", "https://xn--bcher-kva.example/a"),
        ("https://例え.テスト:8443/a", "https://xn--r8jz45g.xn--zckzah:8443/a"),
        ("https://straße.example", "https://xn--strae-oqa.example/"),
        ("https://☃.net/", "https://xn--n3h.net/"),
        ("http://[::1]:81/a", "http://[::1]:81/a"),
        ("http://me:p%40ss@host:80/a", "http://host:80/a"),
        ("http://host/\udce9.jpg", "http://host/%E9.jpg"),
        ("http://my_host.local./a;b=c,d", "http://my_host.local./a;b=c,d"),
    ],
)
def test_what_people_write(written: str, url: str) -> None:
    assert is_address(written) and Address.parse(written).url == url
    assert Address.parse(url).url == url


@pytest.mark.parametrize(
    "written",
    ["HTTP://[::1", "http://[1.2.3]/", "http://", "http:///x.jpg", "http://a b/", "http://h:port/", "http://h:99999/",
     "http://u:se/cret@h/", "ftp://h/x", "file:///etc/passwd", "x.jpg", "http://a<b>/", "http://..℀/", "http://\0/"],
)  # fmt: skip
def test_what_is_no_address(written: str) -> None:
    with pytest.raises(Unavailable) as caught:
        Address.parse(written)
    assert caught.value.code == "malformed" and "cret" not in str(caught.value)
    for open_it, kind in ((download_image, ImageError), (download_for_pack, ImageError)):
        with pytest.raises(kind) as error:
            open_it(written)
        assert "cret" not in str(error.value) and len(str(error.value)) < 300


def test_files_inside_keep_the_query() -> None:
    address = Address.parse("https://me:pw@host/a pack/?sig=1").inside("00000.tar")
    assert address.url == "https://host/a%20pack/00000.tar?sig=1"
    assert address.shown == "https://***@host/a pack/00000.tar?***" and address.authorization


def test_random_texts_are_addresses_or_refused(web: Loopback) -> None:
    rng = random.Random(0)
    letters = "ab/:?#@[]%&=. \t\n\0\x7fé猫\udcff\u202e☃{}<>\\|^`0123456789"
    start = time.perf_counter()
    for _ in range(2000):
        text = rng.choice(("http://", "https://u:p@", "HTTP://[", "http://h:")) + "".join(
            rng.choices(letters, k=rng.randrange(40))
        )
        try:
            url = Address.parse(text).url
        except Unavailable as error:
            assert "\n" not in str(error) and len(str(error)) <= 150
        else:
            assert url.isascii() and url.isprintable() and " " not in url and "@" not in url.split("/")[2]
    assert time.perf_counter() - start < 5


def sent(web: Loopback) -> list[str | None]:
    return [request.headers.get("Authorization") for request in web.requests]


def test_user_and_password_go_to_their_host_alone(web: Loopback) -> None:
    host = web.url.removeprefix("http://")
    web.pages["/x"] = Page(status=302, headers={"Location": "/y z"})
    web.pages["/y z"] = Page(b"here")
    basic = "Basic " + base64.b64encode("mé:p@ss/w".encode()).decode()
    assert fetch_bytes(Address.parse(f"http://mé:p%40ss%2Fw@{host}/x"), 100) == b"here"
    assert sent(web) == [basic, basic]
    with loopback() as other:
        web.pages["/x"] = Page(status=302, headers={"Location": f"{other.url}/z"})
        other.pages["/z"] = Page(b"there")
        assert fetch_bytes(Address.parse(f"http://me:pw@{host}/x"), 100) == b"there"
        assert sent(other) == [None]


@pytest.mark.parametrize(
    "target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:text/plain,x", "gopher://h", "//[", "FILE:/x"]
)
def test_redirects_lead_to_http_alone(web: Loopback, target: str) -> None:
    web.pages["/x.pth"] = Page(status=302, headers={"Location": target})
    for open_it, kind in ((download_image, ImageError), (download_for_pack, ImageError), (hub.pull, CheckpointError)):
        with pytest.raises(kind) as caught:
            open_it(f"{web.url}/x.pth")
        assert "root:" not in str(caught.value)


def test_redirects_in_a_circle_have_an_end(web: Loopback) -> None:
    web.pages["/x"] = Page(status=302, headers={"Location": "/x"})
    with pytest.raises(ImageError, match="circle"):
        download_image(f"{web.url}/x")


@pytest.mark.parametrize("open_it", [download_image, download_for_pack, hub.pull], ids=["image", "pack", "model"])
@pytest.mark.parametrize("page", [None, Page(status=401), Page(status=500), Page(b"<html>")])
def test_secrets_are_in_no_error(web: Loopback, open_it, page: Page | None, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("MPLUG_HOME", str(tmp_path))
    monkeypatch.setattr("mplug_core.weights.download.PAUSE", 0.01)
    if page:
        web.pages["/x.pth"] = page
    address = f"http://me:hunter2@{web.url.removeprefix('http://')}/x.pth?token=hunter2"
    try:
        open_it(address)
    except MplugError as error:
        assert "hunter2" not in f"{error} {error!r}" and "http://***@127.0.0.1" in str(error)
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and b"hunter2" in file.read_bytes()]


def test_bodies(web: Loopback, tmp_path: Path) -> None:
    web.pages["/zip"] = Page(gzip.compress(b"x" * 5000), headers={"Content-Encoding": "gzip"})
    web.pages["/cut"] = Page(b"x" * 5000, cuts=[100, 100])
    web.pages["/open"] = Page(b"x" * 5000, length=False)
    web.pages["/busy"] = Page(b"x" * 5000, statuses=[503])
    for path, attempts in (("zip", 1), ("cut", 3), ("open", 1), ("busy", 2)):
        assert fetch_bytes(Address.parse(f"{web.url}/{path}"), 5000, attempts=attempts) == b"x" * 5000
    for path, code in (("zip", "too_large"), ("open", "too_large"), ("none", "status")):
        with pytest.raises(Unavailable) as caught:
            fetch_bytes(Address.parse(f"{web.url}/{path}"), 4999)
        assert caught.value.code == code
    assert fetch_to(Address.parse(f"{web.url}/open"), tmp_path / "file", 5000, 5.0) == 5000
    with pytest.raises(Unavailable, match="more than"):
        fetch_to(Address.parse(f"{web.url}/open"), tmp_path / "file", 4999, 5.0)
