"""Data that clients keep for the server: encrypted, authenticated, and bound to what it is for."""

import base64
import binascii
import secrets

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

_VERSION = b"\x01"
_NONCE_BYTES = 12
_SALT_BYTES = 16
_TAG_BYTES = 16


class BrokenSeal(Exception):
    """What was sealed was changed, or sealed with another key or for another context."""


class Sealer:
    """The seal of one deployment. Each seal has a key of its own, derived with a random salt, so
    that their number has no bound.

    Args:
        key: the deployment's secret; at least 16 bytes.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) < 16:
            raise ValueError("a sealing key must have at least 16 bytes")
        self._key = key

    def seal(self, plain: bytes, context: str) -> str:
        """Return `plain` encrypted, as URL-safe text.

        Args:
            context: what it is for; only the same context opens it.
        """
        salt, nonce = secrets.token_bytes(_SALT_BYTES), secrets.token_bytes(_NONCE_BYTES)
        box = AESGCM(self._derived(salt)).encrypt(nonce, plain, context.encode())
        return base64.urlsafe_b64encode(_VERSION + salt + nonce + box).decode()

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
