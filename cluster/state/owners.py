"""Owners of stored objects."""

import hashlib
import hmac


def owner_of(api_key: str | None) -> str:
    """Return the name under which the objects of an API key are stored, from which the key cannot
    be found; without keys everything belongs to one owner, the empty name."""
    if not api_key:
        return ""
    return hmac.new(api_key.encode("utf-8", "replace"), b"cantata: owner", hashlib.sha256).hexdigest()
