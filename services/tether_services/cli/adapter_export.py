"""`tether adapter export`: an adapter as PEFT, transformers and vLLM load it, or merged into its base."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tether.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError
from tether_services.cli.adapter_commands import CONFIG_NAME, WEIGHTS_NAME, find_base, read_adapter_config
from tether_services.runtime.durable import write_directory
from tether_services.runtime.model_folder import is_hub_name

__all__ = ["Source", "export", "find_source"]


@dataclass(frozen=True, slots=True)
class Source:
    """An adapter that is to be exported."""

    folder: Path
    """Holds its two files."""
    base: str | None = None
    """Folder or hub name of its base, where a run says so."""
    base_sha256: str = ""
    """Content hash of that base; empty if nobody says so."""


def export(known: argparse.Namespace) -> int:
    """Write the adapter, print the folder, and return 0.

    Raises:
        InvalidArgumentError: There is no such adapter or base, they do not fit, or something is at the output.
        FailedPreconditionError: The run's adapter is not what was committed, or the base is not the one it was trained
            on.
    """
    if known.output.exists():
        raise InvalidArgumentError(f"{known.output} is there already; nothing is written over", field="output")
    source = find_source(known.source, known.state_dir)
    config = read_adapter_config(source.folder)
    base = find_base(source.folder, config, given=known.base or source.base)
    _check_base(base, source.base_sha256)
    if known.merged:
        _write_merged(source.folder, base, known.output, known.dtype)
    else:
        named = known.base or source.base or ""
        _write_adapter(source.folder, config, named if is_hub_name(named) else str(base), known.output, known.dtype)
    print(known.output)
    return 0


def find_source(source: str, state_dir: Path) -> Source:
    """Return the adapter that is meant.

    Args:
        source: Its folder, RUN, or RUN@VERSION.
        state_dir: Holds the runs.

    Raises:
        InvalidArgumentError: There is neither such a folder nor such a run.
        NotFoundError: The run has no such version on the disk.
        FailedPreconditionError: The version is not what was committed.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return Source(folder)
    run_id, at, version = source.partition("@")
    ledger = state_dir / "ledger.sqlite"
    if not ledger.is_file():
        message = f"{source!r} is no folder, and {state_dir} holds no runs; name their folder with --state-dir"
        raise InvalidArgumentError(message, field="source")
    base, base_sha256, hashes = _read_run(ledger, run_id)
    if at and not version.isdigit():
        raise InvalidArgumentError(f"{version!r} is no version; RUN@7 is the seventh", field="source")
    folders = {int(path.name): path for path in (state_dir / run_id / "adapters").glob("[0-9]*") if path.name.isdigit()}
    if at:
        if int(version) not in folders:
            kept = ", ".join(map(str, sorted(folders))) or "none"
            raise NotFoundError(f"Of run {run_id}, version {version} is not kept; {kept} are.", field="source")
        folders = {int(version): folders[int(version)]}
    wanted = hashes if at else hashes[-1:]
    for _, found in sorted(folders.items(), reverse=True):
        if _hash(found / WEIGHTS_NAME) in wanted:
            return Source(found, base, base_sha256)
    made = "this version is not what a committed step has made" if at else "what the last step has made is not there"
    message = f"Of run {run_id}, {made}; {state_dir / run_id / 'adapters'} holds what there is."
    raise FailedPreconditionError(message, field="source", reason="ADAPTER_NOT_COMMITTED")


def _read_run(ledger: Path, run_id: str) -> tuple[str, str, list[str]]:
    """Return base, hash of the base, and hashes of the adapters of a run's committed steps in order."""
    from tether_services.orchestrator.run_config import parse_run_config

    address = ledger.absolute().as_uri() + "?mode=ro"  # quoted: a folder may have any name
    try:
        with closing(sqlite3.connect(address, uri=True)) as connection:
            run = connection.execute("SELECT config_toml, base_sha256 FROM runs WHERE run_id = ?", (run_id,)).fetchone()
            steps = connection.execute(
                "SELECT adapter_sha256 FROM steps WHERE run_id = ? ORDER BY step", (run_id,)
            ).fetchall()
    except sqlite3.DatabaseError as error:
        message = f"{ledger} cannot be read ({error}); start the orchestrator on it once"
        raise FailedPreconditionError(message, field="state_dir", reason="LEDGER_UNREADABLE") from error
    if run is None:
        raise InvalidArgumentError(f"{run_id!r} is neither a folder nor a run of {ledger.parent}", field="source")
    return str(parse_run_config(run[0]).model), run[1], [row[0] for row in steps]


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "missing"


def _check_base(base: Path, sha256: str) -> None:
    """Refuse a base that is not the one that a run was trained on."""
    from tether_services.runtime.content_hash import hash_model_folder

    if sha256 and hash_model_folder(base) != sha256:
        message = f"{base} is not the base that this run was trained on; give that one with --base"
        raise FailedPreconditionError(message, field="base", reason="WRONG_BASE_MODEL")


def _write_adapter(folder: Path, config: Mapping[str, Any], base: str, output: Path, dtype: str | None) -> None:
    """Write PEFT's two files, the weights as they are unless another type is wanted."""
    weights = (folder / WEIGHTS_NAME).read_bytes()
    if dtype is not None:
        import torch
        from safetensors.torch import load, save

        tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in load(weights).items()}
        weights = save(tensors, metadata={"format": "pt"})
    content = json.dumps({**config, "base_model_name_or_path": base}, indent=2, sort_keys=True) + "\n"
    output = output.resolve()
    write_directory(output, {CONFIG_NAME: content.encode(), WEIGHTS_NAME: weights})
    output.chmod(0o755)


def _write_merged(folder: Path, base: Path, output: Path, dtype: str | None) -> None:
    """Write the base's weights with the adapter in them, and the tokenizer, beside the output and then in its place."""
    import torch
    from transformers import AutoConfig, AutoTokenizer

    stored = getattr(AutoConfig.from_pretrained(base, local_files_only=True), "dtype", None) or torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InvalidArgumentError(f"{base} holds no tokenizer: {error}", field="base") from error
    model = _merge(folder, base).to(getattr(torch, dtype) if dtype else stored)
    output = output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    _say(f"writing {output}")
    staged = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        staged.chmod(0o755)
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        for file in staged.iterdir():
            file.chmod(file.stat().st_mode | 0o444)  # the weights library writes them for the owner alone
        staged.rename(output)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _merge(folder: Path, base: Path) -> Any:
    """Return the base with the adapter in its weights, computed in float32."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from tether_services.runtime.pretrained import load_pretrained

    _say(f"loading {base}")
    model = load_pretrained(AutoModelForCausalLM, base, dtype="float32", field="base")
    _say(f"merging {folder}")
    try:
        return PeftModel.from_pretrained(model, str(folder)).merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError, TypeError, KeyError) as error:  # PEFT's answers to what does not fit
        raise InvalidArgumentError(f"the adapter does not fit the base {base}: {error}", field="base") from error


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
