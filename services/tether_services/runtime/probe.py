"""Asks a service for its health: `python -m tether_services.runtime.probe 127.0.0.1:50052 [NAME]`.

Exit status 0 means SERVING, 1 anything else. For container health checks, where no gRPC tool is installed. A service
with transport security is asked at its `health_address`, or with --ca-file and, for mutual TLS, a certificate.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2

TIMEOUT_SECONDS = 5.0


def probe(
    address: str,
    name: str = "",
    *,
    credentials: grpc.ChannelCredentials | None = None,
    server_name: str = "",
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> str:
    """Return "SERVING", another health status, or the gRPC status code of a failed call.

    Args:
        address: host:port of the service.
        name: Health name, for example tether.v1.RewardService or liveness; empty for the process.
        credentials: Of transport security; None: there is none.
        server_name: Name in the certificate of the service, where it is not the host of the address.
        timeout_seconds: How long to wait for the answer.
    """
    with _open(address, credentials, server_name) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        try:
            response = check(health_pb2.HealthCheckRequest(service=name), timeout=timeout_seconds)
        except grpc.RpcError as error:
            return str(error.code().name)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))


def _open(address: str, credentials: grpc.ChannelCredentials | None, server_name: str) -> grpc.Channel:
    if credentials is None:
        return grpc.insecure_channel(address)
    options = [("grpc.ssl_target_name_override", server_name)] if server_name else []
    return grpc.secure_channel(address, credentials, options)


def main(arguments: Sequence[str]) -> int:
    """Probe what the command line names."""
    parser = argparse.ArgumentParser(prog="tether_services.runtime.probe", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("address", metavar="HOST:PORT")
    parser.add_argument("name", nargs="?", default="", metavar="NAME", help="health name; the process otherwise")
    parser.add_argument("--ca-file", type=Path, metavar="FILE", help="roots that the service's certificate is from")
    parser.add_argument("--certificate-file", type=Path, metavar="FILE", help="certificate to show, for mutual TLS")
    parser.add_argument("--key-file", type=Path, metavar="FILE", help="its private key")
    parser.add_argument("--server-name", default="", metavar="NAME", help="in the certificate, where it is not HOST")
    try:
        known = parser.parse_args(arguments)
        if bool(known.certificate_file) != bool(known.key_file) or (known.key_file and not known.ca_file):
            parser.error("--certificate-file, --key-file and --ca-file go together")
    except SystemExit as end:
        return int(end.code or 0)
    credentials = None
    if known.ca_file:
        own = [path.read_bytes() if path else None for path in (known.key_file, known.certificate_file)]
        credentials = grpc.ssl_channel_credentials(known.ca_file.read_bytes(), *own)
    status = probe(known.address, known.name, credentials=credentials, server_name=known.server_name)
    print(status)
    return 0 if status == "SERVING" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
