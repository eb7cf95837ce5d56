"""Access to the public numeric vectors that lie beside a development checkout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

VECTORS = Path(__file__).resolve().parents[3] / "shared" / "golden" / "vectors.json"


class Vector(NamedTuple):
    """One case: named inputs, the expected output and the absolute tolerance in float64."""

    inputs: dict[str, Any]
    expected: Any
    tol: float


def vector_ids() -> set[str]:
    """Return the ids of all vectors; skips the calling test where ../shared is absent, as in a plain clone."""
    return set(_read())


def load_vector(vector_id: str) -> Vector:
    """Return the vector of that id; skips the calling test where ../shared is absent, as in a plain clone."""
    found = _read()[vector_id]
    return Vector(found["inputs"], found["expected"], found["tol"])


def _read() -> dict[str, Any]:
    if not VECTORS.is_file():
        pytest.skip("the public golden vectors (../shared/golden/vectors.json) are not beside this checkout")
    return {vector["id"]: vector for vector in json.loads(VECTORS.read_text())}


def float64(x: Any) -> Tensor:
    """Return a float64 tensor of a nested list."""
    return torch.tensor(x, dtype=torch.float64)


def assert_within(got: Tensor | float, expected: Any, tol: float) -> None:
    """Fail unless every element differs from the expected one by at most `tol`."""
    torch.testing.assert_close(torch.as_tensor(got, dtype=torch.float64), float64(expected), rtol=0.0, atol=tol)


def assert_vector(got: Tensor, expected: Any, *, tol: float, dtype: torch.dtype) -> None:
    """Fail unless `got` has the dtype and is within the tolerance of a vector.

    That is `tol` in float64 and `tol` + 1e-6 * max(1, |expected|) in float32, for every element.
    """
    wanted = float64(expected)
    slack = 1e-6 * wanted.abs().clamp(min=1.0) if dtype == torch.float32 else torch.zeros_like(wanted)
    error = (got.detach().double() - wanted).abs()
    assert (got.dtype, got.shape) == (dtype, wanted.shape)
    assert bool((error <= tol + slack).all()), f"got {got.tolist()}, expected {expected} within {tol}"
