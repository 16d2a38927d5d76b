"""`unitok serve`."""

import importlib.util
import logging
import os
from pathlib import Path

from unitok.cli.arguments import BundleFolder, Dtype
from unitok.errors import UserError
from unitok.hardware import check_device
from unitok.hub import name_of

MISSING = "unitok serve needs more packages: pip install 'unitok-lm[serve]'"


def serve(
    bundle: BundleFolder = Path("scenes"),
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    allow_host: list[str] | None = None,
    name: str = "",
    slots: int = 16,
    queue: int = 64,
    max_new_tokens: int = 0,
    max_body_mb: float = 32.0,
    device: str = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Serve a bundle behind OpenAI's endpoints, with a page at http://HOST:PORT/. Ctrl-C or SIGTERM: what runs is finished, then it stops.

    A key in the environment variable UNITOK_API_KEY must then come with every request to /v1/.

    Args:
        bundle: bundle with tokenizers and a decoder: its folder, USER/NAME[@REVISION] on the Hugging Face hub, or scenes, the built-in one

    network:
        host: address to listen on; 0.0.0.0 for all of this machine's, which then needs --allow-host
        port: number of the port; 0: one that is free
        allow_host: another name by which clients may call this server; may be repeated

    requests:
        name: of the model, as clients call it (default: the bundle's)
        slots: outputs that are generated together
        queue: outputs that may wait; more are refused (503)
        max_new_tokens: most that a request may ask for; 0: what the decoder takes
        max_body_mb: most megabytes of a request

    computation:
        device: where to run: cpu, cuda, cuda:1, mps
        dtype: of the weights that generate; int8: on a CPU; auto: the fastest here
    """
    if slots < 1 or queue < 0 or max_new_tokens < 0 or max_body_mb <= 0 or not 0 <= port < 2**16:
        raise UserError("--slots must be at least 1, --queue and --max-new-tokens 0, --max-body-mb above 0, --port below 65536")
    if any(
        importlib.util.find_spec(module) is None for module in ("fastapi", "uvicorn", "prometheus_client", "python_multipart")
    ):
        raise UserError(MISSING)
    from unitok.api import Unitok
    from unitok.serve.run import run

    unitok = Unitok.from_pretrained(bundle, device=check_device(device), dtype=dtype)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    run(
        unitok, host, port, name or name_of(bundle), allow_host or [], os.environ.get("UNITOK_API_KEY", ""),
        slots, queue, max_new_tokens, round(max_body_mb * 1e6),
    )  # fmt: skip
