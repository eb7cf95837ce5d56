"""Weights that no generator may take: broken, tampered, of wrong names and shapes, or not finite."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from safetensors.numpy import save

from tests.rpc.adapter_files import (
    AdapterBytes,
    begin_request,
    fake_adapter,
    fake_tensors,
)
from tests.rpc.refused_pushes import A_NAME, Header, pickle_bytes, refuse_push, renamed, with_header

FAILED, INVALID = grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT


def test_bytes_that_do_not_match_their_hash_are_refused() -> None:
    adapter = fake_adapter(2)
    swapped = AdapterBytes(adapter.config, fake_adapter(3).weights, adapter.rank, adapter.targets)
    assert len(swapped.weights) == len(adapter.weights)
    refused = refuse_push(swapped, files=begin_request(adapter, "run-a", 2).files)
    assert (refused.code, refused.reason) == (FAILED, "HASH_MISMATCH")


def with_raw_header(change: Callable[[bytes], bytes]) -> bytes:
    """Right tensors behind a header that the library which loads them would not take."""
    weights = fake_adapter(2).weights
    size = struct.unpack("<Q", weights[:8])[0]
    header = change(weights[8 : 8 + size])
    return struct.pack("<Q", len(header)) + header + weights[8 + size :]


@pytest.mark.parametrize(
    "weights",
    [
        b"x",
        b"\x00" * 8,
        b"not a safetensors file at all, but long enough to be read as one",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 100_000_000) + b"{}" * 50,
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 4) + b"{{{{",
        struct.pack("<Q", 20_000) + b"[" * 20_000,
        with_raw_header(lambda raw: b" " + raw),
        with_raw_header(lambda raw: raw.decode().encode("utf-16")),
        fake_adapter(2).weights[:-1],
        fake_adapter(2).weights[:200],
        fake_adapter(2).weights + b"\x00" * 4,
        pickle_bytes(),
        b"PK\x03\x04" + b"\x00" * 100,
    ],
    ids=[
        "one byte",
        "no header",
        "text",
        "huge header",
        "header past the end",
        "list header",
        "broken json",
        "deep json",
        "space before the header",
        "header in utf-16",
        "truncated",
        "half a header",
        "too long",
        "pickle",
        "zip",
    ],
)
def test_what_is_not_safetensors_is_refused(weights: bytes) -> None:
    refused = refuse_push(fake_adapter(weights=weights))
    assert (refused.code, refused.reason) == (FAILED, "NOT_SAFETENSORS")


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header[A_NAME].update(data_offsets=[0, 2**50]),
        lambda header: header[A_NAME].update(data_offsets=[-64, 0]),
        lambda header: header[A_NAME].update(data_offsets=[64, 0]),
        lambda header: header[A_NAME].update(data_offsets="all"),
        lambda header: header[A_NAME].update(shape=[-2, -8]),
        lambda header: header[A_NAME].update(shape=[2**33, 2**33]),
        lambda header: header[A_NAME].update(shape=[1.5, 8]),
        lambda header: header[A_NAME].update(shape=[True, 16]),
        lambda header: header[A_NAME].pop("shape"),
        lambda header: header.update({A_NAME: "a string"}),
        lambda header: header.update(extra={"dtype": "F32", "shape": [2, 8], "data_offsets": [0, 64]}),
        lambda header: header.update(__metadata__=["pt"]),
        lambda header: header.update(__metadata__={"format": 1}),
    ],
)
def test_tampered_header_is_refused(change: Callable[[Header], None]) -> None:
    refused = refuse_push(with_header(change))
    assert (refused.code, refused.reason) == (FAILED, "NOT_SAFETENSORS")


def test_type_that_no_adapter_has_is_refused() -> None:
    tensors = {name: value.astype(np.float64) for name, value in fake_tensors(2).items()}
    assert refuse_push(fake_adapter(tensors=tensors)).reason == "BAD_DTYPE"
    strange = with_header(lambda header: header[A_NAME].update(dtype=["F32"]))
    assert refuse_push(strange).reason == "BAD_DTYPE"


@pytest.mark.parametrize(
    ("reason", "adapter"),
    [
        ("UNKNOWN_TENSOR", renamed("model.layers", "foo.layers")),
        ("UNKNOWN_TENSOR", renamed("base_model.model.", "")),
        ("UNKNOWN_TENSOR", renamed("v_proj", "k_proj")),
        ("UNKNOWN_TENSOR", renamed("lora_A.weight", "lora_A.default.weight")),
        ("UNKNOWN_TENSOR", renamed("layers.1", "layers.7")),
        ("MISSING_TENSOR", fake_adapter(tensors={k: v for k, v in fake_tensors(2).items() if "layers.1" not in k})),
        ("MISSING_TENSOR", fake_adapter(tensors={k: v for k, v in fake_tensors(2).items() if "lora_B" not in k})),
        ("WRONG_SHAPE", fake_adapter(tensors={k: v.T.copy() for k, v in fake_tensors(2).items()})),
        ("WRONG_SHAPE", fake_adapter(tensors=fake_tensors(2, rank=4))),
        ("UNKNOWN_TENSOR", fake_adapter(tensors=fake_tensors(2) | {"extra": np.zeros(4, dtype=np.float32)})),
        ("MISSING_TENSOR", fake_adapter(weights=save({}))),
    ],
)
def test_wrong_names_and_shapes_are_refused(reason: str, adapter: AdapterBytes) -> None:
    refused = refuse_push(adapter)
    assert (refused.code, refused.reason) == (FAILED, reason)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_infinities_and_nans_are_refused(poison: float, kind: Any) -> None:
    tensors = {name: value.astype(kind) for name, value in fake_tensors(2).items()}
    tensors[A_NAME][1, 3] = poison
    refused = refuse_push(fake_adapter(tensors=tensors))
    assert (refused.code, refused.reason) == (FAILED, "NOT_FINITE")
