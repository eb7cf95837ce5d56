"""A written reward model as the service reads it: where a text ends for it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.unit.reward_inputs import labelled_config, reward_config, write_ranked_pairs
from tests.unit.stage_inputs import write_base
from tether_services.recipes.data.reading import read_rankings
from tether_services.recipes.data.rendering import Renderer
from tether_services.recipes.rankings import encode_rankings
from tether_services.recipes.reward_model import run_reward_model
from tether_services.reward.config import RewardSettings
from tether_services.reward.engines.transformers import TransformersRewardEngine, read_scale
from tether_services.reward.items import ItemReader, ScoreInput
from tether_services.runtime.text import HfCodec

BRIEF = {"max_steps": 2}
TURNED = "{% for m in messages %}{{ m.content + '<|turn|>' }}{% endfor %}"


def served_scores(folder: Path, items: list[ScoreInput]) -> list[float]:
    """Return what the engine of the service says of items as its reader reads them, on the raw scale."""

    async def main() -> list[float]:
        engine = TransformersRewardEngine(str(folder), RewardSettings(model=str(folder)), field="model")
        try:
            await engine.start()
            found = engine.description
            reader = ItemReader(
                codec=found.codec,
                reads_text=False,
                reads_tokens=True,
                vocab_size=found.vocab_size,
                max_model_len=found.max_model_len,
                max_text_chars=1000,
                ends_text=found.ends_text,
            )
            scores = await engine.score([reader.prepare(item).task for item in items])
            return [score for score in scores if isinstance(score, float)]
        finally:
            await engine.close()

    return asyncio.run(main())


def test_a_text_is_scored_as_the_ended_token_ids_of_the_training(tmp_path: Path) -> None:
    config = reward_config(tmp_path, tmp_path / "out", training=BRIEF)
    folder = run_reward_model(config)
    item = max(read_rankings(config.data).train, key=lambda ranking: len(ranking.answers))
    (row,) = encode_rankings([item], Renderer(AutoTokenizer.from_pretrained(config.base)), config).rows
    texts = [ScoreInput(prompt=str(item.prompt), response=answer) for answer in item.answers]
    ended = [ScoreInput(response_token_ids=tuple(ids)) for ids in row["answer_ids"]]
    cut = [ScoreInput(response_token_ids=tuple(ids[:-1])) for ids in row["answer_ids"]]
    assert len(texts) == len(ended) > 2
    assert served_scores(folder, texts) == pytest.approx(served_scores(folder, ended), abs=1e-5)
    assert served_scores(folder, texts) != pytest.approx(served_scores(folder, cut), abs=1e-2)


def test_labelled_texts_which_end_half_of_the_time_are_not_ended_by_the_service(tmp_path: Path) -> None:
    folder = run_reward_model(labelled_config(tmp_path, tmp_path / "out", training=BRIEF))
    assert read_scale(folder, field="model").ends_text is False
    text, plain = ScoreInput(response="A good film."), HfCodec(folder, field="model")
    ids = ScoreInput(response_token_ids=tuple(plain.encode("A good film.", add_special_tokens=True)))
    assert served_scores(folder, [text]) == pytest.approx(served_scores(folder, [ids]), abs=1e-5)


def test_answers_that_end_with_another_token_than_the_service_s_are_not_ended_by_it(tmp_path: Path) -> None:
    base = tmp_path / "chat"
    tokenizer = AutoTokenizer.from_pretrained(write_base(tmp_path / "plain"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    tokenizer.chat_template = TURNED
    write_base(base, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(base)
    data = {"sources": [str(write_ranked_pairs(tmp_path / "pairs.jsonl", count=60))], "validation_fraction": 0.2}
    config = reward_config(tmp_path, tmp_path / "out", base=str(base), data=data, template="chat", training=BRIEF)
    folder = run_reward_model(config)
    assert json.loads((folder / "tether_reward.json").read_text())["ends_text"] is False
