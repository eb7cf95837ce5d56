"""Packed rows: nothing of one row reaches another, and nothing of a row is lost."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM

from tests.unit.stage_inputs import sft_config, write_base
from tether.errors import InvalidArgumentError
from tether_services.recipes.base_model import load_tokenizer
from tether_services.recipes.packing import IGNORED, check_packing, collate_packed, pack, unpacked
from tether_services.recipes.sft import Rows, build_trainer, run_sft
from tether_services.recipes.stage import Mode, Stage

MAX_TOKENS = 48


def random_rows(count: int, *, seed: int = 0) -> list[dict[str, list[int]]]:
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        ids = [rng.randrange(3, 2000) for _ in range(rng.randint(2, 30))]
        num_prompt = rng.randint(1, len(ids) - 1)
        rows.append({"input_ids": ids, "labels": [IGNORED] * num_prompt + ids[num_prompt:]})
    return rows


def loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )


def gradients(model: Any, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_loss_and_gradients_of_a_packed_batch_are_those_of_its_rows_apart(attention: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        write_base(tmp_path / "base"), attn_implementation=attention, dtype=torch.float64
    )
    rows = random_rows(12)
    batch = collate_packed(list(pack(rows, max_tokens=MAX_TOKENS)), pad_token_id=0)
    assert batch["input_ids"].shape[0] < len(rows)
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    packed = loss_sum(logits, batch["labels"])
    apart = torch.stack(
        [
            loss_sum(model(torch.tensor([row["input_ids"]]), use_cache=False).logits, torch.tensor([row["labels"]]))
            for row in rows
        ]
    ).sum()
    num_tokens = sum(label != IGNORED for row in rows for label in row["labels"])
    assert int((batch["labels"] != IGNORED).sum()) == num_tokens
    assert packed.item() / num_tokens == pytest.approx(apart.item() / num_tokens, abs=1e-5)
    for first, second in zip(gradients(model, packed), gradients(model, apart), strict=True):
        torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)


def test_packing_keeps_every_row_whole_and_fills_sequences() -> None:
    rows = random_rows(500)
    packed = pack(rows, max_tokens=MAX_TOKENS)
    found = []
    for sequence in packed:
        assert len(sequence["input_ids"]) <= MAX_TOKENS
        start = 0
        for length in sequence["seq_lengths"]:
            found.append({name: sequence[name][start : start + length] for name in ("input_ids", "labels")})
            start += length
        assert start == len(sequence["input_ids"])
    assert sorted(found, key=str) == sorted(rows, key=str)
    num_tokens = sum(len(row["input_ids"]) for row in rows)
    assert len(packed) <= 1.05 * num_tokens / MAX_TOKENS


def test_positions_begin_again_with_every_row_and_the_first_token_of_a_row_has_no_loss() -> None:
    sequences = [
        {"input_ids": [5, 6, 7, 8, 9], "labels": [5, 6, 7, 8, 9], "seq_lengths": [3, 2]},
        {"input_ids": [4, 3], "labels": [IGNORED, 3], "seq_lengths": [2]},
    ]
    batch = collate_packed(sequences, pad_token_id=1)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [4, 3, 1, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7, IGNORED, 9], [IGNORED, 3, IGNORED, IGNORED, IGNORED]]


def test_a_validation_row_is_a_sequence_of_its_own() -> None:
    rows = random_rows(3)
    assert [row["seq_lengths"] for row in unpacked(rows)] == [[len(row["input_ids"])] for row in rows]


def test_a_base_that_goes_by_positions_passes_the_check(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(write_base(tmp_path / "base")).train()
    check_packing(model, random_rows(4), is_exact=True)
    assert model.training


def test_a_base_that_ignores_positions_is_refused() -> None:
    torch.manual_seed(0)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=2000, hidden_size=32, n_layer=2, n_head=2, initializer_range=0.3))
    with pytest.raises(InvalidArgumentError, match="see each other") as caught:
        check_packing(bloom, random_rows(4), is_exact=True)
    assert [violation.field for violation in caught.value.violations] == ["packing"]


def test_the_trainer_takes_the_loss_of_packed_rows_per_token(tmp_path: Path) -> None:
    config = sft_config(tmp_path, tmp_path / "out", packing=True, max_tokens=MAX_TOKENS, lora={"rank": 0})
    tokenizer, model = load_tokenizer(Path(config.base)), AutoModelForCausalLM.from_pretrained(config.base)
    rows = Rows(random_rows(12), num_overlong=0)
    stage = Stage("sft", config, Mode(), tmp_path / "work")
    trainer = build_trainer(stage, config, model=model, tokenizer=tokenizer, parts=(rows, rows))
    trainer.model.eval()
    packed_sum, apart_sum, num_tokens = 0.0, 0.0, 0
    with torch.no_grad():
        for batch in trainer.get_train_dataloader():
            assert batch["input_ids"].shape[0] > 1
            count = int((batch["labels"] != IGNORED).sum())
            packed_sum += trainer.compute_loss(trainer.model, batch).item() * count
            num_tokens += count
        for row in rows.rows:
            logits = model(torch.tensor([row["input_ids"]]), use_cache=False).logits
            apart_sum += loss_sum(logits, torch.tensor([row["labels"]])).item()
    assert packed_sum / num_tokens == pytest.approx(apart_sum / num_tokens, abs=1e-5)


def test_steps_and_warm_up_of_a_packed_stage_count_sequences(tmp_path: Path) -> None:
    config = sft_config(tmp_path, tmp_path / "out", packing=True, training={"warmup_fraction": 0.5, "log_every": 1})
    run_sft(config)
    manifest = json.loads((config.output / "manifest.json").read_text())["metrics"]
    assert manifest["train_sequences"] < 0.6 * manifest["train_rows"]
    num_steps = 2 * -(-manifest["train_sequences"] // 8)
    rows = [json.loads(line) for line in (config.output / "history.jsonl").read_text().splitlines()]
    rates = {row["step"]: row["learning_rate"] for row in rows if "learning_rate" in row}
    assert max(rates) == num_steps
    assert max(rates, key=lambda step: rates[step]) == num_steps // 2 + 1
    last = [row["num_tokens"] for row in rows if "num_tokens" in row][-1]
    assert last == 2 * manifest["train_tokens"]
