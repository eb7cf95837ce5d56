"""`tether train pretrain` from a configuration file to a model folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_pretraining_from_the_command_line_prints_the_folder_that_it_wrote(tmp_path: Path) -> None:
    stories = [f"Story {n}. A cat and a dog went to the park and saw {n} birds. They were happy." for n in range(300)]
    (tmp_path / "stories.txt").write_text("\n<|endoftext|>\n".join(stories))
    config = tmp_path / "pretrain.toml"
    config.write_text(
        f'text_files = ["{tmp_path / "stories.txt"}"]\nvocab_size = 270\nhidden_size = 32\nnum_layers = 1\n'
        "intermediate_size = 32\nblock_tokens = 32\ncontext_tokens = 64\nnum_steps = 3\nwarmup_steps = 1\nthreads = 1\n"
    )
    command = [sys.executable, "-m", "tether_services", "train", "pretrain", "--config", str(config)]
    folder = tmp_path / "model"
    done = subprocess.run(
        [*command, "--set", f"output={folder}"], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(folder)
    assert (folder / "model.safetensors").is_file()
    assert json.loads((folder / "manifest.json").read_text())["config"]["num_steps"] == 3
