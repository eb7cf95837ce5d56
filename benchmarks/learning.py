"""Learning, not only formulas: PPO, GRPO and RLOO over seeds; PPO beside best-of-n; PPO-ptx.

    .venv/bin/python benchmarks/learning.py methods   # score, KL at its target, variety: three methods, five seeds
    .venv/bin/python benchmarks/learning.py frontier  # score against KL beside best-of-n
    .venv/bin/python benchmarks/learning.py ptx       # held-out language-model loss with and without pretraining text

The task is the demo's: packaged models, packaged prompts, demo.toml below the settings of each study, every run
through the four real services. Each study prints a table and writes it to the output folder, with the same figures in
JSON and a plot. A finished run in the output folder is not run again; after a change of the code, give another folder.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, only its own folder is on the path

from benchmarks.learning_parts.frontier import run_frontier
from benchmarks.learning_parts.methods import run_methods
from benchmarks.learning_parts.runs import Options
from benchmarks.learning_parts.tables import Study, write_study
from tether.errors import TetherError
from tether_services.cli.local_commands import run_until_interrupted

STORIES = Path(__file__).resolve().parents[2] / "shared" / "data" / "text" / "tinystories-sample.txt"
"""Beside the checkout and not part of it; where it is absent, `ptx` says so and stops."""


def main(arguments: list[str]) -> int:
    """Run a study, print its table and return the exit status."""
    known = build_parser().parse_args(arguments)
    if known.study == "ptx" and not known.text.is_file():
        print(f"error: no {known.text}; give the story file of the pretraining with --text FILE", file=sys.stderr)
        return 2
    options = Options(known.output, tuple(known.seeds), known.steps, known.threads, known.parallel, tuple(known.set))
    command = "python benchmarks/learning.py " + shlex.join(arguments)

    async def show() -> int:
        study = await start(known, options)
        print("\n" + write_study(study, known.output, command=command, figures=known.figures), flush=True)
        return 0

    try:
        return run_until_interrupted(show())
    except TetherError as error:
        print(
            f"error: {error}", *(f"{v.field}: {v.description}" for v in error.violations), sep="\n  ", file=sys.stderr
        )
        return 1


def start(known: argparse.Namespace, options: Options) -> Coroutine[Any, Any, Study]:
    """Return the study that the command line names."""
    if known.study == "methods":
        return run_methods(options, kl_target=known.kl_target, kl_horizon=known.kl_horizon, kl_coef=known.kl_coef)
    if known.study == "frontier":
        return run_frontier(options, kl_coefs=known.kl_coefs)
    from benchmarks.learning_parts.ptx import run_ptx  # the only study that loads a model itself

    return run_ptx(options, kl_coef=known.kl_coef, ptx_coefs=known.ptx_coefs, text=known.text)


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    studies = parser.add_subparsers(dest="study", required=True)
    methods = _add_study(studies, "methods", seeds=[0, 1, 2, 3, 4], steps=60)
    methods.add_argument("--kl-target", type=float, default=6.0, help="nats per response")
    methods.add_argument("--kl-horizon", type=float, default=320.0, help="at 64 responses a step, 4 %% a step")
    methods.add_argument("--kl-coef", type=float, default=0.18, help="where the controller begins")
    frontier = _add_study(studies, "frontier", seeds=[0])
    frontier.add_argument("--kl-coefs", type=float, nargs="+", default=[0.04, 0.06, 0.1, 0.2, 0.4])
    ptx = _add_study(studies, "ptx", seeds=[0, 1, 2])
    ptx.add_argument("--kl-coef", type=float, default=0.05, help="of all policies, half of the demo's")
    ptx.add_argument("--ptx-coefs", type=float, nargs="+", default=[0.3])
    ptx.add_argument("--text", type=Path, default=STORIES, help="story file that the demo policy was pretrained on")
    return parser


def _add_study(studies: Any, name: str, *, seeds: list[int], steps: int = 24) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = studies.add_parser(name)
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds)
    parser.add_argument("--steps", type=int, default=steps, help="PPO steps of each run")
    parser.add_argument("--output", type=Path, default=Path("runs/learning"))
    parser.add_argument("--figures", type=Path, help="folder of the plot; the output folder if not given")
    parser.add_argument("--threads", type=int, default=1, help="of each deployment")
    parser.add_argument("--parallel", type=int, default=2, help="deployments at the same time")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of every run")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
