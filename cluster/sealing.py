"""Data that clients keep for the server: encrypted, authenticated, and bound to what it is for."""

import base64
import binascii
import contextlib
import hmac
import os
import secrets
import stat
import tempfile
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from workers.errors import ConfigError

SECRET_CHARS = 43
"""Length of a drawn secret, which has 256 bits."""
_VERSION = b"\x01"
_NONCE_BYTES = 12
_SALT_BYTES = 16
_TAG_BYTES = 16


class BrokenSeal(Exception):
    """What was sealed was changed, or sealed with another key or for another context."""


class Sealer:
    """The seal of one deployment. A seal is a function of what is sealed, so that an event that is
    sent again is the same. Salt and nonce are a keyed hash of it: two texts share them only if they
    are equal.

    Args:
        key: the deployment's secret; at least 16 bytes.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) < 16:
            raise ValueError("a sealing key must have at least 16 bytes")
        self._key = key
        self._hash_key = HKDF(SHA256(), length=32, salt=None, info=b"cantata seal heads").derive(key)

    def seal(self, plain: bytes, context: str) -> str:
        """Return `plain` encrypted, as URL-safe text.

        Args:
            context: what it is for; only the same context opens it.
        """
        aad = context.encode()
        message = len(aad).to_bytes(8, "big") + aad + plain
        head = hmac.digest(self._hash_key, message, "sha256")[: _SALT_BYTES + _NONCE_BYTES]
        salt, nonce = head[:_SALT_BYTES], head[_SALT_BYTES:]
        box = AESGCM(self._derived(salt)).encrypt(nonce, plain, aad)
        return base64.urlsafe_b64encode(_VERSION + head + box).decode()

    def open(self, sealed: str, context: str) -> bytes:
        """Return what was sealed.

        Raises:
            BrokenSeal: it is none of ours, or not for this context.
        """
        try:
            raw = base64.b64decode(sealed.encode(), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            raise BrokenSeal("not base64") from None
        head = len(_VERSION) + _SALT_BYTES + _NONCE_BYTES
        if raw[: len(_VERSION)] != _VERSION or len(raw) < head + _TAG_BYTES:
            raise BrokenSeal("not a seal")
        salt, nonce = raw[len(_VERSION) : head - _NONCE_BYTES], raw[head - _NONCE_BYTES : head]
        try:
            return AESGCM(self._derived(salt)).decrypt(nonce, raw[head:], context.encode())
        except InvalidTag:
            raise BrokenSeal("changed, or sealed elsewhere") from None

    def _derived(self, salt: bytes) -> bytes:
        return HKDF(SHA256(), length=32, salt=salt, info=b"cantata seal").derive(self._key)


def new_secret() -> str:
    """Return a random secret."""
    return secrets.token_urlsafe(32)


def kept_secret(file: Path) -> str:
    """Return the secret that a file holds. If there is none yet, a random one is drawn and kept
    there, readable by this user alone; of several processes that do so at once, all get the same.

    Raises:
        ConfigError: the file cannot be read or written, or others may read it.
    """
    try:
        with contextlib.suppress(FileNotFoundError):
            return _read_secret(file)
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        drawn = new_secret()
        descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=".secret-")  # mode 0600
        try:
            with os.fdopen(descriptor, "w") as stream:
                stream.write(drawn)
                stream.flush()
                os.fsync(stream.fileno())
            with contextlib.suppress(FileExistsError):
                os.link(name, file)  # whole or not at all, and never over another's
        finally:
            os.unlink(name)
        return _read_secret(file)
    except OSError as error:
        raise ConfigError(
            f"the secret of this deployment cannot be kept in {file}: {error.strerror}; set gateway.secret"
        ) from None


def _read_secret(file: Path) -> str:
    text = file.read_text(errors="replace").strip()
    if stat.S_IMODE(file.stat().st_mode) & 0o077:
        raise ConfigError(f"{file} holds a secret and can be read by others: run chmod 600 {file}")
    if len(text) < SECRET_CHARS or not text.isascii():
        raise ConfigError(f"{file} holds no secret: remove it, or set gateway.secret")
    return text
