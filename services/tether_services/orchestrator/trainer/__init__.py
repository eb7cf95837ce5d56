"""The PPO trainer: one base model, a policy and a critic adapter, their optimisers, checkpoints and export."""

from tether_services.orchestrator.trainer.batch import RolloutBatch, Sample
from tether_services.orchestrator.trainer.export import AdapterFile, AdapterFiles
from tether_services.orchestrator.trainer.report import UpdateReport
from tether_services.orchestrator.trainer.trainer import Trainer

__all__ = ["AdapterFile", "AdapterFiles", "RolloutBatch", "Sample", "Trainer", "UpdateReport"]
