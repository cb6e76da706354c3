"""Which addresses are this machine, and over which nobody is between."""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import urlsplit


def is_loopback(host: str | None) -> bool:
    """Tell whether a host is this very machine, however it is written; no name is looked up."""
    if host == "localhost":
        return True
    found = _address(host)
    return found is not None and (found.is_loopback or found.is_unspecified)


def is_link_local(host: str | None) -> bool:
    """
    Tell whether a host is one that only this network segment knows (RFC 3927, RFC 4291).

    169.254.169.254 is one of them, where clouds hand out the machine's own login.
    """
    found = _address(host)
    return found is not None and found.is_link_local


def is_private_way(url: str) -> bool:
    """Tell whether nobody is between: TLS, or this machine."""
    parts = urlsplit(url)
    return parts.scheme == "https" or is_loopback(parts.hostname)


def _address(host: str | None) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Read an address as the resolver would, `127.1` and `::ffff:127.0.0.1` too; None of a name."""
    try:
        found = ipaddress.ip_address((host or "").partition("%")[0])
    except ValueError:
        try:
            return ipaddress.IPv4Address(socket.inet_aton(host or ""))
        except (OSError, ValueError):
            return None
    mapped = getattr(found, "ipv4_mapped", None)
    return found if mapped is None else ipaddress.IPv4Address(mapped)
