"""The page that shows the HTTP API, `/docs`: Swagger UI, served from this process, so that it works
for browsers that cannot reach the internet."""

from importlib.resources import files

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import FileResponse

PAGE = "/docs"
DOCUMENT = "/openapi.json"
_FILES = ("swagger-ui-bundle.js", "swagger-ui.css", "favicon.png")
DOCS_PATHS = frozenset({PAGE, DOCUMENT, *(f"{PAGE}/{name}" for name in _FILES)})
"""Paths of everything that a browser needs to show the page."""


def add_docs(app: FastAPI) -> None:
    """Add the page, its files and the OpenAPI document as routes, which metrics count by name."""

    @app.get(DOCUMENT, include_in_schema=False)
    async def document() -> Response:
        return Response(orjson.dumps(app.openapi()), media_type="application/json")

    @app.get(PAGE, include_in_schema=False)
    async def page(request: Request) -> Response:
        root = str(request.scope.get("root_path", "")).rstrip("/")
        script, style, icon = (f"{root}{PAGE}/{name}" for name in _FILES)
        return get_swagger_ui_html(
            openapi_url=f"{root}{DOCUMENT}",
            title=app.title,
            swagger_js_url=script,
            swagger_css_url=style,
            swagger_favicon_url=icon,
        )

    for name in _FILES:
        _add_file(app, name)


def _add_file(app: FastAPI, name: str) -> None:
    @app.get(f"{PAGE}/{name}", include_in_schema=False)
    async def file() -> Response:
        return FileResponse(str(files("fastapi_offline") / "static" / name))
