"""Registries in S3: what every store promises, on two servers, and what only a network can do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from store_contract import StoreContract, World

from pipelines.stores.s3 import S3Store

if TYPE_CHECKING:
    from registry_servers import S3Server


def world_of(server: S3Server) -> World:
    """Return an empty registry on a server, below a prefix of a bucket of its own."""
    bucket = server.new_bucket()
    registry = server.registry(bucket=bucket, prefix="models/gguf")

    def tamper(_model: str, sha256: str) -> None:
        key = f"models/gguf/blobs/sha256/{sha256}"
        if server.directory is not None:  # as a disk does it: ETag and size stay
            path = server.directory / bucket / key
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            with path.open("r+b") as file:
                file.write(data)
            return
        client = server.client()
        data = bytearray(client.get_object(Bucket=bucket, Key=key)["Body"].read())
        data[len(data) // 2] ^= 1
        client.put_object(Bucket=bucket, Key=key, Body=bytes(data))
        client.close()

    def garble(model: str, alias: str) -> None:
        client = server.client()
        key = f"models/gguf/aliases/{model}/{alias}.json"
        client.put_object(Bucket=bucket, Key=key, Body=b"<html>no alias</html>")
        client.close()

    # Small parts: the files of these tests are sent as large ones are. 5 MiB is S3's least.
    return World(
        open=lambda: S3Store("production", registry, part_bytes=5 << 20),
        tamper=tamper,
        garble_alias=garble,
    )


class TestContract(StoreContract):
    """The one suite, on each server."""

    @pytest.fixture
    def world(self, s3_server: S3Server) -> World:
        """An empty registry."""
        return world_of(s3_server)
