"""Asks a service for its health: `python -m tether_services.runtime.probe 127.0.0.1:50052 [NAME]`.

Exit status 0 means SERVING, 1 anything else. For container health checks, where no gRPC tool is installed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import grpc
from grpc_health.v1 import health_pb2

TIMEOUT_SECONDS = 5.0


def probe(address: str, name: str = "", *, timeout_seconds: float = TIMEOUT_SECONDS) -> str:
    """Return "SERVING", another health status, or the gRPC status code of a failed call.

    Args:
        address: host:port of the service.
        name: Health name, for example tether.v1.RewardService or liveness; empty for the process.
        timeout_seconds: How long to wait for the answer.
    """
    with grpc.insecure_channel(address) as channel:
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


def main(arguments: Sequence[str]) -> int:
    """Probe what the command line names."""
    if not 1 <= len(arguments) <= 2:
        print(__doc__, file=sys.stderr)
        return 2
    status = probe(*arguments)
    print(status)
    return 0 if status == "SERVING" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
