"""Registries: one Protocol (`base`), five kinds; `open_store` finds the one that a URL names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.errors import ParamsError

if TYPE_CHECKING:
    from pathlib import Path

    from pipelines.params import Declaration
    from pipelines.stores.base import Store


def open_store(name: str, declared: Declaration, root: Path) -> Store:
    """
    Return the store of a declared registry; nothing is asked of it yet.

    Args:
        name: Its key under `registries`.
        declared: The declaration.
        root: Of the checkout: relative paths of `file:` and `mlflow:sqlite:` are below it.

    Raises:
        ParamsError: It is not declared, or its declaration contradicts itself.
    """
    # Each kind brings a library that the others do not need.
    from pipelines import params  # noqa: PLC0415
    from pipelines.wording import did_you_mean, quoted  # noqa: PLC0415

    registry = params.registry_of(declared, name)
    if registry is None:
        known = sorted({*declared.registries, params.LOCAL_REGISTRY})
        raise ParamsError(
            f"registry {quoted(name)} is not declared{did_you_mean(name, known) or '.'}",
            hint=f"Declared: {', '.join(known)}. Declare it under `registries` of params.yaml "
            "(docs/params.md).",
        )
    kind, _, rest = registry.url.partition(":")
    if kind == "file":
        from pipelines.stores.local import LocalStore  # noqa: PLC0415

        return LocalStore(name, root / rest, max_file_mib=registry.max_file_mib)
    if kind == "s3":
        from pipelines.stores.s3 import S3Store  # noqa: PLC0415

        return S3Store(name, registry)
    if kind == "oci":
        from pipelines.stores.oci import OciStore  # noqa: PLC0415

        return OciStore(name, registry)
    if kind == "hf":
        from pipelines.stores.huggingface import HuggingFaceStore  # noqa: PLC0415

        return HuggingFaceStore(name, registry)
    from pipelines.stores.mlflow import MlflowStore  # noqa: PLC0415

    if registry.blobs is None:
        raise ParamsError(
            f"registry {quoted(name)} is of MLflow, which keeps no files.",
            hint=f"registries.{name}.blobs: the registry that holds them.",
        )
    return MlflowStore(name, registry, open_store(registry.blobs, declared, root), root)
