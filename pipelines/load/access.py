"""
How we come to a server: with the key that the environment holds for it, and nothing else of that.

A proxy would be measured, and a login of .netrc would be told to whoever answers.
"""

from __future__ import annotations

import os
from typing import Final

from pipelines import __version__

API_KEY_ENV: Final = "GGUF_FLEET_API_KEY"


def headers() -> dict[str, str]:
    """Return what every request says of us."""
    found = {"Accept-Encoding": "identity", "User-Agent": f"gguf-fleet/{__version__}"}
    key = os.environ.get(API_KEY_ENV)
    if key:
        found["Authorization"] = f"Bearer {key}"
    return found


def certificates() -> str | bool:
    """Return the file of the certificates to trust, or True for the usual ones."""
    return os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("SSL_CERT_FILE") or True
