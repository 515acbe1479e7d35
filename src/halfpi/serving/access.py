"""Who may connect, and over what: API keys and TLS."""

from __future__ import annotations

import hashlib
import hmac
import ssl
from pathlib import Path


class ApiKeys:
    """The keys that clients may present, kept as digests; with no file everybody may connect.

    openpi's client sends its key as `Authorization: Api-Key KEY` (websocket_client_policy.py).
    Raises ValueError if the file cannot be read or holds no key.
    """

    def __init__(self, path: Path | None) -> None:
        self._digests = [] if path is None else [_digest(key) for key in _read_keys(path)]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accepts(self, authorization: str | None) -> bool:
        """Whether the header is right, in a time that does not tell which part of it is wrong."""
        if not self._digests:
            return True
        scheme, _, key = (authorization or "").partition(" ")
        presented = _digest(key.strip())
        matches = [hmac.compare_digest(presented, digest) for digest in self._digests]
        return scheme.lower() == "api-key" and any(matches)


def tls_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """The server's side of TLS. Raises ValueError if the files are no certificate and its key."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key)
    except OSError as error:  # ssl.SSLError is one
        raise ValueError(f"no TLS with {certificate} and {key}: {error}") from error
    return context


def _read_keys(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"API keys {path} cannot be read: {error}") from error
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise ValueError(f"API keys {path} holds none: expected one a line")
    return keys


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()
