"""Images behind URLs: bounded in time, size and attempts; only http and https, also after a redirect."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request
from urllib.parse import quote, urlsplit, urlunsplit

from mplug_core.errors import ImageError

MAX_BYTES = 50 << 20
PAUSE = 1.0
"""Seconds before the second attempt; each further one waits twice as long, at most 5 s."""
AGENT = "Mozilla/5.0 (compatible; mplug)"
_AGAIN = (408, 425, 429, 500, 502, 503, 504)


def _opener() -> urllib.request.OpenerDirector:
    # no file:, ftp: or data: handler, which a redirect could otherwise reach
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler, urllib.request.HTTPErrorProcessor, urllib.request.HTTPRedirectHandler,
    ):  # fmt: skip
        opener.add_handler(handler())
    return opener


_OPENER = _opener()


def download(url: str, timeout: float = 20.0, attempts: int = 3, max_bytes: int = MAX_BYTES) -> bytes:
    """The bytes behind a URL; ImageError with code ``bad_url``, ``missing``, ``unreachable`` or ``too_large``.

    ``timeout``: seconds without an answer, and a tenfold of it for the whole. What may pass is tried ``attempts``
    times.
    """
    try:
        parts = urlsplit(url.strip())
        usable = parts.scheme.lower() in ("http", "https") and parts.hostname
    except ValueError:
        usable = False
    if not usable:
        raise ImageError(f"{_shown(url)} is no http or https URL", "only those are downloaded", "bad_url")
    ascii_url = urlunsplit(parts._replace(
        path=quote(parts.path, safe="/%:@!$&'()*+,;=~-._"), query=quote(parts.query, safe="/%:@!$&'()*+,;=~-._?"),
        fragment="",
    ))  # fmt: skip
    reason = ""
    for attempt in range(max(1, attempts)):
        if attempt:
            time.sleep(min(PAUSE * 2 ** (attempt - 1), 5.0))
        try:
            return _get(ascii_url, timeout, max_bytes)
        except urllib.error.HTTPError as error:
            reason = f"status {error.code}"
            error.close()
            if error.code not in _AGAIN:
                raise ImageError(f"{_shown(url)}: {reason}", code="missing") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = str(getattr(error, "reason", None) or error) or type(error).__name__
    raise ImageError(f"{_shown(url)}: {reason}", code="unreachable")


def _get(url: str, timeout: float, max_bytes: int) -> bytes:
    end = time.monotonic() + 10 * timeout
    request = urllib.request.Request(url, headers={"User-Agent": AGENT})
    with _OPENER.open(request, timeout=timeout) as answer:
        parts, size = [], 0
        while chunk := answer.read1(1 << 16):
            parts.append(chunk)
            size += len(chunk)
            if size > max_bytes:
                raise ImageError(f"{_shown(url)} has more than {max_bytes >> 20} MB", code="too_large")
            if time.monotonic() > end:
                raise TimeoutError("too slow")
        expected = answer.headers.get("Content-Length", "")
        if expected.isdecimal() and int(expected) != size:
            raise OSError("the connection broke")
        return b"".join(parts)


def _shown(url: str) -> str:
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in url)[:200]
