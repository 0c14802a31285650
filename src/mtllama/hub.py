"""Whether the Hugging Face hub can be asked at all: found out at once, before any client begins to retry."""

import os
import re
import socket
from urllib.parse import urlsplit

TIMEOUT = 3.0
"""Seconds to wait for a connection."""


def parse(text: str) -> tuple[str, str | None] | None:
    """`owner/name` or `owner/name@revision` as the hub's id and the revision; None for any other text."""
    found = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?", text)
    return (found[1], found[2]) if found else None


def offline() -> bool:
    """Whether the user has asked for local caches only."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")


def unreachable() -> str | None:
    """Why the hub cannot be asked, or None if it can."""
    if offline():
        return "HF_HUB_OFFLINE is set"
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return None  # the proxy resolves the host; the client will find out
    address = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    host, port = address.hostname or "huggingface.co", address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((host, port), timeout=TIMEOUT).close()
    except OSError as error:
        return f"{host} is not reachable: {error}"
    return None
