"""The server's process: from a bundle to a socket that listens, until a signal ends it."""

import socket
from collections.abc import Sequence
from contextlib import suppress

import uvicorn

from unitok.api import Unitok
from unitok.errors import UserError
from unitok.serve.app import make_app
from unitok.serve.generation import Generation
from unitok.serve.guard import LOOPBACK, Guard


def run(
    bundle: Unitok,
    host: str,
    port: int,
    name: str,
    allow_hosts: Sequence[str] = (),
    key: str = "",
    slots: int = 16,
    queue: int = 64,
    max_new_tokens: int = 0,
    max_body: int = 32 << 20,
) -> None:
    """Serve a bundle until SIGINT or SIGTERM; what runs then is finished first.

    Args:
        host, port: to listen on; port 0: one that is free.
        name: of the model, as clients call it.
        allow_hosts: names that clients may use for this server, besides `host` and those of the loopback.
        key, max_body: see `Guard`. slots, queue: see `Engine`. max_new_tokens: see `Generation`.

    Errors: `UserError` for an address that cannot be listened on.
    """
    generation = Generation(bundle, slots, queue, max_new_tokens)
    app = make_app(generation, name)
    guard = Guard(app, generation.metrics, {*LOOPBACK, *(h.lower() for h in (host, *allow_hosts))}, key, max_body)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
        except OSError as error:
            raise UserError(f"{host}:{port}: {error.strerror}; choose another --host or --port") from None
        listening.listen(socket.SOMAXCONN)
        at = f"[{host}]" if ":" in host else host
        print(f"unitok serves {name} at http://{at}:{listening.getsockname()[1]}/", flush=True)
        config = uvicorn.Config(
            guard,
            log_level="warning",
            access_log=False,
            timeout_keep_alive=5,
            lifespan="on",
            server_header=False,
            timeout_graceful_shutdown=60,
        )
        with suppress(KeyboardInterrupt):  # uvicorn has finished what ran
            uvicorn.Server(config).run(sockets=[listening])
