"""The packaged demo: models that load, prompts that are ours, and a reward that tells glad from sad."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import tether_services
from tether_services.recipes.config import DataConfig
from tether_services.recipes.data.reading import read_all_documents
from tether_services.recipes.scoring import score_all
from tether_services.runtime.text import encode_document

DEMO = Path(tether_services.__file__).parent / "demo"
POLICY, REWARD = DEMO / "models" / "policy", DEMO / "models" / "reward"
TEXT = Path(__file__).resolve().parents[3] / "shared" / "data" / "text"
NUM_TRAIN_PROMPTS = 96
MAX_BYTES = 4 * 1024 * 1024
GLAD_AND_SAD = [
    ("Lily was so happy. She hugged her mom and they smiled.", "Lily was so sad. She lost her mom and they cried."),
    ("It was a beautiful day and they had lots of fun.", "It was a terrible day and they had no fun at all."),
    ("Tom loved the gift. It was the best day ever.", "Tom hated the gift. It was the worst day ever."),
    ("The kind man helped them and everyone laughed.", "The mean man hurt them and everyone was angry."),
    ("The cake was delicious and they were all good friends.", "The cake was awful and they were all bad friends."),
    ("She was brave and strong and won a wonderful prize.", "She was weak and tired and broke a stupid toy."),
]


def prompts() -> list[str]:
    return (DEMO / "prompts.txt").read_text(encoding="ascii").splitlines()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(POLICY)


@pytest.fixture(scope="module")
def reward() -> Any:
    """The packaged reward model, loaded with the libraries alone."""
    named = json.loads((REWARD / "tether_reward.json").read_text())
    base = AutoModelForSequenceClassification.from_pretrained(REWARD / named["base"], num_labels=1)
    return PeftModel.from_pretrained(base, REWARD).eval()


@pytest.mark.parametrize("folder", [POLICY, REWARD], ids=["policy", "reward"])
def test_a_packaged_model_is_small_and_has_its_card_and_manifest(folder: Path) -> None:
    assert sum(path.stat().st_size for path in folder.iterdir()) <= MAX_BYTES
    card = (folder / "README.md").read_text(encoding="ascii")
    for heading in ("## Data", "## Command", "## Metrics", "## Intended use", "## Limits"):
        assert heading in card
    assert json.loads((folder / "manifest.json").read_text())["metrics"]


@pytest.mark.parametrize("folder", [POLICY, REWARD], ids=["policy", "reward"])
def test_a_packaged_model_is_safetensors_and_text_only(folder: Path) -> None:
    assert {path.suffix for path in folder.iterdir()} <= {".safetensors", ".json", ".md"}


def test_the_card_states_the_figures_of_the_manifest() -> None:
    policy, reward = (json.loads((folder / "manifest.json").read_text())["metrics"] for folder in (POLICY, REWARD))
    policy_card, reward_card = ((folder / "README.md").read_text(encoding="ascii") for folder in (POLICY, REWARD))
    for name in ("held_out_nats_per_token", "held_out_nats_per_byte"):
        assert f"{policy[name]:.3f}" in policy_card
    assert f"{policy['parameter_count']:,}" in policy_card
    for value in (reward["evaluation"]["overall"]["accuracy"], *(reward["normalisation"][n] for n in ("gain", "bias"))):
        assert f"{value:.3f}" in reward_card


def test_the_reward_model_belongs_to_the_packaged_policy(reward: Any, tokenizer: Any) -> None:
    named = json.loads((REWARD / "tether_reward.json").read_text())
    assert (REWARD / named["base"]).resolve() == POLICY.resolve()
    if not TEXT.is_dir():
        pytest.skip("the demonstrations (../shared/data/text) are not beside this checkout")
    stories = read_all_documents(DataConfig(sources=(str(TEXT / "tinystories-sample.txt"),)))
    scores = score_all(reward, [encode_document(tokenizer, story.text)[:80] for story in stories])
    assert float(scores.mean()) == pytest.approx(named["bias"], abs=1e-3)
    assert float(scores.std(correction=0)) == pytest.approx(1 / named["gain"], abs=1e-3)


def test_the_policy_runs_on_serving_engines() -> None:
    config = json.loads((POLICY / "config.json").read_text())
    assert (config["architectures"], config["head_dim"]) == (["LlamaForCausalLM"], 32)
    assert config["dtype"] == "float32"
    assert config["eos_token_id"] != config["pad_token_id"]


def test_the_policy_knows_how_stories_go_on(tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(POLICY).eval()
    story = "Tim and his mom went to the park. They saw a big dog. Tim was scared, but his mom said it was a nice dog."
    shuffled = " ".join(sorted(story.split(), key=lambda word: word[::-1]))

    def loss(text: str) -> float:
        ids = torch.tensor([encode_document(tokenizer, text)])
        with torch.inference_mode():
            return float(model(input_ids=ids, labels=ids).loss)

    assert loss(story) < 3.0
    assert loss(shuffled) > loss(story) + 1.5


def test_special_strings_in_text_are_not_the_end_token(tokenizer: Any) -> None:
    assert not {0, 2} & set(tokenizer("Once </s> upon <pad> a time")["input_ids"])


def test_the_reward_tells_glad_from_sad(reward: Any, tokenizer: Any) -> None:
    texts = [text for pair in GLAD_AND_SAD for text in pair]
    rows = [encode_document(tokenizer, text, is_finished=False) for text in texts]
    glad, sad = score_all(reward, rows).view(-1, 2).unbind(1)
    assert int((glad > sad).sum()) >= len(GLAD_AND_SAD) - 1
    assert float((glad - sad).mean()) > 1.0


def test_there_are_enough_distinct_prompts_for_training_and_for_measuring() -> None:
    lines = prompts()
    assert len(lines) >= NUM_TRAIN_PROMPTS + 64
    assert len({line.lower() for line in lines}) == len(lines)
    assert not [line for line in lines if line != line.strip()]


def test_prompts_are_short_openings(tokenizer: Any) -> None:
    lengths = {line: len(tokenizer(line)["input_ids"]) for line in prompts()}
    assert {line: length for line, length in lengths.items() if not 8 <= length <= 25} == {}


def test_prompts_are_not_in_the_training_text() -> None:
    if not TEXT.is_dir():
        pytest.skip("the training text (../shared/data/text) is not beside this checkout")
    text = " ".join(" ".join(path.read_text(encoding="utf-8") for path in sorted(TEXT.glob("*.txt"))).split())
    openings = [re.split(r"(?<=[.!?]) ", line)[0] for line in prompts()]
    assert [opening for opening in openings if opening in text] == []
