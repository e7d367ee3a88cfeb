"""The page at `/`: a chat in the browser and the cluster live. Its files are in `static/`, as the
browser gets them."""

import gzip
import hashlib
from dataclasses import dataclass
from importlib.resources import files

from fastapi import FastAPI, Request, Response
from starlette.responses import RedirectResponse
from starlette.routing import BaseRoute, Match
from starlette.types import Receive, Scope, Send

from cluster.frontend import errors

_INDEX = "index.html"
_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_NAMES = tuple(
    sorted(
        entry.name
        for entry in (files("cluster.frontend") / "static").iterdir()
        if entry.name.rpartition(".")[2] in _TYPES
    )
)
PATHS = frozenset({"", "/", *(f"/page/{name}" for name in _NAMES if name != _INDEX)})
"""Paths of everything that a browser needs to show the page."""
_HEADERS = {
    # Nothing from elsewhere, nothing inline, no text that becomes markup.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    # A browser asks each time whether its copy is current: files of two versions do not mix.
    "cache-control": "no-cache",
    "vary": "accept-encoding",
}


@dataclass(frozen=True, slots=True)
class _File:
    media_type: str
    plain: bytes
    zipped: bytes
    tag: str

    @classmethod
    def read(cls, name: str) -> "_File":
        plain = (files("cluster.frontend") / "static" / name).read_bytes()
        tag = hashlib.sha256(plain).hexdigest()[:20]
        return cls(_TYPES[name.rpartition(".")[2]], plain, gzip.compress(plain, 9, mtime=0), tag)

    def answer(self, request: Request) -> Response:
        zips = _takes_gzip(request.headers.get("accept-encoding", ""))
        tag = f'"{self.tag}-gzip"' if zips else f'"{self.tag}"'
        headers = {**_HEADERS, "etag": tag}
        known = {
            entry.strip().removeprefix("W/") for entry in request.headers.get("if-none-match", "").split(",")
        }
        if tag in known or "*" in known:
            return Response(status_code=304, headers=headers)
        if zips:
            headers["content-encoding"] = "gzip"
        return Response(self.zipped if zips else self.plain, headers=headers, media_type=self.media_type)


def add_page(app: FastAPI) -> None:
    """Add the page and its files as routes; the files are read here, once."""
    read = {name: _File.read(name) for name in _NAMES}
    index = read.pop(_INDEX)

    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        return index.answer(request)

    @app.api_route("/page/{name}", methods=["GET", "HEAD"], include_in_schema=False)
    async def file(request: Request, name: str) -> Response:
        if name not in read:
            raise errors.UnknownRoute("The page has no such file.")
        return read[name].answer(request)

    app.router.routes.append(_BarePrefix())


def refuse_page(app: FastAPI) -> None:
    """Add a route that says that there is no page: `/` is known, for `HEAD`, in any case."""

    @app.get("/", include_in_schema=False)
    async def no_page() -> Response:
        raise errors.UnknownRoute("This server has no page: gateway.page is false.")


class _BarePrefix(BaseRoute):
    """The prefix under which the app is mounted, without the slash at its end: there the page's
    relative URLs would lead elsewhere."""

    path = "/"

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Return whether this is the path; `route` names it for metrics."""
        is_bare = (
            scope["type"] == "http"
            and scope["method"] in ("GET", "HEAD")
            and scope["path"] != ""
            and scope["path"] == scope.get("root_path")
        )
        return (Match.FULL, {"route": self}) if is_bare else (Match.NONE, {})

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Redirect to the same path with the slash."""
        last = scope["path"].rpartition("/")[2]
        await RedirectResponse(f"./{last}/")(scope, receive, send)


def _takes_gzip(accepted: str) -> bool:
    """Return whether a header Accept-Encoding allows gzip."""
    for entry in accepted.lower().split(","):
        name, _, quality = entry.partition(";")
        if name.strip() in ("gzip", "*"):
            return quality.replace(" ", "") not in ("q=0", "q=0.0", "q=0.00", "q=0.000")
    return False
