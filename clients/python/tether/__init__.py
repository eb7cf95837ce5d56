"""The light client of tether: typed, with a deadline on every call, and nothing but gRPC underneath.

`Client` is for ordinary programs; the `...Client` classes are the same calls for asyncio.
"""

from tether.adapter import ActiveAdapter, Adapter, AdapterClient, AdapterProbe, AdapterPush, CommitStage, PushResult
from tether.client import Client
from tether.credentials import TlsFiles
from tether.errors import (
    AbortedError,
    CancelledError,
    DeadlineExceededError,
    FailedPreconditionError,
    FieldViolation,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    TetherError,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
)
from tether.generator import Completion, Generation, GeneratorClient, GeneratorState, Message, SamplingParams
from tether.orchestrator import OrchestratorClient, Rollback, Run, SampleCounts, StepEvent, StepState
from tether.reference import ItemLogprobs, LogprobItem, LogprobResult, ReferenceClient, ReferenceState
from tether.reward import (
    CompareResult,
    ItemScore,
    PairPreference,
    RewardClient,
    RewardModel,
    ScoreComponent,
    ScoredItem,
    ScoreItem,
    ScoreResult,
)
from tether.reward_models import (
    LoadedRewardModel,
    LoadedRewardModels,
    RewardModelClient,
    RewardModelShadow,
    ScoreCacheState,
)

__version__ = "0.1.0"

__all__ = [
    "AbortedError",
    "ActiveAdapter",
    "Adapter",
    "AdapterClient",
    "AdapterProbe",
    "AdapterPush",
    "CancelledError",
    "Client",
    "CommitStage",
    "CompareResult",
    "Completion",
    "DeadlineExceededError",
    "FailedPreconditionError",
    "FieldViolation",
    "Generation",
    "GeneratorClient",
    "GeneratorState",
    "InternalError",
    "InvalidArgumentError",
    "ItemLogprobs",
    "ItemScore",
    "LoadedRewardModel",
    "LoadedRewardModels",
    "LogprobItem",
    "LogprobResult",
    "Message",
    "NotFoundError",
    "OrchestratorClient",
    "PairPreference",
    "PermissionDeniedError",
    "PushResult",
    "ReferenceClient",
    "ReferenceState",
    "ResourceExhaustedError",
    "RewardClient",
    "RewardModel",
    "RewardModelClient",
    "RewardModelShadow",
    "Rollback",
    "Run",
    "SampleCounts",
    "SamplingParams",
    "ScoreCacheState",
    "ScoreComponent",
    "ScoreItem",
    "ScoreResult",
    "ScoredItem",
    "StepEvent",
    "StepState",
    "TetherError",
    "TlsFiles",
    "UnauthenticatedError",
    "UnavailableError",
    "UnimplementedError",
    "__version__",
]
