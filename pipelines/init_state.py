"""Whether a repository is still the template, or a fleet of somebody's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pipelines.params import DeclaredHost

# The embedded model. Its files are the template's; what is declared of it goes when a fleet begins.
EXAMPLE_SOURCE: Final = "path:examples/tiny-llama"
EXAMPLE_HOST: Final = "local"
# Of .github/CODEOWNERS, as long as nobody has written his own team there.
PLACEHOLDER: Final = "@OWNER/"


def examples(models: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the keys of models that are the example; of plain data."""
    return tuple(
        name
        for name, model in models.items()
        if isinstance(model, dict) and model.get("source") == EXAMPLE_SOURCE
    )


def is_fresh(models: Mapping[str, Any]) -> bool:
    """Tell whether nothing but the example is declared."""
    return bool(models) and len(examples(models)) == len(models)


def is_example_host(hosts: Mapping[str, DeclaredHost]) -> bool:
    """Tell whether the only host is the example's, as the template declares it."""
    if set(hosts) != {EXAMPLE_HOST}:
        return False
    said = hosts[EXAMPLE_HOST].model_dump(exclude_unset=True)
    return said == {"memory_mib": 4096, "runs_on": ("self-hosted", "gpu")}


def is_untouched(params: bytes, codeowners: bytes | None) -> bool:
    """
    Tell whether nobody has begun yet: the example is the only model, and its owners are nobody.

    Args:
        params: Bytes of params.yaml.
        codeowners: Bytes of .github/CODEOWNERS; None if there is none.

    Raises:
        ParamsError: params.yaml is wrong.
    """
    from pipelines import pin_lines  # noqa: PLC0415 - pydantic and YAML

    models = pin_lines.values(params, [("models",)])["models",]
    return is_fresh(models) and codeowners is not None and PLACEHOLDER.encode() in codeowners
