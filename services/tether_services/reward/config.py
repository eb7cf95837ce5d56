"""Settings of the reward service."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field, model_validator

from tether_services.runtime.batching import BatchSettings
from tether_services.runtime.checks import NAME_PATTERN
from tether_services.runtime.model_folder import Dtype, Quantization
from tether_services.runtime.settings import ServerSettings, Settings

PROGRAM = "tether serve reward"
ENV_PREFIX = "TETHER_REWARD__"


class ComponentSettings(Settings):
    """One part of a score."""

    name: str = Field(pattern=NAME_PATTERN.pattern)
    """Name of the part in answers."""
    engine: Literal["fake", "transformers", "rules"]
    """`transformers` runs a reward model, `rules` a Python function, `fake` is deterministic and needs no model."""
    path: str = ""
    """transformers: folder or hub name of a sequence-classification model with one output, or of an adapter of one."""
    function: str = ""
    """rules: "module:function" with the signature (prompt: str, response: str, **arguments) -> float."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """rules: keyword arguments of the function."""
    salt: str = Field(default="", max_length=64)
    """fake: another text gives other scores, so that versions can be told apart."""
    weight: float = 1.0
    """Factor of this part in the sum; may be negative."""
    gain: float | None = Field(default=None, gt=0)
    """value = gain * (raw - bias); unset takes the model's own, 1 where it has none."""
    bias: float | None = None
    """See gain; unset takes the model's own, 0 where it has none."""

    @model_validator(mode="after")
    def _check_choices(self) -> ComponentSettings:
        """Refuse settings that are missing or would be ignored."""
        if self.engine == "transformers" and not self.path:
            raise ValueError("path is required by engine 'transformers'")
        if self.engine == "rules" and not self.function:
            raise ValueError("function is required by engine 'rules'")
        if self.engine != "transformers" and self.path:
            raise ValueError(f"engine {self.engine!r} would ignore path: remove it")
        if self.engine != "rules" and (self.function or self.arguments):
            raise ValueError(f"engine {self.engine!r} would ignore function and arguments: remove them")
        if self.engine != "fake" and self.salt:
            raise ValueError(f"engine {self.engine!r} would ignore salt: remove it")
        return self


class ModelSettings(Settings):
    """A named reward model: a weighted sum of components."""

    name: str = Field(pattern=NAME_PATTERN.pattern)
    """Name that requests use."""
    version: str = Field(default="", max_length=64)
    """Version label; empty takes the first 12 digits of the content hash."""
    components: tuple[ComponentSettings, ...] = Field(min_length=1, max_length=16)
    """Parts of the score, in the order in which they are reported."""
    tokenizer: str = ""
    """Folder or hub name of the tokenizer; empty takes that of the first transformers component."""
    cacheable: bool = True
    """Whether its scores may be kept in the cache; set false where a rule does not always give the same answer."""

    @property
    def label(self) -> str:
        """Return "name@version", or the name alone where the version follows from the content."""
        return f"{self.name}@{self.version}" if self.version else self.name

    @model_validator(mode="after")
    def _check_names(self) -> ModelSettings:
        _check_distinct("components", (component.name for component in self.components))
        return self


class CacheSettings(Settings):
    """Scores that are kept to answer the same item again; docs/reward-models.md says what callers can learn from it."""

    max_items: int = Field(default=0, ge=0, le=10_000_000)
    """Scores that are kept at most; 0 turns the cache off."""
    max_bytes: int = Field(default=64 * 1024 * 1024, ge=1024)
    """Memory that they may take, estimated."""


class ShadowSettings(Settings):
    """How a candidate scores along; which one and how much is said by SetShadow."""

    queue_limit: int = Field(default=256, ge=1, le=65536)
    """Items that may wait for it; more are dropped and counted."""
    timeout_seconds: float = Field(default=30.0, gt=0, le=600)
    """Items of a call that the candidate has not scored after this long are dropped and counted."""


class RewardSettings(ServerSettings):
    """Serve reward models and rules: scores of responses."""

    address: str = "127.0.0.1:50052"
    """host:port to serve on; port 0 takes a free one and logs it."""
    admin_address: str = ""
    """host:port of RewardModelService, which loads and switches models, usually 127.0.0.1:50062; port 0 takes a free
    one and logs it. Empty: the models stay those of the configuration."""
    metrics_address: str = "127.0.0.1:9102"
    """host:port of the Prometheus endpoint; port 0 takes a free one and logs it."""
    engine: Literal["fake", "transformers"] = "transformers"
    """Engine of the one reward model "default"; give `models` instead for rules, several parts or several models."""
    model: str = ""
    """Folder or hub name of that reward model; required except by the fake engine and where `models` is given."""
    models: tuple[ModelSettings, ...] = Field(default=(), max_length=64)
    """Reward models; the first is the default one, the first of a name that of the name. Empty: one, of `engine` and
    `model`."""
    model_store: str = ""
    """Folder with NAME/VERSION for each reward model that LoadRewardModel may load; empty: it may load none."""
    rule_modules: tuple[str, ...] = ("tether_services.reward.rules",)
    """Modules whose functions a model.toml of the store may name, besides those of the rules in `models`."""
    max_models: int = Field(default=16, ge=1, le=64)
    """Versions that are held at the same time at most; each takes its memory."""
    state_dir: str = ""
    """Folder that keeps which version is the default across restarts; empty: a restart goes back to the first model."""
    dtype: Dtype = "float32"
    """Numeric type of the weights of transformers models."""
    quantization: Quantization = "none"
    """Precision of the linear layers: as stored, 8 bits or 4 bits (bitsandbytes)."""
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """`auto` (a GPU where there is one), `cpu`, `cuda` or `cuda:N`."""
    max_message_bytes: int = Field(default=2 * 1024 * 1024, ge=1024, le=256 * 1024 * 1024)
    """Largest request accepted. Small, because strangers may call: a parsed message takes up to 36 times its size."""
    max_items: int = Field(default=64, ge=1, le=1024)
    """Items per call at most."""
    max_text_chars: int = Field(default=100_000, ge=1)
    """Characters of a prompt, of a response and of a conversation at most."""
    forward_tokens: int = Field(default=8192, ge=1)
    """Tokens per forward pass at most, padding counted; a batch is run in several passes where it has more."""
    rule_seconds: float = Field(default=60.0, gt=0, le=86400)
    """A rule that takes longer than this for one item is taken to hang: liveness fails."""
    batch: BatchSettings = BatchSettings()
    """How items of many calls are gathered."""
    cache: CacheSettings = CacheSettings()
    """Scores that are kept; off by default."""
    shadow: ShadowSettings = ShadowSettings()
    """How a candidate scores along."""

    @model_validator(mode="after")
    def _check_choices(self) -> RewardSettings:
        """Refuse settings that contradict each other or would be ignored."""
        if self.models and {"engine", "model"} & self.model_fields_set:
            raise ValueError("engine and model would be ignored beside models: put them into models")
        if not self.models and self.engine == "fake" and self.model:
            raise ValueError("the fake engine takes no model: unset model or choose another engine")
        if not self.models and self.engine != "fake" and not self.model:
            raise ValueError("model is required: a model folder or hub name; or give models")
        if self.max_items > self.batch.queue_limit:
            raise ValueError("max_items must not exceed batch.queue_limit, or such a request could never run")
        if len(self.models) > self.max_models:
            raise ValueError(f"there are {len(self.models)} models and max_models is {self.max_models}: raise it")
        if self.cache.max_items and not self.batch.mix_calls:
            raise ValueError("cache.max_items must be 0 with batch.mix_calls = false: what is cached leaves the batch")
        _check_distinct("models", (model.label for model in self.models))
        return self

    def reward_models(self) -> tuple[ModelSettings, ...]:
        """Return `models`, or the one model that `engine` and `model` describe."""
        if self.models:
            return self.models
        component = ComponentSettings(name="score", engine=self.engine, path=self.model)
        return (ModelSettings(name="default", components=(component,)),)


def _check_distinct(field: str, names: Iterable[str]) -> None:
    """Refuse a name that appears twice."""
    seen: set[str] = set()
    for index, name in enumerate(names):
        if name in seen:
            raise ValueError(f"{field}[{index}].name: {name!r} is taken by another one")
        seen.add(name)
