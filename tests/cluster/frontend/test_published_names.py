"""Names that clients and operators have written down keep working: flags, settings, routes, fields,
metrics. `python3 -m tests.cluster.frontend.test_published_names` adds the names that are new."""

import asyncio
import contextlib
import io
import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from prometheus_client.metrics import MetricWrapperBase

from cluster.cli import main
from cluster.config import setting_paths
from cluster.metrics import GatewayMetrics
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import Gateway, make_encoding, serving
from workers.metrics import EngineMetrics

PUBLISHED = Path(__file__).parents[2] / "golden" / "published_names.txt"
COMMANDS = ("serve", "inspect", "make-checkpoint", "bench serve", "bench engine")


def flags() -> Iterator[str]:
    for command in COMMANDS:
        text = io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            main([*command.split(), "--help"])
        for flag in re.findall(r"(?<![\w-])--?[a-z][\w-]*", text.getvalue()):
            yield f"cantata {command} {flag}"


def openapi_names(document: dict[str, Any]) -> Iterator[str]:
    """Yield routes, and each with the fields of its body and of its answers."""
    schemas = document["components"]["schemas"]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            route = f"{method.upper()} {path}"
            yield route
            bodies = (operation.get("requestBody", {}), operation["responses"]["200"])
            for name in re.findall(r"#/components/schemas/(\w+)", json.dumps(bodies)):
                yield from (f"{route} {field}" for field in schemas[name].get("properties", ()))


def metrics() -> Iterator[str]:
    """Yield each metric's name, type and labels."""
    for made in (GatewayMetrics(), EngineMetrics()):
        for metric in vars(made).values():
            if isinstance(metric, MetricWrapperBase):
                [family] = metric.describe()
                yield f"{family.name} {family.type} {','.join(metric._labelnames)}".rstrip()


async def names(gateway: Gateway) -> set[str]:
    document = (await gateway.http.get("/openapi.json")).json()
    found: Iterable[str] = (*flags(), *setting_paths(), *openapi_names(document), *metrics())
    return set(found)


async def test_no_published_name_is_gone(gateway: Gateway) -> None:
    published = PUBLISHED.read_text().splitlines()
    assert len(published) > 200
    assert sorted(set(published) - await names(gateway)) == []


async def _write() -> None:
    with tempfile.TemporaryDirectory() as folder:
        encoding = make_encoding(Path(folder))
    engine = await FakeEngine().start()
    async with serving(encoding, [engine]) as gateway:
        PUBLISHED.write_text("".join(f"{name}\n" for name in sorted(await names(gateway))))
    await engine.stop()


if __name__ == "__main__":
    asyncio.run(_write())
