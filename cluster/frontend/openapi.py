"""The OpenAPI document: bodies are read by hand (`body.py`), so their schemas are put in here."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import TypeAdapter

_REF = "#/components/schemas/{model}"


def describe(request: type | None, answer: type | None, *, stream: type | None = None) -> dict[str, Any]:
    """`openapi_extra` of a route: what it reads and what it answers; errors are the same everywhere."""
    extra: dict[str, Any] = {"x-types": [kind for kind in (request, answer, stream) if kind is not None]}
    if request is not None:
        extra["requestBody"] = {"required": True, "content": {"application/json": {"schema": _ref(request)}}}
    responses: dict[str, Any] = {
        "default": {"description": "An error.", "content": {"application/json": {"schema": {"$ref": _REF.format(model="ErrorAnswer")}}}}
    }
    if answer is not None:
        content: dict[str, Any] = {"application/json": {"schema": _ref(answer)}}
        if stream is not None:
            content["text/event-stream"] = {"schema": _ref(stream)}
        responses["200"] = {"description": "The answer; with `stream`, events of the second schema.", "content": content}
        if stream is None:
            responses["200"]["description"] = "The answer."
    extra["responses"] = responses
    return extra


def _ref(kind: type) -> dict[str, str]:
    return {"$ref": _REF.format(model=kind.__name__)}


def document(app: FastAPI, error: type) -> dict[str, Any]:
    """The whole document, with the schemas that `describe` refers to."""
    found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    kinds: dict[str, type] = {error.__name__: error}
    for path in found["paths"].values():
        for operation in path.values():
            kinds |= {kind.__name__: kind for kind in operation.pop("x-types", ())}
    _, schemas = TypeAdapter.json_schemas(
        [(name, "validation", TypeAdapter(kind)) for name, kind in sorted(kinds.items())], ref_template=_REF
    )
    found.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
    return found
