"""The page's own files, read once, and the headers that keep it from doing anything but what it is for.

They hold no data and need no credential: a browser has none to send before they run. Nothing comes from elsewhere, no
script stands in a document, and no text can become markup (Trusted Types without any policy).
"""

from pathlib import Path
from typing import Final

from aiohttp import hdrs, web

FOLDER: Final = Path(__file__).resolve().parent / "static"

START: Final = "index.html"

TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none';"
        " form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    hdrs.CACHE_CONTROL: "no-store",
}
"""Never kept: after an upgrade the page is that of the daemon that it asks."""


def file_routes() -> list[web.RouteDef]:
    """``/``, and ``/page/FILE`` for each file of FOLDER."""
    files = {path.name: path.read_bytes() for path in FOLDER.iterdir() if path.suffix in TYPES}

    def answer(name: str) -> web.Response:
        kind = TYPES[Path(name).suffix]
        response = web.Response(body=files[name], headers={**HEADERS, hdrs.CONTENT_TYPE: kind})
        response.force_close()  # or the door would think of it as a stranger who shows nothing
        return response

    async def start(_: web.Request) -> web.StreamResponse:
        return answer(START)

    async def file(request: web.Request) -> web.StreamResponse:
        name = request.match_info["file"]
        return answer(name) if name in files else web.Response(status=404, text="the page has no such file\n")

    return [web.get("/", start), web.get("/page/{file}", file)]
