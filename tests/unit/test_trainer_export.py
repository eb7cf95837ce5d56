from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.unit.tiny_llama import new_trainer, random_samples, score_samples, write_tiny_llama
from tether.errors import FailedPreconditionError
from tether_services.orchestrator.trainer import Trainer
from tether_services.runtime.content_hash import hash_model_folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def trained(base: Path) -> Trainer:
    trainer = new_trainer(base)
    trainer.update(score_samples(trainer, random_samples(12)))
    return trainer


def test_the_exported_adapter_loaded_by_peft_is_the_policy(base: Path, trained: Trainer, tmp_path: Path) -> None:
    exported = trained.export_adapter(tmp_path / "1", policy_version=1)
    policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), exported.directory).eval()
    probes = random_samples(4)
    for sample, expected in zip(probes, trained.probe_logprobs(probes), strict=True):
        text = torch.tensor([[*sample.prompt_token_ids, *sample.response_token_ids]])
        first = len(sample.prompt_token_ids)
        with torch.no_grad():
            logprobs = policy(input_ids=text).logits[0, first - 1 : -1].log_softmax(-1)
        got = logprobs.gather(-1, text[0, first:, None]).squeeze(-1)
        assert got.tolist() == pytest.approx(expected, abs=1e-5)


def test_names_and_tensors_are_those_that_peft_itself_would_write(trained: Trainer, tmp_path: Path) -> None:
    trained.export_adapter(tmp_path / "1", policy_version=1)
    written = load_file(tmp_path / "1" / "adapter_model.safetensors")
    expected = get_peft_model_state_dict(trained._model._peft, adapter_name="policy")
    assert written.keys() == expected.keys()
    assert all(written[name].equal(expected[name]) for name in written)
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in written
    assert len(written) == 2 * 7 * 2


def test_the_configuration_is_plain_and_names_no_path(trained: Trainer, base: Path, tmp_path: Path) -> None:
    trained.export_adapter(tmp_path / "1", policy_version=1)
    text = (tmp_path / "1" / "adapter_config.json").read_text()
    config = json.loads(text)
    assert (config["r"], config["lora_alpha"], config["bias"]) == (4, 8, "none")
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert config["modules_to_save"] is None
    assert not config["use_dora"]
    assert "/" not in text


def test_the_manifest_tells_the_truth_about_the_files(trained: Trainer, base: Path, tmp_path: Path) -> None:
    exported = trained.export_adapter(tmp_path / "7", policy_version=7)
    assert {f.name for f in exported.files} == {p.name for p in (tmp_path / "7").iterdir()}
    for file in exported.files:
        content = (exported.directory / file.name).read_bytes()
        assert (file.size_bytes, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert (exported.policy_version, exported.rank, exported.alpha) == (7, 4, 8)
    assert exported.base_sha256 == hash_model_folder(base)


def test_an_untrained_adapter_is_the_identity_and_a_trained_one_is_not(
    trained: Trainer, base: Path, tmp_path: Path
) -> None:
    assert new_trainer(base).export_adapter(tmp_path / "0", policy_version=1).is_identity
    assert not trained.export_adapter(tmp_path / "1", policy_version=1).is_identity


def test_equal_weights_have_equal_hashes_whatever_the_version(trained: Trainer, tmp_path: Path) -> None:
    one, two = (trained.export_adapter(tmp_path / str(v), policy_version=v) for v in (1, 2))
    assert one.files == two.files


def test_a_repeated_export_is_a_no_op_and_another_content_is_refused(
    trained: Trainer, base: Path, tmp_path: Path
) -> None:
    first = trained.export_adapter(tmp_path / "1", policy_version=1)
    assert trained.export_adapter(tmp_path / "1", policy_version=1) == first
    with pytest.raises(FailedPreconditionError, match="exists with other content"):
        new_trainer(base).export_adapter(tmp_path / "1", policy_version=1)


def test_weights_that_are_not_finite_are_not_exported(base: Path, tmp_path: Path) -> None:
    trainer = new_trainer(base)
    with torch.no_grad():
        next(iter(trainer._model.adapter_parameters("policy").values()))[0, 0] = math.inf
    with pytest.raises(FailedPreconditionError, match="not finite"):
        trainer.export_adapter(tmp_path / "1", policy_version=1)
    assert list(tmp_path.iterdir()) == []
