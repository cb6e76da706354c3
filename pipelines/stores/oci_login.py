"""
Who one is to a registry of OCI: addresses, trusted authorities, user name and password.

GGUF_FLEET_<NAME>_USERNAME and _PASSWORD, else what `docker login` wrote in clear into config.json.
Credential helpers are programs of the user's and are not run; where one has the login, the error
says so.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from pipelines import console
from pipelines.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import requests

# Secrets of a deployment environment, which do not know what its registry is called.
SHARED: Final = ("REGISTRY_USERNAME", "REGISTRY_PASSWORD")
_PORTS: Final = {"http": 80, "https": 443}


def credentials(name: str, host: str) -> tuple[str, str] | None:
    """
    Return user name and password of a registry; None if there are none.

    Args:
        name: Its key in params.yaml.
        host: As docker knows it, host[:port].

    Raises:
        StoreError: Half of it is set, or a credential helper has it.
    """
    names = variables(name)
    found = [os.environ.get(each, "") for each in names]
    if all(found):
        return found[0], found[1]
    if any(found):
        missing = names[found.index("")]
        raise StoreError(f"{missing} is not set.", hint=f"{' and '.join(names)} go together.")
    return _from_docker(host, name)


def origin_of(url: str) -> str:
    """Return `scheme://host:port` of an address, the port also where it goes without saying."""
    parts = urlsplit(url)
    port = parts.port or _PORTS.get(parts.scheme, 0)
    return f"{parts.scheme}://{parts.hostname or ''}:{port}"


def no_auth(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """Keep requests from looking for a login by itself."""
    return request


def authorities() -> str | bool:
    """Return the file of trusted authorities that the environment names, or requests' own."""
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
        path = os.environ.get(name)
        if path:
            if not Path(path).is_file():
                raise StoreError(f"{name} names {console.clean(path)}, which is no file.")
            return path
    return True


def basic(login: tuple[str, str]) -> str:
    """Return the Authorization header of a user name and a password (RFC 7617)."""
    return f"Basic {base64.b64encode(':'.join(login).encode()).decode()}"


def variables(name: str) -> tuple[str, str]:
    """Return the names of the variables that hold the login of a registry."""
    prefix = f"GGUF_FLEET_{name.upper().replace('-', '_')}"
    return f"{prefix}_USERNAME", f"{prefix}_PASSWORD"


def lend(registries: Mapping[str, str]) -> None:
    """
    Give the login of a deployment environment to its registry of OCI, whatever that is called.

    REGISTRY_USERNAME and REGISTRY_PASSWORD, for this process; of two such registries neither gets
    it: a password belongs to one of them, and nobody says to which.

    Args:
        registries: Addresses, `oci://...`, of the environment's registries, by name.
    """
    found = [name for name, url in registries.items() if url.startswith("oci:")]
    login = [os.environ.get(name, "") for name in SHARED]
    if len(found) == 1 and all(login):
        for name, value in zip(variables(found[0]), login, strict=True):
            os.environ[name] = os.environ.get(name) or value


def _from_docker(host: str, name: str) -> tuple[str, str] | None:
    """Return the login that `docker login` wrote in clear into its config.json, if any."""
    folder = os.environ.get("DOCKER_CONFIG")
    path = (Path(folder) if folder else Path.home() / ".docker") / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(config, dict):
        return None
    auths = _table(config, "auths")
    keys = (host, f"https://{host}", f"https://{host}/v1/", f"https://{host}/v2/")
    entry = next((auths[key] for key in keys if key in auths), None)
    if isinstance(entry, dict) and isinstance(entry.get("auth"), str) and entry["auth"]:
        try:
            user, _, password = (
                base64.b64decode(entry["auth"], validate=True).decode().partition(":")
            )
        except (binascii.Error, UnicodeDecodeError) as error:
            raise StoreError(f"{path}: the login of {host} cannot be read.") from error
        if user and password:
            return user, password
    if host in _table(config, "credHelpers") or (entry is not None and config.get("credsStore")):
        raise StoreError(
            f"{path} leaves the login of {host} to a credential helper, which is not run here.",
            hint=f"Set {' and '.join(variables(name))}.",
        )
    return None


def _table(config: dict[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key)
    return value if isinstance(value, dict) else {}
