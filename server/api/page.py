"""/ and /assets/…: the page for people, from the files in `server/page`.

Knows nothing of what the page does: it asks this server over the same API as everybody else, with its reader's key.

Invariant: what is served is the fixed set of files that was there at start; no path of a request reaches the disk. The
headers let the page load and contact nothing but this server, and let none of its text become markup.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from server.services import Services

FOLDER = Path(__file__).parent.parent / "page"
INDEX = "index.html"
_MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_POLICY = (
    "default-src 'self'",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
    "object-src 'none'",
    "require-trusted-types-for 'script'",  # and no policy makes any: nothing that parses markup works
    "trusted-types 'none'",
)
_HEADERS = {
    "Cache-Control": "no-cache",  # kept, but asked for again: a new version is seen at once
    "Content-Security-Policy": "; ".join(_POLICY),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class Asset:
    """One file of the page, and what goes over the wire with it."""

    content: bytes
    media_type: str
    etag: str

    @classmethod
    def read(cls, path: Path) -> Asset:
        content = path.read_bytes()
        return cls(content, _MEDIA_TYPES[path.suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')

    def reply(self, request: Request) -> Response:
        headers = {**_HEADERS, "ETag": self.etag}
        known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
        if self.etag in known or "*" in known:
            return Response(status_code=304, headers=headers)
        return Response(self.content, headers=headers, media_type=self.media_type)


def add_routes(app: FastAPI, _: Services) -> None:
    assets = {path.name: Asset.read(path) for path in sorted(FOLDER.iterdir()) if path.suffix in _MEDIA_TYPES}
    index = assets.pop(INDEX)

    async def get_page(request: Request) -> Response:
        return index.reply(request)

    async def get_asset(name: str, request: Request) -> Response:
        if name not in assets:
            raise HTTPException(404, "Not Found")
        return assets[name].reply(request)

    # no part of the API, so not in its description
    app.add_api_route("/", get_page, include_in_schema=False)
    app.add_api_route("/assets/{name}", get_asset, include_in_schema=False)
