"""Programs that run on a disk of their own: small, with few files, or read-only."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_NO_DISK = 77


def run_on_disk(folder: Path, code: str, *arguments: str, options: str = "size=4m", prepare: str = "true") -> str:
    """Return the output of a program whose first argument is a folder that is a disk of its own.

    Skips the test, with the reason, where no disk can be mounted: that takes Linux and the right to it.

    Args:
        folder: Where to mount; made. What is written there is gone at the end.
        code: The program.
        arguments: Further arguments.
        options: Of the tmpfs, for example `size=4m` or `nr_inodes=8`.
        prepare: Shell command after the mount.
    """
    script = folder.with_suffix(".py")
    script.write_text(code)
    folder.mkdir()
    mount = f"mount -t tmpfs -o {options} tmpfs {folder} && {prepare} || exit {_NO_DISK}"
    command = ["unshare", "-m", "sh", "-c", f'{mount}; exec {sys.executable} {script} {folder} "$@"', "sh", *arguments]
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "services", "clients/python"))
    environment = os.environ | {"PYTHONPATH": paths}
    try:
        subprocess.run(["unshare", "-m", "true"], check=True, capture_output=True)
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no mount namespace: {error}")
    if done.returncode == _NO_DISK:
        pytest.skip(f"no disk can be mounted: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return done.stdout
