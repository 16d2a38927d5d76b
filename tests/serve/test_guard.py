"""A client that stops reading is let go, and what was made for it ends."""

import asyncio

from starlette.responses import StreamingResponse

from unitok.serve.guard import Guard
from unitok.serve.metrics import Metrics


def test_a_client_that_stops_reading_is_let_go():
    ended = []

    async def pieces():
        try:
            while True:
                yield "data: more\n\n"
        finally:
            ended.append(True)

    async def app(scope, receive, send):
        await StreamingResponse(pieces())(scope, receive, send)

    async def receive():
        await asyncio.sleep(60)  # it stays connected

    taken = []

    async def send(message):
        taken.append(message)
        if len(taken) > 3:
            await asyncio.sleep(60)  # its buffers are full

    scope = {
        "type": "http", "method": "GET", "path": "/v1/models", "headers": [(b"host", b"localhost")], "asgi": {"spec_version": "2.4"},
    }  # fmt: skip

    async def ask():
        guard = Guard(app, Metrics(None), patience=0.2)
        await asyncio.wait_for(guard(scope, receive, send), 5)
        await asyncio.sleep(0)

    asyncio.run(ask())
    assert len(taken) == 4
    assert ended
