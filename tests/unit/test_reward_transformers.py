"""The reward engine against plain forward passes of the same model."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from tests.unit.tiny_reward import MAX_LEN, VOCABULARY, write_adapter, write_classifier, write_policy, write_scale
from tether.errors import InvalidArgumentError, TetherError
from tether_services.reward.config import RewardSettings
from tether_services.reward.engine import EngineDescription, ScoreTask
from tether_services.reward.engines.transformers import TransformersRewardEngine, find_reward_folder

PAD = 0


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classifier(tmp_path_factory.mktemp("reward") / "classifier")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("reward")
    return write_adapter(root / "adapter", write_policy(root / "policy"))


def score(
    folder: Path, tasks: Sequence[ScoreTask], **settings: object
) -> tuple[list[float | TetherError], EngineDescription]:
    async def main() -> tuple[list[float | TetherError], EngineDescription]:
        checked = RewardSettings.model_validate({"model": str(folder), **settings})
        engine = TransformersRewardEngine(str(folder), checked, field="models[0].components[0].path")
        try:
            await engine.start()
            await engine.check()
            return await engine.score(tasks), engine.description
        finally:
            await engine.close()

    return asyncio.run(main())


def refusal(folder: Path) -> InvalidArgumentError:
    with pytest.raises(InvalidArgumentError) as caught:
        score(folder, [])
    assert caught.value.violations[0].field == "models[0].components[0].path"
    return caught.value


def ragged_tasks(count: int = 9, *, seed: int = 0) -> list[ScoreTask]:
    """Return items without the pad id, which the library would take for padding."""
    rng = random.Random(seed)

    def ids(shortest: int) -> tuple[int, ...]:
        return tuple(rng.randrange(1, len(VOCABULARY)) for _ in range(rng.randint(shortest, 20)))

    return [ScoreTask(prompt_token_ids=ids(0), response_token_ids=ids(1)) for _ in range(count)]


def rows(tasks: Sequence[ScoreTask]) -> list[list[int]]:
    return [[*task.prompt_token_ids, *task.response_token_ids] for task in tasks]


@torch.no_grad()
def plain_scores(model: torch.nn.Module, tasks: Sequence[ScoreTask]) -> list[float]:
    """Return what the library's own forward gives, one unpadded row at a time."""
    return [float(model(input_ids=torch.tensor([row])).logits[0, 0]) for row in rows(tasks)]


def test_scores_equal_the_librarys_own_forward(classifier: Path) -> None:
    tasks = ragged_tasks()
    scores, _ = score(classifier, tasks)
    model = AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    assert scores == pytest.approx(plain_scores(model, tasks), abs=1e-5)
    assert len({round(value, 4) for value in scores if isinstance(value, float)}) == len(tasks)


def test_scores_equal_the_librarys_padded_forward(classifier: Path) -> None:
    tasks = ragged_tasks(5)
    width = max(map(len, rows(tasks)))
    ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows(tasks)])
    model = AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=(ids != PAD).long()).logits[:, 0].tolist()
    assert score(classifier, tasks)[0] == pytest.approx(expected, abs=1e-5)


def test_an_adapter_folder_equals_a_direct_peft_forward(adapter: Path) -> None:
    tasks = ragged_tasks()
    base = AutoModelForSequenceClassification.from_pretrained(adapter.parent / "policy", num_labels=1)
    model = PeftModel.from_pretrained(base, str(adapter)).eval()
    expected = plain_scores(model, tasks)
    assert score(adapter, tasks)[0] == pytest.approx(expected, abs=1e-5)
    with model.disable_adapter(), torch.no_grad():
        assert plain_scores(model, tasks) != pytest.approx(expected, abs=1e-2)


def test_d35_an_item_alone_and_in_a_batch_agree(classifier: Path) -> None:
    tasks = ragged_tasks(12)
    together, _ = score(classifier, tasks)
    alone = [score(classifier, [task])[0][0] for task in tasks]
    assert together == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("forward_tokens", [1, 50, 10_000])
def test_padding_and_pass_size_change_nothing(adapter: Path, forward_tokens: int) -> None:
    tasks = ragged_tasks(10)
    expected, _ = score(adapter, tasks)
    assert score(adapter, tasks, forward_tokens=forward_tokens)[0] == pytest.approx(expected, abs=1e-5)


def test_d34_a_response_that_ends_in_the_pad_id_is_scored_at_that_token(classifier: Path) -> None:
    short, long = ScoreTask(response_token_ids=(4, 5)), ScoreTask(response_token_ids=(4, 5, PAD))
    scores, _ = score(classifier, [short, long])
    assert scores[0] != pytest.approx(scores[1], abs=1e-3)
    model = AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    with torch.no_grad():
        hidden = model.model(input_ids=torch.tensor([[4, 5, PAD]])).last_hidden_state
        assert scores[1] == pytest.approx(float(model.score(hidden[0, -1])), abs=1e-5)


def test_the_prompt_matters(classifier: Path) -> None:
    one, other = ScoreTask(prompt_token_ids=(4,), response_token_ids=(6,)), ScoreTask(response_token_ids=(6,))
    scores, _ = score(classifier, [one, other])
    assert scores[0] != scores[1]


def test_the_description_of_a_whole_model(classifier: Path) -> None:
    _, description = score(classifier, ragged_tasks(1))
    assert (description.engine, description.gain, description.bias) == ("transformers", 1.0, 0.0)
    assert (description.max_model_len, description.vocab_size) == (MAX_LEN, len(VOCABULARY))
    assert description.codec is not None
    assert description.codec.encode("the cat", add_special_tokens=True) == [1, 4, 5]


def test_the_scale_of_an_adapter_comes_from_its_file(adapter: Path) -> None:
    _, description = score(adapter, ragged_tasks(1))
    assert (description.gain, description.bias, description.max_model_len) == (2.0, 0.5, 40)


def test_the_hash_covers_everything_that_decides_a_score(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", write_policy(tmp_path / "policy"))
    seen = {find_reward_folder(str(adapter), field="path").sha256}

    def changed() -> bool:
        sha256 = find_reward_folder(str(adapter), field="path").sha256
        new = sha256 not in seen
        seen.add(sha256)
        return new

    (tmp_path / "policy" / "README.md").write_text("words")
    assert not changed()
    write_scale(adapter, base="../policy", gain=3.0)
    assert changed()
    write_adapter(adapter, tmp_path / "policy", seed=5)
    assert changed()
    write_policy(tmp_path / "policy", seed=7)
    assert changed()


def test_an_adapter_without_a_scale_file_is_refused(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", write_policy(tmp_path / "policy"))
    (adapter / "tether_reward.json").unlink()
    assert "must name the base" in refusal(adapter).message


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("{", "not JSON"),
        ("[]", "not valid"),
        ('{"base": "../policy", "gian": 2}', "gian"),
        ('{"base": "../policy", "gain": 0}', "gain"),
        ('{"base": "../policy", "gain": NaN}', "gain"),
        ('{"base": "../policy", "bias": "much"}', "bias"),
        ('{"base": "../nowhere"}', "nowhere"),
    ],
)
def test_a_bad_scale_file_is_named_with_its_key(tmp_path: Path, content: str, what: str) -> None:
    adapter = write_adapter(tmp_path / "adapter", write_policy(tmp_path / "policy"))
    (adapter / "tether_reward.json").write_text(content)
    error = refusal(adapter)
    assert what in error.message + error.violations[0].description


def _drop_weights(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()


def _truncate(adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])


def _pickle(adapter: Path) -> None:
    torch.save({}, adapter / "adapter_model.safetensors")


def _drop_head(adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: t for name, t in tensors.items() if "score" not in name}, adapter / "adapter_model.safetensors")


def _drop_layer(adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: t for name, t in tensors.items() if "layers.1" not in name}, adapter / "adapter_model.safetensors")


def _other_rank(adapter: Path) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 2}))


@pytest.mark.parametrize("damage", [_drop_weights, _truncate, _pickle, _drop_head, _drop_layer, _other_rank])
@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_a_damaged_adapter_is_refused(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    adapter = write_adapter(tmp_path / "adapter", write_policy(tmp_path / "policy"))
    damage(adapter)
    refusal(adapter)


def test_a_model_without_a_reward_head_is_refused(tmp_path: Path) -> None:
    assert "2 outputs" in refusal(write_policy(tmp_path / "policy")).message
    assert "lacks weights" in refusal(write_policy(tmp_path / "one", num_labels=1)).message


def test_a_classifier_with_several_outputs_is_refused(tmp_path: Path) -> None:
    assert "3 outputs" in refusal(write_classifier(tmp_path / "three", num_labels=3)).message


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16, num_labels=1
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    assert "no `score` head" in refusal(tmp_path).message


def test_a_head_that_gives_no_numbers_is_refused_at_start(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    tensors["score.weight"] = tensors["score.weight"] * float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "not numbers" in refusal(folder).message
