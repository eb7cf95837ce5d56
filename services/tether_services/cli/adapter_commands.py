"""`tether adapter`: its arguments, and `push`: a trained adapter into a serving generator, proven to have arrived."""

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
from tether_services.cli.adapter_lifecycle import (
    PUSHED_RUN,
    activate,
    check_owner,
    check_untrained,
    explaining_stale,
    list_stored,
    orchestrator_of,
    roll_back,
    switch,
)
from tether_services.cli.connection import add_connection, credential_options

if TYPE_CHECKING:
    from torch import Tensor

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

CONFIG_NAME, WEIGHTS_NAME = ADAPTER_FILES
EPOCH = 1
"""Of the writer of a run that no training run writes: there is one command at a time."""
PROBE_TEXTS = (
    "Once upon a time there was a little dog that wanted to see the sea.",
    "The committee will meet on Tuesday to decide how the money is spent.",
    "To make the soup, cut two onions and cook them slowly in butter.",
    "Question: Why is the sky blue?\nAnswer: The air scatters blue light more than red light.",
)
"""Ordinary text: the log-probabilities of unlikely tokens differ more from one arithmetic to another."""
PROBE_TOKENS = 48
DTYPES = ("float32", "bfloat16", "float16")
DESCRIPTION = """\
Push a LoRA adapter (PEFT) into a serving generator: the folder that `tether train dpo` wrote, the folder `adapter` of
`tether train sft`, or `adapters/NNNNNN` of a PPO run.

The generator verifies the files, loads the adapter and proves it: its log-probabilities of a few texts must be those
that base and adapter give here. Requests in flight keep the version they began with. The adapter is then activated,
unless --no-activate is given; under a run that is being trained on the generator only with --take. A version of a run
that is being trained is pushed only with --take as well.
"""
EXPORT_DESCRIPTION = """\
Write an adapter as a folder that transformers, PEFT and vLLM load: its two files, naming the base, or with --merged the
weights of the base with the adapter in them, and the tokenizer.

SOURCE is the folder of an adapter, or RUN or RUN@VERSION of the runs in --state-dir (the last committed version where
none is given). Nothing is written over; OUTPUT appears whole or not at all.
"""


def add_adapter(commands: Commands) -> None:
    """Add `tether adapter` to the command."""
    text = "list, push, activate, roll back and export adapters"
    parser = commands.add_parser("adapter", help=text, description=f"{text.capitalize()}.")
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    _add_list(actions)
    _add_push(actions)
    _add_activate(actions)
    _add_rollback(actions)
    _add_export(actions)


def _add_list(actions: Commands) -> None:
    text = "list the stored adapters of a generator, and what it serves"
    inner = actions.add_parser("list", help=text, description=f"{text.capitalize()}.")
    inner.add_argument("--json", action="store_true", help="print JSON")
    _add_generator(inner)
    inner.set_defaults(run=list_stored)


def _add_push(actions: Commands) -> None:
    inner = actions.add_parser(
        "push",
        help="bring an adapter into a serving generator",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    inner.add_argument("folder", type=Path, metavar="FOLDER", help=f"holds {CONFIG_NAME} and {WEIGHTS_NAME}")
    inner.add_argument(
        "--base", metavar="MODEL", help="base that it was trained on, folder or hub name; what the adapter says else"
    )
    inner.add_argument("--run-id", default=PUSHED_RUN, metavar="ID", help=f"run that it is stored under ({PUSHED_RUN})")
    inner.add_argument(
        "--policy-version", type=int, metavar="N", help="its version in that run, 1 or more; the next free one else"
    )
    inner.add_argument(
        "--activate", action=argparse.BooleanOptionalAction, default=True, help="serve it from now on (yes)"
    )
    _add_writer(inner)
    inner.set_defaults(run=push)


def _add_activate(actions: Commands) -> None:
    text = "serve a stored version from now on"
    inner = actions.add_parser("activate", help=text, description=f"{text.capitalize()}.")
    inner.add_argument("run_id", metavar="RUN")
    inner.add_argument("policy_version", type=int, metavar="VERSION", help="0 is the base model")
    _add_writer(inner)
    inner.set_defaults(run=activate)


def _add_rollback(actions: Commands) -> None:
    text = "serve the newest stored version below the active one"
    inner = actions.add_parser("rollback", help=text, description=f"{text.capitalize()}.")
    inner.add_argument("run_id", metavar="RUN", help="the run that is served now")
    _add_writer(inner)
    inner.set_defaults(run=roll_back)


def _add_export(actions: Commands) -> None:
    inner = actions.add_parser(
        "export",
        help="write an adapter for transformers, PEFT and vLLM, or merged into its base",
        description=EXPORT_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    inner.add_argument("source", metavar="SOURCE", help="adapter folder, RUN or RUN@VERSION")
    inner.add_argument("output", type=Path, metavar="OUTPUT", help="folder to be made")
    inner.add_argument("--merged", action="store_true", help="write full weights and the tokenizer")
    inner.add_argument(
        "--base", metavar="MODEL", help="folder or hub name of the base; what adapter or run says otherwise"
    )
    inner.add_argument(
        "--dtype", choices=DTYPES, help="numeric type of the written weights; that of adapter or base otherwise"
    )
    inner.add_argument("--state-dir", type=Path, default=Path("runs"), metavar="DIR", help="holds the runs (runs)")
    inner.set_defaults(run=_export)


def _add_generator(parser: argparse.ArgumentParser) -> None:
    add_connection(
        parser, "127.0.0.1:50061", of="adapter port of the generator, its admin_address", timeout_seconds=600.0
    )


def _add_take(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--take", action="store_true", help="also from a run that is being trained on the generator, which it disturbs"
    )
    parser.add_argument(
        "--orchestrator",
        default="127.0.0.1:50054",
        metavar="HOST:PORT",
        help="whom to ask whether the run is being trained that owns the generator (127.0.0.1:50054)",
    )


def _add_writer(parser: argparse.ArgumentParser) -> None:
    _add_generator(parser)
    _add_take(parser)
    parser.add_argument(
        "--epoch",
        type=int,
        default=EPOCH,
        metavar="N",
        help="act as this attempt of the run's training; with a higher one than its own that is locked out (1)",
    )


def _export(known: argparse.Namespace) -> int:
    from tether_services.cli.adapter_export import export

    return export(known)


def push(known: argparse.Namespace) -> int:
    """Push an adapter, activate it if wanted, print its version, and return 0.

    With a run that is being trained in the way, nothing is pushed.

    Raises:
        InvalidArgumentError: The folder holds no LoRA adapter, its base is not to be found, or the version is below 1.
        FailedPreconditionError: The generator refused the adapter; the reason names the check. IN_TRAINING,
            OWNER_UNKNOWN: a run would be disturbed; --take is not given.
        AbortedError: Something else was activated meanwhile, or --epoch is not that of the run's present writer.
        TetherError: The generator cannot be reached; the narrowest class says why.
    """
    if known.policy_version is not None and known.policy_version < 1:
        message = f"{known.policy_version} is no version of an adapter; they begin at 1, and 0 is the base alone"
        raise InvalidArgumentError(message, field="policy_version")
    config = read_adapter_config(known.folder)
    return asyncio.run(_push(known, config))


def read_adapter_config(folder: Path) -> dict[str, Any]:
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
    async with AdapterClient(known.address, timeout_seconds=known.timeout, **credential_options(known)) as client:
        active = await client.get_active_adapter()
        await check_untrained(known.run_id, take=known.take, orchestrator=orchestrator_of(known))
        if known.activate and active.run_id != known.run_id:
            await check_owner(active, known.run_id, take=known.take, orchestrator=orchestrator_of(known))
        version = known.policy_version or await _choose_version(client, known.run_id, known.folder)
        # The generator is there; only now load the model, which takes long.
        declared = await asyncio.to_thread(_declare, known, config, version)
        with explaining_stale():
            result = await client.push(known.folder, declared, epoch=known.epoch)
        print(
            f"pushed as version {version} of run {known.run_id}; off by {result.mean_abs_dlogp:.2g} nats per token from"
            " base and adapter here",
            file=sys.stderr,
        )
        if known.activate:
            active = await client.get_active_adapter()
            await switch(client, known.run_id, version, active=active, epoch=known.epoch)
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
