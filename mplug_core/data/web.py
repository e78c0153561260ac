"""Images at web addresses, one at a time for someone who waits: bounded in time and size, with errors that say why."""

from __future__ import annotations

import http.client
import re
import time
import urllib.error
import urllib.request

from mplug_core.errors import ImageError

MAX_BYTES = 64 << 20
SECONDS = 60
CONNECT_SECONDS = 15

_CHUNK = 1 << 16
_ADDRESS = re.compile(r"https?://", re.IGNORECASE)


def is_address(name: str) -> bool:
    """Whether a name is an http or https address."""
    return _ADDRESS.match(name) is not None


def download(address: str, max_bytes: int = MAX_BYTES) -> bytes:
    """What is at an http(s) address; ImageError where it can't be had in a minute, or has more than ``max_bytes``."""
    deadline = time.monotonic() + SECONDS
    try:
        request = urllib.request.Request(address, headers={"User-Agent": "mplug", "Accept": "image/*"})
        with urllib.request.urlopen(request, timeout=CONNECT_SECONDS) as answer:
            data = bytearray()
            while chunk := answer.read1(_CHUNK):
                data += chunk
                if len(data) > max_bytes:
                    limit = f"more than {max_bytes >> 20} MB"
                    raise ImageError(f"{address} has {limit}", "download it and scale it down", "too_large")
                if time.monotonic() > deadline:
                    raise TimeoutError
            return bytes(data)
    except urllib.error.HTTPError as error:
        code = "missing" if error.code in (404, 410) else "unreadable"
        reason = f"{error.code} {error.reason}".strip()
        raise ImageError(f"{address}: the server answers {reason}", "check the address", code) from error
    except TimeoutError as error:
        raise ImageError(f"{address}: no answer in time", "try again, or download it yourself", "unreadable") from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            reason = "no answer in time"
        else:
            reason = getattr(error.reason, "strerror", None) or str(error.reason)
        raise ImageError(f"{address}: {reason}", "is there network? Files work without", "unreadable") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ImageError(f"{address}: {reason}", "check the address and the network", "unreadable") from error
