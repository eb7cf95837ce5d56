"""The reward stage as a whole, on small data: what it learns, writes, measures and refuses."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    set_seed,
)
from trl import RewardConfig, RewardTrainer

from tests.unit.reward_inputs import labelled_config, reward_config, write_ranked_pairs, write_rankings
from tests.unit.stage_inputs import PACKAGED_POLICY, write_base
from tether.errors import InvalidArgumentError
from tether_services.orchestrator.trainer.critic_start import read_critic_start
from tether_services.recipes.config import LORA_TARGETS, RewardModelConfig
from tether_services.recipes.data.reading import read_rankings
from tether_services.recipes.data.rendering import Renderer
from tether_services.recipes.ranking_metrics import Judged, measure_agreement
from tether_services.recipes.reward_model import read_material, run_reward_model
from tether_services.recipes.scoring import build_reward_model, score_all
from tether_services.recipes.stage import Mode
from tether_services.recipes.training import trainer_arguments
from tether_services.runtime.content_hash import hash_model_folder

ROWS = [[1, 40, 41], [1, 50], [1, 60, 61, 62, 63, 64, 65], [1]]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inputs")


@pytest.fixture(scope="module")
def ranked(inputs: Path) -> Path:
    """An adapter of all linear layers and the embeddings, from rankings of two to five answers."""
    lora = {"rank": 4, "target_modules": [*LORA_TARGETS, "embed_tokens"]}
    training = {"num_epochs": 6, "eval_every": 9}
    return run_reward_model(reward_config(inputs, inputs / "ranked", lora=lora, training=training))


@pytest.fixture(scope="module")
def whole(inputs: Path) -> Path:
    """A whole model from labelled sentences."""
    return run_reward_model(labelled_config(inputs, inputs / "whole", lora={"rank": 0}, dropout=0.1))


def metrics(folder: Path) -> Any:
    return json.loads((folder / "manifest.json").read_text())["metrics"]


def scale(folder: Path) -> Any:
    return json.loads((folder / "tether_reward.json").read_text())


def load_plainly(folder: Path) -> Any:
    """Load a reward folder with the libraries alone, as a server does."""
    base = scale(folder)["base"]
    model = AutoModelForSequenceClassification.from_pretrained(folder / base, num_labels=1)
    return PeftModel.from_pretrained(model, folder).eval() if base else model.eval()


def material_of(config: RewardModelConfig) -> Any:
    return read_material(config, Renderer(AutoTokenizer.from_pretrained(config.base)))


def fresh(inputs: Path, tmp_path: Path, *, seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    config = reward_config(inputs, tmp_path / "out", **changes)
    return build_reward_model(config, Path(config.base), pad_token_id=0)


def refusal(config: RewardModelConfig) -> InvalidArgumentError:
    with pytest.raises(InvalidArgumentError) as caught:
        run_reward_model(config)
    return caught.value


def test_rankings_are_learned(ranked: Path) -> None:
    found = metrics(ranked)
    assert found["evaluation"]["overall"]["accuracy"] > 0.85
    assert found["evaluation"]["overall"]["num_rankings"] == found["validation_rankings"]
    assert set(found["evaluation"]["by_size"]) == {"2", "3", "4", "5"}


@pytest.mark.parametrize("rank", [0, 4])
def test_pairs_train_as_a_plain_script_of_the_library_on_the_same_text(inputs: Path, tmp_path: Path, rank: int) -> None:
    data = {"sources": [str(write_ranked_pairs(tmp_path / "pairs.jsonl", count=70))], "validation_fraction": 0.1}
    training = {"max_steps": 10, "log_every": 1}
    config = reward_config(inputs, tmp_path / "out", data=data, lora={"rank": rank, "alpha": 8}, training=training)
    history = (run_reward_model(config) / "history.jsonl").read_text().splitlines()
    ours = [row["loss"] for row in map(json.loads, history) if "loss" in row]
    pairs = [
        {"prompt": item.prompt, "chosen": item.answers[0], "rejected": item.answers[1]}
        for item in read_rankings(config.data).train
    ]
    set_seed(config.seed)
    arguments = trainer_arguments(config, num_rows=len(pairs), folder=tmp_path / "work")
    trainer = RewardTrainer(
        model=build_reward_model(config, Path(config.base), pad_token_id=0),
        args=RewardConfig(**arguments, max_length=None),
        train_dataset=Dataset.from_list(pairs),
        eval_dataset=Dataset.from_list(pairs[:4]),
        # the script writes the end token as text
        processing_class=AutoTokenizer.from_pretrained(config.base, split_special_tokens=False),
    )
    trainer.train()
    theirs = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(ours) == 10
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert abs(ours[0] - ours[-1]) > 0.1, "nothing was learned, so nothing was compared"


def test_labels_are_learned_by_a_whole_model(whole: Path) -> None:
    found = metrics(whole)
    assert found["evaluation"]["overall"]["accuracy"] > 0.9
    assert found["evaluation"]["overall"]["num_pairs"] == 30 * 30
    assert found["accuracy"] == pytest.approx(found["evaluation"]["overall"]["accuracy"], abs=1e-6)


def test_the_figures_are_those_of_the_written_model(ranked: Path, inputs: Path) -> None:
    model = load_plainly(ranked)
    material = material_of(reward_config(inputs, inputs / "again"))
    judged = []
    for row, lengths in zip(material.validation.rows, material.validation.lengths, strict=True):
        with torch.inference_mode():
            scores = [float(model(input_ids=torch.tensor([ids])).logits[0, 0]) for ids in row["answer_ids"]]
        numbers = (torch.tensor(values).double().numpy() for values in (scores, row["levels"], lengths))
        judged.append(Judged(*numbers))
    found, stated = measure_agreement(judged), metrics(ranked)["evaluation"]["overall"]
    assert (found.num_pairs, found.num_rankings) == (stated["num_pairs"], stated["num_rankings"])
    assert found.accuracy == pytest.approx(stated["accuracy"], abs=1e-5)
    assert found.length_baseline == pytest.approx(stated["length_baseline"], abs=1e-5)


@pytest.mark.parametrize("name", ["ranked", "whole"])
def test_demonstrations_have_mean_0_and_deviation_1_on_the_written_scale(
    request: pytest.FixtureRequest, inputs: Path, name: str
) -> None:
    folder = request.getfixturevalue(name)
    config = (labelled_config if name == "whole" else reward_config)(inputs, inputs / "again")
    rows = material_of(config).demonstrations.token_ids
    constants = scale(folder)
    scores = constants["gain"] * (score_all(load_plainly(folder), rows) - constants["bias"])
    assert float(scores.mean()) == pytest.approx(0.0, abs=1e-4)
    assert float(scores.std(correction=0)) == pytest.approx(1.0, abs=1e-4)
    stated = metrics(folder)["normalisation"]
    assert stated == {"gain": constants["gain"], "bias": constants["bias"], "num_demonstrations": len(rows)}


def test_the_whole_model_is_complete_without_its_base(whole: Path) -> None:
    assert scale(whole)["base"] == ""
    assert json.loads((whole / "config.json").read_text())["architectures"] == ["LlamaForSequenceClassification"]
    assert not (whole / "adapter_config.json").exists()
    assert AutoTokenizer.from_pretrained(whole).eos_token_id == 2


def test_the_adapter_names_its_base_by_a_relative_path_only(ranked: Path, inputs: Path) -> None:
    settings = json.loads((ranked / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == scale(ranked)["base"] == "../base"
    assert settings["modules_to_save"] == ["classifier", "score"]
    assert scale(ranked)["max_length"] == 64
    written = [path for path in ranked.rglob("*") if path.is_file()]
    assert not [path.name for path in written if str(inputs).encode() in path.read_bytes()]


def test_the_critic_starts_from_the_adapter(ranked: Path, inputs: Path) -> None:
    start = read_critic_start(ranked, base_sha256=hash_model_folder(inputs / "base"))
    head = load_file(ranked / "adapter_model.safetensors")["base_model.model.score.weight"]
    constants = scale(ranked)
    torch.testing.assert_close(start.head_weight, constants["gain"] * head)
    assert float(start.head_bias) == pytest.approx(-constants["gain"] * constants["bias"], rel=1e-6)


def test_the_folder_has_a_page_and_pictures(ranked: Path) -> None:
    page = (ranked / "evaluation.md").read_text(encoding="ascii")
    found = metrics(ranked)["evaluation"]
    assert f"| all | {found['overall']['num_rankings']} | {found['overall']['num_pairs']} |" in page
    for heading in ("longer wins", "## By difference in length", "## Calibration"):
        assert heading in page
    assert page.count("\n| 2 |") == 1
    assert {path.name for path in (ranked / "plots").iterdir()} == {"training.svg", "calibration.svg"}


def test_the_history_has_loss_and_accuracy_of_the_validation_rankings(ranked: Path) -> None:
    rows = [json.loads(line) for line in (ranked / "history.jsonl").read_text().splitlines()]
    measured = [row for row in rows if "eval_loss" in row]
    assert len(measured) > 2
    assert measured[-1]["eval_loss"] < measured[0]["eval_loss"]
    assert all(0.0 <= row["eval_accuracy"] <= 1.0 for row in measured)
    assert metrics(ranked)["loss"] == measured[-1]["eval_loss"]


def test_the_same_seed_gives_the_same_bytes(inputs: Path, tmp_path: Path) -> None:
    digests = []
    for name in ("first", "second"):
        folder = run_reward_model(labelled_config(inputs, tmp_path / name, token_dropout=0.3))
        digests.append(hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest())
    assert digests[0] == digests[1]


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_an_adapter_is_trained_on_a_quantised_base_on_the_cpu(inputs: Path, tmp_path: Path, quantization: str) -> None:
    config = reward_config(inputs, tmp_path / "out", quantization=quantization, training={"max_steps": 6})
    folder = run_reward_model(config)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    moved = [name for name, tensor in tensors.items() if "lora_B" in name and tensor.abs().max() > 0]
    assert len(moved) == 14
    served = score_all(load_plainly(folder), [[1, *range(300, 330)]])
    assert torch.isfinite(served).all()


def test_regression_learns_scores(inputs: Path, tmp_path: Path) -> None:
    config = reward_config(inputs, tmp_path / "out", objective="regression", training={"num_epochs": 8})
    found = metrics(run_reward_model(config))
    assert found["loss"] < 1.0, "the levels are 0 to 4, with a variance of about 2"
    assert found["evaluation"]["overall"]["accuracy"] > 0.8


def test_a_regression_also_learns_from_rankings_with_only_ties(inputs: Path, tmp_path: Path) -> None:
    lines = write_rankings(tmp_path / "mixed.jsonl", count=60).read_text().splitlines()
    mixed = [json.loads(line) for line in lines]
    tied = [row | {"scores": [2] * len(row["scores"])} if n % 4 == 0 else row for n, row in enumerate(mixed)]
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in tied))
    data = {"sources": [str(path)], "validation_fraction": 0.3}
    found = metrics(run_reward_model(reward_config(inputs, tmp_path / "out", data=data, objective="regression")))
    assert found["train_rankings"] + found["validation_rankings"] == 60
    assert 0 < found["evaluation"]["overall"]["num_rankings"] < found["validation_rankings"]
    assert 0.0 <= found["accuracy"] <= 1.0


@pytest.mark.parametrize("kind", ["pairs", "labelled"])
def test_regression_without_scores_is_refused(inputs: Path, tmp_path: Path, kind: str) -> None:
    pairs = {"sources": [str(write_ranked_pairs(tmp_path / "pairs.jsonl", count=120))]}
    changes: dict[str, Any] = {"data": pairs} if kind == "pairs" else {}
    make = reward_config if kind == "pairs" else labelled_config
    error = refusal(make(inputs, tmp_path / "out", objective="regression", **changes))
    assert error.violations[0].field == "objective"


def test_margins_of_the_data_reach_the_loss(inputs: Path, tmp_path: Path) -> None:
    losses = []
    for name, margin in (("without", None), ("with", 3.0)):
        sources = [str(write_ranked_pairs(tmp_path / f"{name}.jsonl", count=60, margin=margin))]
        config = reward_config(
            inputs, tmp_path / name, data={"sources": sources, "validation_fraction": 0.2}, training={"max_steps": 1}
        )
        losses.append(metrics(run_reward_model(config))["loss"])
    assert losses[1] > losses[0] + 1.0


def test_a_dry_run_writes_nothing(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for make in (reward_config, labelled_config):
        config = make(inputs, tmp_path / "out")
        run_reward_model(config, Mode(dry_run=True))
        assert not config.output.exists()
        assert "optimiser steps" in capsys.readouterr().out


def test_the_dry_run_of_labelled_texts_counts_the_steps_of_the_run(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = labelled_config(inputs, tmp_path / "out")
    run_reward_model(config, Mode(dry_run=True))
    rows = [json.loads(line) for line in (inputs_run(inputs, tmp_path) / "history.jsonl").read_text().splitlines()]
    assert f"{max(row['step'] for row in rows)} of" in capsys.readouterr().out


def inputs_run(inputs: Path, tmp_path: Path) -> Path:
    return run_reward_model(labelled_config(inputs, tmp_path / "run"))


def test_rank_0_trains_everything_and_an_adapter_only_itself_and_the_head(inputs: Path, tmp_path: Path) -> None:
    adapted = fresh(inputs, tmp_path)
    kinds = {name.split(".")[-3 if "lora" in name else -2] for name, p in adapted.named_parameters() if p.requires_grad}
    assert kinds == {"lora_A", "lora_B", "default"}
    assert all(p.requires_grad for p in fresh(inputs, tmp_path, lora={"rank": 0}).parameters())


def test_a_fresh_adapter_leaves_the_base_unchanged(inputs: Path, tmp_path: Path) -> None:
    model = fresh(inputs, tmp_path)
    classifier = model.get_base_model()
    head = classifier.score.modules_to_save["default"].weight[0]
    with torch.inference_mode(), model.disable_adapter():
        hidden = [classifier.model(input_ids=torch.tensor([row])).last_hidden_state[0, -1] for row in ROWS]
        expected = torch.stack([h @ head for h in hidden])
    torch.testing.assert_close(score_all(model, ROWS), expected, atol=1e-5, rtol=0)


def test_d32_the_head_starts_with_the_published_spread(inputs: Path, tmp_path: Path) -> None:
    heads = [fresh(inputs, tmp_path, seed=seed, lora={"rank": 0}).score.weight.detach().flatten() for seed in range(30)]
    assert float(torch.cat(heads).std()) == pytest.approx(1 / 65**0.5, rel=0.1)


@pytest.mark.parametrize("lora", [{"rank": 0}, {"rank": 4}])
def test_d32_the_head_is_kept_in_float32(inputs: Path, tmp_path: Path, lora: dict[str, int]) -> None:
    model = fresh(inputs, tmp_path, dtype="bfloat16", lora=lora)
    heads = [p.dtype for name, p in model.named_parameters() if "score" in name]
    assert set(heads) == {torch.float32}


def test_a_reward_model_as_the_base_keeps_its_head(whole: Path, inputs: Path, tmp_path: Path) -> None:
    model = fresh(inputs, tmp_path, base=str(whole), lora={"rank": 0})
    assert torch.equal(model.score.weight, load_file(whole / "model.safetensors")["score.weight"])


def test_many_rows_come_back_in_their_order_and_the_mode_of_the_model_stays(inputs: Path, tmp_path: Path) -> None:
    model = fresh(inputs, tmp_path, lora={"rank": 4, "dropout": 0.5})
    assert model.training
    rows = [[1, *range(30, 30 + length)] for length in [5, 1, 9, 3] * 12]
    alone = torch.cat([score_all(model, [row]) for row in rows])
    torch.testing.assert_close(score_all(model, rows), alone, atol=1e-5, rtol=0)
    assert model.training


def test_dropout_is_refused_where_the_model_is_built_otherwise(inputs: Path, tmp_path: Path) -> None:
    base = tmp_path / "gpt2"
    tokenizer = AutoTokenizer.from_pretrained(PACKAGED_POLICY)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    config = reward_config(inputs, tmp_path / "out", base=str(base), lora={"rank": 0}, dropout=0.1)
    assert refusal(config).violations[0].field == "dropout"


def test_an_encoder_is_refused_as_a_base(inputs: Path, tmp_path: Path) -> None:
    base = tmp_path / "bert"
    shape = BertConfig(
        vocab_size=3000, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertForSequenceClassification(shape).save_pretrained(base)
    AutoTokenizer.from_pretrained(PACKAGED_POLICY).save_pretrained(base)
    assert refusal(reward_config(inputs, tmp_path / "out", base=str(base))).violations[0].field == "base"


def test_a_folder_without_a_model_names_the_base(inputs: Path, tmp_path: Path) -> None:
    AutoTokenizer.from_pretrained(PACKAGED_POLICY).save_pretrained(tmp_path / "empty")
    assert refusal(reward_config(inputs, tmp_path / "out", base=str(tmp_path / "empty"))).violations[0].field == "base"


def test_nothing_left_to_train_on_is_refused(inputs: Path, tmp_path: Path) -> None:
    error = refusal(reward_config(inputs, tmp_path / "out", max_tokens=8))
    assert error.violations[0].field == "data.sources"
    assert "raise max_tokens" in str(error)


def test_the_base_may_be_the_output_of_a_hub_like_folder_elsewhere(inputs: Path, tmp_path: Path) -> None:
    base = write_base(tmp_path / "elsewhere" / "deep" / "base")
    config = reward_config(
        inputs, tmp_path / "out", base=str(base), base_reference="../elsewhere/deep/base", training={"max_steps": 1}
    )
    folder = run_reward_model(config)
    assert scale(folder)["base"] == "../elsewhere/deep/base"
    assert torch.isfinite(score_all(load_plainly(folder), ROWS)).all()
