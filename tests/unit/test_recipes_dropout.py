"""Dropout in the residual stream, hooked into models with a score head and with an adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.unit.tiny_llama import write_tiny_llama
from tether_services.recipes.dropout import residual_dropout

IDS = torch.arange(3, 43).view(2, 20)


def classifier(folder: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)


def adapted(folder: Path) -> Any:
    lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=4, target_modules=["q_proj", "o_proj", "embed_tokens"])
    return get_peft_model(classifier(folder), lora)


@pytest.mark.parametrize("make", [classifier, adapted])
def test_dropout_acts_in_training_only_and_is_taken_out_again(make: Callable[[Path], Any], tmp_path: Path) -> None:
    model = make(write_tiny_llama(tmp_path / "base")).eval()
    with torch.no_grad():
        plain = model(input_ids=IDS).logits
        with residual_dropout(model, share=0.5):
            assert torch.equal(model(input_ids=IDS).logits, plain)
            assert not torch.allclose(model.train()(input_ids=IDS).logits, plain)
        assert torch.equal(model(input_ids=IDS).logits, plain)


@pytest.mark.parametrize(("kind", "expected"), [("score", 0.4), ("lm_head", 0.0)])
def test_only_a_score_head_reads_values_with_holes(tmp_path: Path, kind: str, expected: float) -> None:
    folder = write_tiny_llama(tmp_path / "base")
    model = classifier(folder) if kind == "score" else AutoModelForCausalLM.from_pretrained(folder)
    read: list[Tensor] = []
    model.get_submodule(kind).register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].detach()))
    with residual_dropout(model.train(), share=0.4):
        model(input_ids=IDS)
    assert float((read[0] == 0).float().mean()) == pytest.approx(expected, abs=0.05)


def test_no_share_hooks_nothing_in(tmp_path: Path) -> None:
    model = classifier(write_tiny_llama(tmp_path / "base")).train()
    with torch.no_grad(), residual_dropout(model, share=0.0):
        assert torch.equal(model(input_ids=IDS).logits, model(input_ids=IDS).logits)
