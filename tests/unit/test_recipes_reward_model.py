"""Reward-model training on small labels: groups, scores, the written folder."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.unit.recipe_inputs import pretrain_config, reward_config
from tether.errors import InvalidArgumentError
from tether_services.recipes.pretrain import run_pretrain
from tether_services.recipes.reward_model import epoch_groups, read_material, run_reward_model
from tether_services.recipes.scoring import build_reward_model, raw_scores, score_all
from tether_services.recipes.sentiment import LabelledText
from tether_services.recipes.tokenizer import encode_document

ROWS = [[1, 40, 41], [1, 50], [1, 60, 61, 62, 63, 64, 65], [1]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_pretrain(pretrain_config(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def trained(base: Path) -> Path:
    """A reward model folder beside its base, from a run of a few seconds."""
    return run_reward_model(reward_config(base.parent, base))


def metrics(folder: Path) -> Any:
    return json.loads((folder / "manifest.json").read_text())["metrics"]


def load_plainly(folder: Path) -> Any:
    """Load a reward folder with the libraries alone, as a server does."""
    named = json.loads((folder / "tether_reward.json").read_text())
    base = AutoModelForSequenceClassification.from_pretrained(folder / named["base"], num_labels=1)
    return PeftModel.from_pretrained(base, folder).eval()


def last_scores(model: Any, rows: list[list[int]], *, pad_token_id: int = 0) -> torch.Tensor:
    """Return the raw scores at the last token of each row, [N]."""
    with torch.inference_mode():
        return raw_scores(model, rows, pad_token_id=pad_token_id)


def fresh(base: Path, tmp_path: Path) -> Any:
    torch.manual_seed(0)
    return build_reward_model(reward_config(tmp_path, base), pad_token_id=0).eval()


def test_training_separates_the_labels(trained: Path) -> None:
    assert metrics(trained)["validation_pair_accuracy"] > 0.9
    assert metrics(trained)["validation_accuracy"] > 0.8


def test_the_folder_loads_with_the_libraries_alone_and_scores_the_same(trained: Path, base: Path) -> None:
    model, tokenizer = load_plainly(trained), AutoTokenizer.from_pretrained(base)
    material = read_material(reward_config(base.parent, base), tokenizer=tokenizer)
    bias = json.loads((trained / "tether_reward.json").read_text())["bias"]
    scores = torch.stack(
        [model(input_ids=torch.tensor([ids])).logits[0, 0].detach() for ids in material.demonstrations]
    )
    assert float(scores.mean()) == pytest.approx(bias, abs=1e-4)


def test_the_adapter_names_its_base_by_a_relative_path_only(trained: Path, base: Path) -> None:
    settings = json.loads((trained / "adapter_config.json").read_text())
    normalisation = json.loads((trained / "tether_reward.json").read_text())
    assert settings["base_model_name_or_path"] == normalisation["base"] == "../policy"
    assert (normalisation["gain"], normalisation["max_length"]) == (1.0, 64)
    assert not [path.name for path in trained.iterdir() if str(base.parent).encode() in path.read_bytes()]


def test_the_adapter_is_what_serving_engines_accept(trained: Path) -> None:
    settings = json.loads((trained / "adapter_config.json").read_text())
    assert (settings["task_type"], settings["bias"], settings["lora_dropout"]) == ("SEQ_CLS", "none", 0.0)
    assert settings["modules_to_save"] == ["classifier", "score"]
    assert settings["target_modules"] == sorted(settings["target_modules"])


def test_a_model_card_that_is_already_there_stays(base: Path, tmp_path: Path) -> None:
    config = reward_config(tmp_path, base, num_epochs=1)
    config.output.mkdir()
    (config.output / "README.md").write_text("# mine\n")
    run_reward_model(config)
    assert (config.output / "README.md").read_text() == "# mine\n"


def test_the_same_seed_gives_the_same_adapter(base: Path, tmp_path: Path) -> None:
    config = reward_config(tmp_path, base, num_epochs=1)
    weights = [(run_reward_model(config) / "adapter_model.safetensors").read_bytes() for _ in range(2)]
    assert weights[0] == weights[1]


def test_only_adapter_and_head_learn(base: Path, tmp_path: Path) -> None:
    model = fresh(base, tmp_path)
    kinds = {name.split(".")[-3 if "lora" in name else -2] for name, p in model.named_parameters() if p.requires_grad}
    assert kinds == {"lora_A", "lora_B", "default"}
    assert not [name for name, p in model.named_parameters() if p.requires_grad and "embed" in name]


def test_a_fresh_adapter_leaves_the_base_unchanged(base: Path, tmp_path: Path) -> None:
    model = fresh(base, tmp_path)
    with torch.inference_mode():
        with_adapter = last_scores(model, ROWS)
        with model.disable_adapter():
            body = model.get_base_model().model
            hidden = [body(input_ids=torch.tensor([row])).last_hidden_state[0, -1] for row in ROWS]
        head = model.get_base_model().score.modules_to_save["default"].weight[0]
    torch.testing.assert_close(with_adapter, torch.stack([h @ head for h in hidden]), atol=1e-5, rtol=0)


def test_d32_the_head_starts_with_the_published_spread(base: Path, tmp_path: Path) -> None:
    heads = []
    for seed in range(40):
        torch.manual_seed(seed)
        model = build_reward_model(reward_config(tmp_path, base), pad_token_id=0)
        heads.append(model.get_base_model().score.modules_to_save["default"].weight.detach().flatten())
    assert float(torch.cat(heads).std()) == pytest.approx(1 / 33**0.5, rel=0.1)


def test_d34_the_score_is_read_at_the_last_real_token(base: Path, tmp_path: Path) -> None:
    model = fresh(base, tmp_path)
    alone = torch.cat([last_scores(model, [row]) for row in ROWS])
    torch.testing.assert_close(last_scores(model, ROWS), alone, atol=1e-5, rtol=0)


def test_d34_the_value_of_the_padding_does_not_matter(base: Path, tmp_path: Path) -> None:
    model = fresh(base, tmp_path)
    assert torch.equal(last_scores(model, ROWS), last_scores(model, ROWS, pad_token_id=77))


def test_d34_a_real_token_equal_to_the_padding_is_scored(base: Path, tmp_path: Path) -> None:
    padded, plain = last_scores(fresh(base, tmp_path), [[1, 40, 0], [1, 40]])
    assert padded != plain


@pytest.mark.parametrize("rows", [[], [[1, 2], []]])
def test_d34_nothing_to_score_is_an_error_not_a_number(base: Path, tmp_path: Path, rows: list[list[int]]) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        raw_scores(fresh(base, tmp_path), rows, pad_token_id=0)
    assert caught.value.violations[0].field == "token_ids"


def test_many_rows_come_back_in_their_order(base: Path, tmp_path: Path) -> None:
    model = fresh(base, tmp_path)
    rows = [[1, *range(30, 30 + length)] for length in [5, 1, 9, 3] * 12]
    alone = torch.cat([last_scores(model, [row]) for row in rows])
    torch.testing.assert_close(score_all(model, rows, pad_token_id=0), alone, atol=1e-5, rtol=0)


def test_groups_are_balanced_and_no_sentence_is_used_twice_in_a_pass() -> None:
    items = [LabelledText(f"s{index}e", index % 2) for index in range(200)]
    texts: list[str] = []

    def encode(text: str, end: bool) -> list[int]:
        texts.append(text)
        return [1, int(end)]

    groups = list(epoch_groups(items, group_size=6, encode=encode, rng=random.Random(0)))
    assert all(Counter(group.levels) == {1: 3, 0: 3} for group in groups)
    used = [part.lower().rstrip(".") for text in texts for part in text.split(". ")]
    assert len(used) == len(set(used))
    assert len(used) > 150
    assert {ids[1] for group in groups for ids in group.token_ids} == {0, 1}
    assert {text.count(". ") for text in texts} == {0, 1, 2}


def test_sentences_of_the_validation_files_are_not_trained_on(base: Path, tmp_path: Path) -> None:
    config = reward_config(tmp_path, base)
    copied = config.validation_files[0].read_text().splitlines()[1].upper()
    train = config.train_files[0]
    train.write_text(train.read_text() + copied + " !\n")
    material = read_material(config, tokenizer=AutoTokenizer.from_pretrained(base))
    assert material.overlap_count == 1
    assert not {item.text.lower() for item in material.train} & {item.text.lower() for item in material.validation}


def test_demonstrations_are_held_out_openings_of_the_asked_length(base: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    material = read_material(reward_config(tmp_path, base), tokenizer=tokenizer)
    assert {len(ids) for ids in material.demonstrations} == {20}
    assert {ids[0] for ids in material.demonstrations} == {tokenizer.bos_token_id}


def test_a_single_label_is_refused_by_field(base: Path, tmp_path: Path) -> None:
    only_good = tmp_path / "only.pos"
    only_good.write_text("fine film\ngood film\n")
    with pytest.raises(InvalidArgumentError, match="both labels") as caught:
        run_reward_model(reward_config(tmp_path, base, train_files=(only_good,)))
    assert caught.value.violations[0].field == "train_files"


def test_too_few_sentences_for_a_step_name_the_setting(base: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        run_reward_model(reward_config(tmp_path, base, groups_per_step=1000))
    assert caught.value.violations[0].field == "groups_per_step"


def test_a_folder_without_a_model_names_the_base(base: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(tmp_path / "empty")
    with pytest.raises(InvalidArgumentError) as caught:
        run_reward_model(reward_config(tmp_path, tmp_path / "empty"))
    assert caught.value.violations[0].field == "base"


def test_texts_longer_than_the_model_takes_are_cut_in_training(base: Path, tmp_path: Path) -> None:
    long = tmp_path / "long.csv"
    words = " ".join(["very"] * 200)
    long.write_text("label,sentence\n" + "".join(f"{i % 2},{words} film {i}\n" for i in range(60)))
    output = run_reward_model(reward_config(tmp_path, base, train_files=(long,), num_epochs=1, groups_per_step=1))
    assert metrics(output)["train_sentence_count"] == 60
    assert len(encode_document(AutoTokenizer.from_pretrained(base), words)) > 64
