"""Which requests the dashboard accepts."""

from __future__ import annotations

import secrets
from typing import Any

from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response

COOKIE = "evolver"
POLICY = "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; frame-ancestors 'none'"


class Guard(BaseHTTPMiddleware):
    """Accepts requests that have the token, and actions only from our own pages.

    A request under another host name is refused: a foreign page may have sent the browser here under its own name.
    """

    def __init__(self, app: Any, token: str, hosts: frozenset[str]) -> None:
        super().__init__(app)
        self._token, self._hosts = token, hosts

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        host = request.headers.get("host", "")
        if host.partition(":")[0] not in self._hosts:
            return PlainTextResponse(
                "the dashboard does not answer under that host name; open the address that `evolver dashboard` has "
                "printed",
                403,
            )
        given = request.query_params.get("token")
        if request.method == "GET" and given is not None and self._is_token(given):
            answer: Response = RedirectResponse(request.url.path, 303)
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
