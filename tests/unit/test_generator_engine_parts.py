"""What surrounds the real engines: model files, the guard of child processes, the zero adapter, vLLM's arguments."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from tests.unit.tiny_llama import VOCAB_SIZE, write_tiny_llama
from tether.errors import InvalidArgumentError
from tether_services.generator.config import GeneratorSettings
from tether_services.generator.engine import Sampling
from tether_services.generator.engines import model_files
from tether_services.generator.engines.zero_adapter import write_zero_adapter
from tether_services.runtime.content_hash import hash_model_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("llama"))


def settings(model: Path, **changes: object) -> GeneratorSettings:
    return GeneratorSettings.model_validate({"model": str(model), **changes})


def test_facts_of_a_model_are_read_from_its_folder(folder: Path) -> None:
    files = model_files.read_model_files(settings(folder), on_gpu=False)
    assert (files.folder, files.sha256) == (folder.resolve(), hash_model_folder(folder))
    assert (files.max_model_len, files.dtype, files.stop_token_ids) == (64, "float32", (2,))
    assert model_files.read_model_files(settings(folder), on_gpu=True).dtype == "bfloat16"
    assert model_files.read_model_files(settings(folder, dtype="float16"), on_gpu=True).dtype == "float16"
    assert model_files.read_model_files(settings(folder, max_model_len=10), on_gpu=False).max_model_len == 10


def test_malformed_files_of_a_model_name_the_setting(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        broken = shutil.copytree(folder, tmp_path / name)
        (broken / name).write_text("[", encoding="utf-8")
        with pytest.raises(InvalidArgumentError) as caught:
            model_files.read_model_files(settings(broken), on_gpu=False)
        assert caught.value.violations[0].field == "model"


def test_context_longer_than_the_models_is_refused(folder: Path) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        model_files.read_model_files(settings(folder, max_model_len=65), on_gpu=False)
    assert caught.value.violations[0].field == "max_model_len"


@pytest.mark.parametrize(("listed", "expected"), [(7, (7,)), ([2, 1], (2, 1)), (None, (5,))])
def test_stop_ids_come_from_the_generation_config(tmp_path: Path, listed: object, expected: tuple[int, ...]) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
    assert model_files.read_stop_token_ids(tmp_path, 5) == expected


def test_stop_ids_fall_back_to_the_model_config(tmp_path: Path) -> None:
    assert model_files.read_stop_token_ids(tmp_path, [3, 4]) == (3, 4)
    assert model_files.read_stop_token_ids(tmp_path, None) == ()


def test_linear_layers_are_found_without_weights_and_without_the_output_layer(folder: Path) -> None:
    files = model_files.read_model_files(settings(folder), on_gpu=False)
    shapes = model_files.read_linear_shapes(files)
    assert len(shapes) == 2 * 7
    assert shapes["model.layers.0.self_attn.k_proj"] == (32, 16)
    assert shapes["model.layers.1.mlp.down_proj"] == (48, 32)
    assert not any("lm_head" in path for path in shapes)
    description = model_files.describe_model(files, settings(folder), shapes)
    assert (description.vocab_size, description.base_model) == (VOCAB_SIZE, folder.name)


def test_nan_logprobs_are_a_failure() -> None:
    assert model_files.check_logprobs([-1.0]) == [-1.0]
    with pytest.raises(FloatingPointError):
        model_files.check_logprobs([-1.0, float("nan")])


def test_zero_adapter_changes_nothing(folder: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    files = model_files.read_model_files(settings(folder), on_gpu=False)
    adapter = write_zero_adapter(model_files.read_linear_shapes(files))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([[1, 5, 9, 7]])
    with torch.no_grad():
        before = model(ids).logits
        after = PeftModel.from_pretrained(model, str(adapter.folder))(input_ids=ids).logits
    assert torch.equal(before, after)
    shutil.rmtree(adapter.folder)


PARENT = """
import subprocess, sys, time
sys.path.insert(0, {services!r})
from tether_services.generator.engines.orphans import OrphanGuard
guard = OrphanGuard()
child = subprocess.Popen([sys.executable, "-c", "import subprocess, sys, time;"
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); time.sleep(600)"])
time.sleep(0.5)
guard.started()
print("ready", flush=True)
if sys.stdin.readline() == "stop\\n":
    guard.stop()
    print("stopped", flush=True)
    time.sleep(600)
"""


def start_parent() -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """A process with a child and a grandchild, under guard, and all its descendants."""
    services = str(Path(model_files.__file__).parents[3])
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.format(services=services)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "ready\n"
    until = time.monotonic() + 10
    while len(found := psutil.Process(parent.pid).children(recursive=True)) < 3 and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.3)
    return parent, found


def close(parent: subprocess.Popen[str]) -> None:
    parent.wait()
    for stream in (parent.stdin, parent.stdout):
        assert stream is not None
        stream.close()


def test_descendants_of_a_killed_process_are_killed() -> None:
    parent, found = start_parent()
    assert len(found) == 3  # child, grandchild, guard
    parent.kill()
    close(parent)
    _, alive = psutil.wait_procs(found, timeout=10)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


def test_guard_that_is_told_to_stop_kills_nothing() -> None:
    parent, found = start_parent()
    assert parent.stdin is not None and parent.stdout is not None
    parent.stdin.write("stop\n")
    parent.stdin.flush()
    assert parent.stdout.readline() == "stopped\n"
    left = psutil.Process(parent.pid).children(recursive=True)
    assert len(left) == 2
    for process in left:
        process.kill()
    parent.kill()
    close(parent)
    psutil.wait_procs(found, timeout=10)


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_arguments_of_vllm_are_the_safe_ones(folder: Path) -> None:
    from tether_services.generator.engines.vllm import engine_arguments

    given = settings(folder, engine="vllm", adapters={"max_rank": 9}, batch={"max_items": 10})
    files = model_files.read_model_files(given, on_gpu=False)
    arguments = engine_arguments(given, files, ["q_proj"], on_cpu=True)
    assert arguments["logprobs_mode"] == "processed_logprobs"
    assert arguments["max_lora_rank"] == 16
    assert arguments["max_num_seqs"] == 14
    assert arguments["max_cpu_loras"] >= arguments["max_loras"] >= 3
    assert arguments["lora_target_modules"] == ["q_proj"]
    assert (arguments["dtype"], arguments["gpu_memory_utilization"]) == ("float32", 0.2)
    assert arguments["trust_remote_code"] is False
    assert engine_arguments(given, files, [], on_cpu=False)["gpu_memory_utilization"] == 0.9


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.slow
def test_sampling_parameters_of_vllm_carry_every_field() -> None:
    from tether_services.generator.engines.vllm import sampling_params

    sampling = Sampling(7, temperature=0.5, top_p=0.9, top_k=3, stop=("x",), stop_token_ids=(4,), ignore_eos=True)
    params = sampling_params(sampling, seed=11)
    assert (params.n, params.max_tokens, params.temperature, params.top_p, params.top_k) == (1, 7, 0.5, 0.9, 3)
    assert (params.seed, params.stop, params.stop_token_ids, params.ignore_eos) == (11, ["x"], [4], True)
    assert (params.logprobs, params.detokenize) == (0, True)
    assert sampling_params(Sampling(1), seed=0).detokenize is False
