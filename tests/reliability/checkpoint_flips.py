"""Inverts single bits of a checkpoint and of the adapter exported from it, and says what the trainer makes of each.

    python -m tests.reliability.launch ... tests.reliability.checkpoint_flips ORDER.json

The order names the run's folder, its configuration, the checkpoint as the ledger has it, the flips, and the files that
take answers and history. Every flip is undone before the next one.
"""

from __future__ import annotations

import json
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any, Final

from tests.reliability.disk import flipped
from tests.reliability.recording import STATE_FILES, WEIGHTS, Recorder, hash_file
from tether.errors import TetherError
from tether_services.orchestrator.config import RunConfig
from tether_services.orchestrator.records import CheckpointRow
from tether_services.orchestrator.run_files import RunFiles
from tether_services.orchestrator.session import build_trainer
from tether_services.orchestrator.trainer import Trainer

__all__ = ["LIKE"]

LIKE: Final = "checkpoint"
"""What every state that is loaded must be like."""


class Reader:
    """Takes a run up again and again, as a resumed worker does."""

    def __init__(self, order: dict[str, Any]) -> None:
        config = RunConfig.model_validate(tomllib.loads(order["config"]))
        self.trainer: Trainer = build_trainer(Path(config.model), config, threads=1)
        self.files = RunFiles(Path(order["folder"]))
        self.row = CheckpointRow(**order["checkpoint"])
        self.adapter_sha256: str = order["adapter_sha256"]
        self.recorder = Recorder(Path(order["history"]))

    def load(self, name: str) -> None:
        """Load the checkpoint and record what the trainer then is."""
        self.trainer.load_checkpoint(self.files.find_checkpoint(self.row))
        with tempfile.TemporaryDirectory() as folder:
            self.trainer.save_checkpoint(Path(folder) / "again")
            for part in STATE_FILES:
                sha256 = hash_file(Path(folder) / "again" / part)
                self.recorder.record(
                    "state", like=LIKE, run=name, policy_version=self.row.version, part=f"loaded {part}", sha256=sha256
                )

    def export(self) -> str:
        """Export the adapter where it is not whole, and return the hash of what lies there then."""
        folder = self.files.make_way(
            self.row.version, config=self.trainer.adapter_config, committed_sha256=self.adapter_sha256
        )
        self.trainer.export_adapter(folder, policy_version=self.row.version)
        config = (folder / "adapter_config.json").read_bytes()
        return hash_file(folder / WEIGHTS) if config == self.trainer.adapter_config else "another configuration"

    def judge(self, number: int, file: str, bit: int) -> str:
        """Return what became of a flip: refused and why, made anew, or loaded."""
        path = self.files.directory / file
        try:
            with flipped(path, bit):
                if path.parent.parent.name == "adapters":
                    return "made anew" if self.export() == self.adapter_sha256 else "taken as it is"
                self.load(f"flip {number}")
                return "loaded"
        except TetherError as error:
            return f"refused {error.reason}: {error.message}"
        except Exception as error:  # without its protection: whatever the libraries make of it
            return f"failed {type(error).__name__}: {error}"


def main() -> int:
    """Judge every flip and write the answers in their order."""
    order = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    reader = Reader(order)
    answers = []
    for number, (file, bit) in enumerate(order["flips"]):
        reader.load("whole")  # what a damaged one may have left in the trainer must not count for the next
        answers.append(reader.judge(number, file, bit))
    Path(order["answers"]).write_text(json.dumps(answers), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
