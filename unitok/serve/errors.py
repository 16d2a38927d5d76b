"""Errors as answers in OpenAI's form."""

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from unitok.errors import UserError
from unitok.serve.engine import BusyError
from unitok.serve.guard import error_body


class ClientLeftError(Exception):
    """Nobody waits for the answer any more."""


def handle_errors(app: FastAPI) -> None:
    """Answer errors in OpenAI's form."""

    @app.exception_handler(UserError)
    def wrong(request: Request, error: UserError) -> JSONResponse:
        field, colon, _ = str(error).partition(":")
        return JSONResponse(error_body(str(error), param=field if colon and field.isidentifier() else None), 400)

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        steps = [str(step) for step in first["loc"] if step != "body"]
        message = str(first["msg"]).removeprefix("Value error, ")
        if not steps and "json" not in request.headers.get("content-type", ""):
            message = "send the body as JSON, with `Content-Type: application/json`"
        if first["type"] == "json_invalid":
            steps, message = [], f"the body is not JSON, at character {steps[-1]}"
        field = ".".join(steps) or (message.partition(":")[0] if ":" in message else "")
        return JSONResponse(error_body(f"{'.'.join(steps)}: {message}" if steps else message, param=field or None), 400)

    @app.exception_handler(BusyError)
    def busy(request: Request, error: BusyError) -> JSONResponse:
        body = error_body(
            "the server is busy: too many requests wait already; try again in a second", "server_error", code="busy"
        )
        return JSONResponse(body, 503, {"Retry-After": "1"})

    @app.exception_handler(HTTPException)
    def other(request: Request, error: HTTPException) -> JSONResponse:
        known = error.status_code != 405 or any(getattr(route, "path", "") == request.url.path for route in app.routes)
        if not known:  # the page's files, which are only read, would have any name
            return JSONResponse(error_body(f"there is no {request.method} {request.url.path} here"), 404)
        return JSONResponse(error_body(str(error.detail)), error.status_code)

    @app.exception_handler(ClientLeftError)
    def left(request: Request, error: ClientLeftError) -> Response:
        return Response(status_code=499)

    @app.exception_handler(Exception)
    def failed(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(error_body("the server failed; its log says why", "server_error"), 500)
