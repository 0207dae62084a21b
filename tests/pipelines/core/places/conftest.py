"""Fixtures: a place of each kind of store."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import store_servers

from pipelines.core.places.place import Where, place_of


@pytest.fixture(scope="session")
def moto_endpoint() -> Iterator[str]:
    """Endpoint of moto's server."""
    with store_servers.moto_server() as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def seaweed_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Endpoint of SeaweedFS."""
    with store_servers.seaweed_server(tmp_path_factory.mktemp("seaweed")) as endpoint:
        yield endpoint


def bucket_place(endpoint: str) -> Any:
    """A new prefix in the bucket of a server."""
    return place_of(f"s3://{store_servers.BUCKET}/{uuid.uuid4().hex[:8]}", store_servers.storage(endpoint))


@pytest.fixture(
    params=["local", "memory", "moto", pytest.param("seaweed", marks=pytest.mark.slow)],
)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Where:
    """An empty folder of each kind of store; those of S3 are on two servers that share no code."""
    if request.param == "local":
        return tmp_path
    if request.param == "memory":
        return place_of(f"memory://{uuid.uuid4().hex[:8]}/x")
    return bucket_place(request.getfixturevalue(f"{request.param}_endpoint"))
