"""The one opener of addresses: what people write becomes an address, and only http and https are followed.

An address may have spaces, letters of any script and an international host; existing ``%`` escapes stay as they are.
``user:password@`` is sent as a header, to the host that it was written for and to no other after a redirect. Proxies
are those of the environment. What an address is called in messages is :func:`~mplug_core.errors.shown_address`.
"""

from __future__ import annotations

import base64
import functools
import http.client
import re
import ssl
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import SplitResult, quote, unquote, urlsplit, urlunsplit

from mplug_core.errors import shortened, shown_address

AGENT = "Mozilla/5.0 (compatible; mplug)"
CONNECT_SECONDS = 15.0
"""Seconds after which a server that can't be reached is given up."""
PAUSE = 1.0
"""Seconds before the second attempt; each further one waits twice as long, at most 5 s."""
AGAIN = (408, 425, 429, 500, 502, 503, 504)
"""Answers that may be others the next time."""

_CHUNK = 1 << 16
_WRITTEN = re.compile(r"\s*https?://", re.IGNORECASE)
_LOST = re.compile(r"%(?![0-9A-Fa-f]{2})")  # a percent sign that escapes nothing
_HOST = re.compile(r"[a-z0-9._~-]+")
_SAFE = "/%:@!$&'()*+,;=~-._"

Code = Literal["malformed", "status", "unreachable", "too_large"]


class Unavailable(Exception):
    """Why an address gives nothing.

    ``code`` is ``malformed`` (no address), ``status`` (the server says no: ``status``), ``unreachable`` or
    ``too_large``; ``again``: it may be better the next time.
    """

    def __init__(self, reason: str, code: Code, status: int = 0, again: bool = False) -> None:
        super().__init__(shortened(" ".join(reason.split()), 150))
        self.code, self.status, self.again = code, status, again

    @property
    def is_gone(self) -> bool:
        """Whether the server says that there is no such thing."""
        return self.status in (404, 410)


def is_address(name: str) -> bool:
    """Whether a name is meant as an http or https address."""
    return _WRITTEN.match(name) is not None


@dataclass(frozen=True)
class Address:
    """An http(s) address as it is asked for: ``url`` is ASCII, without user, password and fragment.

    ``authorization`` is the header of the user and password, ``shown`` the address as messages have it.
    """

    url: str
    shown: str
    fragment: str = ""
    authorization: str | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, written: str) -> Address:
        """The address that somebody wrote; Unavailable (``malformed``) for what is no http(s) address."""
        shown = shown_address(written)
        try:
            parts = urlsplit(written.strip())
            if parts.scheme not in ("http", "https"):
                raise Unavailable("it is no http or https address", "malformed")
            host, port = _host_of(parts), parts.port
        except ValueError as error:
            raise Unavailable(_said(error), "malformed") from error
        path = quote(parts.path or "/", safe=_SAFE, errors="surrogateescape")
        query = quote(parts.query, safe=f"{_SAFE}?", errors="surrogateescape")
        netloc = host if port is None else f"{host}:{port}"
        url = SplitResult(parts.scheme, netloc, _LOST.sub("%25", path), _LOST.sub("%25", query), "")
        return cls(urlunsplit(url), shown, parts.fragment, _authorization(parts))

    def inside(self, name: str) -> Address:
        """The address of something in this folder; a query, which may be a signature, stays behind it."""
        parts, shown = urlsplit(self.url), urlsplit(self.shown)
        steps = quote(name, safe="/~-._", errors="surrogateescape")
        url = urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{steps}"))
        return replace(self, url=url, shown=urlunsplit(shown._replace(path=f"{shown.path.rstrip('/')}/{name}")))

    @property
    def origin(self) -> tuple[str, str | None, int]:
        """Scheme, host and port."""
        parts = urlsplit(self.url)
        return parts.scheme, parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)


def _host_of(parts: SplitResult) -> str:
    """The host as it is asked for: international names in their ASCII form. ValueError for what is no host."""
    host = parts.hostname or ""
    if parts.netloc.rpartition("@")[2].startswith("["):
        import ipaddress

        ipaddress.IPv6Address(host)
        return f"[{host}]"
    host = unquote(host)
    if not host.isascii():
        host = _in_ascii(host)
    if not host:
        raise ValueError("it has no host")
    if not _HOST.fullmatch(host):
        raise ValueError("its host has characters that no host has; in a password write %40 for @, %2F for /")
    return host


def _in_ascii(host: str) -> str:
    import idna

    try:
        return idna.encode(host, uts46=True).decode("ascii")
    except idna.IDNAError:  # the rules of 2008 leave out symbols, which some hosts have
        return host.encode("idna").decode("ascii").lower()


def _authorization(parts: SplitResult) -> str | None:
    if not parts.username and not parts.password:
        return None
    who = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
    return "Basic " + base64.b64encode(who.encode("utf-8", "surrogateescape")).decode("ascii")


def _said(error: ValueError) -> str:
    """What is wrong with an address, without the parts of it that a library repeats: one may be a password."""
    reason = str(error)
    if "port" in reason.lower():
        return "its port is no number; in a password write %40 for @, %2F for /"
    return "its host has characters that no host has" if "netloc" in reason else reason


@contextmanager
def open_address(
    address: Address, headers: Mapping[str, str] | None = None, timeout: float = 20.0, connect: float = CONNECT_SECONDS
) -> Iterator[http.client.HTTPResponse]:
    """The answer to a GET, with the headers that it came with; Unavailable where there is none, or it says no.

    ``timeout`` are the seconds without a byte after which the connection is given up, ``connect`` those to reach the
    server.
    """
    request = urllib.request.Request(address.url, headers={"User-Agent": AGENT, **(headers or {})})
    if address.authorization:
        request.add_unredirected_header("Authorization", address.authorization)
    try:
        answer = _opener(connect).open(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        phrase = http.client.responses.get(error.code, "")
        if 300 <= error.code < 400:
            circle = _Redirects.inf_msg in str(error.reason)
            phrase = "and leads in a circle" if circle else "and leads to no http or https address"
        reason = f"status {error.code} {phrase}".rstrip()
        raise Unavailable(reason, "status", error.code, error.code in AGAIN) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Unavailable(reason_of(error), "unreachable", again=True) from error
    with answer:
        yield answer


def fetch_bytes(
    address: Address,
    max_bytes: int,
    timeout: float = 20.0,
    seconds: float = 200.0,
    attempts: int = 1,
    accept: str = "*/*",
) -> bytes:
    """What is behind an address. ``seconds`` are those for the whole, ``attempts`` those of what may pass.

    Unavailable where it can't be had, ends too early, or has more than ``max_bytes``.
    """
    for attempt in range(1, max(1, attempts) + 1):
        try:
            return _get(address, max_bytes, timeout, seconds, accept)
        except Unavailable as error:
            if not error.again or attempt >= attempts:
                raise
        time.sleep(min(PAUSE * 2 ** (attempt - 1), 5.0))
    raise AssertionError("unreachable")


def fetch_to(address: Address, path: Path, max_bytes: int, timeout: float) -> int:
    """Write what is behind an address to a file; how many bytes it was. Unavailable as of :func:`fetch_bytes`, OSError
    where the disk fails."""
    size = 0
    with (
        open_address(address, {"Accept-Encoding": "identity"}, timeout) as answer,
        open(path, "wb") as file,
    ):
        for chunk in chunks_of(answer):
            size += len(chunk)
            if size > max_bytes:
                raise Unavailable(f"more than {max_bytes:,} bytes", "too_large", again=True)
            file.write(chunk)
        check_whole(answer, size)
    return size


def _get(address: Address, max_bytes: int, timeout: float, seconds: float, accept: str) -> bytes:
    end = time.monotonic() + seconds
    headers = {"Accept": accept, "Accept-Encoding": "identity"}
    with open_address(address, headers, timeout, min(timeout, CONNECT_SECONDS)) as answer:
        unzip = _unzipper(answer)
        data, size = bytearray(), 0
        for chunk in chunks_of(answer):
            size += len(chunk)
            data += unzip(chunk, max_bytes + 1 - len(data))
            if len(data) > max_bytes:
                raise Unavailable(f"more than {max_bytes >> 20} MB", "too_large")
            if time.monotonic() > end:
                raise Unavailable("timed out, no answer in time", "unreachable", again=True)
        check_whole(answer, size)
        return bytes(data)


def _unzipper(answer: http.client.HTTPResponse) -> Any:
    """What makes chunks of an answer plain, at most so many bytes: some servers compress though nobody asked."""
    kind = answer.headers.get("Content-Encoding", "identity").strip().lower()
    if kind not in ("gzip", "x-gzip", "deflate"):
        return lambda chunk, most: chunk
    unzip = zlib.decompressobj(47)

    def plain(chunk: bytes, most: int) -> bytes:
        try:
            return unzip.decompress(unzip.unconsumed_tail + chunk, most)
        except zlib.error as error:
            raise Unavailable("it is compressed, and damaged", "unreachable", again=True) from error

    return plain


def chunks_of(answer: http.client.HTTPResponse, size: int = _CHUNK) -> Iterator[bytes]:
    """An answer's bytes as they come; Unavailable where the connection breaks."""
    try:
        while chunk := answer.read1(size):
            yield chunk
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Unavailable(reason_of(error), "unreachable", again=True) from error


def check_whole(answer: http.client.HTTPResponse, size: int) -> None:
    """Unavailable where fewer or more bytes came than were announced."""
    expected = answer.headers.get("Content-Length", "")
    if expected.isdecimal() and int(expected) != size and "Transfer-Encoding" not in answer.headers:
        raise Unavailable(f"the connection broke after {size:,} of {expected} bytes", "unreachable", again=True)


def reason_of(error: BaseException) -> str:
    """A library's error about a connection in a few words."""
    inner = getattr(error, "reason", None)
    error = inner if isinstance(inner, BaseException) else error
    if isinstance(error, TimeoutError):
        return "timed out, no answer in time"
    return getattr(error, "strerror", None) or str(inner or error) or type(error).__name__


class _Reached:
    """A connection that is made within ``connect`` seconds, and waits longer for answers."""

    def __init__(self, *arguments: Any, connect: float, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._seconds_to_connect = connect

    def connect(self) -> None:
        patience = self.timeout
        self.timeout = min(self._seconds_to_connect, patience)
        super().connect()  # type: ignore[misc]
        self.sock.settimeout(patience)  # type: ignore[attr-defined]


class _Http(_Reached, http.client.HTTPConnection):
    pass


class _Https(_Reached, http.client.HTTPSConnection):
    pass


class _HttpHandler(urllib.request.HTTPHandler):
    connect = CONNECT_SECONDS

    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(functools.partial(_Http, connect=self.connect), request)


class _HttpsHandler(urllib.request.HTTPSHandler):
    connect = CONNECT_SECONDS

    def https_open(self, request: urllib.request.Request) -> Any:
        connection = functools.partial(_Https, connect=self.connect)
        return self.do_open(connection, request, context=ssl.create_default_context())


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Redirects to http and https alone; what identifies a user goes to no other host."""

    def redirect_request(self, request: Any, answer: Any, code: int, message: str, headers: Any, target: str) -> Any:
        answer.read = lambda *_: b""  # the page that nobody looks at may have no end
        try:
            address = Address.parse(target)
        except Unavailable as error:
            raise Unavailable(f"status {code} and leads to no http or https address", "status", code) from error
        leads = super().redirect_request(request, answer, code, message, headers, address.url)
        if leads is None:
            return None
        known = request.unredirected_hdrs.get("Authorization")
        before, now = Address.parse(request.full_url).origin, address.origin
        safer = before[1] == now[1] and (before[0], before[2], *now[::2]) == ("http", 80, "https", 443)
        if address.authorization or (known and (before == now or safer)):
            leads.add_unredirected_header("Authorization", address.authorization or known)
        return leads


def _opener(connect: float) -> urllib.request.OpenerDirector:
    """Knows http and https alone, also after a redirect; made anew, as variables may name another proxy."""
    opener = urllib.request.OpenerDirector()
    plain, secure = _HttpHandler(), _HttpsHandler()
    plain.connect = secure.connect = connect
    for handler in (
        urllib.request.ProxyHandler(), plain, secure, urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(), _Redirects(),
    ):  # fmt: skip
        opener.add_handler(handler)
    return opener
