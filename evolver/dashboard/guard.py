"""Which requests the dashboard accepts."""

from __future__ import annotations

import secrets
from typing import Any

from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response

COOKIE = "evolver"
URL_BYTES = 2**12  # with the query
HEADER_BYTES = 2**14  # all names and values together
POLICY = "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; frame-ancestors 'none'"


class Guard(BaseHTTPMiddleware):
    """Accepts requests that have the token, and actions only from our own pages.

    Requests with a longer address or longer headers than any page of ours sends are refused unread. A request under
    another host name is refused: a foreign page may have sent the browser here under its own name.
    """

    def __init__(self, app: Any, token: str, hosts: frozenset[str]) -> None:
        super().__init__(app)
        self._token, self._hosts = token, hosts

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        if answer_long := _refuse_long(request):
            return answer_long
        host = request.headers.get("host", "")
        if host.partition(":")[0] not in self._hosts:
            return PlainTextResponse(
                "the dashboard does not answer under that host name; open the address that `evolver dashboard` has "
                "printed",
                403,
            )
        given = request.query_params.get("token")
        if request.method == "GET" and given is not None and self._is_token(given):
            answer: Response = RedirectResponse("/" + request.scope["path"].lstrip("/"), 303)
            answer.set_cookie(COOKIE, self._token, httponly=True, samesite="strict")
            return answer
        if not self._is_token(request.cookies.get(COOKIE, "")):
            return PlainTextResponse("open the address that `evolver dashboard` has printed, with its token", 401)
        if request.method != "GET":
            origin = request.headers.get("origin", f"http://{host}")
            if request.headers.get("x-evolver") != "1" or origin != f"http://{host}":
                return PlainTextResponse("the dashboard accepts actions from its own pages only", 403)
        answer = await call_next(request)
        answer.headers["Content-Security-Policy"] = POLICY
        answer.headers["X-Content-Type-Options"] = "nosniff"
        answer.headers["Referrer-Policy"] = "no-referrer"
        return answer

    def _is_token(self, given: str) -> bool:
        return secrets.compare_digest(given.encode(), self._token.encode())  # as text it must be ASCII


def _refuse_long(request: Request) -> Response | None:
    """The answer to a request whose address or headers are too long; None for all others."""
    path = request.scope.get("raw_path") or request.scope["path"].encode()
    if len(path) + len(request.scope["query_string"]) > URL_BYTES:
        return PlainTextResponse(f"the address is longer than {URL_BYTES} bytes; the dashboard has no such page", 414)
    if sum(len(name) + len(value) for name, value in request.headers.raw) > HEADER_BYTES:
        return PlainTextResponse(
            f"the headers are longer than {HEADER_BYTES} bytes; delete the browser's cookies of this address", 431
        )
    return None
