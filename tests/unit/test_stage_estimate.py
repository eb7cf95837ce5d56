"""What a dry run says of memory, steps and parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import TaskType
from transformers import AutoModelForCausalLM

from tests.unit.stage_inputs import sft_config
from tether_services.recipes.base_model import load_base, load_tokenizer, with_adapter
from tether_services.recipes.data.reading import read_demonstrations
from tether_services.recipes.data.rendering import Renderer
from tether_services.recipes.estimate import Estimate, estimate, show_estimate
from tether_services.recipes.sft import build_trainer, encode_demonstrations
from tether_services.recipes.stage import Mode, Stage

LAYERS = 2
MODULES = {
    "q": (64, 64),
    "k": (64, 32),
    "v": (64, 32),
    "o": (64, 64),
    "gate": (64, 96),
    "up": (64, 96),
    "down": (96, 64),
}
"""Inputs and outputs of the linear layers of a block of the tiny base."""
NUM_LINEAR = LAYERS * sum(rows * columns for rows, columns in MODULES.values())
NUM_LORA = LAYERS * sum(4 * (rows + columns) for rows, columns in MODULES.values())


def measure(tmp_path: Path, **changes: Any) -> Estimate:
    config = sft_config(tmp_path, tmp_path / "out", **changes)
    tokenizer = load_tokenizer(Path(config.base))
    data = read_demonstrations(config.data)
    parts = tuple(encode_demonstrations(part, Renderer(tokenizer), config) for part in (data.train, data.validation))
    base = load_base(AutoModelForCausalLM, config, Path(config.base))
    model = with_adapter(base, config, task=TaskType.CAUSAL_LM)
    stage = Stage("sft", config, Mode(dry_run=True), tmp_path / "work")
    trainer = build_trainer(stage, config, model=model, tokenizer=tokenizer, parts=(parts[0], parts[1]))
    found = estimate(trainer, config, num_tokens=parts[0].num_tokens)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert found.num_rows == len(trainer.train_dataset)
    return found


def whole(tmp_path: Path) -> int:
    """Return the parameters of the base."""
    base = AutoModelForCausalLM.from_pretrained(sft_config(tmp_path, tmp_path / "out").base)
    return int(base.num_parameters())


def test_parameters_are_counted(tmp_path: Path) -> None:
    found = measure(tmp_path)
    assert found.num_parameters == whole(tmp_path) + NUM_LORA
    assert (found.num_trainable, found.gradient_bytes, found.optimizer_bytes) == (NUM_LORA, 4 * NUM_LORA, 8 * NUM_LORA)
    assert found.weight_bytes == 4 * found.num_parameters
    everything = measure(tmp_path, lora={"rank": 0})
    assert everything.num_trainable == everything.num_parameters == whole(tmp_path)


@pytest.mark.parametrize(("quantization", "bytes_per_weight"), [("int8", 1.0), ("nf4", 0.5)])
def test_a_quantised_base_has_as_many_parameters_in_fewer_bytes(
    quantization: str, bytes_per_weight: float, tmp_path: Path
) -> None:
    found = measure(tmp_path, quantization=quantization)
    assert found.num_parameters == whole(tmp_path) + NUM_LORA
    others = found.num_parameters - NUM_LINEAR
    assert found.weight_bytes == 4 * others + bytes_per_weight * NUM_LINEAR


def test_activations_grow_with_the_micro_batch(tmp_path: Path) -> None:
    sizes = [
        measure(tmp_path, training={"micro_batch_rows": rows, "rows_per_step": 8}).activation_bytes
        for rows in (1, 4, 8)
    ]
    assert 2.5 * sizes[0] < sizes[1] < sizes[2]
    assert sizes[2] > 1.5 * sizes[1]


def test_gradient_checkpointing_keeps_less(tmp_path: Path) -> None:
    plain, checkpointed = (
        measure(tmp_path, training={"gradient_checkpointing": value}).activation_bytes for value in (False, True)
    )
    assert checkpointed < 0.7 * plain


@pytest.mark.parametrize(("training", "expected"), [({}, 22), ({"max_steps": 5}, 5), ({"num_epochs": 0.5}, 6)])
def test_steps_are_those_that_the_run_will_take(training: dict[str, Any], expected: int, tmp_path: Path) -> None:
    found = measure(tmp_path, training=training)
    assert found.num_steps == expected
    assert found.seconds == expected * found.seconds_per_step > 0


def test_the_sum_of_the_parts_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = {"weight_bytes": 3 * 2**30, "gradient_bytes": 2**20, "optimizer_bytes": 2**21, "activation_bytes": 2**29}
    found = Estimate(
        num_rows=1234,
        num_tokens=56789,
        num_steps=10,
        num_parameters=1000,
        num_trainable=10,
        seconds_per_step=30.0,
        **parts,
    )
    assert found.memory_bytes == sum(parts.values())
    show_estimate(found, title="sft")
    shown = " ".join(capsys.readouterr().out.split())
    for text in ("3.50 GiB", "512.0 MiB", "1,234", "56,789", "of these trained 10", "5.0 min"):
        assert text in shown
