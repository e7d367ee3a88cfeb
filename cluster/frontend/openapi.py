"""The OpenAPI document: bodies are read by hand (`body.py`), so their schemas are put in here."""

from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import TypeAdapter

from cluster.frontend.answers import ErrorAnswer
from cluster.frontend.openapi_ranges import state_ranges

_REF = "#/components/schemas/{model}"


class Schemas:
    """The types that routes read and answer, with their schemas."""

    def __init__(self) -> None:
        self._kinds: dict[str, type] = {}

    def describe(
        self, request: type | None, answer: type, *, stream: type | None = None, error: type = ErrorAnswer
    ) -> dict[str, Any]:
        """Return a route's `openapi_extra`.

        Args:
            stream: type of the events, if the answer can be streamed.
            error: type of all its errors.
        """
        content = {"application/json": {"schema": self._ref(answer)}}
        if stream is not None:
            content["text/event-stream"] = {"schema": self._ref(stream)}
        extra: dict[str, Any] = {
            "responses": {
                "200": {
                    "description": "The answer." if stream is None else "The answer; with `stream`, events.",
                    "content": content,
                },
                "default": {
                    "description": "An error.",
                    "content": {"application/json": {"schema": self._ref(error)}},
                },
            }
        }
        if request is not None:
            extra["requestBody"] = {
                "required": True,
                "content": {"application/json": {"schema": self._ref(request)}},
            }
        return extra

    def document(self, app: FastAPI, vocab_size: int) -> dict[str, Any]:
        """Return the whole document, with every schema to which `describe` referred, and in it the
        ranges that requests are checked for."""
        found = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        adapters: list[tuple[str, Literal["validation"], TypeAdapter[Any]]] = [
            (name, "validation", TypeAdapter(kind)) for name, kind in sorted(self._kinds.items())
        ]
        _, schemas = TypeAdapter.json_schemas(adapters, ref_template=_REF)
        state_ranges(schemas["$defs"], vocab_size)
        found.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
        return found

    def _ref(self, kind: type) -> dict[str, str]:
        self._kinds[kind.__name__] = kind
        return {"$ref": _REF.format(model=kind.__name__)}
