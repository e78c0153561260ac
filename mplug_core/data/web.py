"""Images at web addresses, bounded in time and size, with errors that say why."""

from __future__ import annotations

from mplug_core.download import Address, Unavailable, fetch_bytes
from mplug_core.errors import ImageError, shown_address

MAX_BYTES = 64 << 20
SECONDS = 60.0
CONNECT_SECONDS = 15.0


def download(written: str, max_bytes: int | None = None) -> bytes:
    """What is at an http(s) address, for someone who waits; ImageError where it can't be had in a minute, or has more
    than ``max_bytes`` (default: :data:`MAX_BYTES`).

    Codes are ``missing``, ``unreadable`` and ``too_large``.
    """
    try:
        address = Address.parse(written)
    except Unavailable as error:
        hint = "write it as a browser shows it"
        raise ImageError(f"{shown_address(written)} is no address: {error}", hint, "unreadable") from error
    try:
        return fetch_bytes(address, max_bytes or MAX_BYTES, CONNECT_SECONDS, SECONDS, accept="image/*")
    except Unavailable as error:
        if error.code == "too_large":
            raise ImageError(f"{address.shown} has {error}", "download it and scale it down", "too_large") from error
        if error.code == "status":
            code = "missing" if error.is_gone else "unreadable"
            hint = "write user:password@ before the host" if error.status == 401 else "check the address"
            raise ImageError(f"{address.shown}: the server answers {error}", hint, code) from error
        hint = "is there network? Files work without"
        raise ImageError(f"{address.shown}: {error}", hint, "unreadable") from error
