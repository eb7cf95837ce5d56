"""`tether adapter push` before it reaches a generator: which folder, which base, which proofs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.rpc.adapter_files import write_peft_adapter
from tests.rpc.run_services import write_tiny_policy
from tether.errors import InvalidArgumentError
from tether_services.cli.adapter_commands import PROBE_TEXTS, PROBE_TOKENS, compute_probes, find_base
from tether_services.cli.main import main


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_policy(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return write_peft_adapter(base, base.parent / "runs" / "adapter", seed=1)


def field_of(error: InvalidArgumentError) -> list[str]:
    return [violation.field for violation in error.violations]


def test_a_relative_base_begins_at_the_adapter(base: Path, adapter: Path) -> None:
    assert find_base(adapter, {"base_model_name_or_path": "../../base"}, given=None) == base.resolve()


def test_an_absolute_base_is_found(base: Path, adapter: Path) -> None:
    assert find_base(adapter, {"base_model_name_or_path": str(base)}, given=None) == base.resolve()


def test_a_given_base_goes_before_the_one_that_the_adapter_names(base: Path, adapter: Path) -> None:
    assert find_base(adapter, {"base_model_name_or_path": "nowhere"}, given=str(base)) == base.resolve()


@pytest.mark.parametrize("named", ["base", "", None, "../gone", "/nowhere/at/all"])
def test_a_base_that_is_not_here_has_to_be_given(adapter: Path, named: str | None) -> None:
    with pytest.raises(InvalidArgumentError, match="give the base with --base") as caught:
        find_base(adapter, {"base_model_name_or_path": named}, given=None)
    assert field_of(caught.value) == ["base"]


def test_a_given_base_that_is_not_there_is_refused(adapter: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="nowhere") as caught:
        find_base(adapter, {}, given="/nowhere")
    assert field_of(caught.value) == ["base"]


def test_the_proofs_are_log_probabilities_of_base_and_adapter_together(base: Path, adapter: Path) -> None:
    probes = compute_probes(base, adapter)
    assert len(probes) == len(PROBE_TEXTS)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).eval()
    for probe in probes:
        assert 2 <= len(probe.token_ids) <= PROBE_TOKENS
        with torch.no_grad():
            table = torch.log_softmax(model(torch.tensor([probe.token_ids])).logits[0].double(), -1)
        expected = [float(table[place, token]) for place, token in enumerate(probe.token_ids[1:])]
        assert list(probe.logprobs) == pytest.approx(expected, abs=1e-5)
        with torch.no_grad(), model.disable_adapter():
            table = torch.log_softmax(model(torch.tensor([probe.token_ids])).logits[0].double(), -1)
        expected = [float(table[place, token]) for place, token in enumerate(probe.token_ids[1:])]
        assert list(probe.base_logprobs) == pytest.approx(expected, abs=1e-5)
        assert list(probe.base_logprobs) != pytest.approx(list(probe.logprobs), abs=1e-3)


def test_proofs_without_a_tokenizer_name_the_base(base: Path, adapter: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(bare)
    with pytest.raises(InvalidArgumentError) as caught:
        compute_probes(bare, adapter)
    assert field_of(caught.value) == ["base"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no adapter_config.json and no adapter_model.safetensors"),
        ({"adapter_config.json": "{}"}, "no adapter_model.safetensors"),
        ({"adapter_config.json": "{}", "adapter_model.bin": ""}, "no adapter_model.safetensors"),
        ({"adapter_config.json": "{", "adapter_model.safetensors": ""}, "not JSON"),
        ({"adapter_config.json": "[]", "adapter_model.safetensors": ""}, "LoRA"),
        ({"adapter_config.json": json.dumps({"peft_type": "IA3"}), "adapter_model.safetensors": ""}, "LoRA"),
    ],
)
def test_a_folder_that_is_no_lora_adapter_is_refused(
    tmp_path: Path, files: dict[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert main(["adapter", "push", str(tmp_path)]) == 1
    shown = capsys.readouterr().err
    assert message in shown and "folder" in shown


@pytest.mark.parametrize("version", ["0", "-1"])
def test_a_version_below_1_is_refused_and_not_replaced(
    adapter: Path, version: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapter", "push", str(adapter), f"--policy-version={version}"]) == 1
    shown = capsys.readouterr().err
    assert f"{version} is no version" in shown and "policy_version" in shown


def test_help_says_what_is_pushed_proven_and_activated(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["adapter", "push", "--help"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for part in ("FOLDER", "--address", "--base", "--run-id", "--policy-version", "--no-activate", "proves it"):
        assert part in shown
