"""The preference stage: TRL's numbers, the project's own formula, what it writes, what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, TaskType
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import DPOConfig as TrlDpoConfig
from trl import DPOTrainer

from tests.unit.preference_inputs import dpo_config, write_pairs, write_rankings
from tether.errors import InvalidArgumentError
from tether.reference import LogprobItem
from tether_services.ppo.losses import dpo_loss
from tether_services.recipes.base_model import load_base, load_tokenizer, with_adapter
from tether_services.recipes.config import DpoConfig
from tether_services.recipes.data.reading import read_rankings
from tether_services.recipes.data.rendering import Renderer
from tether_services.recipes.dpo import PairTrainer, build_trainer, run_dpo, with_reference
from tether_services.recipes.pairs import Pairs, completions_of, encode_pairs
from tether_services.recipes.reference_logprobs import completion_logprobs
from tether_services.recipes.stage import Mode, Stage

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def history_of(folder: Path, name: str) -> list[float]:
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


def manifest_of(folder: Path) -> Any:
    return json.loads((folder / "manifest.json").read_text())


def plain_trl(config: DpoConfig, folder: Path, *, rank: int) -> list[dict[str, float]]:
    """Return the log of TRL's own trainer on the same rows as texts, with nothing of this project but the split."""
    data = read_rankings(config.data)
    rows = [
        [{"prompt": r.prompt, "chosen": r.answers[0], "rejected": r.answers[1]} for r in part]
        for part in (data.train, data.validation)
    ]
    arguments = TrlDpoConfig(
        output_dir=str(folder),
        seed=0,
        data_seed=0,
        use_cpu=True,
        bf16=False,
        learning_rate=0.005,
        lr_scheduler_type="linear",
        warmup_steps=1,
        adam_beta2=0.95,
        num_train_epochs=2,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        gradient_accumulation_steps=2,
        gradient_checkpointing=False,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=4,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        beta=config.beta,
        loss_type=[config.kind],
    )
    set_seed(0)
    lora = LoraConfig(r=rank, lora_alpha=8, task_type=TaskType.CAUSAL_LM, target_modules=["q_proj", "v_proj"])
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(config.base),
        args=arguments,
        train_dataset=Dataset.from_list(rows[0]),
        eval_dataset=Dataset.from_list(rows[1]),
        processing_class=AutoTokenizer.from_pretrained(config.base),
        peft_config=lora if rank else None,
    )
    trainer.train()
    logged: list[dict[str, float]] = trainer.state.log_history
    return logged


@pytest.mark.parametrize(("kind", "rank"), [("sigmoid", 4), ("ipo", 4), ("sigmoid", 0)])
def test_the_losses_are_those_of_plain_trl_on_the_same_texts(tmp_path: Path, kind: str, rank: int) -> None:
    lora = {"rank": rank, "alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    config = dpo_config(tmp_path, kind=kind, lora=lora)
    theirs = plain_trl(config, tmp_path / "trl", rank=rank)
    run_dpo(config)
    for name in ("loss", "eval_loss", "rewards/margins", "grad_norm"):
        expected = [row[name] for row in theirs if name in row]
        assert len(expected) >= 2
        assert history_of(config.output, name) == pytest.approx(expected, abs=1e-4, rel=1e-4), name
    assert history_of(config.output, "loss")[-1] < history_of(config.output, "loss")[0]


def built(base: Path, config: DpoConfig, *, work: Path, is_trained: bool = True) -> tuple[PairTrainer, Pairs, Renderer]:
    """Return a trainer on the pairs of a configuration, with an adapter that is no identity if it is trained."""
    tokenizer = load_tokenizer(base)
    renderer = Renderer(tokenizer, template="plain")
    pairs = encode_pairs(read_rankings(config.data).train, renderer, config)
    set_seed(config.seed)
    model = with_adapter(load_base(AutoModelForCausalLM, config, base), config, task=TaskType.CAUSAL_LM)
    stage = Stage("dpo", config, Mode(), work)
    trainer = build_trainer(stage, config, model=model, tokenizer=tokenizer, parts=(pairs, pairs))
    items = completions_of(pairs.pairs)
    reference = dict(zip(items, completion_logprobs(trainer, items, title="reference"), strict=True))
    trainer.train_dataset = with_reference(trainer.train_dataset, pairs.pairs, reference)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if is_trained and "lora_B" in name:
                parameter.normal_(std=0.3)
    return trainer, pairs, renderer


@torch.no_grad()
def sequence_logprob(model: Any, item: LogprobItem, *, mean: bool) -> float:
    """Return the log-probability of a response from a plain forward pass of one unpadded row."""
    ids = torch.tensor([[*item.prompt_token_ids, *item.response_token_ids]])
    table = torch.log_softmax(model(input_ids=ids).logits[0].double(), dim=-1)
    places = range(len(item.prompt_token_ids) - 1, ids.shape[1] - 1)
    values = [float(table[place, ids[0, place + 1]]) for place in places]
    return sum(values) / (len(values) if mean else 1)


@pytest.mark.parametrize(("kind", "smoothing"), [("sigmoid", 0.0), ("sigmoid", 0.1), ("sigmoid", 0.4), ("ipo", 0.0)])
def test_the_loss_of_a_batch_is_the_project_s_own_formula(tmp_path: Path, kind: Any, smoothing: float) -> None:
    config = dpo_config(tmp_path, kind=kind, label_smoothing=smoothing, beta=0.3)
    trainer, pairs, _ = built(tmp_path / "base", config, work=tmp_path / "work")
    trainer.model.eval()
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(6)])
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, batch)

    def column(side: str) -> Tensor:
        return torch.tensor(
            [sequence_logprob(trainer.model, getattr(p, side), mean=kind == "ipo") for p in pairs.pairs[:6]]
        )

    policy = column("chosen"), column("rejected")
    with trainer.model.disable_adapter():
        reference = column("chosen"), column("rejected")
    expected = dpo_loss(*policy, *reference, beta=0.3, kind=kind, label_smoothing=smoothing)
    assert abs(float(expected) - float(dpo_loss(*reference, *reference, beta=0.3, kind=kind))) > 0.01
    assert float(loss) == pytest.approx(float(expected), abs=1e-5)


def test_the_validation_loss_counts_every_pair_once_however_they_are_batched(tmp_path: Path) -> None:
    config = dpo_config(tmp_path, beta=0.3)
    trainer, pairs, _ = built(tmp_path / "base", config, work=tmp_path / "work")
    whole = trainer.train_dataset
    trainer.model.eval()
    with torch.no_grad():
        losses = [float(trainer.compute_loss(trainer.model, trainer.data_collator([row]))) for row in whole]
    assert len(losses) == len(pairs.pairs) and len(losses) % 8
    for size in (1, 8):
        trainer.args.per_device_eval_batch_size = size
        assert trainer.evaluate(whole)["eval_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_trl_s_ipo_is_not_the_one_on_sums(tmp_path: Path) -> None:
    """Answers of different lengths tell the two apart: the stage has TRL's, per token, as its setting says."""
    trainer, pairs, _ = built(tmp_path / "base", dpo_config(tmp_path, kind="ipo"), work=tmp_path / "work")
    trainer.model.eval()
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    policy = [[sequence_logprob(trainer.model, p.chosen, mean=False) for p in pairs.pairs[:4]]]
    policy.append([sequence_logprob(trainer.model, p.rejected, mean=False) for p in pairs.pairs[:4]])
    reference = [batch["ref_chosen_logps"], batch["ref_rejected_logps"]]
    on_sums = dpo_loss(*map(torch.tensor, policy), *reference, beta=0.1, kind="ipo")
    with torch.no_grad():
        assert abs(float(trainer.compute_loss(trainer.model, batch)) - float(on_sums)) > 0.1


def test_only_one_adapter_is_there_and_only_it_is_trained(tmp_path: Path) -> None:
    trainer, _, _ = built(tmp_path / "base", dpo_config(tmp_path), work=tmp_path / "work")
    assert list(trainer.model.peft_config) == ["default"] and trainer.model.active_adapter == "default"
    names = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert names and all(".lora_" in name and ".default." in name for name in names)


def test_the_trainer_never_asks_for_the_reference_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("TRL computed reference log-probabilities of its own")

    monkeypatch.setattr(DPOTrainer, "compute_ref_log_probs", refuse)
    config = dpo_config(tmp_path, training={"num_epochs": 1})
    assert run_dpo(config) == config.output


def test_an_adapter_folder_loads_on_its_base_and_gives_the_written_accuracy(tmp_path: Path) -> None:
    config = dpo_config(tmp_path)
    folder = run_dpo(config)
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "../base"
    assert settings["target_modules"] == sorted(settings["target_modules"])
    assert {"tokenizer.json", "manifest.json", "history.jsonl"} <= {path.name for path in folder.iterdir()}
    for name in ("training.svg", "rewards.svg"):
        assert "<svg" in (folder / "plots" / name).read_text()[:2000]
    metrics = manifest_of(folder)["metrics"]
    base = AutoModelForCausalLM.from_pretrained(config.base)
    model = PeftModel.from_pretrained(base, str(folder)).eval()
    renderer = Renderer(load_tokenizer(tmp_path / "base"), template="plain")
    pairs = encode_pairs(read_rankings(config.data).validation, renderer, config).pairs

    def leads() -> list[float]:
        sides = ((sequence_logprob(model, side, mean=False) for side in (p.chosen, p.rejected)) for p in pairs)
        return [chosen - rejected for chosen, rejected in sides]

    trained = leads()
    with model.disable_adapter():
        gained = [after - before for after, before in zip(trained, leads(), strict=True)]
    assert metrics["accuracy"] == sum(lead > 0 for lead in gained) / len(gained) > 0.8
    assert metrics["reward_margin"] == pytest.approx(0.1 * sum(gained) / len(gained), abs=1e-4)
    assert metrics["validation_pairs"] == len(pairs)


def test_rank_0_trains_every_weight_and_writes_a_whole_model(tmp_path: Path) -> None:
    config = dpo_config(tmp_path, lora={"rank": 0}, training={"learning_rate": 0.001})
    folder = run_dpo(config)
    assert not (folder / "adapter_config.json").exists()
    before, after = (load_file(path / "model.safetensors") for path in (tmp_path / "base", folder))
    assert before.keys() == after.keys()
    assert all(not before[name].equal(after[name]) for name in before if name.endswith("proj.weight"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.generation_config.eos_token_id == 2
    assert manifest_of(folder)["metrics"]["accuracy"] > 0.8


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_an_adapter_is_trained_on_a_quantised_base(tmp_path: Path, quantization: str) -> None:
    pytest.importorskip("bitsandbytes", reason="quantised bases need the quant extra")
    config = dpo_config(tmp_path, quantization=quantization)
    folder = run_dpo(config)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert all(tensor.any() for tensor in tensors.values())
    losses = history_of(folder, "loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4), "the reference is the quantised base itself"
    assert losses[-1] < 0.85 * losses[0]


def test_best_and_worst_leave_one_pair_of_each_ranking(tmp_path: Path) -> None:
    data = {"sources": [str(write_rankings(tmp_path / "rankings.jsonl"))]}
    counts = {}
    for pairs in ("all", "best_worst"):
        config = dpo_config(tmp_path, data=data, pairs=pairs, output=tmp_path / pairs, training={"max_steps": 1})
        metrics = manifest_of(run_dpo(config))["metrics"]
        counts[pairs] = metrics["train_pairs"] + metrics["validation_pairs"]
    assert counts == {"all": 4 * (2 + 5 + 9), "best_worst": 12}


def test_dropout_of_the_adapter_is_applied_and_the_reference_has_none(tmp_path: Path) -> None:
    lora = {"rank": 4, "alpha": 8}
    without = run_dpo(dpo_config(tmp_path, lora=lora, output=tmp_path / "without"))
    with_dropout = run_dpo(dpo_config(tmp_path, lora=lora | {"dropout": 0.5}, output=tmp_path / "with"))
    assert history_of(with_dropout, "loss")[0] == pytest.approx(0.6931, abs=1e-4), "B is 0: nothing to drop yet"
    assert history_of(with_dropout, "loss")[3] != pytest.approx(history_of(without, "loss")[3], abs=1e-4)


def test_a_dry_run_estimates_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = dpo_config(tmp_path)
    run_dpo(config, Mode(dry_run=True))
    assert not config.output.exists()
    shown = capsys.readouterr().out
    assert "dpo: dry run" in shown and "optimiser steps" in shown


def test_pairs_that_are_all_too_long_are_refused_with_what_to_change(tmp_path: Path) -> None:
    source = tmp_path / "long.jsonl"
    rows = [{"prompt": f"w4 w{n + 5}", "chosen": " w6" * 20, "rejected": " w7" * 20} for n in range(20)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InvalidArgumentError, match="raise max_tokens") as caught:
        run_dpo(dpo_config(tmp_path, data={"sources": [str(source)]}, max_tokens=8))
    assert caught.value.violations[0].field == "data.sources"


def test_a_base_without_the_target_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        run_dpo(dpo_config(tmp_path, lora={"target_modules": ["c_attn"]}))
    assert caught.value.violations[0].field == "lora.target_modules"


def test_two_runs_of_one_configuration_are_equal_to_the_byte(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs.jsonl")
    folders = [run_dpo(dpo_config(tmp_path, output=tmp_path / name)) for name in ("first", "second")]
    for name in ("adapter_model.safetensors", "history.jsonl", "adapter_config.json"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


def test_activations_computed_twice_give_the_same_losses(tmp_path: Path) -> None:
    plain = run_dpo(dpo_config(tmp_path, output=tmp_path / "plain"))
    twice = run_dpo(dpo_config(tmp_path, output=tmp_path / "twice", training={"gradient_checkpointing": True}))
    assert history_of(twice, "loss") == pytest.approx(history_of(plain, "loss"), abs=1e-5)


def test_a_base_in_16_bits_starts_at_the_reference_too(tmp_path: Path) -> None:
    plain = run_dpo(dpo_config(tmp_path, output=tmp_path / "plain"))
    halved = run_dpo(dpo_config(tmp_path, output=tmp_path / "halved", dtype="bfloat16"))
    losses = history_of(halved, "loss")
    assert losses[0] == pytest.approx(math.log(2), abs=0.02)
    assert losses == pytest.approx(history_of(plain, "loss"), abs=0.1)
    assert {t.dtype for t in load_file(halved / "adapter_model.safetensors").values()} == {torch.float32}
