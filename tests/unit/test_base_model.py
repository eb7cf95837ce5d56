"""The base of a stage: whole, in 8 bits or in 4 bits, with an adapter that learns."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import TaskType
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.unit.run_inputs import fields_of
from tests.unit.stage_inputs import sft_config, write_base
from tether_services.recipes.base_model import base_folder, load_base, load_tokenizer, with_adapter
from tether_services.recipes.config import SftConfig

KINDS = {"none": nn.Linear, "int8": bitsandbytes.nn.Linear8bitLt, "nf4": bitsandbytes.nn.Linear4bit}
IDS = torch.tensor([[5, 300, 41, 77, 1200, 9, 18, 640]])


def load(config: SftConfig, *, kind: Any = AutoModelForCausalLM, **options: Any) -> Any:
    return load_base(kind, config, base_folder(config), **options)


def adapted(config: SftConfig) -> Any:
    return with_adapter(load(config), config, task=TaskType.CAUSAL_LM)


def loss(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS, labels=IDS).loss
    return found


def frozen_bytes(model: Any) -> dict[str, bytes]:
    weights = {name: weight for name, weight in model.named_parameters() if not weight.requires_grad}
    return {name: weight.detach().contiguous().view(torch.uint8).numpy().tobytes() for name, weight in weights.items()}


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_adapter_learns_in_float32_and_the_base_stays_as_it_is(
    quantization: str, dtype: str, tmp_path: Path
) -> None:
    model = adapted(sft_config(tmp_path, tmp_path / "out", quantization=quantization, dtype=dtype))
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    assert {weight.dtype for weight in trained} == {torch.float32}
    before = frozen_bytes(model)
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        value = loss(model)
        torch.autograd.backward(value)
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0] - 0.1
    assert frozen_bytes(model) == before


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_the_layers_whose_output_is_the_result_stay_whole(quantization: str, tmp_path: Path) -> None:
    config = sft_config(tmp_path, tmp_path / "out", quantization=quantization)
    causal = load(config)
    ranker = load(config, kind=AutoModelForSequenceClassification, num_labels=1, may_lack=("score.weight",))
    for model, head in ((causal, causal.lm_head), (ranker, ranker.score)):
        assert type(head) is nn.Linear and head.weight.dtype == torch.float32
        blocks = [module for module in model.model.layers.modules() if isinstance(module, nn.Linear)]
        assert len(blocks) == 14
        assert {type(module) for module in blocks} == {KINDS[quantization]}
        assert model.model.embed_tokens.weight.dtype == torch.float32
    assert causal.training


@pytest.mark.parametrize(("quantization", "least", "most"), [("int8", 1e-6, 0.05), ("nf4", 0.01, 0.5)])
def test_fewer_bits_change_the_outputs_by_little(quantization: str, least: float, most: float, tmp_path: Path) -> None:
    whole, rounded = (
        load(sft_config(tmp_path, tmp_path / "out", quantization=kind)) for kind in ("none", quantization)
    )
    with torch.no_grad():
        expected, found = (model.eval()(IDS).logits for model in (whole, rounded))
    assert least < float((found - expected).norm() / expected.norm()) < most


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_measuring_in_between_does_not_change_what_is_learned(quantization: str, tmp_path: Path) -> None:
    measured = adapted(sft_config(tmp_path, tmp_path / "out", quantization=quantization))
    plain = copy.deepcopy(measured)
    with torch.no_grad():
        measured.eval()
        loss(measured)
        measured.train()
    gradients = []
    for model in (measured, plain):
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        gradients.append(torch.autograd.grad(loss(model), trained))
    assert any(bool(gradient.any()) for gradient in gradients[0])
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))


def test_the_start_of_an_adapter_follows_from_the_seed_alone(tmp_path: Path) -> None:
    def start(seed: int, noise: int) -> dict[str, Tensor]:
        torch.manual_seed(noise)
        model = adapted(sft_config(tmp_path, tmp_path / "out", seed=seed))
        return {name: weight for name, weight in model.named_parameters() if "lora_A" in name}

    first, again, other = start(0, noise=1), start(0, noise=2), start(1, noise=1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_without_an_adapter_every_weight_is_trained_in_float32(tmp_path: Path) -> None:
    model = adapted(sft_config(tmp_path, tmp_path / "out", lora={"rank": 0}, dtype="bfloat16"))
    assert all(weight.requires_grad and weight.dtype == torch.float32 for weight in model.parameters())


def test_gradient_checkpointing_reaches_the_adapter(tmp_path: Path) -> None:
    config = sft_config(tmp_path, tmp_path / "out", training={"gradient_checkpointing": True})
    model = adapted(config)
    model.gradient_checkpointing_enable({"use_reentrant": True})  # the kind that needs inputs with a gradient
    trained = [weight for name, weight in model.named_parameters() if "lora_B" in name]
    torch.autograd.backward(loss(model))
    assert all(weight.grad is not None and bool(weight.grad.any()) for weight in trained)


def test_only_a_reward_model_has_an_adapter_of_the_embeddings(tmp_path: Path) -> None:
    config = sft_config(tmp_path, tmp_path / "out", lora={"target_modules": ["q_proj", "embed_tokens"]})
    refused = fields_of(lambda: adapted(config))
    assert list(refused) == ["lora.target_modules"] and "embed_tokens" in refused["lora.target_modules"]
    ranker = load(config, kind=AutoModelForSequenceClassification, num_labels=1, may_lack=("score.weight",))
    model = with_adapter(ranker, config, task=TaskType.SEQ_CLS)
    trained = {name.split(".")[-3] for name, weight in model.named_parameters() if "lora_embedding" in name}
    assert trained == {"embed_tokens"}


def test_what_is_too_long_for_the_base_is_refused(tmp_path: Path) -> None:
    base = str(write_base(tmp_path / "short", max_position_embeddings=64))
    refused = fields_of(lambda: load(sft_config(tmp_path, tmp_path / "out", base=base)))
    assert refused == {"max_tokens": "max_tokens is 96, and short accepts 64; lower it"}


def test_a_folder_without_tokenizer_or_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    config = sft_config(tmp_path, tmp_path / "out", base=str(tmp_path / "empty"))
    assert list(fields_of(lambda: load(config))) == ["base"]
    assert list(fields_of(lambda: load_tokenizer(tmp_path / "empty"))) == ["base"]


def test_a_tokenizer_without_padding_pads_with_its_end_token_on_the_right(tmp_path: Path) -> None:
    path = write_base(tmp_path / "base") / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("pad_token")
    path.write_text(json.dumps(settings | {"padding_side": "left"}))
    tokenizer = load_tokenizer(tmp_path / "base")
    assert (tokenizer.pad_token_id, tokenizer.padding_side) == (tokenizer.eos_token_id, "right")
