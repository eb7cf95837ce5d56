"""Where a service may listen: on loopback in any case, elsewhere only with authentication and transport security."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

from tether.errors import InvalidArgumentError

PROTECTIONS = ("authentication", "transport security")
PORT_PATTERN = re.compile(r"[0-9]{1,5}")


def check_bind_address(address: str, *, insecure: bool, field: str, lacking: Sequence[str] = PROTECTIONS) -> None:
    """Refuse an address that other machines can reach, unless the service is protected or `insecure` is set.

    Args:
        address: host:port, [v6]:port or unix:path.
        insecure: The service's setting of that name.
        field: Name of the setting that holds the address.
        lacking: Those of PROTECTIONS that the service does not have.

    Raises:
        InvalidArgumentError: The address is malformed, or not loopback, and neither of the two holds.
    """
    if is_loopback(address, field=field) or insecure or not lacking:
        return
    raise InvalidArgumentError(
        f"{address} can be reached by other machines and there is no {' and no '.join(lacking)}. "
        "Bind to 127.0.0.1, set tls and tokens_file (docs/security.md), or set insecure = true on a network that you"
        " trust.",
        field=field,
        reason="INSECURE_ADDRESS",
    )


def is_loopback(address: str, *, field: str) -> bool:
    """Return whether only this machine can reach host:port, [v6]:port or unix:path.

    Raises:
        InvalidArgumentError: The address is malformed.
    """
    if address.startswith("unix:"):
        return True
    host, port = split_address(address, field=field)
    if not 0 <= port <= 65535:
        raise InvalidArgumentError(f"{address}: the port must be in [0, 65535].", field=field)
    return _is_loopback(host)


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
