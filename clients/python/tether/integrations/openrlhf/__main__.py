"""Serve OpenRLHF's remote reward protocol: `python -m tether.integrations.openrlhf --reward HOST:PORT --port N`."""

from __future__ import annotations

import argparse
import ipaddress
import signal
import sys
from collections.abc import Sequence

from tether.errors import InvalidArgumentError, TetherError
from tether.integrations.openrlhf.endpoint import REWARD_PATH, EndpointLimits, RewardEndpoint
from tether.integrations.openrlhf.queries import QueryForm
from tether.integrations.scoring import ScoringOptions, Unscored

__all__ = ["main"]

CONFIG_ERROR_EXIT_CODE = 42
"""Exit status for a bad configuration, as of the services."""
DRAIN_SECONDS = 30
"""Requests in flight get this long to finish after SIGTERM."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGINT or SIGTERM, and return the exit status."""
    asked = _parser().parse_args(arguments)
    try:
        _check_host(asked.host, insecure=asked.insecure)
        options = ScoringOptions(
            asked.reward, asked.model, asked.version, _unscored(asked.unscored), {"timeout_seconds": asked.timeout}
        )
        form = QueryForm(asked.prompt_template, asked.end_text)
        endpoint = RewardEndpoint(options, form=form, limits=EndpointLimits(body_bytes=asked.max_body_bytes))
    except TetherError as error:
        print(error, file=sys.stderr)
        return CONFIG_ERROR_EXIT_CODE
    return _serve(endpoint, host=asked.host, port=asked.port)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tether.integrations.openrlhf",
        description="Answer OpenRLHF's remote reward requests with the scores of a tether reward scorer.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--reward", required=True, metavar="HOST:PORT", help="the reward scorer")
    parser.add_argument("--model", default="", help="name of the reward model; empty: the default one")
    parser.add_argument("--version", default="", help="version of the model; empty: whichever is loaded")
    parser.add_argument("--unscored", default="raise", help="reward of a response without a score: raise, or a number")
    parser.add_argument(
        "--prompt-template", default="", help="how a prompt was made, with {} for the message: score conversations"
    )
    parser.add_argument("--end-text", default="", help="text of the end token, removed from the end of responses")
    parser.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS", help="deadline of a scoring call")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve on")
    parser.add_argument("--port", type=int, default=5000, help="port to serve on; 0 takes a free one and prints it")
    parser.add_argument("--insecure", action="store_true", help="allow an address other than loopback")
    parser.add_argument(
        "--max-body-bytes", type=int, default=EndpointLimits().body_bytes, help="bytes of a request body at most"
    )
    return parser


def _check_host(host: str, *, insecure: bool) -> None:
    """Refuse an address that others can reach: OpenRLHF sends no credentials, so that nobody could be told apart.

    Raises:
        InvalidArgumentError: The address is not loopback, and nobody said that this is intended.
    """
    try:
        is_loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = False
    if not (is_loopback or insecure):
        raise InvalidArgumentError(
            f"{host} may be reached by others, and OpenRLHF's protocol has no credentials. Serve on 127.0.0.1, "
            "or add --insecure on a network that you trust.",
            field="--host",
        )


def _unscored(text: str) -> Unscored:
    if text == "raise":
        return "raise"
    try:
        return float(text)
    except ValueError:
        raise InvalidArgumentError(f"{text!r} is neither 'raise' nor a number.", field="--unscored") from None


def _serve(endpoint: RewardEndpoint, *, host: str, port: int) -> int:
    try:
        import uvicorn
    except ImportError:
        print("uvicorn is missing: pip install 'tether[integrations]'", file=sys.stderr)
        return CONFIG_ERROR_EXIT_CODE
    config = uvicorn.Config(
        endpoint,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )
    server = uvicorn.Server(config)

    def stop(number: int, frame: object) -> None:
        server.should_exit = True

    for number in (signal.SIGINT, signal.SIGTERM):  # it raises them again after its end, which is to be an ordinary one
        signal.signal(number, stop)
    listening = config.bind_socket()
    listening.listen(config.backlog)  # so that a caller who reads the line below can connect
    name = f"[{host}]" if ":" in host else host
    print(f"OpenRLHF endpoint: http://{name}:{listening.getsockname()[1]}{REWARD_PATH}", flush=True)
    server.run(sockets=[listening])
    return 0


if __name__ == "__main__":
    sys.exit(main())
