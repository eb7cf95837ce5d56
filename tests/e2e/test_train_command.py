"""`tether train pretrain` from a configuration file to a model folder, as a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CONFIG = """\
vocab_size = 270
hidden_size = 32
num_layers = 1
intermediate_size = 32
block_tokens = 32
context_tokens = 64
threads = 1

[data]
sources = ["{stories}"]

[training]
max_steps = {max_steps}
eval_every = 2
checkpoint_every = 2
"""


def write_command(folder: Path, *, max_steps: int) -> list[str]:
    """Write stories and settings, and return the command; its output is `model` in the folder."""
    stories = [f"Story {n}. A cat and a dog went to the park and saw {n} birds. They were happy." for n in range(300)]
    text, config = folder / "stories.txt", folder / "pretrain.toml"
    text.write_text("\n<|endoftext|>\n".join(stories))
    config.write_text(CONFIG.format(stories=text, max_steps=max_steps))
    command = [sys.executable, "-m", "tether_services", "train", "pretrain", "--config", str(config)]
    return [*command, "--set", f"output={folder / 'model'}"]


@pytest.mark.slow
def test_pretraining_from_the_command_line_prints_the_folder_that_it_wrote(tmp_path: Path) -> None:
    done = subprocess.run(
        write_command(tmp_path, max_steps=3), capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'model'}\n"
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert json.loads((tmp_path / "model" / "manifest.json").read_text())["config"]["training"]["max_steps"] == 3


def _take_interrupts() -> None:
    """Undo what the tests themselves may have inherited: a job in the background ignores Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
def test_ctrl_c_ends_the_process_with_a_way_to_go_on_and_no_traceback(tmp_path: Path) -> None:
    command = write_command(tmp_path, max_steps=2000)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=_take_interrupts
    )
    first = tmp_path / "model" / "checkpoints"
    until = time.monotonic() + 200
    while not any(first.glob("checkpoint-*/complete")) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=100)
    assert (process.returncode, out) == (130, ""), err
    assert err.splitlines()[-1] == "interrupted; go on with --resume"
    assert "Traceback" not in err
    assert any(first.glob("checkpoint-*/complete"))
