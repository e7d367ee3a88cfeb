"""The secret that the gateways of a Ray cluster share where the operator gives none."""

import asyncio

from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

from cluster.config import AppConfig
from cluster.sealing import new_secret

_KEY, _NAMESPACE = b"gateway_secret", b"cantata"


async def with_shared_secret(config: AppConfig) -> AppConfig:
    """Return the settings with a secret. Without one in them it is the cluster's, which its first
    gateway draws and Ray's head keeps; those who can read it can run code there anyway."""
    if config.gateway.secret is not None:
        return config
    secret = await asyncio.to_thread(_shared)
    return config.model_copy(update={"gateway": config.gateway.model_copy(update={"secret": secret})})


def _shared() -> str:
    # Without overwrite the first value stays, whichever gateways draw one at once.
    _internal_kv_put(_KEY, new_secret().encode(), overwrite=False, namespace=_NAMESPACE)
    kept: bytes = _internal_kv_get(_KEY, namespace=_NAMESPACE)
    return kept.decode()
