"""A server that the tests of this folder share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import LIMITS, Server, running


@pytest.fixture(scope="session")
def server(bundle_folder: Path) -> Iterator[Server]:
    with running(bundle_folder, *LIMITS) as server:
        yield server
