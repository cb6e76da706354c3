"""What every layer of `verify` is given: one conversion with all that it was made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from pipelines.gguf_header import Header
    from pipelines.layout import Layout
    from pipelines.params import VerifySlice
    from pipelines.records import ConvertRecord, FetchRecord
    from pipelines.toolchain import Toolchain


@dataclass(frozen=True, kw_only=True)
class Subject:
    """
    One 16-bit GGUF, whose bytes were proved against its record, and the source it came from.

    Attributes:
        model: Its key in params.yaml.
        source: Directory with upstream's files, as `fetch` verified them.
        f16: The 16-bit GGUF.
        header: Header of that file: metadata and tensor list.
        config: Upstream's config.json, as parsed; `text_config` not taken out.
        fetch: Record of the source.
        convert: Record of the conversion.
        tools: The pinned llama.cpp.
        log: File to which every program's output is appended.
        scratch: Directory of the layer's own; exists, empty at the start, removed at the end.
        at: Paths of the checkout, for the corpus and the golden conversations.
        slice_: The declaration.
    """

    model: str
    source: Path
    f16: Path
    header: Header
    config: Mapping[str, Any]
    fetch: FetchRecord
    convert: ConvertRecord
    tools: Toolchain
    log: Path
    scratch: Path
    at: Layout
    slice_: VerifySlice

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture, e.g. "llama"; it begins the metadata's keys."""
        return self.convert.architecture
