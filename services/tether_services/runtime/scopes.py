"""Which scope each method needs. A method that is not listed cannot be called by anyone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

SCOPES: Final = (
    "generate",
    "score",
    "model.write",
    "model.read",
    "reference",
    "adapter.push",
    "adapter.activate",
    "adapter.read",
    "run.write",
    "run.read",
)
"""What a token or a certificate can be allowed; one scope for each group of methods."""


def _methods(service: str, scope: str, *names: str) -> dict[str, str]:
    return {f"/tether.v1.{service}/{name}": scope for name in names}


METHOD_SCOPES: Final[Mapping[str, str]] = {
    **_methods("GeneratorService", "generate", "Generate", "GetGenerator"),
    **_methods("RewardService", "score", "Score", "Compare", "ListRewardModels"),
    **_methods(
        "RewardModelService",
        "model.write",
        "LoadRewardModel",
        "UnloadRewardModel",
        "SetDefaultRewardModel",
        "SetShadow",
        "ClearShadow",
    ),
    **_methods("RewardModelService", "model.read", "ListLoadedRewardModels"),
    **_methods("ReferenceService", "reference", "ComputeLogprobs", "GetReference"),
    **_methods("AdapterService", "adapter.push", "BeginPush", "PushChunks", "CommitPush"),
    **_methods("AdapterService", "adapter.activate", "ActivateAdapter", "RollbackAdapter", "DeleteAdapter"),
    **_methods("AdapterService", "adapter.read", "ListAdapters", "GetActiveAdapter"),
    **_methods("OrchestratorService", "run.write", "StartRun", "CancelRun", "ResumeRun", "RollbackRun"),
    **_methods("OrchestratorService", "run.read", "GetRun", "ListRuns", "ListSteps", "WatchRun"),
}
"""Scope of each method by its full name. A test compares it with the service descriptors."""
