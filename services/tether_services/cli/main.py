"""The `tether` command: its arguments and how it ends. Everything heavy is imported after parsing."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, TypeAlias

import tether
from tether.errors import InvalidArgumentError, TetherError
from tether_services.cli.adapter_commands import add_adapter
from tether_services.cli.bench_commands import add_bench
from tether_services.cli.connection import add_connection
from tether_services.cli.data_commands import add_data
from tether_services.cli.error_commands import add_errors
from tether_services.cli.model_commands import add_model
from tether_services.cli.scoring_commands import SCORE_DESCRIPTION, add_score_arguments
from tether_services.cli.token_commands import add_token

SERVICES: Final = ("generator", "reward", "reference", "orchestrator")
STAGES: Final = ("pretrain", "sft", "reward", "dpo")
CONFIG_ERROR_EXIT_CODE: Final = 42
"""As in runtime.settings, which is not imported here: a bad configuration, which starting again cannot help."""
INTERRUPTED_EXIT_CODE: Final = 130
"""What a shell reports after Ctrl-C."""

Command = Callable[[argparse.Namespace], int]
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status: 0, 1 for a failure, 42 for a bad configuration, 130 after Ctrl-C."""
    known = build_parser().parse_args(arguments)
    run: Command = known.run
    try:
        status = run(known)
        sys.stdout.flush()
        return status
    except TetherError as error:
        return report_error(error)
    except BrokenPipeError:  # whoever reads the output, such as head, has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left goes nowhere, without an error
        return 1
    except ModuleNotFoundError as error:
        if not error.name or error.name.startswith(("tether.", "tether_services")):
            raise
        print(
            f"error: {error.name} is not installed; pip install 'tether[serve]', [models], [train] or [bench]",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt as stop:
        print("; ".join(["interrupted", *map(str, stop.args)]), file=sys.stderr)
        return INTERRUPTED_EXIT_CODE


def report_error(error: TetherError) -> int:
    """Print the error, one line per offending field, and return the exit status."""
    described = [v for v in error.violations if v.description != error.message]
    print(f"error: [{error.reason}] {error.message}" if described else f"error: {error}", file=sys.stderr)
    for violation in described:
        print(f"  {violation.field}: {violation.description}", file=sys.stderr)
    return CONFIG_ERROR_EXIT_CODE if error.reason == "INVALID_CONFIG" else 1


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all subcommands."""
    parser = argparse.ArgumentParser(prog="tether", description="Trains language models from human feedback.")
    parser.add_argument("--version", action="version", version=f"tether {tether.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_delegating(commands, "serve", "run one service", SERVICES, _serve)
    _add_delegating(commands, "train", "run one offline stage", STAGES, _train)
    add_data(commands)
    add_adapter(commands)
    add_model(commands)
    add_token(commands)
    _add_up(commands)
    _add_demo(commands)
    _add_run(commands)
    _add_score(commands)
    _add_generate(commands)
    add_bench(commands)
    add_errors(commands)
    return parser


def _add_delegating(commands: Commands, name: str, text: str, choices: Sequence[str], run: Command) -> None:
    """Add a command whose further arguments belong to what it names."""
    parser = commands.add_parser(name, help=text, description=f"{text.capitalize()}: {', '.join(choices)}.")
    parser.add_argument("name", metavar="NAME", help=f"{', '.join(choices)}; NAME --help lists its settings")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="--config FILE --set KEY=VALUE --dry-run")
    parser.set_defaults(run=run)


def _add_local(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="MODEL", help="folder or hub name of the policy; the packaged one otherwise")
    parser.add_argument("--reward-model", metavar="MODEL", help="folder or hub name; the packaged one otherwise")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads to share out; all otherwise")


def _add_up(commands: Commands) -> None:
    text = "run the four services on this machine until Ctrl-C"
    parser = commands.add_parser("up", help=text, description=f"{text.capitalize()}.")
    parser.add_argument("--engine", choices=("transformers", "vllm", "fake"), default="transformers")
    _add_local(parser)
    parser.add_argument("--state-dir", type=Path, default=Path("runs"), metavar="DIR", help="runs and logs (runs)")
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="no answer depends on what else is asked at the time: the same seeds give the same bits; slower",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="SERVICE.KEY=VALUE",
        help="a setting of one service",
    )
    parser.set_defaults(run=_up)


def _add_demo(commands: Commands) -> None:
    text = "train a small story writer to be more positive, start to finish"
    parser = commands.add_parser("demo", help=text, description=f"{text.capitalize()}.")
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    _add_local(parser)
    parser.add_argument(
        "--prompts", metavar="SOURCE", help="file with one a line, folder or hub name; the packaged ones otherwise"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="PPO steps")
    parser.add_argument("--run-id", metavar="ID", help="name of the run; one with the time otherwise")
    parser.add_argument("--seed", type=int, metavar="N", help="of prompts, sampling and training")
    parser.add_argument("--output", type=Path, default=Path("runs"), metavar="DIR", help="folder of the runs (runs)")
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="a setting of the run"
    )
    parser.set_defaults(run=_demo)


def _add_run(commands: Commands) -> None:
    parser = commands.add_parser("run", help="start, list, watch and stop training runs")
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    texts = {
        "start": "start a run",
        "get": "show a run",
        "show": "show a run and, with --steps, what each of its steps left behind",
        "list": "list the runs, newest first",
        "watch": "show the progress of a run until it has ended",
        "cancel": "stop a run after its current step",
        "resume": "continue a failed or cancelled run",
        "rollback": "take back the last steps of a run",
    }
    for action, text in texts.items():
        inner = actions.add_parser(action, help=text, description=f"{text.capitalize()}.")
        if action != "list":
            inner.add_argument("run_id", metavar="RUN_ID")
        add_connection(inner, "127.0.0.1:50054", of="orchestrator")
        inner.set_defaults(run=_run, action=action)
        if action in ("start", "resume"):
            inner.add_argument("--watch", action="store_true", help="show its progress until it has ended")
        if action == "start":
            _add_run_config(inner)
        if action == "resume":
            text = "committed steps that stay; the others are rolled back first (all stay)"
            inner.add_argument("--from-step", type=int, metavar="N", help=text)
        if action == "rollback":
            text = "committed steps that stay, 0 to begin anew (all but the last one)"
            inner.add_argument("--to-step", type=int, metavar="N", help=text)
        if action == "show":
            inner.set_defaults(run=_show)
            inner.add_argument("--steps", action="store_true", help="with samples, adapter and checkpoint of each step")
            inner.add_argument("--json", action="store_true", help="print JSON")
        if action == "watch":
            inner.add_argument("--first-step", type=int, default=0, metavar="N", help="first step to show (0)")


def _add_run_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="TOML file with the configuration")
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="override one key"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved settings and start nothing")


def _add_score(commands: Commands) -> None:
    parser = commands.add_parser(
        "score",
        help="score the rows of a file, or responses to a prompt",
        description=SCORE_DESCRIPTION,
        usage="tether score [options] FILE\n       tether score [options] PROMPT RESPONSE...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_score_arguments(parser)
    add_connection(parser, "127.0.0.1:50052", of="reward service")
    parser.set_defaults(run=_score)


def _add_generate(commands: Commands) -> None:
    text = "continue a prompt"
    parser = commands.add_parser("generate", help=text, description=f"{text.capitalize()}.")
    parser.add_argument("prompt", metavar="PROMPT")
    parser.add_argument("--n", type=int, default=1, help="completions (1)")
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="new tokens at most (64)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (1)")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus mass (1)")
    parser.add_argument("--top-k", type=int, default=0, help="most likely tokens kept; 0 is off (0)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends a completion; repeatable")
    parser.add_argument("--seed", type=int, metavar="N", help="makes a repeat give the same text")
    parser.add_argument("--policy-version", type=int, metavar="N", help="the active one otherwise")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    add_connection(parser, "127.0.0.1:50051", of="generator")
    parser.set_defaults(run=_generate)


def _serve(known: argparse.Namespace) -> int:
    _check_choice("service", known.name, SERVICES)
    module = importlib.import_module(f"tether_services.{known.name}.__main__")
    return int(module.main(known.rest))


def _train(known: argparse.Namespace) -> int:
    _check_choice("stage", known.name, STAGES)
    from tether_services.cli.training_commands import train

    return train(known.name, known.rest)


def _check_choice(field: str, name: str, choices: Sequence[str]) -> None:
    if name not in choices:
        raise InvalidArgumentError(
            f"There is no {field} {name!r}; there are {', '.join(choices)}.", field=field, reason="INVALID_CONFIG"
        )


def _up(known: argparse.Namespace) -> int:
    from tether_services.cli.local_commands import up

    return up(known)


def _demo(known: argparse.Namespace) -> int:
    from tether_services.demo.demo import run_demo

    return run_demo(known)


def _show(known: argparse.Namespace) -> int:
    from tether_services.cli.run_commands import show

    return show(known)


def _run(known: argparse.Namespace) -> int:
    from tether_services.cli.client_commands import run

    return run(known)


def _score(known: argparse.Namespace) -> int:
    from tether_services.cli.scoring_commands import score

    return score(known)


def _generate(known: argparse.Namespace) -> int:
    from tether_services.cli.client_commands import generate

    return generate(known)
