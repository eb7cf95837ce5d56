"""Starts a module of the product as a child of the suite: bound to its parent, armed, sabotaged for a control.

python -m tests.reliability.launch --parent-pid PID --role ROLE --index N [--sabotage NAME] MODULE ARGUMENTS...
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.reliability.breaking import BREAK_VARIABLE, install
from tether_services.runtime.child import die_with_parent


def main(arguments: Sequence[str] | None = None) -> None:
    """Become the module."""
    parser = argparse.ArgumentParser(prog="tests.reliability.launch", description=__doc__)
    parser.add_argument("--parent-pid", type=int, required=True)
    parser.add_argument("--role", default="")
    parser.add_argument("--index", type=int, default=1)
    parser.add_argument("--sabotage", action="append", default=[])
    parser.add_argument("--fork-socket", help="an orchestrator takes its workers from the fork server there")
    parser.add_argument("module")
    parser.add_argument("rest", nargs=argparse.REMAINDER)
    known = parser.parse_args(arguments)
    die_with_parent(known.parent_pid)
    if known.role.startswith("generator"):  # a worker arms itself, under its epoch
        from tether_services.runtime.fault_points import arm

        arm(known.role, known.index)
    if BREAK_VARIABLE in os.environ:
        install(known.role)
    if known.sabotage:
        from tests.reliability.sabotage import take_out

        for name in known.sabotage:
            take_out(name)
    if known.fork_socket:
        set_worker_command(sys.executable, "-S", str(Path(__file__).with_name("fork_client.py")), known.fork_socket)
    sys.argv = [known.module, *known.rest]
    runpy.run_module(known.module, run_name="__main__", alter_sys=True)


def set_worker_command(*command: str) -> None:
    """Have the orchestrator of this process start its workers with another command."""
    from tether_services.orchestrator.engines.process import ProcessEngine

    defaults = ProcessEngine.__init__.__kwdefaults__
    assert defaults and "command" in defaults, "the engine has no default command any more"
    defaults["command"] = command


if __name__ == "__main__":
    main()
