"""`tether adapter push`: a trained adapter in a real generator, proven and served."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e.service_process import service_process
from tests.rpc.adapter_files import write_peft_adapter
from tests.rpc.run_services import write_tiny_policy
from tests.unit.preference_inputs import dpo_config
from tether import AdapterClient, GeneratorClient, SamplingParams
from tether.adapter import ActiveAdapter, Adapter
from tether.errors import FailedPreconditionError, InvalidArgumentError, UnavailableError
from tether_services.cli.main import main
from tether_services.local.ports import free_ports
from tether_services.recipes.dpo import run_dpo

pytestmark = pytest.mark.slow

PACKAGED_POLICY = Path(__file__).parents[2] / "services/tether_services/demo/models/policy"
PROMPT = "One day a little dog"


@pytest.fixture(scope="module")
def generator() -> Iterator[dict[str, str]]:
    with service_process("generator", PACKAGED_POLICY) as addresses:
        yield addresses


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of a few steps of preference training on the packaged policy, which prefers sad cats."""
    folder = tmp_path_factory.mktemp("trained")
    rows = [
        {"prompt": f"{start} a little {who}", "chosen": " was so sad that it cried.", "rejected": " was very happy."}
        for start in ("One day", "Once upon a time", "In the morning", "At night", "Then", "Long ago")
        for who in ("dog", "cat", "bird", "girl", "boy", "fox")
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"sources": [str(folder / "pairs.jsonl")]}
    return run_dpo(dpo_config(folder, base=str(PACKAGED_POLICY), data=data, max_tokens=64, training={"num_epochs": 3}))


def push(addresses: dict[str, str], folder: Path, *options: str) -> int:
    return main(["adapter", "push", str(folder), "--address", addresses["admin_address"], *options])


def stored(addresses: dict[str, str], run_id: str) -> list[Adapter]:
    async def ask() -> tuple[Adapter, ...]:
        async with AdapterClient(addresses["admin_address"]) as client:
            return await client.list_adapters()

    return [found for found in asyncio.run(ask()) if found.run_id == run_id]


def active(addresses: dict[str, str]) -> tuple[str, int]:
    async def ask() -> ActiveAdapter:
        async with AdapterClient(addresses["admin_address"]) as client:
            return await client.get_active_adapter()

    found = asyncio.run(ask())
    return found.run_id, found.policy_version


def generated(addresses: dict[str, str], *, policy_version: int | None = None) -> list[int]:
    """Return the greedy continuation that the generator gives."""

    async def ask() -> list[int]:
        async with GeneratorClient(addresses["address"]) as client:
            sampling = SamplingParams(max_tokens=20, temperature=0.0)
            result = await client.generate(PROMPT, sampling=sampling, policy_version=policy_version)
            return list(result.completions[0].token_ids)

    return asyncio.run(ask())


def continued(model: torch.nn.Module) -> list[int]:
    """Return the greedy continuation that the libraries give."""
    ids = torch.tensor([AutoTokenizer.from_pretrained(PACKAGED_POLICY)(PROMPT)["input_ids"]])
    with torch.no_grad():
        whole = model.generate(input_ids=ids, max_new_tokens=20, do_sample=False)  # type: ignore[operator]
    row: list[int] = whole[0, ids.shape[1] :].tolist()
    return row


def test_a_pushed_adapter_is_served_as_the_libraries_compute_it(generator: dict[str, str], adapter: Path) -> None:
    command = [sys.executable, "-m", "tether_services", "adapter", "push", str(adapter)]
    done = subprocess.run(
        [*command, "--address", generator["admin_address"]], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "1\n"
    assert "pushed as version 1 of run pushed" in done.stderr and "active; the base model was" in done.stderr
    assert active(generator) == ("pushed", 1)
    base = AutoModelForCausalLM.from_pretrained(PACKAGED_POLICY, dtype=torch.float32).eval()
    of_base = continued(base)
    of_adapter = continued(PeftModel.from_pretrained(base, str(adapter)).eval())
    assert generated(generator) == generated(generator, policy_version=1) == of_adapter != of_base
    assert generated(generator, policy_version=0) == of_base


def test_the_same_adapter_again_is_the_same_version_and_another_one_the_next(
    generator: dict[str, str], adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_peft_adapter(PACKAGED_POLICY, tmp_path / "other", seed=3)
    options = ("--run-id", "again", "--base", str(PACKAGED_POLICY))
    for folder in (adapter, adapter, other):
        assert push(generator, folder, *options) == 0
    assert capsys.readouterr().out.split() == ["1", "1", "2"]
    assert [found.policy_version for found in stored(generator, "again")] == [1, 2]
    assert active(generator) == ("again", 2)


def test_without_activation_the_same_is_served_as_before(
    generator: dict[str, str], adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = active(generator)
    assert push(generator, adapter, "--run-id", "quiet", "--policy-version", "7", "--no-activate") == 0
    assert active(generator) == before
    assert [(found.policy_version, found.state) for found in stored(generator, "quiet")] == [(7, "loaded")]
    captured = capsys.readouterr()
    assert captured.out == "7\n" and "active" not in captured.err


def test_an_adapter_of_another_base_is_refused_with_the_field(
    generator: dict[str, str], adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(PACKAGED_POLICY, base)
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | {"rope_theta": 12345.0}))
    assert push(generator, adapter, "--run-id", "wrong", "--base", str(base), "--take") == 1
    shown = capsys.readouterr().err
    assert "WRONG_BASE_MODEL" in shown and "base_model_sha256" in shown
    assert stored(generator, "wrong") == []


def test_a_changed_file_is_refused_because_the_proof_fails(
    generator: dict[str, str], adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """lora_alpha at 32 pushes one scale while the proof, computed from alpha 8 here, speaks of another."""
    from tether_services.cli import adapter_commands

    folder = tmp_path / "changed"
    shutil.copytree(adapter, folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 32}))
    probes = adapter_commands.compute_probes(PACKAGED_POLICY, adapter)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter_commands, "compute_probes", lambda base, folder: probes)
        code = push(generator, folder, "--run-id", "changed", "--base", str(PACKAGED_POLICY), "--no-activate")
    assert code == 1 and "PROOF_FAILED" in capsys.readouterr().err
    assert stored(generator, "changed") == []


def test_an_adapter_that_changes_nothing_yet_can_be_pushed(generator: dict[str, str], tmp_path: Path) -> None:
    folder = write_peft_adapter(PACKAGED_POLICY, tmp_path / "fresh", seed=0, scale=0.0)
    assert push(generator, folder, "--run-id", "fresh", "--no-activate") == 0
    assert len(stored(generator, "fresh")) == 1


def test_a_generator_that_is_not_there_is_named_before_a_model_is_loaded(adapter: Path) -> None:
    (port,) = free_ports(1)
    with pytest.raises(UnavailableError, match=str(port)):
        main_without_report(["adapter", "push", str(adapter), "--address", f"127.0.0.1:{port}", "--base", "/nowhere"])


def main_without_report(arguments: list[str]) -> int:
    """Run the command and let its error out."""
    from tether_services.cli.main import build_parser

    known = build_parser().parse_args(arguments)
    code: int = known.run(known)
    return code


def test_a_base_of_another_shape_is_refused_here(generator: dict[str, str], adapter: Path, tmp_path: Path) -> None:
    tiny = write_tiny_policy(tmp_path / "tiny")
    arguments = [
        "adapter",
        "push",
        str(adapter),
        "--address",
        generator["admin_address"],
        "--base",
        str(tiny),
        "--take",
    ]
    with pytest.raises((InvalidArgumentError, FailedPreconditionError)) as caught:
        main_without_report(arguments)
    assert [violation.field for violation in caught.value.violations] == ["base"]
