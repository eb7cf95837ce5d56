"""Settings of the reference service."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from tether_services.runtime.batching import BatchSettings
from tether_services.runtime.model_folder import Dtype, Quantization
from tether_services.runtime.settings import ServerSettings

PROGRAM = "tether serve reference"
ENV_PREFIX = "TETHER_REFERENCE__"
MODEL_KEYS = ("model", "dtype", "quantization", "device", "forward_tokens")
"""Settings that the fake engine would ignore."""


class ReferenceSettings(ServerSettings):
    """Serve the reference policy: log-probabilities of given responses."""

    address: str = "127.0.0.1:50053"
    """host:port to serve on; port 0 takes a free one and logs it."""
    metrics_address: str = "127.0.0.1:9103"
    """host:port of the Prometheus endpoint; port 0 takes a free one and logs it."""
    engine: Literal["fake", "transformers"] = "transformers"
    """`transformers` runs any causal language model, `fake` is deterministic and needs no model."""
    model: str = ""
    """Folder or hub name of the reference policy, a causal language model; required except by the fake engine."""
    dtype: Dtype = "float32"
    """Numeric type of the weights; take the trainer's, or the log-probabilities of the two will differ."""
    quantization: Quantization = "none"
    """Precision of the linear layers: as stored, 8 bits or 4 bits (bitsandbytes); take the trainer's."""
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """`auto` (a GPU where there is one), `cpu`, `cuda` or `cuda:N`."""
    max_model_len: int | None = Field(default=None, ge=2)
    """Prompt plus response tokens at most; unset takes the model's own limit."""
    max_items: int = Field(default=64, ge=1, le=1024)
    """Items per call at most."""
    forward_tokens: int = Field(default=8192, ge=1)
    """Tokens per forward pass at most, padding counted; a batch is run in several passes where it has more."""
    batch: BatchSettings = BatchSettings()
    """How items of many calls are gathered."""

    @model_validator(mode="after")
    def _check_choices(self) -> ReferenceSettings:
        """Refuse settings that contradict each other or would be ignored."""
        ignored = [key for key in MODEL_KEYS if key in self.model_fields_set]
        if self.engine == "fake" and ignored:
            raise ValueError(f"the fake engine would ignore {', '.join(ignored)}: unset it or choose another engine")
        if self.engine != "fake" and not self.model:
            raise ValueError("model is required: a model folder or hub name")
        if self.max_items > self.batch.queue_limit:
            raise ValueError("max_items must not exceed batch.queue_limit, or such a request could never run")
        return self
