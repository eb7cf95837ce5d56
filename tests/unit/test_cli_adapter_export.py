"""`tether adapter export`: what it writes is loaded by transformers and PEFT and computes what the adapter does."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.rpc.adapter_files import write_peft_adapter
from tests.rpc.run_services import write_tiny_policy
from tests.unit.tiny_llama import write_tiny_llama
from tether.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError
from tether_services.cli.adapter_export import find_source
from tether_services.cli.main import main
from tether_services.orchestrator.ledger_schema import prepare
from tether_services.runtime.content_hash import hash_model_folder

IDS = torch.tensor([[1, 5, 9, 7, 3, 8, 2]])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_policy(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    folder = write_peft_adapter(base, base.parent / "adapter", seed=1)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "../base"}))
    return folder


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    values: torch.Tensor = model.eval()(input_ids=IDS).logits
    return values.float()


def adapted(base: Path, adapter: Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="float32"), str(adapter)))


def export(source: object, output: Path, *options: object) -> int:
    return main(["adapter", "export", str(source), str(output), *map(str, options)])


def test_an_exported_adapter_is_loaded_with_its_base_from_anywhere(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert export(adapter, Path("out")) == 0
    assert capsys.readouterr().out == "out\n"
    assert sorted(path.name for path in Path("out").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    monkeypatch.chdir("/")
    written = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32")
    assert torch.equal(logits(written), adapted(base, adapter))
    weights = "adapter_model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (adapter / weights).read_bytes()


def test_weights_of_another_type_are_written_where_that_is_wanted(adapter: Path, tmp_path: Path) -> None:
    assert export(adapter, tmp_path / "out", "--dtype", "bfloat16") == 0
    before = load_file(adapter / "adapter_model.safetensors")
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name].bfloat16()) for name in before)


def test_merged_weights_compute_what_base_and_adapter_do(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(adapter, tmp_path / "out", "--merged") == 0
    assert [line.split()[0] for line in capsys.readouterr().err.splitlines()][:2] == ["loading", "merging"]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32")
    wanted = adapted(base, adapter)
    assert (logits(merged) - wanted).abs().max() < 1e-5
    assert (logits(AutoModelForCausalLM.from_pretrained(base, dtype="float32")) - wanted).abs().max() > 1e-2
    text = "a b c, and then"
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (base, tmp_path / "out")]
    assert tokenizers[0](text).input_ids == tokenizers[1](text).input_ids
    assert not list(tmp_path.glob(".*")), "nothing is left beside it"
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in (tmp_path / "out").iterdir())


def test_merged_weights_have_the_type_that_is_wanted(adapter: Path, tmp_path: Path) -> None:
    assert export(adapter, tmp_path / "out", "--merged", "--dtype", "bfloat16") == 0
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize("options", [[], ["--merged"]])
@pytest.mark.parametrize("what", ["file", "folder"])
def test_nothing_is_written_over(
    adapter: Path, tmp_path: Path, options: list[str], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    output.mkdir() if what == "folder" else output.write_text("mine")
    assert export(adapter, output, *options) == 1
    assert "out is there already" in capsys.readouterr().err
    assert output.is_dir() or output.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_base_that_the_adapter_does_not_fit_leaves_nothing(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_tiny_llama(tmp_path / "other", hidden_size=48)
    assert export(adapter, tmp_path / "out", "--merged", "--base", other) == 1
    assert "other holds no tokenizer" in capsys.readouterr().err
    AutoTokenizer.from_pretrained(base).save_pretrained(other)
    assert export(adapter, tmp_path / "out", "--merged", "--base", other) == 1
    assert "does not fit the base" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


@pytest.fixture
def state_dir(base: Path, tmp_path: Path) -> Path:
    """A run of two committed steps, and a third version that was exported and never committed."""
    folder = tmp_path / "runs"
    hashes = {}
    for version in (1, 2, 3):
        made = write_peft_adapter(base, folder / f"demo/adapters/{version:06d}", seed=version)
        hashes[version] = hashlib.sha256((made / "adapter_model.safetensors").read_bytes()).hexdigest()
    config = f'model = "{base}"\nprompts = "prompts.txt"\ntotal_steps = 3\n[trainer]\nlearning_rate = 0.01\n'
    with closing(sqlite3.connect(folder / "ledger.sqlite", isolation_level=None)) as connection:
        prepare(connection, folder)
        connection.execute(
            "INSERT INTO runs (run_id, state, epoch, total_steps, create_time, config_toml, base_sha256)"
            " VALUES ('demo', 'RUNNING', 1, 3, 0, ?, ?)",
            (config, hash_model_folder(base)),
        )
        for step in (0, 1):
            connection.execute(
                "INSERT INTO steps (run_id, step, epoch, policy_version, metrics, distributions, commit_time,"
                " adapter_sha256, new_version) VALUES ('demo', ?, 1, ?, '{}', '{}', 0, ?, ?)",
                (step, step, hashes[step + 1], step + 1),
            )
    return folder


def test_the_last_committed_version_of_a_run_is_exported_with_the_base_of_the_run(
    base: Path, state_dir: Path, tmp_path: Path
) -> None:
    assert export("demo", tmp_path / "last", "--state-dir", state_dir) == 0
    assert export("demo@1", tmp_path / "first", "--state-dir", state_dir, "--merged") == 0
    last = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "last", dtype="float32")
    assert torch.equal(logits(last), adapted(base, state_dir / "demo/adapters/000002"))
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "first", dtype="float32")
    assert (logits(first) - adapted(base, state_dir / "demo/adapters/000001")).abs().max() < 1e-5


def test_versions_that_no_committed_step_has_made_are_refused(state_dir: Path) -> None:
    with pytest.raises(FailedPreconditionError, match="not what a committed step has made") as caught:
        find_source("demo@3", state_dir)
    assert caught.value.reason == "ADAPTER_NOT_COMMITTED"
    with pytest.raises(NotFoundError, match="version 7 is not kept; 1, 2, 3 are"):
        find_source("demo@7", state_dir)


def test_an_adapter_with_a_flipped_bit_is_refused_and_not_replaced_by_an_older_one(state_dir: Path) -> None:
    weights = state_dir / "demo/adapters/000002/adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 4
    weights.write_bytes(content)
    for source in ("demo", "demo@2"):
        with pytest.raises(FailedPreconditionError) as caught:
            find_source(source, state_dir)
        assert caught.value.reason == "ADAPTER_NOT_COMMITTED"


@pytest.mark.parametrize("source", ["nowhere", "demo@", "demo@last", "demo@-1", "other"])
def test_what_is_neither_a_folder_nor_a_run_is_refused(state_dir: Path, source: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        find_source(source, state_dir)
    assert [violation.field for violation in caught.value.violations] == ["source"]


def test_without_runs_the_message_names_the_option(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="--state-dir"):
        find_source("demo", tmp_path)


@pytest.mark.parametrize("name", ["runs#1", "a%41b", "q?mode=rwc", "r%zz&x"])
def test_a_state_folder_may_have_any_name(state_dir: Path, name: str) -> None:
    state_dir.rename(state_dir.parent / name)
    before = sorted(state_dir.parent.rglob("*"))
    found = find_source("demo", state_dir.parent / name)
    assert found.folder == state_dir.parent / name / "demo/adapters/000002"
    after = [path for path in state_dir.parent.rglob("*") if not path.name.endswith(("-wal", "-shm"))]
    assert sorted(after) == before, "nothing is made beside it"


def test_a_ledger_that_cannot_be_opened_is_named(state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_file", lambda path: path.name == "ledger.sqlite")
    with pytest.raises(FailedPreconditionError, match=r"gone/ledger\.sqlite cannot be read") as caught:
        find_source("demo", state_dir / "gone")
    assert caught.value.reason == "LEDGER_UNREADABLE"


def test_another_base_than_that_of_the_run_is_refused(
    state_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_tiny_llama(tmp_path / "other", hidden_size=48)
    assert export("demo", tmp_path / "out", "--state-dir", state_dir, "--base", other) == 1
    assert "WRONG_BASE_MODEL" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


ASK_VLLM = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
base, merged, adapter, ids = json.loads(sys.argv[1])
common = dict(dtype="float32", enforce_eager=True, max_model_len=32, gpu_memory_utilization=0.1, max_num_seqs=4)
def ask(llm, **more):
    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=5)
    output = llm.generate({"prompt_token_ids": ids}, params, use_tqdm=False, **more)[0].outputs[0]
    return {str(token): entry.logprob for token, entry in output.logprobs[0].items()}
answers = [ask(LLM(model=base, enable_lora=True, max_lora_rank=8, **common), lora_request=LoRARequest("a", 1, adapter))]
answers.append(ask(LLM(model=merged, **common)))
print("answers", json.dumps(answers))
"""


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_loads_both_forms_and_computes_the_same(adapter: Path, tmp_path: Path) -> None:
    packaged = Path(__file__).parents[2] / "services/tether_services/demo/models/policy"
    source = write_peft_adapter(packaged, tmp_path / "made", seed=3)
    assert export(source, tmp_path / "peft", "--base", packaged) == 0
    assert export(source, tmp_path / "merged", "--base", packaged, "--merged", "--dtype", "float32") == 0
    ids = [1, 40, 50, 60, 70]
    given = json.dumps([str(packaged), str(tmp_path / "merged"), str(tmp_path / "peft"), ids])
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run(
        [sys.executable, "-c", ASK_VLLM, given], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("answers"))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(packaged, dtype="float32"), str(source))
    with torch.no_grad():
        wanted = torch.log_softmax(model.eval()(input_ids=torch.tensor([ids])).logits[0, -1].float(), -1)
    for answer in json.loads(line.removeprefix("answers")):
        assert len(answer) >= 5
        for token, logprob in answer.items():
            assert logprob == pytest.approx(float(wanted[int(token)]), abs=1e-3)
