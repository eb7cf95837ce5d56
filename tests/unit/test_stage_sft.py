"""Supervised fine-tuning: what is learned, what is written, and that the numbers are TRL's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig as TrlSftConfig
from trl import SFTTrainer

from tests.unit.run_inputs import fields_of
from tests.unit.stage_inputs import PACKAGED_POLICY, sft_config, write_base
from tether.errors import InvalidArgumentError
from tether_services.generator.config import GeneratorSettings
from tether_services.generator.engines.model_files import read_model_files
from tether_services.recipes.base_model import load_base, load_tokenizer
from tether_services.recipes.config import LORA_TARGETS, SftConfig
from tether_services.recipes.data.reading import read_demonstrations
from tether_services.recipes.data.records import Demonstration, Place, Turn
from tether_services.recipes.data.rendering import Renderer
from tether_services.recipes.packing import IGNORED
from tether_services.recipes.sft import encode_demonstrations, run_sft
from tether_services.recipes.stage import Mode

IDS = torch.tensor([[5, 300, 41, 77, 1200, 9, 18, 640, 33, 7]])
SHORT = {"max_steps": 6, "eval_every": 3, "checkpoint_every": 3}


def run(tmp_path: Path, *, name: str = "out", **changes: Any) -> SftConfig:
    config = sft_config(tmp_path, tmp_path / name, **{"training": SHORT} | changes)
    assert run_sft(config) == config.output
    return config


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    logits: Tensor = model.eval()(IDS).logits.float()
    return logits


def test_an_adapter_is_written_alone_and_merged_into_a_whole_model(tmp_path: Path) -> None:
    config = run(tmp_path)
    merged, loading = AutoModelForCausalLM.from_pretrained(config.output, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    base = AutoModelForCausalLM.from_pretrained(config.base)
    before = logits_of(base)
    adapted = PeftModel.from_pretrained(base, config.output / "adapter")
    torch.testing.assert_close(logits_of(merged), logits_of(adapted), atol=1e-5, rtol=1e-5)
    assert float((logits_of(merged) - before).abs().max()) > 0.01
    assert (merged.generation_config.eos_token_id, merged.config.use_cache) == (base.config.eos_token_id, True)


def test_the_adapter_names_its_base_by_a_relative_path_and_its_lists_are_sorted(tmp_path: Path) -> None:
    adapter = run(tmp_path).output / "adapter"
    assert sorted(path.name for path in adapter.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    text = (adapter / "adapter_config.json").read_text()
    settings = json.loads(text)
    assert settings["base_model_name_or_path"] == "../../base"
    assert (adapter / settings["base_model_name_or_path"]).resolve() == (tmp_path / "base").resolve()
    assert settings["target_modules"] == sorted(LORA_TARGETS)
    assert str(tmp_path) not in text


def test_rank_zero_trains_every_weight_and_writes_no_adapter(tmp_path: Path) -> None:
    config = run(tmp_path, lora={"rank": 0})
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (config.base, config.output))
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert not (config.output / "adapter").exists()


@pytest.mark.parametrize(("quantization", "tolerance"), [("nf4", 1e-5), ("int8", 0.05)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_of_a_quantised_base_is_merged_into_its_rounded_weights(
    quantization: str, tolerance: float, dtype: str, tmp_path: Path
) -> None:
    config = run(tmp_path, quantization=quantization, dtype=dtype)
    merged = AutoModelForCausalLM.from_pretrained(config.output)
    assert {str(parameter.dtype) for parameter in merged.parameters()} == {f"torch.{dtype}"}
    assert "quantization_config" not in json.loads((config.output / "config.json").read_text())
    quantised = load_base(AutoModelForCausalLM, config, Path(config.base))
    expected = logits_of(PeftModel.from_pretrained(quantised, config.output / "adapter"))
    found = logits_of(merged)
    limit = max(tolerance, 0.02 if dtype == "bfloat16" else 0.0)
    assert float((found - expected).norm() / expected.norm()) < limit
    weights = load_file(config.output / "adapter/adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_the_written_folder_is_the_base_of_the_next_fine_tuning(tmp_path: Path) -> None:
    first = run(tmp_path)
    second = run(tmp_path, name="next", base=str(first.output))
    parent = json.loads((second.output / "manifest.json").read_text())["parent"]
    assert (parent["name"], parent["stage"]) == ("out", "sft")


def test_only_the_answer_and_its_end_are_learned(tmp_path: Path) -> None:
    config = sft_config(tmp_path, tmp_path / "out")
    tokenizer = load_tokenizer(Path(config.base))
    item = Demonstration((Turn("user", "Who is that?"),), "A fox.", Place("made", 1))
    (row,) = encode_demonstrations([item], Renderer(tokenizer), config).rows
    learned = [label for label in row["labels"] if label != IGNORED]
    assert row["input_ids"][-len(learned) :] == learned
    assert tokenizer.decode(learned) == " A fox." + tokenizer.eos_token
    assert tokenizer.decode(row["input_ids"]).endswith("Human: Who is that?\n\nAssistant: A fox." + tokenizer.eos_token)


@pytest.mark.parametrize(("overlong", "num_kept"), [("drop", 1), ("truncate", 2)])
def test_overlong_records_are_counted_and_dropped_or_cut(overlong: str, num_kept: int, tmp_path: Path) -> None:
    config = sft_config(tmp_path, tmp_path / "out", max_tokens=32, overlong=overlong)
    renderer = Renderer(load_tokenizer(Path(config.base)))
    items = [Demonstration("Say it.", "fox " * count, Place("made", count)) for count in (2, 90)]
    found = encode_demonstrations(items, renderer, config)
    assert (len(found.rows), found.num_overlong) == (num_kept, 1)
    assert max(len(row["input_ids"]) for row in found.rows) <= 32
    assert all(row["labels"][-1] == renderer.answer_ids("a", "b")[-1] for row in found.rows)
    assert found.num_tokens == sum(len(row["input_ids"]) for row in found.rows)


def test_the_manifest_states_rows_tokens_and_the_validation_loss(tmp_path: Path) -> None:
    config = run(tmp_path, max_tokens=64, overlong="drop")
    manifest = json.loads((config.output / "manifest.json").read_text())
    metrics, report = manifest["metrics"], manifest["data_report"]
    assert metrics["train_rows"] + metrics["validation_rows"] + metrics["overlong_records"] == report["num_rows"] == 90
    last = json.loads((config.output / "history.jsonl").read_text().splitlines()[-1])
    assert metrics["loss"] == last["eval_loss"] > 0


def text_rows(items: list[Demonstration]) -> Dataset:
    """Return demonstrations in TRL's own format; the conversation is written out here."""
    return Dataset.from_list(
        [
            {"prompt": f"\n\nHuman: {item.prompt[0].content}\n\nAssistant:", "completion": f" {item.answer}"}  # type: ignore[union-attr]
            for item in items
        ]
    )


def trl_losses(config: SftConfig, folder: Path) -> tuple[dict[int, float], dict[int, float], dict[str, Tensor]]:
    """Return training and validation losses by step and the trained weights of a plain TRL script on text."""
    data = read_demonstrations(config.data)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=list(LORA_TARGETS))
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(config.base),
        args=TrlSftConfig(
            output_dir=str(folder),
            seed=0,
            use_cpu=True,
            bf16=False,
            learning_rate=0.003,
            lr_scheduler_type="linear",
            warmup_steps=1,
            adam_beta2=0.95,
            num_train_epochs=2,
            per_device_train_batch_size=4,
            per_device_eval_batch_size=90,  # all of them: the library's loss is a mean of batches
            gradient_accumulation_steps=2,
            gradient_checkpointing=False,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=11,
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=text_rows(data.train),
        eval_dataset=text_rows(data.validation),
        processing_class=AutoTokenizer.from_pretrained(config.base, split_special_tokens=False),
        peft_config=lora if config.lora.rank else None,
    )
    trainer.train()
    trained = {name: value.detach() for name, value in trainer.model.named_parameters() if value.requires_grad}
    return *(losses_of(trainer.state.log_history, name) for name in ("loss", "eval_loss")), trained  # type: ignore[return-value]


def losses_of(rows: list[dict[str, float]], name: str) -> dict[int, float]:
    return {int(row["step"]): row[name] for row in rows if name in row}


@pytest.mark.parametrize("rank", [0, 4])
def test_losses_and_weights_are_those_of_a_plain_trl_script_on_the_same_text(rank: int, tmp_path: Path) -> None:
    training = {"schedule": "linear", "warmup_fraction": 0.04, "log_every": 1, "eval_every": 11, "checkpoint_every": 20}
    config = sft_config(tmp_path, tmp_path / "out", lora={"rank": rank, "alpha": 8}, training=training)
    run_sft(config)
    rows = [json.loads(line) for line in (config.output / "history.jsonl").read_text().splitlines()]
    train, validation, weights = trl_losses(config, tmp_path / "trl")
    assert len(train) == 22
    assert losses_of(rows, "loss") == pytest.approx(train, abs=1e-4)
    assert losses_of(rows, "eval_loss") == pytest.approx(validation, abs=1e-4)
    ours = load_file(config.output / ("adapter/adapter_model.safetensors" if rank else "model.safetensors"))
    assert len(weights) >= len(ours)
    for name, tensor in ours.items():
        theirs = weights[name.replace(".weight", ".default.weight") if rank else name]
        torch.testing.assert_close(tensor, theirs, atol=1e-4, rtol=1e-4)


def test_gradient_checkpointing_changes_nothing_that_is_learned(tmp_path: Path) -> None:
    plain, checkpointed = (
        load_file(
            run(tmp_path, name=str(value), training=SHORT | {"gradient_checkpointing": value}).output
            / "adapter/adapter_model.safetensors"
        )
        for value in (False, True)
    )
    for name, tensor in plain.items():
        torch.testing.assert_close(checkpointed[name], tensor, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("packing", [False, True])
def test_the_validation_loss_is_the_mean_over_answer_tokens_however_rows_are_batched(
    packing: bool, tmp_path: Path
) -> None:
    found = []
    for size in (1, 4, 8):
        training = {"max_steps": 1, "eval_every": 1, "checkpoint_every": 1, "micro_batch_rows": size}
        config = run(tmp_path, name=str(size), packing=packing, training=training | {"learning_rate": 1e-12})
        found.append(json.loads((config.output / "manifest.json").read_text())["metrics"]["loss"])
    tokenizer = load_tokenizer(Path(config.base))
    rows = encode_demonstrations(read_demonstrations(config.data).validation, Renderer(tokenizer), config).rows
    assert len({len(row["labels"]) for row in rows}) > 1 and len(rows) % 4
    assert found == pytest.approx([mean_answer_loss(Path(config.base), rows)] * 3, abs=1e-5)


@torch.no_grad()
def mean_answer_loss(folder: Path, rows: list[dict[str, list[int]]]) -> float:
    """Return the definition: the mean negative log-likelihood of all answer tokens, one row at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    values: list[float] = []
    for row in rows:
        table = torch.log_softmax(model(torch.tensor([row["input_ids"]])).logits[0].double(), dim=-1)
        targets = enumerate(row["labels"])
        values += [-float(table[place - 1, label]) for place, label in targets if label != IGNORED]
    return sum(values) / len(values)


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_chat_base(folder: Path) -> tuple[Path, int]:
    """Write a base whose template ends a turn with a token that is not the tokenizer's, and return it with that id."""
    tokenizer = AutoTokenizer.from_pretrained(PACKAGED_POLICY)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    write_base(folder, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder)
    return folder, int(tokenizer.convert_tokens_to_ids("<|im_end|>"))


@pytest.mark.parametrize("rank", [0, 4])
def test_a_served_model_stops_at_the_token_that_ended_the_answers_of_its_data(rank: int, tmp_path: Path) -> None:
    base, end = write_chat_base(tmp_path / "chat")
    config = run(tmp_path, base=str(base), template="chat", lora={"rank": rank, "alpha": 8})
    served = read_model_files(GeneratorSettings(model=str(config.output)), on_gpu=False)
    assert set(served.stop_token_ids) == {AutoTokenizer.from_pretrained(base).eos_token_id, end}


def test_generation_defaults_of_the_base_are_kept_with_all_its_end_tokens(tmp_path: Path) -> None:
    base, end = write_chat_base(tmp_path / "chat")
    # the library reads a temperature without sampling, and refuses to write it
    defaults = {"eos_token_id": [77, 78], "temperature": 0.6, "do_sample": False, "bos_token_id": 5}
    (base / "generation_config.json").write_text(json.dumps(defaults))
    config = run(tmp_path, base=str(base), template="chat")
    written = json.loads((config.output / "generation_config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(base)
    ends = [77, 78, tokenizer.eos_token_id, end]
    assert written == defaults | {"eos_token_id": ends, "pad_token_id": tokenizer.pad_token_id}


def test_a_dry_run_estimates_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = sft_config(tmp_path, tmp_path / "out")
    run_sft(config, Mode(dry_run=True))
    assert not config.output.exists()
    printed = capsys.readouterr().out
    assert "22 of" in printed and "activations" in printed


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"max_tokens": 129}, "max_tokens"),
        ({"max_tokens": 8}, "data.sources"),
        ({"lora": {"rank": 4, "target_modules": ["no_such_layer"]}}, "lora.target_modules"),
        ({"base": "no-such-folder"}, "base"),
        ({"template": "chat"}, "template"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(changes: dict[str, Any], field: str, tmp_path: Path) -> None:
    config = sft_config(tmp_path, tmp_path / "out", **changes)
    assert list(fields_of(lambda: run_sft(config))) == [field]


def test_a_base_without_an_end_token_is_refused(tmp_path: Path) -> None:
    config = sft_config(tmp_path, tmp_path / "out", base=str(write_base(tmp_path / "endless")))
    path = tmp_path / "endless/tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": None}))
    with pytest.raises(InvalidArgumentError, match="no end token"):
        run_sft(config)
