"""`tether adapter push`: a trained adapter into a serving generator, with the proof that it arrived."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from tether.adapter import ADAPTER_FILES, AdapterClient, AdapterProbe, AdapterPush
from tether.errors import InvalidArgumentError

if TYPE_CHECKING:
    from torch import Tensor

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

CONFIG_NAME, WEIGHTS_NAME = ADAPTER_FILES
RUN_ID = "pushed"
"""The run that adapters belong to which no training run pushed."""
EPOCH = 1
"""Of the run's writer: there is one command at a time."""
PROBE_TEXTS = (
    "Once upon a time there was a little dog that wanted to see the sea.",
    "The committee will meet on Tuesday to decide how the money is spent.",
    "To make the soup, cut two onions and cook them slowly in butter.",
    "Question: Why is the sky blue?\nAnswer: The air scatters blue light more than red light.",
)
"""Ordinary text: the log-probabilities of unlikely tokens differ more from one arithmetic to another."""
PROBE_TOKENS = 48
DESCRIPTION = """\
Push a LoRA adapter (PEFT) into a serving generator: the folder that `tether train dpo` wrote, the folder `adapter` of
`tether train sft`, or `adapters/NNNNNN` of a PPO run.

The generator verifies the files, loads the adapter and proves it: its log-probabilities of a few texts must be those
that base and adapter give here. Requests in flight keep the version they began with. The adapter is then activated,
unless --no-activate is given; a training run that uses the generator would lose it to this adapter and fail.
"""


def add_adapter(commands: Commands) -> None:
    """Add `tether adapter push` to the command."""
    parser = commands.add_parser("adapter", help="push a trained adapter", description="Push a trained adapter.")
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    inner = actions.add_parser(
        "push",
        help="bring an adapter into a serving generator",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    inner.add_argument("folder", type=Path, metavar="FOLDER", help=f"holds {CONFIG_NAME} and {WEIGHTS_NAME}")
    inner.add_argument(
        "--generator",
        default="127.0.0.1:50061",
        metavar="HOST:PORT",
        help="adapter port of the generator, its admin_address (127.0.0.1:50061)",
    )
    inner.add_argument(
        "--base", metavar="MODEL", help="base that it was trained on, folder or hub name; what the adapter says else"
    )
    inner.add_argument("--run-id", default=RUN_ID, metavar="ID", help=f"run that it is stored under ({RUN_ID})")
    inner.add_argument(
        "--policy-version", type=int, metavar="N", help="its version in that run, 1 or more; the next free one else"
    )
    inner.add_argument(
        "--activate", action=argparse.BooleanOptionalAction, default=True, help="serve it from now on (yes)"
    )
    inner.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="deadline of a call (600)")
    inner.set_defaults(run=push)


def push(known: argparse.Namespace) -> int:
    """Push an adapter, activate it if wanted, print its version, and return 0.

    Raises:
        InvalidArgumentError: The folder holds no LoRA adapter, its base is not to be found, or the version is below 1.
        FailedPreconditionError: The generator refused the adapter; the reason names the check.
        TetherError: The generator cannot be reached; the narrowest class says why.
    """
    if known.policy_version is not None and known.policy_version < 1:
        message = f"{known.policy_version} is no version of an adapter; they begin at 1, and 0 is the base alone"
        raise InvalidArgumentError(message, field="policy_version")
    config = _read_config(known.folder)
    return asyncio.run(_push(known, config))


def _read_config(folder: Path) -> dict[str, Any]:
    """Return adapter_config.json of a LoRA adapter whose weights are there."""
    missing = [name for name in ADAPTER_FILES if not (folder / name).is_file()]
    if missing:
        raise InvalidArgumentError(
            f"{folder} is no adapter folder: it has no {' and no '.join(missing)}", field="folder"
        )
    try:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidArgumentError(f"{folder / CONFIG_NAME} is not JSON: {error}", field="folder") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise InvalidArgumentError(f"{folder / CONFIG_NAME} is not of a LoRA adapter", field="folder")
    return config


async def _push(known: argparse.Namespace, config: Mapping[str, Any]) -> int:
    async with AdapterClient(known.generator, timeout_seconds=known.timeout) as client:
        version = known.policy_version or await _choose_version(client, known.run_id, known.folder)
        # The generator is there; only now load the model, which takes long.
        declared = await asyncio.to_thread(_declare, known, config, version)
        result = await client.push(known.folder, declared, epoch=EPOCH)
        print(
            f"pushed as version {version} of run {known.run_id}; off by {result.mean_abs_dlogp:.2g} nats per token from"
            " base and adapter here",
            file=sys.stderr,
        )
        if known.activate:
            await _activate(client, known.run_id, version)
    print(version)
    return 0


async def _choose_version(client: AdapterClient, run_id: str, folder: Path) -> int:
    """Return the version under which the run has these weights already, or else the next free one."""
    sha256 = hashlib.sha256((folder / WEIGHTS_NAME).read_bytes()).hexdigest()
    stored = {a.policy_version: a for a in await client.list_adapters() if a.run_id == run_id}
    same = [version for version, a in stored.items() if a.sha256 == sha256 and a.state != "retiring"]
    return max(same, default=max(stored, default=0) + 1)


def _declare(known: argparse.Namespace, config: Mapping[str, Any], version: int) -> AdapterPush:
    """Return what is declared about the adapter, with proofs computed from base and adapter here."""
    from safetensors.torch import load_file

    from tether_services.runtime.content_hash import hash_model_folder

    base = find_base(known.folder, config, given=known.base)
    return AdapterPush(
        run_id=known.run_id,
        policy_version=version,
        base_model_sha256=hash_model_folder(base),
        rank=config["r"],
        target_modules=sorted(config["target_modules"]),
        probes=compute_probes(base, known.folder),
        differs_from_base=_has_effect(load_file(known.folder / WEIGHTS_NAME)),
    )


def _has_effect(tensors: Mapping[str, Tensor]) -> bool:
    return any(bool(tensor.ne(0).any()) for name, tensor in tensors.items() if ".lora_B." in name)


def find_base(folder: Path, config: Mapping[str, Any], *, given: str | None) -> Path:
    """Return the folder of the adapter's base: the given one, or what the adapter's configuration names.

    Args:
        folder: Of the adapter; a relative name in the configuration begins here.
        config: Content of adapter_config.json.
        given: Folder or hub name; None to go by the configuration.

    Raises:
        InvalidArgumentError: There is none.
    """
    from tether_services.runtime.model_folder import find_model_folder

    if given is not None:
        return find_model_folder(given, field="base")
    named = str(config.get("base_model_name_or_path") or "")
    if named and (folder / named / "config.json").is_file():
        return (folder / named).resolve()
    try:
        return find_model_folder(named, field="base")
    except InvalidArgumentError as error:
        message = f"the adapter names {named!r} as its base, which is not here; give the base with --base"
        raise InvalidArgumentError(message, field="base") from error


def compute_probes(base: Path, folder: Path) -> list[AdapterProbe]:
    """Return some texts with the log-probabilities of their tokens, with the adapter and without it, in float32.

    Raises:
        InvalidArgumentError: The base is no causal language model with a tokenizer, or the adapter does not fit it.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from tether_services.runtime.pretrained import load_pretrained
    from tether_services.runtime.text import HfCodec

    codec = HfCodec(base, field="base")
    model = load_pretrained(AutoModelForCausalLM, base, dtype="float32", field="base")
    try:
        adapted = PeftModel.from_pretrained(model, str(folder)).eval()
    except (ValueError, RuntimeError, TypeError, KeyError) as error:  # PEFT's answers to what does not fit
        raise InvalidArgumentError(f"the adapter does not fit the base {base}: {error}", field="base") from error
    rows = [codec.encode(text, add_special_tokens=True)[:PROBE_TOKENS] for text in PROBE_TEXTS]
    with adapted.disable_adapter():
        bare = [_logprobs(adapted, row) for row in rows]
    return [AdapterProbe(row, _logprobs(adapted, row), base) for row, base in zip(rows, bare, strict=True)]


def _logprobs(model: Any, token_ids: Sequence[int]) -> list[float]:
    """Return the log-probability of each token after the first, in nats."""
    import torch

    ids = torch.tensor([token_ids])
    with torch.inference_mode():
        table = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0, :-1].float(), dim=-1)
    values: list[float] = table.gather(-1, ids[0, 1:, None]).squeeze(-1).tolist()
    return values


async def _activate(client: AdapterClient, run_id: str, version: int) -> None:
    """Have new requests use a pushed version; what was served before is named on stderr."""
    active = await client.get_active_adapter()
    await client.activate(
        run_id,
        version,
        expected_run_id=active.run_id,
        expected_policy_version=active.policy_version,
        epoch=EPOCH,
    )
    before = f"version {active.policy_version} of run {active.run_id}" if active.run_id else "the base model"
    print(f"active; {before} was served before", file=sys.stderr)
