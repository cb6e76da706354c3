"""
gguf-py of the pinned llama.cpp: its names of tensors and its reference implementation of quants.

A release of the package `gguf` knows the architectures and types of the day that it was made, the
toolchain's copy those of the very commit that converts and quantizes. The two have one name, so the
copy is imported under a name of ours, and only the modules that are asked for: `gguf/__init__.py`
would read half a tokenizer library.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

from pipelines.errors import ToolError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipelines.toolchain import Toolchain

_SUFFIXES: Final = (".weight", ".bias")


def module(tools: Toolchain, name: str) -> Any:  # noqa: ANN401 - a module without types
    """
    Import one module of the toolchain's gguf-py, e.g. "constants".

    Raises:
        ToolError: The prefix has none, or none that can be imported.
    """
    directory = tools.converter.parent / "gguf-py" / "gguf"
    package = f"_gguf_py_{tools.commit[:12]}_{abs(hash(directory)):x}"
    if package not in sys.modules:
        parent = ModuleType(package)
        parent.__path__ = [str(directory)]
        sys.modules[package] = parent
    try:
        return importlib.import_module(f"{package}.{name}")
    except ImportError as error:
        if error.name is not None and not error.name.startswith(package):
            raise  # numpy is missing: the caller says how to install it
        raise ToolError(
            f"{directory} has no module {name} that can be imported: {error}.",
            hint="Run `fleet toolchain --verify`.",
        ) from error


class TensorNames:
    """Upstream's names of tensors and llama.cpp's, for one architecture."""

    def __init__(self, tools: Toolchain, architecture: str, blocks_count: int) -> None:
        """
        Read the table of names.

        Raises:
            ToolError: gguf-py does not know the architecture.
        """
        constants, mapping = module(tools, "constants"), module(tools, "tensor_mapping")
        arch = next(
            (key for key, name in constants.MODEL_ARCH_NAMES.items() if name == architecture), None
        )
        if arch is None:
            raise ToolError(f"gguf-py of the toolchain knows no architecture {architecture}.")
        # Its constructor adds the architecture's own names to a table of the class; a class of our
        # own keeps those from the next architecture.
        table = mapping.TensorNameMap
        own = type("_Names", (table,), {"block_mappings_cfg": dict(table.block_mappings_cfg)})
        self._names = own(arch, blocks_count)

    def of(self, upstream: str) -> str | None:
        """Return llama.cpp's name of an upstream tensor; None if the table has none."""
        name: str | None = self._names.get_name(upstream, try_suffixes=_SUFFIXES)
        return name


def dequantize(tools: Toolchain, rows: NDArray[np.uint8], type_: str) -> NDArray[np.float32] | None:
    """
    Turn whole rows of blocks into numbers by gguf-py's reference implementation.

    Args:
        tools: Whose gguf-py.
        rows: (rows, bytes of a row).
        type_: ggml's name of the type in capitals, e.g. "Q4_K".

    Returns:
        (rows, elements of a row), or None if gguf-py cannot read the type.
    """
    import numpy  # noqa: ICN001, PLC0415 - not for those who only look up names

    constants, quants = module(tools, "constants"), module(tools, "quants")
    try:
        kind = constants.GGMLQuantizationType[type_]
        # A scale that is infinite is a finding of the caller's, no warning of numpy's.
        with numpy.errstate(all="ignore"):
            found: NDArray[np.float32] = quants.dequantize(rows, kind)
    except (KeyError, NotImplementedError):
        return None
    return found
