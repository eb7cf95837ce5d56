"""What the reference says about answers: asked of a reference service or of the model here, and kept for a resume."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from trl import DPOTrainer

from tether.client import Client
from tether.errors import FailedPreconditionError, InvalidArgumentError
from tether.reference import LogprobItem
from tether_services.recipes.progress import progress_line
from tether_services.runtime.durable import write_text
from tether_services.runtime.padding import PaddedBatch, padded_batches

__all__ = ["ask_service", "check_agreement", "check_service", "completion_logprobs", "divide_into_calls", "kept"]

CALL_TOKENS = 16384
"""Tokens in one call: some seconds of work for a service on a CPU, far below the deadline."""
CALL_SECONDS = 600.0
"""Deadline of a call; the service may be busy with others."""
FLOAT32_TOLERANCE = 1e-3
"""Nats per token between two correct implementations in float32."""
REDUCED_TOLERANCE = 0.05
"""The same where one of them computes in 16 bits or fewer."""


def kept(items: Sequence[LogprobItem], ask: Callable[[], list[float]], *, path: Path, base_sha256: str) -> list[float]:
    """Return what `ask` answers about the items; it is asked once, and a resumed stage reads the answer from a file.

    Args:
        items: What the answer is about.
        ask: Returns a number for each item.
        path: JSON file, written whole or not at all.
        base_sha256: Of the reference.
    """
    digest = hashlib.sha256(base_sha256.encode())
    for item in items:
        digest.update(repr((item.prompt_token_ids, item.response_token_ids)).encode())
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["items_sha256"] == digest.hexdigest():
            return [float(value) for value in found["logprobs"]]
    logprobs = ask()
    write_text(path, json.dumps({"items_sha256": digest.hexdigest(), "logprobs": logprobs}, allow_nan=False))
    return logprobs


def check_service(address: str, base_sha256: str, *, max_tokens: int) -> None:
    """Refuse a reference service that holds another model than the base, or cannot read rows of `max_tokens`.

    Raises:
        FailedPreconditionError: BASE_MISMATCH, with both hashes.
        InvalidArgumentError: Names the setting that is beyond the service's limit.
        TetherError: The service cannot be reached; the narrowest class says why.
    """
    with Client(reference=address, timeout_seconds=CALL_SECONDS) as client:
        state = client.get_reference()
    if state.base_model_sha256 != base_sha256:
        message = (
            f"the reference service at {address} holds the model {state.base_model_sha256}, not {base_sha256}: point"
            " both at the same folder, or leave `reference` empty"
        )
        raise FailedPreconditionError(message, field="reference", reason="BASE_MISMATCH")
    if max_tokens > state.max_model_len:
        message = f"max_tokens is {max_tokens}; the reference service at {address} reads at most {state.max_model_len}"
        raise InvalidArgumentError(message, field="max_tokens")


def ask_service(address: str, items: Sequence[LogprobItem]) -> list[float]:
    """Return the log-probability of each response under a reference service, in nats, summed, at temperature 1.

    Raises:
        TetherError: The service cannot be reached, or refused; the narrowest class says why.
    """
    sums: list[float] = []
    with (
        Client(reference=address, timeout_seconds=CALL_SECONDS) as client,
        progress_line("reference", total=len(items)) as report,
    ):
        for call in divide_into_calls(items, max_items=client.get_reference().max_items):
            sums += [sum(item.ref_logprobs) for item in client.compute_logprobs(call).items]
            report(len(sums), "")
    return sums


def divide_into_calls(items: Sequence[LogprobItem], *, max_items: int) -> list[list[LogprobItem]]:
    """Return the items in their order, in groups of at most `max_items` items and `CALL_TOKENS` tokens."""
    calls: list[list[LogprobItem]] = []
    num_tokens = 0
    for item in items:
        size = len(item.prompt_token_ids) + len(item.response_token_ids)
        if not calls or len(calls[-1]) == max_items or num_tokens + size > CALL_TOKENS:
            calls.append([])
            num_tokens = 0
        calls[-1].append(item)
        num_tokens += size
    return calls


def check_agreement(served: Sequence[float], local: Sequence[float], *, num_tokens: int, is_float32: bool) -> None:
    """Refuse log-probabilities of a service that are not those of the base as it is loaded here.

    Args:
        served: Sums of some items, from the service.
        local: Of the same ones, from here.
        num_tokens: Response tokens of these items, at least 1.
        is_float32: Whether the base here is neither quantised nor in 16 bits.

    Raises:
        FailedPreconditionError: REFERENCE_DIFFERS: they are further apart than rounding explains.
    """
    tolerance = FLOAT32_TOLERANCE if is_float32 else REDUCED_TOLERANCE
    distance = sum(abs(a - b) for a, b in zip(served, local, strict=True)) / num_tokens
    if not distance <= tolerance:
        message = (
            f"the reference service is off by {distance:.2g} nats per token from the base loaded here, {tolerance:g} is"
            " accepted: serve it with the same dtype and quantization, or leave `reference` empty"
        )
        raise FailedPreconditionError(message, field="reference", reason="REFERENCE_DIFFERS")


def completion_logprobs(trainer: DPOTrainer, items: Sequence[LogprobItem], *, title: str) -> list[float]:
    """Return the log-probability of each response under the trainer's model as it is now, in nats, summed.

    Before the first step an adapter changes nothing: the model then is the reference.

    Args:
        trainer: Its model computes log-probabilities as in the training; dropout is off here.
        items: Prompts and responses.
        title: Of the progress bar.
    """
    rows = [[*item.prompt_token_ids, *item.response_token_ids] for item in items]
    longest = max(len(row) for row in rows)
    max_tokens = 2 * trainer.args.per_device_train_batch_size * longest  # no more than in a training step
    sums: dict[int, float] = {}
    was_training = trainer.model.training
    trainer.model.eval()
    with progress_line(title, total=len(items)) as report:
        for batch in padded_batches(rows, max_tokens=max_tokens, device=str(trainer.args.device)):
            starts = [len(items[index].prompt_token_ids) for index in batch.indices]
            sums.update(zip(batch.indices, _sums(trainer, batch, starts), strict=True))
            report(len(sums), "")
    trainer.model.train(was_training)
    return [sums[index] for index in range(len(items))]


@torch.no_grad()
def _sums(trainer: DPOTrainer, batch: PaddedBatch, starts: Sequence[int]) -> list[float]:
    """Return the summed log-probabilities of the tokens from each row's start on."""
    ids = batch.token_ids
    place = torch.arange(ids.shape[1], device=ids.device)
    is_token = place < batch.lengths[:, None]
    is_response = is_token & (place >= torch.tensor(starts, device=ids.device)[:, None])
    labels = ids.masked_fill(~is_response, -100)
    with trainer.accelerator.autocast():
        output = trainer.model(
            input_ids=ids, attention_mask=is_token.long(), labels=labels, use_cache=False, fused_lm_head=True
        )
    sums: list[float] = output.log_probs.double().sum(dim=1).tolist()
    return sums
