"""Images behind URLs for a pack: what may pass is tried again."""

from __future__ import annotations

from mplug_core.download import Address, Unavailable, fetch_bytes
from mplug_core.errors import ImageError, shown_address

MAX_BYTES = 50 << 20


def download(url: str, timeout: float = 20.0, attempts: int = 3, max_bytes: int = MAX_BYTES) -> bytes:
    """The bytes behind a URL; ImageError with code ``bad_url``, ``missing``, ``unreachable`` or ``too_large``.

    ``timeout``: seconds without an answer, and a tenfold of it for the whole. What may pass is tried ``attempts``
    times.
    """
    try:
        return fetch_bytes(Address.parse(url), max_bytes, timeout, 10 * timeout, attempts)
    except Unavailable as error:
        if error.code == "malformed":
            hint = "only http and https are downloaded"
            raise ImageError(f"{shown_address(url)}: {error}", hint, "bad_url") from error
        code = {"too_large": "too_large", "unreachable": "unreachable"}.get(error.code)
        code = code or ("unreachable" if error.again else "missing")
        raise ImageError(f"{shown_address(url)}: {error}", code=code) from error
