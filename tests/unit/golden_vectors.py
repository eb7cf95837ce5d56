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


def load_vector(vector_id: str) -> Vector:
    """Return the vector of that id; skips the calling test where ../shared is absent, as in a plain clone."""
    if not VECTORS.is_file():
        pytest.skip("the public golden vectors (../shared/golden/vectors.json) are not beside this checkout")
    found = {v["id"]: v for v in json.loads(VECTORS.read_text())}[vector_id]
    return Vector(found["inputs"], found["expected"], found["tol"])


def float64(x: Any) -> Tensor:
    """Return a float64 tensor of a nested list."""
    return torch.tensor(x, dtype=torch.float64)


def assert_within(got: Tensor | float, expected: Any, tol: float) -> None:
    """Fail unless every element differs from the expected one by at most `tol`."""
    torch.testing.assert_close(torch.as_tensor(got, dtype=torch.float64), float64(expected), rtol=0.0, atol=tol)
