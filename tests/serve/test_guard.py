"""A client that stops reading is let go, and what was made for it ends; long answers; errors."""

import asyncio

import pytest
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


def test_long_answers_go_in_pieces_and_errors_of_our_own_are_not_hidden():
    body, sent = bytes(range(256)) * 700, []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"end"})
        raise FileNotFoundError("ours")

    async def receive():
        await asyncio.sleep(60)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"host", b"localhost")]}
    with pytest.raises(FileNotFoundError, match="ours"):
        asyncio.run(Guard(app, Metrics(None))(scope, receive, send))
    bodies = [message["body"] for message in sent[1:]]
    assert b"".join(bodies) == body + b"end"
    assert max(map(len, bodies)) <= 1 << 16
    assert [message.get("more_body", False) for message in sent[1:]] == [True] * (len(bodies) - 1) + [False]
