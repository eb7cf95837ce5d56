"""Settings of the generator."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from tether_services.generator.storage import FREE_BYTES
from tether_services.runtime.batching import BatchSettings
from tether_services.runtime.model_folder import Quantization
from tether_services.runtime.settings import ServerSettings, Settings

PROGRAM = "tether serve generator"
ENV_PREFIX = "TETHER_GENERATOR__"
IGNORED_KEYS = {
    "fake": (
        "model",
        "dtype",
        "quantization",
        "device",
        "gpu_memory_utilization",
        "batch.max_items",
        "batch.max_tokens",
        "batch.max_delay_seconds",
        "batch.mix_calls",
        "batch.training_share",
        "batch.credit_tokens",
    ),
    "transformers": ("gpu_memory_utilization", "fake_token_seconds"),
    "vllm": ("device", "fake_token_seconds", "batch.max_tokens", "batch.max_delay_seconds", "batch.mix_calls"),
}
"""Settings that an engine would ignore, so that setting them is an error."""


class GeneratorBatchSettings(BatchSettings):
    """How completions are gathered. A batch runs to its end, so that waiting a little for company pays."""

    max_tokens: int = Field(default=65536, ge=1)
    """Prompt tokens plus max_tokens of all completions of a batch at most; a single larger one runs alone."""
    max_delay_seconds: float = Field(default=0.05, ge=0, le=10)
    """How long the first completion of a batch waits for company; 64 concurrent calls arrive within this."""


class AdapterSettings(Settings):
    """Limits of adapters and of the way in which they arrive."""

    folder: Path | None = None
    """Where adapters are stored; those in it are proven and served again after a restart. Unset takes a temporary
    folder that is removed at exit."""
    max_rank: int = Field(default=16, ge=1, le=512)
    """Largest rank accepted; vLLM reserves memory and time for it."""
    max_bytes: int = Field(default=1024**3, ge=1024)
    """Largest adapter accepted, all files together."""
    free_bytes: int = Field(default=FREE_BYTES, ge=0)
    """A push that would leave less than this on the disk is refused."""
    quota_bytes: int = Field(default=0, ge=0)
    """Adapters and uploads together take at most this on the disk; 0 is no limit."""
    keep_versions: int = Field(default=3, ge=1, le=16)
    """Newest versions of a run that stay loaded besides the active one; older ones are retired once idle."""
    keep_runs: int = Field(default=2, ge=1, le=16)
    """Runs whose newest versions stay loaded: those that pushed last, and the active one."""
    upload_seconds: float = Field(default=600.0, gt=0, le=86400)
    """An upload that has received nothing for this long is forgotten."""
    prove_tolerance: float | None = Field(default=None, gt=0, le=1)
    """Largest mean |delta logprob| in nats of a pushed adapter's probes; unset is 1e-3 in float32, else 0.05."""


class GeneratorSettings(ServerSettings):
    """Serve the policy: sample completions, accept and activate LoRA adapters."""

    address: str = "127.0.0.1:50051"
    """host:port of GeneratorService; port 0 takes a free one and logs it."""
    admin_address: str = "127.0.0.1:50061"
    """host:port of AdapterService, which changes what is served; port 0 takes a free one and logs it."""
    metrics_address: str = "127.0.0.1:9101"
    """host:port of the Prometheus endpoint; port 0 takes a free one and logs it."""
    engine: Literal["fake", "transformers", "vllm"] = "transformers"
    """`vllm` is the fast one, `transformers` runs anywhere, `fake` is deterministic and needs no model."""
    model: str = ""
    """Folder or hub name of the base model, a causal language model; required except by the fake engine."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Numeric type of the weights; `auto` is float32 on a CPU and bfloat16 on a GPU."""
    quantization: Quantization = "none"
    """Precision of the linear layers: as stored, 8 bits or 4 bits (bitsandbytes); take the trainer's."""
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """`auto` (a GPU where there is one), `cpu`, `cuda` or `cuda:N`, for the transformers engine."""
    max_model_len: int | None = Field(default=None, ge=2)
    """Prompt plus completion tokens at most; unset takes the model's own limit."""
    max_n: int = Field(default=64, ge=1, le=256)
    """Largest n of a request."""
    batch: GeneratorBatchSettings = GeneratorBatchSettings()
    """How completions are gathered; max_items is how many run at once, queue_limit how many may be in the service."""
    gpu_memory_utilization: float | None = Field(default=None, gt=0, le=1)
    """Share of the device's memory for vLLM (of RAM on a CPU); unset is 0.9 on a GPU and 0.2 on a CPU."""
    adapters: AdapterSettings = AdapterSettings()
    """Limits of adapters."""
    fake_token_seconds: float = Field(default=0.0, ge=0, le=10)
    """The fake engine takes this long per token, to practise slow generation."""

    @model_validator(mode="after")
    def _check_choices(self) -> GeneratorSettings:
        """Refuse settings that contradict each other or would be ignored."""
        given = self.model_fields_set | {f"batch.{key}" for key in self.batch.model_fields_set}
        ignored = [key for key in IGNORED_KEYS[self.engine] if key in given]
        if self.engine == "vllm" and self.quantization == "int8":
            raise ValueError("vllm quantises to nf4 only: set quantization to nf4, or take the transformers engine")
        if ignored:
            raise ValueError(f"engine = {self.engine} would ignore {', '.join(ignored)}: unset it")
        if self.engine != "fake" and not self.model:
            raise ValueError("model is required: a model folder or hub name")
        if self.max_n > self.batch.queue_limit:
            raise ValueError("max_n must not exceed batch.queue_limit, or such a request could never run")
        return self
