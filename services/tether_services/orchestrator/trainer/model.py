"""One base model in memory that serves as policy, critic and reference.

Policy = base with the adapter `policy`; critic = base with the adapter `critic` and a value head on its last hidden
states; reference = base with the adapters off.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from tether.errors import FailedPreconditionError, InvalidArgumentError
from tether_services.orchestrator.config import TrainerConfig
from tether_services.orchestrator.trainer.critic_start import CriticStart, LoraShape
from tether_services.ppo.statistics import at_least_float32
from tether_services.runtime.model_folder import Quantization
from tether_services.runtime.pretrained import allow_adapters_of_embeddings, load_pretrained

__all__ = ["AdapterName", "SharedModel", "check_no_dropout", "load_base"]

AdapterName = Literal["policy", "critic", "reference"]

_HEAD_TOLERANCE = 1e-3
"""Relative; far above rounding and far below any change that a model makes to its logits on purpose."""


def load_base(folder: Path, *, dtype: str, quantization: Quantization = "none", device: str = "cpu") -> Any:
    """Return the causal language model in `folder` in evaluation mode, with every dropout set to 0.

    Only safetensors weights are read and no code from the folder runs. A quantised base is on its device at once.

    Raises:
        InvalidArgumentError: The folder does not hold such a model.
    """
    source = {"local_files_only": True, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(folder, **source)
    for name in [n for n in config.to_dict() if n.endswith(("dropout", "pdrop", "dropout_prob"))]:
        setattr(config, name, 0.0)
    return load_pretrained(
        AutoModelForCausalLM,
        folder,
        dtype=dtype,
        field="model",
        quantization=quantization,
        device="cpu" if quantization == "none" else device,  # adapters are drawn on the CPU, before the move
        config=config,
    )


def check_no_dropout(model: nn.Module) -> None:
    """Refuse a model with a dropout above 0: policy ratios would differ from 1 before the first update.

    Raises:
        FailedPreconditionError: Names the first such module.

    Source: D4.
    """
    for name, module in model.named_modules():
        rates = [getattr(module, a, 0.0) for a in ("p", "attention_dropout", "dropout")]
        if any(isinstance(rate, float) and rate > 0.0 for rate in rates):
            raise FailedPreconditionError(f"module {name} has dropout; set it to 0", field="model", reason="DROPOUT")


class SharedModel:
    """A frozen base with a policy adapter, a critic adapter and a value head."""

    def __init__(
        self,
        base: Any,
        config: TrainerConfig,
        *,
        device: str,
        has_critic: bool = True,
        critic_start: CriticStart | None = None,
    ) -> None:
        """Attach adapters to `base`, which is changed in place; that of the critic only if there is one.

        The policy adapter starts as the identity (B = 0). So does the critic adapter unless `critic_start` is given.

        Raises:
            InvalidArgumentError: A target module does not exist in the base, or `critic_start` does not fit it.
            FailedPreconditionError: The base has dropout, or changes its logits after the output layer.
        """
        policy = LoraShape(config.lora_rank, config.lora_alpha, tuple(sorted(config.lora_target_modules)))
        self.shapes = {"policy": policy}
        if has_critic:
            self.shapes["critic"] = critic_start.shape if critic_start else policy
        self.vocab_size: int = base.config.vocab_size
        self.max_length: int = base.config.max_position_embeddings
        self.device = device
        self._body, self._head = base.get_decoder(), base.get_output_embeddings()
        # Attached before the move to the device, so that one seed gives the same adapters everywhere.
        self._peft = _attach(base, self.shapes)
        self.value_head = _new_value_head(base.config.hidden_size)
        check_no_dropout(self._peft)
        if critic_start:
            self._start_critic(critic_start)
        self._peft.to(device)
        self.value_head.to(device)
        _check_output_layer(base, self._body, self._head, device)

    @contextmanager
    def using(self, adapter: AdapterName) -> Iterator[None]:
        """Run forward passes under this adapter; `reference` turns the adapters off."""
        if adapter == "reference":
            with self._peft.disable_adapter():
                yield
        else:
            self._peft.set_adapter(adapter)
            yield

    def hidden_states(self, token_ids: Tensor) -> Tensor:
        """Return the [B, L, h] last hidden states of right-padded ids [B, L].

        No attention mask is needed: a causal model never looks to the right, where the padding is.
        """
        positions = torch.arange(token_ids.shape[1], device=token_ids.device)[None, :]
        hidden: Tensor = self._body(input_ids=token_ids, position_ids=positions, use_cache=False).last_hidden_state
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the [n, V] logits of hidden states [n, h] in the base's precision, before the temperature."""
        logits: Tensor = self._head(hidden)
        return logits

    def values(self, hidden: Tensor) -> Tensor:
        """Return the [n] values of hidden states [n, h], computed in float32 or wider."""
        values: Tensor = self.value_head(at_least_float32(hidden))
        return values.squeeze(-1)

    def adapter_parameters(self, adapter: AdapterName) -> dict[str, nn.Parameter]:
        """Return the LoRA parameters by their PEFT name without the adapter's name, in order of name."""
        found: dict[str, nn.Parameter] = {}
        for name, parameter in self._peft.named_parameters():
            for part in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
                if name.endswith((f".{part}.{adapter}.weight", f".{part}.{adapter}")):
                    found[name.replace(f".{part}.{adapter}", f".{part}")] = parameter
        return dict(sorted(found.items()))

    def trained_parameters(self, adapter: AdapterName) -> dict[str, nn.Parameter]:
        """Return all that training this adapter changes: its LoRA parameters, and the value head for the critic."""
        parameters = self.adapter_parameters(adapter)
        if adapter == "critic":
            parameters |= {f"value_head.{name}": p for name, p in self.value_head.named_parameters()}
        return parameters

    @torch.no_grad()
    def _start_critic(self, start: CriticStart) -> None:
        target = self.trained_parameters("critic")
        tensors = {**start.tensors, "value_head.weight": start.head_weight, "value_head.bias": start.head_bias}
        copy_tensors(target, tensors, field="reward_model")


@torch.no_grad()
def copy_tensors(target: dict[str, nn.Parameter], source: dict[str, Tensor], *, field: str) -> None:
    """Copy every tensor of `source` into the parameter of the same name; both must have the same names and shapes.

    Raises:
        InvalidArgumentError: A name is missing, is unknown, or has another shape; nothing has been copied then.
    """
    wrong = sorted(set(target) ^ set(source)) or [n for n in target if target[n].shape != source[n].shape]
    if wrong:
        raise InvalidArgumentError(f"{len(wrong)} tensors do not fit this model, the first is {wrong[0]}", field=field)
    for name, parameter in target.items():
        parameter.copy_(source[name])


def _attach(base: Any, shapes: dict[str, LoraShape]) -> Any:
    """Return the PEFT model around `base` with one adapter per shape."""
    # As the generator: the output layer is shared with every log-probability and has no adapter.
    # A reward model may have changed the embeddings; an engine that serves the policy's adapter may not load that.
    kinds: dict[str, tuple[type[nn.Module], ...]] = {"policy": (nn.Linear,), "critic": (nn.Linear, nn.Embedding)}
    modules = list(base.get_decoder().named_modules())
    for name, shape in shapes.items():
        present = {path.rpartition(".")[2] for path, module in modules if isinstance(module, kinds[name])}
        missing = sorted(set(shape.target_modules) - present)
        if missing:
            message = f"the base's blocks have no linear layers named {', '.join(missing)} for the {name} adapter"
            raise InvalidArgumentError(message, field="trainer.lora_target_modules")
    model = get_peft_model(base, _lora_config(shapes["policy"]), adapter_name="policy")
    if "critic" in shapes:
        allow_adapters_of_embeddings()
        model.add_adapter("critic", _lora_config(shapes["critic"]))
    return model.eval()


def _lora_config(shape: LoraShape) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=shape.rank,
        lora_alpha=shape.alpha,
        target_modules=list(shape.target_modules),
        lora_dropout=0.0,
        use_rslora=shape.use_rslora,
    )


def _new_value_head(hidden_size: int) -> nn.Linear:
    """Return a float32 head with weights of standard deviation 1 / sqrt(h + 1) and bias 0.

    Source: D32.
    """
    head = nn.Linear(hidden_size, 1, dtype=torch.float32)
    nn.init.normal_(head.weight, std=1.0 / math.sqrt(hidden_size + 1))
    nn.init.zeros_(head.bias)
    return head


@torch.no_grad()
def _check_output_layer(base: Any, body: Any, head: Any, device: str) -> None:
    """Refuse models whose logits are not simply the output layer on the last hidden states (soft-capped, scaled)."""
    probe = torch.arange(min(8, base.config.vocab_size), device=device)[None, :]
    expected = base(input_ids=probe, use_cache=False).logits
    got = head(body(input_ids=probe, use_cache=False).last_hidden_state)
    if (got - expected).abs().max() > _HEAD_TOLERANCE * expected.abs().max():
        message = "this model changes its logits after the output layer (for example by soft-capping); not supported"
        raise FailedPreconditionError(message, field="model", reason="UNSUPPORTED_MODEL")
