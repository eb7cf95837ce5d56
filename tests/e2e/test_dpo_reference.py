"""The preference stage asks a real reference service, and ends like one that asked nobody."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, asynccontextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.e2e.service_process import service_process
from tests.rpc.run_services import write_tiny_policy
from tests.rpc.scripted_server import in_thread
from tests.rpc.serving import LOCAL, serving
from tests.unit.preference_inputs import dpo_config, write_pairs, write_rankings
from tests.unit.test_dpo import built, sequence_logprob
from tether.errors import FailedPreconditionError, InvalidArgumentError, UnavailableError
from tether_services.local.ports import free_ports
from tether_services.recipes.dpo import run_dpo
from tether_services.recipes.pairs import completions_of
from tether_services.recipes.reference_logprobs import ask_service, completion_logprobs
from tether_services.recipes.stage import Mode
from tether_services.reference.config import ReferenceSettings
from tether_services.reference.service import ReferenceService

pytestmark = pytest.mark.slow

TOML = """
output = "{output}"
base = "{base}"
reference = "{reference}"
max_tokens = 32
threads = 1
device = "cpu"
lora = {{ rank = 4, alpha = 8 }}
data = {{ sources = ["{source}"], validation_fraction = 0.25 }}

[training]
learning_rate = 0.005
num_epochs = 5
rows_per_step = 8
micro_batch_rows = 4
checkpoint_every = 1
eval_every = 5
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_policy(tmp_path_factory.mktemp("served") / "base")


@pytest.fixture(scope="module")
def reference(base: Path) -> Iterator[dict[str, str]]:
    with service_process("reference", base, "max_items=7") as addresses:
        yield addresses


def num_calls(addresses: dict[str, str]) -> float:
    """Return how many times the service has been asked for log-probabilities."""
    with urlopen(f"http://{addresses['metrics_address']}/metrics", timeout=10) as page:
        lines = page.read().decode().splitlines()
    found = [line for line in lines if "ComputeLogprobs" in line and "requests_total" in line]
    assert found, [line for line in lines if "ComputeLogprobs" in line]
    return sum(float(line.rsplit(" ", 1)[1]) for line in found)


def serve_in_thread(base: Path, **changes: object) -> AbstractContextManager[str]:
    settings = ReferenceSettings.model_validate({**LOCAL, "model": str(base), **changes})

    @asynccontextmanager
    async def serve() -> AsyncIterator[str]:
        async with serving(settings, lambda registry: ReferenceService(settings, registry)) as served:
            yield served.target

    return in_thread(serve)


@pytest.mark.parametrize("rank", [4, 0])
def test_the_service_and_the_model_here_train_the_same_weights(
    tmp_path: Path, base: Path, reference: dict[str, str], rank: int
) -> None:
    data = {"sources": [str(write_rankings(tmp_path / "rankings.jsonl", count=16))]}
    before = num_calls(reference)
    folders = {
        name: run_dpo(
            dpo_config(
                tmp_path,
                base=str(base),
                data=data,
                output=tmp_path / name,
                reference=address,
                lora={"rank": rank, "alpha": 8},
                training={"learning_rate": 0.001},
            )
        )
        for name, address in (("served", reference["address"]), ("here", ""))
    }
    num_answers = 16 // 3 * 12 + 3
    assert num_calls(reference) - before == -(-num_answers // 7), "each answer once, 7 in a call"
    name = "adapter_model.safetensors" if rank else "model.safetensors"
    served, here = (load_file(folders[kind] / name) for kind in ("served", "here"))
    assert served.keys() == here.keys()
    for key in here:
        torch.testing.assert_close(served[key], here[key], rtol=0, atol=1e-5)
    first, second = (json.loads((folder / "manifest.json").read_text())["metrics"] for folder in folders.values())
    assert first == pytest.approx(second, abs=1e-4)


def test_the_numbers_of_the_service_are_those_computed_here_and_those_of_a_plain_forward(
    tmp_path: Path, base: Path, reference: dict[str, str]
) -> None:
    config = dpo_config(tmp_path, base=str(base))
    trainer, pairs, _ = built(base, config, work=tmp_path / "work", is_trained=False)
    items = completions_of(pairs.pairs)
    served = ask_service(reference["address"], items)
    assert len(served) > 50
    assert served == pytest.approx(completion_logprobs(trainer, items, title="here"), abs=1e-4)
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    assert served == pytest.approx([sequence_logprob(model, item, mean=False) for item in items], abs=1e-4)


def test_a_killed_run_goes_on_without_the_service_and_ends_the_same(tmp_path: Path, base: Path) -> None:
    write_pairs(tmp_path / "pairs.jsonl")
    with serve_in_thread(base) as address:
        for name in ("whole", "killed"):
            text = TOML.format(output=tmp_path / name, base=base, reference=address, source=tmp_path / "pairs.jsonl")
            (tmp_path / f"{name}.toml").write_text(text)
        command = [sys.executable, "-m", "tether_services", "train", "dpo", "--config"]
        done = subprocess.run([*command, str(tmp_path / "whole.toml")], capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == str(tmp_path / "whole")
        kill_after_checkpoint([*command, str(tmp_path / "killed.toml")], tmp_path / "killed")
    resumed = [*command, str(tmp_path / "killed.toml"), "--resume"]
    done = subprocess.run(resumed, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    for name in ("adapter_model.safetensors", "history.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    metrics = [json.loads((tmp_path / name / "manifest.json").read_text())["metrics"] for name in ("whole", "killed")]
    assert metrics[0] == metrics[1]


def kill_after_checkpoint(command: list[str], output: Path) -> None:
    """Run until the second checkpoint is complete, then kill."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 200
        while not (output / "checkpoints" / "checkpoint-2" / "complete").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert (output / "checkpoints" / "reference.json").is_file()


def test_a_service_with_another_model_is_refused_before_anything_is_read(
    tmp_path: Path, reference: dict[str, str]
) -> None:
    other = write_tiny_policy(tmp_path / "other", seed=5)
    data = {"sources": [str(tmp_path / "there-is-no-such-file.jsonl")]}
    with pytest.raises(FailedPreconditionError, match="point both at the same folder") as caught:
        run_dpo(dpo_config(tmp_path, base=str(other), data=data, reference=reference["address"]))
    assert caught.value.reason == "BASE_MISMATCH"
    assert [violation.field for violation in caught.value.violations] == ["reference"]


def test_a_dry_run_checks_the_service_and_asks_it_nothing(
    tmp_path: Path, base: Path, reference: dict[str, str]
) -> None:
    before = num_calls(reference)
    config = dpo_config(tmp_path, base=str(base), reference=reference["address"])
    run_dpo(config, Mode(dry_run=True))
    assert num_calls(reference) == before
    other = write_tiny_policy(tmp_path / "other", seed=5)
    with pytest.raises(FailedPreconditionError):
        run_dpo(config.model_copy(update={"base": str(other)}), Mode(dry_run=True))


def test_a_service_in_another_precision_is_refused(tmp_path: Path, base: Path) -> None:
    with (
        serve_in_thread(base, dtype="bfloat16") as address,
        pytest.raises(FailedPreconditionError, match="same dtype") as caught,
    ):
        run_dpo(dpo_config(tmp_path, base=str(base), reference=address))
    assert caught.value.reason == "REFERENCE_DIFFERS"


def test_rows_that_the_service_cannot_read_are_refused_by_the_name_of_the_setting(tmp_path: Path, base: Path) -> None:
    with serve_in_thread(base, max_model_len=16) as address, pytest.raises(InvalidArgumentError) as caught:
        run_dpo(dpo_config(tmp_path, base=str(base), reference=address, max_tokens=32))
    assert [violation.field for violation in caught.value.violations] == ["max_tokens"]


def test_a_service_that_is_not_there_is_named(tmp_path: Path, base: Path) -> None:
    (port,) = free_ports(1)
    with pytest.raises(UnavailableError, match=str(port)):
        run_dpo(dpo_config(tmp_path, base=str(base), reference=f"127.0.0.1:{port}"))
