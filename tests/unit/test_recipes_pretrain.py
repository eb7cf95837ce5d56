"""Pretraining on small text: loss, the written folder, going on after an interruption."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from tests.unit.interruption import ctrl_c_when
from tests.unit.recipe_inputs import pretrain_config, write_stories
from tether.errors import FailedPreconditionError, InvalidArgumentError
from tether_services.recipes.config import PretrainConfig
from tether_services.recipes.data.reading import read_documents
from tether_services.recipes.dropout import residual_dropout
from tether_services.recipes.pretrain import held_out_loss, llama_config, run_pretrain
from tether_services.recipes.stage import Mode
from tether_services.recipes.tokenizer import train_tokenizer
from tether_services.runtime.text import encode_document


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that a run of about a second wrote, weights in float16."""
    return run_pretrain(pretrain_config(tmp_path_factory.mktemp("pretrain"), weights_dtype="float16"))


def manifest(folder: Path) -> Any:
    return json.loads((folder / "manifest.json").read_text())


def measured(folder: Path) -> dict[int, float]:
    """Return the held-out loss by step."""
    rows = map(json.loads, (folder / "history.jsonl").read_text().splitlines())
    return {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}


def test_the_held_out_loss_equals_a_loop_over_single_documents(tmp_path: Path) -> None:
    config = pretrain_config(tmp_path)
    documents = ["One day a cat met a dog.", "The hen said 7 words and the owl said no more than that.", "A pig."]
    tokenizer = train_tokenizer(documents, vocab_size=270, max_length=64)
    model = LlamaForCausalLM(llama_config(config, tokenizer))
    total, tokens = 0.0, 0
    for text in documents:
        ids = torch.tensor([encode_document(tokenizer, text)])
        logprobs = model(input_ids=ids).logits[0, :-1].detach().double().log_softmax(-1)
        total -= float(logprobs.gather(1, ids[0, 1:, None]).sum())
        tokens += ids.shape[1] - 1
    measured = held_out_loss(model, documents, tokenizer=tokenizer, max_tokens=64)
    assert measured.nats_per_token == pytest.approx(total / tokens, rel=1e-5)
    assert measured.nats_per_byte == pytest.approx(total / sum(map(len, documents)), rel=1e-5)


def test_residual_dropout_acts_in_training_only_and_is_taken_out_again(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(20)[None]
    plain = model.eval()(input_ids=ids).logits
    with residual_dropout(model, share=0.5):
        assert torch.equal(model(input_ids=ids).logits, plain)
        assert not torch.allclose(model.train()(input_ids=ids).logits, plain)
    assert torch.equal(model(input_ids=ids).logits, plain)


def test_training_learns_the_pattern_of_the_text(folder: Path) -> None:
    metrics = manifest(folder)["metrics"]
    assert metrics["held_out_nats_per_token"] < 0.6 * math.log(300)
    assert metrics["held_out_nats_per_token"] <= min(measured(folder).values()) + 0.01
    assert metrics["held_out_nats_per_byte"] < metrics["held_out_nats_per_token"]


def test_adamw_alone_learns_too_and_something_else(tmp_path: Path) -> None:
    alone, both = (
        run_pretrain(short(tmp_path, output=tmp_path / name, matrix_optimizer=name)) for name in ("adamw", "muon")
    )
    assert measured(alone)[12] < math.log(300) - 0.5
    assert measured(alone) != measured(both)


@pytest.mark.parametrize("keep_best", [True, False])
def test_the_weights_of_the_lowest_held_out_loss_are_kept_or_the_last_ones(keep_best: bool, tmp_path: Path) -> None:
    # Text of another kind is soon predicted worse, the better the stories are known.
    (tmp_path / "numbers.txt").write_text("".join(f"{n * n} {n**3}\n<|endoftext|>\n" for n in range(40)))
    data = {"sources": [str(write_stories(tmp_path / "s.txt", count=200))]}
    data["validation_sources"] = [str(tmp_path / "numbers.txt")]
    config = short(tmp_path, data=data, training={"max_steps": 40, "learning_rate": 0.05, "keep_best": keep_best})
    output = run_pretrain(config)
    losses = measured(output)
    assert min(losses.values()) < losses[40] - 0.1
    expected = min(losses.values()) if keep_best else losses[40]
    assert manifest(output)["metrics"]["held_out_nats_per_token"] == pytest.approx(expected, abs=1e-4)


def test_the_folder_loads_in_float32_whatever_type_is_stored(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    explicit = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(20)[None]
    assert torch.equal(model(input_ids=ids).logits, explicit(input_ids=ids).logits)


def test_the_folder_names_the_end_token_for_generation(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.eos_token_id == 2
    assert json.loads((folder / "config.json").read_text())["pad_token_id"] == tokenizer.pad_token_id == 0


def test_the_written_loss_is_that_of_the_stored_weights(folder: Path) -> None:
    config = pretrain_config(folder.parent)
    held_out = [document.text for document in read_documents(config.data).validation]
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    again = held_out_loss(model, held_out, tokenizer=tokenizer, max_tokens=config.context_tokens)
    assert again.nats_per_token == pytest.approx(manifest(folder)["metrics"]["held_out_nats_per_token"], abs=1e-4)


def test_the_files_can_be_read_by_other_users(folder: Path) -> None:
    assert {
        path.name: path.stat().st_mode & 0o444 for path in folder.iterdir() if path.stat().st_mode & 0o444 != 0o444
    } == {}


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path: Path) -> None:
    weights = [
        (run_pretrain(short(tmp_path, output=tmp_path / str(index), seed=seed)) / "model.safetensors").read_bytes()
        for index, seed in enumerate((1, 1, 2))
    ]
    assert weights[0] == weights[1] != weights[2]


def short(folder: Path, *, training: dict[str, Any] | None = None, **changes: Any) -> PretrainConfig:
    """Return the settings of a run of a few steps, over more than one epoch."""
    schedule = {"max_steps": 12, "rows_per_step": 64, "micro_batch_rows": 32, "eval_every": 4, "checkpoint_every": 4}
    return pretrain_config(folder, training=schedule | (training or {}), **changes)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_an_interrupted_run_ends_like_one_in_one_go(optimizer: str, tmp_path: Path) -> None:
    whole = run_pretrain(short(tmp_path, output=tmp_path / "whole", matrix_optimizer=optimizer))
    config = short(tmp_path, output=tmp_path / "parts", matrix_optimizer=optimizer)
    for last in (4, 8):
        complete = config.output / "checkpoints" / f"checkpoint-{last}" / "complete"
        with ctrl_c_when(complete.is_file), pytest.raises(KeyboardInterrupt):
            run_pretrain(config, Mode(resume=True))
        assert not (config.output / "manifest.json").exists()
    run_pretrain(config, Mode(resume=True))
    assert max(row["epoch"] for row in map(json.loads, (whole / "history.jsonl").read_text().splitlines())) > 1.5
    for name in ("model.safetensors", "history.jsonl", "tokenizer.json", "config.json"):
        assert (config.output / name).read_bytes() == (whole / name).read_bytes(), name
    assert manifest(config.output)["metrics"] == manifest(whole)["metrics"]


def test_a_dry_run_estimates_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = pretrain_config(tmp_path)
    run_pretrain(config, Mode(dry_run=True))
    assert not config.output.exists()
    shown = capsys.readouterr().out
    parameters = count_parameters(config)
    assert "pretrain: dry run" in shown and f"{parameters:,}, of these trained {parameters:,}" in shown


def count_parameters(config: PretrainConfig) -> int:
    layer = 4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size + 2 * config.hidden_size
    return config.vocab_size * config.hidden_size + config.num_layers * layer + config.hidden_size


def test_a_tokenizer_can_be_used_again(folder: Path, tmp_path: Path) -> None:
    reused = tmp_path / "reused"
    reused.mkdir()
    for path in folder.glob("tokenizer*.json"):
        shutil.copy(path, reused)
    config = pretrain_config(tmp_path, training={"max_steps": 2}, tokenizer=reused)
    output = run_pretrain(config)
    assert (output / "tokenizer.json").read_text() == (folder / "tokenizer.json").read_text()
    (reused / "tokenizer_config.json").write_text("{}")
    with pytest.raises(FailedPreconditionError, match="tokenizer_sha256"):
        run_pretrain(config, Mode(resume=True))


def test_products_can_be_taken_in_bfloat16_and_the_weights_stay_float32(tmp_path: Path) -> None:
    exact = run_pretrain(short(tmp_path, output=tmp_path / "exact"))
    fast = run_pretrain(short(tmp_path, output=tmp_path / "fast", dtype="bfloat16"))
    weights = [load_file(output / "model.safetensors") for output in (exact, fast)]
    assert {tensor.dtype for tensor in weights[1].values()} == {torch.float32}
    assert any(not torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert measured(fast)[12] == pytest.approx(measured(exact)[12], rel=0.05)


def test_the_model_has_no_dropout_tied_embeddings_and_a_cache(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.attention_dropout == 0.0
    assert not [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert model.config.use_cache is True


def test_a_missing_text_file_leaves_no_folder(tmp_path: Path) -> None:
    config = pretrain_config(tmp_path, data={"sources": (str(tmp_path / "absent.txt"),)})
    with pytest.raises(InvalidArgumentError, match=r"absent\.txt") as caught:
        run_pretrain(config)
    assert [violation.field for violation in caught.value.violations] == ["data.sources"]
    assert not config.output.exists()


def test_text_shorter_than_a_block_is_refused(tmp_path: Path) -> None:
    text = "".join(f"{i % 7}\n<|endoftext|>\n" for i in range(40))
    (tmp_path / "short.txt").write_text(text + "".join(f"{i}\n<|endoftext|>\n" for i in range(10, 50)))
    data = {"sources": (str(tmp_path / "short.txt"),), "validation_fraction": 0.5}
    with pytest.raises(InvalidArgumentError, match="shorter than one block"):
        run_pretrain(pretrain_config(tmp_path, data=data, vocab_size=260, context_tokens=512, block_tokens=512))
