"""Runs the demo once per seed and prints one row each: does every seed learn within the leash?

    .venv/bin/python benchmarks/demo_seeds.py --seeds 0 1 2 3 4

A seed succeeds when the mean held-out score rises by at least 1.0 standard deviation of the scores before, at a mean KL
of at most 12 nats per 64 response tokens, with trainer and generator agreeing to 1e-3 nats per token and every sample
made by the version it should have been made by. The exit status is the number of seeds that failed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

MIN_GAIN_IN_SD = 1.0
MAX_KL_PER_64_TOKENS = 12.0
MAX_MEAN_ABS_DLOGP = 1e-3


def main() -> int:
    """Run every seed and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--engine", default="transformers", choices=["transformers", "vllm"])
    parser.add_argument("--output", type=Path, default=Path("runs"))
    arguments = parser.parse_args()
    failed = 0
    print(
        f"{'seed':>4} {'gain/sd':>8} {'KL/64 tok':>9} {'|dlogp|':>9} {'versions':>8} {'seconds':>8}  verdict",
        flush=True,
    )
    for seed in arguments.seeds:
        report = run_demo(seed, arguments.engine, arguments.output)
        good = succeeded(report)
        failed += not good
        print(format_row(seed, report) + ("  success" if good else "  FAILED"), flush=True)
    print(f"{len(arguments.seeds) - failed} of {len(arguments.seeds)} seeds succeeded")
    return failed


def run_demo(seed: int, engine: str, output: Path) -> dict[str, Any]:
    """Return the report of one demo run."""
    run_id = f"seed-{seed}-{engine}"
    command = [sys.executable, "-m", "tether_services", "demo", "--engine", engine, "--seed", str(seed)]
    command += ["--run-id", run_id, "--output", str(output)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    if finished.returncode != 0:
        raise SystemExit(f"seed {seed} ended with status {finished.returncode}:\n{finished.stdout}\n{finished.stderr}")
    report: dict[str, Any] = json.loads((output / run_id / "report.json").read_text(encoding="utf-8"))
    return report


def succeeded(report: dict[str, Any]) -> bool:
    """Return whether all four bounds hold."""
    return bool(
        report["gain_in_sd"] >= MIN_GAIN_IN_SD
        and report["kl_per_64_tokens"] <= MAX_KL_PER_64_TOKENS
        and report["mean_abs_dlogp_max"] < MAX_MEAN_ABS_DLOGP
        and report["versions_as_expected"]
    )


def format_row(seed: int, report: dict[str, Any]) -> str:
    """Return the figures of one seed as a table row."""
    return (
        f"{seed:>4} {report['gain_in_sd']:>8.2f} {report['kl_per_64_tokens']:>9.2f} "
        f"{report['mean_abs_dlogp_max']:>9.1e} {report['versions_as_expected']!s:>8} {report['wall_seconds']:>8.0f}"
    )


if __name__ == "__main__":
    sys.exit(main())
