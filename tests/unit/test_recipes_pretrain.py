"""Pretraining on small text: blocks, loss, the written folder."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from tests.unit.recipe_inputs import SEPARATOR, pretrain_config
from tether.errors import InvalidArgumentError
from tether_services.recipes.documents import read_documents
from tether_services.recipes.pretrain import block_stream, held_out_loss, llama_config, residual_dropout, run_pretrain
from tether_services.recipes.tokenizer import encode_document, train_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that a run of about a second wrote, weights in float16."""
    return run_pretrain(pretrain_config(tmp_path_factory.mktemp("pretrain"), weights_dtype="float16"))


def manifest(folder: Path) -> Any:
    return json.loads((folder / "manifest.json").read_text())


def test_a_pass_makes_every_token_a_target_once() -> None:
    encoded = [[1, 5, 6, 2], [1, 7, 2], [1, 8, 9, 10, 11, 2]]
    blocks = list(islice(block_stream(encoded, block_tokens=4, generator=torch.Generator().manual_seed(0)), 3))
    assert {len(block) for block in blocks} == {5}
    targets = Counter(token for block in blocks for token in block[1:].tolist())
    assert targets == Counter(token for ids in encoded for token in ids) - Counter([1])  # the first id starts the pass


def test_a_block_is_text_without_gaps() -> None:
    blocks = block_stream([list(range(3, 50))], block_tokens=8, generator=torch.Generator().manual_seed(0))
    for block in islice(blocks, 5):
        assert block.tolist() == list(range(int(block[0]), int(block[0]) + 9))
        assert (int(block[0]) - 3) % 8 == 0


def test_blocks_of_a_long_document_do_not_come_in_a_row() -> None:
    book, stories = [7] * 4000, [[8] * 40] * 100
    blocks = islice(block_stream([book, *stories], block_tokens=40, generator=torch.Generator().manual_seed(0)), 199)
    kinds = [int(block[20]) for block in blocks]
    longest = max(len(list(group)) for _, group in groupby(kinds))
    assert longest < 20


def test_text_shorter_than_a_block_names_the_setting() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        next(block_stream([[1, 2, 3]], block_tokens=3, generator=torch.Generator()))
    assert caught.value.violations[0].field == "block_tokens"


def test_the_order_of_documents_changes_between_passes_and_follows_the_seed() -> None:
    encoded = [[index] for index in range(100)]

    def two_passes(seed: int) -> list[int]:
        stream = block_stream(encoded, block_tokens=1, generator=torch.Generator().manual_seed(seed))
        return [int(block[0]) for block in islice(stream, 198)]

    order = two_passes(1)
    assert len(set(order[:99])) == len(set(order[99:])) == 99
    assert order[:99] != order[99:]
    assert order == two_passes(1)
    assert order != two_passes(2)


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
    assert metrics["held_out_nats_per_token"] <= min(metrics["held_out_nats_per_token_by_step"].values()) + 0.01


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
    split = read_documents(config.text_files, separator=SEPARATOR, held_out_fraction=config.held_out_fraction)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    measured = held_out_loss(model, split.held_out, tokenizer=tokenizer, max_tokens=config.context_tokens)
    assert measured.nats_per_token == pytest.approx(manifest(folder)["metrics"]["held_out_nats_per_token"], abs=1e-4)


def test_the_files_can_be_read_by_other_users(folder: Path) -> None:
    assert {
        path.name: path.stat().st_mode & 0o444 for path in folder.iterdir() if path.stat().st_mode & 0o444 != 0o444
    } == {}


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    config = pretrain_config(tmp_path, num_steps=5)
    weights = [(run_pretrain(config) / "model.safetensors").read_bytes() for _ in range(2)]
    assert weights[0] == weights[1]


def test_a_tokenizer_can_be_used_again(folder: Path, tmp_path: Path) -> None:
    output = run_pretrain(pretrain_config(tmp_path, num_steps=2, warmup_steps=1, tokenizer=folder))
    assert (output / "tokenizer.json").read_text() == (folder / "tokenizer.json").read_text()


def test_the_model_has_no_dropout_and_tied_embeddings(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.attention_dropout == 0.0
    assert not [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]


def test_a_missing_text_file_stops_before_anything_is_written(tmp_path: Path) -> None:
    config = pretrain_config(tmp_path, text_files=(tmp_path / "absent.txt",))
    with pytest.raises(InvalidArgumentError) as caught:
        run_pretrain(config)
    assert caught.value.violations[0].field == "text_files"
    assert not config.output.exists()
