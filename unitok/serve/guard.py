"""What stands before the endpoints: who may ask, how large and how slowly, and what is logged of it.

A request must name this server as its host, so that a page of another site that leads a browser here (DNS rebinding) gets nothing. Bodies
have a limit, and time: a client that sends slowly is let go, and for one that stops reading nothing more is generated. The log has a line per request, without contents.
"""

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from unitok.errors import visible
from unitok.serve.metrics import Metrics

log = logging.getLogger("unitok")

#: Of every answer: the page loads and asks nothing but this server, and no other page may show it.
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (
        b"content-security-policy",
        b"default-src 'self'; img-src 'self' data: blob:; media-src 'self' data: blob:; frame-ancestors 'none'",
    ),
)
PIECE = 1 << 16  # bytes of an answer that are sent at once
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def error_body(
    message: str, type: str = "invalid_request_error", param: str | None = None, code: str | None = None
) -> dict[str, object]:
    """Return an error in OpenAI's form."""
    return {"error": {"message": visible(message), "type": type, "param": param, "code": code}}


@dataclass
class Guard:
    """ASGI middleware.

    Args:
        hosts: names that requests may use for this server, without ports. key: that requests to `/v1/` must have as their bearer token; "":
            none. max_body: bytes. patience: seconds between two pieces of a body, and for a client to take 64 kB of the answer; for all
            of a body ten times as many.
    """

    app: ASGIApp
    metrics: Metrics
    hosts: Collection[str] = LOOPBACK
    key: str = ""
    max_body: int = 32 << 20
    patience: float = 30.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), [0]

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                status[0] = message["status"]
                message["headers"] = [*message.get("headers", []), *HEADERS]
            try:
                for piece in _pieces(message):
                    await asyncio.wait_for(send(piece), self.patience)
            except TimeoutError:
                raise StoppedReading("the client stopped reading") from None

        try:
            refusal = self._refusal(scope)
            if refusal:
                await _answer(noting, *refusal)
            else:
                await self.app(scope, self._limited(scope, receive), noting)
        except (ClientDisconnect, StoppedReading):
            log.info("%s: the client left before the end of its answer", visible(scope["path"]))
        finally:
            seconds = time.monotonic() - began
            self.metrics.answered(scope.get("route"), status[0])
            log.info("%s %s %d %.0f ms", scope["method"], visible(scope["path"]), status[0], 1000 * seconds)

    def _refusal(self, scope: Scope) -> tuple[int, dict[str, object]] | None:
        """Status and body for a request that is refused before it is read; None for others."""
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        if name.lower() not in self.hosts:
            return 403, error_body(
                f"host {host[:60]!r}: this server has another name; start it with --host or --allow-host", code="host"
            )
        scheme, _, given = headers.get("authorization", "").partition(" ")
        given = given.strip() if scheme.lower() == "bearer" else ""
        if self.key and scope["path"].startswith("/v1/") and not hmac.compare_digest(given.encode(), self.key.encode()):
            return 401, error_body(
                "a wrong or missing key: send it as `Authorization: Bearer KEY`", "authentication_error", code="invalid_api_key"
            )
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.max_body:
            return 413, error_body(f"a body of {length[:20]} bytes; at most {self.max_body} are taken", code="body_too_large")
        return None

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        """`receive` with limits on the size of the body and on the time between its pieces."""
        taken, complete, began = 0, False, time.monotonic()

        async def limited() -> Message:
            nonlocal taken, complete
            if complete:  # what is left to receive is that the client leaves
                return await receive()
            left = began + 10 * self.patience - time.monotonic()
            try:
                message = await asyncio.wait_for(receive(), min(self.patience, max(left, 0.0)))
            except TimeoutError:
                raise HTTPException(408, "the body comes too slowly") from None
            if message["type"] == "http.request":
                taken += len(message.get("body", b""))
                complete = not message.get("more_body", False)
                if taken > self.max_body:
                    raise HTTPException(413, f"a body of more than {self.max_body} bytes")
            return message

        return limited


class StoppedReading(OSError):
    """A client takes nothing of its answer any more: as if it had left."""


def _pieces(message: Message) -> Iterator[Message]:
    """A message, a long body in pieces: a slow client has its time for each of them."""
    body = message.get("body", b"")
    if message["type"] != "http.response.body" or len(body) <= PIECE:
        yield message
        return
    for start in range(0, len(body), PIECE):
        last = start + PIECE >= len(body)
        yield {**message, "body": body[start : start + PIECE], "more_body": message.get("more_body", False) if last else True}


async def _answer(send: Send, status: int, body: dict[str, object]) -> None:
    data = json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode()), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})
