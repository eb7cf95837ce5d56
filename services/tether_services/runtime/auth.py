"""Where a service may listen, and the place of identity checks in the guard chain.

Transport security, tokens, scopes and quotas are not there yet. Until they are, a service binds to loopback only unless
it is told `insecure = true`.
"""

from __future__ import annotations

import ipaddress
import re

from tether.errors import InvalidArgumentError

PORT_PATTERN = re.compile(r"[0-9]{1,5}")


def check_bind_address(address: str, *, insecure: bool, field: str) -> None:
    """Refuse an address that other machines can reach, unless `insecure` is set.

    Args:
        address: host:port, [v6]:port or unix:path.
        insecure: The service's setting of that name.
        field: Name of the setting that holds the address.

    Raises:
        InvalidArgumentError: The address is malformed, or not loopback and `insecure` is False.
    """
    if address.startswith("unix:"):
        return
    host, port = split_address(address, field=field)
    if not 0 <= port <= 65535:
        raise InvalidArgumentError(f"{address}: the port must be in [0, 65535].", field=field)
    if not insecure and not _is_loopback(host):
        raise InvalidArgumentError(
            f"{address} can be reached by other machines and there is no transport security. "
            "Bind to 127.0.0.1, or set insecure = true on a network that you trust.",
            field=field,
            reason="INSECURE_ADDRESS",
        )


def split_address(address: str, *, field: str) -> tuple[str, int]:
    """Return host and port of host:port or [v6]:port.

    Raises:
        InvalidArgumentError: The address has no port or the port is not a number.
    """
    host, separator, port = address.rpartition(":")
    if not separator or not host or not PORT_PATTERN.fullmatch(port):
        raise InvalidArgumentError(f"{address!r} is not host:port.", field=field)
    return host.strip("[]"), int(port)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
