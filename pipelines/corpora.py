"""A declared text is there with the declared bytes, or nothing is computed from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines import hashing
from pipelines.errors import DigestError, ParamsError

if TYPE_CHECKING:
    from pipelines.layout import Layout
    from pipelines.params import Corpus


def require(corpus: Corpus, at: Layout, what: str) -> None:
    """
    Read all of a text and hold it against its declaration.

    Args:
        corpus: The declaration.
        at: The checkout that holds it.
        what: What it is for, e.g. "calibration text".

    Raises:
        ParamsError: There is no such file.
        DigestError: It has other bytes.
    """
    path = at.root / corpus.path
    if not path.is_file():
        raise ParamsError(
            f"the {what} {corpus.path} does not exist.",
            hint="Put it there, or correct `path` under `corpora` in params.yaml.",
        )
    found = hashing.digest(path).sha256
    if found != corpus.sha256:
        raise DigestError(
            f"{corpus.path} has sha256 {found}, declared is {corpus.sha256}.",
            hint="Restore the file, or declare the new digest if the change is meant.",
        )
