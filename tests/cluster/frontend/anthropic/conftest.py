"""Anthropic's own client for the gateway of the tests."""

from collections.abc import AsyncIterator

import anthropic
import httpx2
import pytest

from tests.support.gateway import Gateway


@pytest.fixture
async def client(gateway: Gateway) -> AsyncIterator[anthropic.AsyncAnthropic]:
    # Certificates are of no use on loopback and take half a second to load.
    http = httpx2.AsyncClient(timeout=30, verify=False)
    async with anthropic.AsyncAnthropic(
        base_url=gateway.url, api_key="none", max_retries=0, http_client=http
    ) as client:
        yield client
