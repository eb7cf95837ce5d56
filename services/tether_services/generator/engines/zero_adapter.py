"""An adapter that changes nothing, for engines that cannot mix requests with and without an adapter.

vLLM 0.32 on CPU marks a request without adapter by slot -1 and then indexes the adapters' weights with it, which is the
last slot: in a batch with other adapters, such a request is silently sampled from one of them. With this adapter every
request has a slot of its own.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tether_services.generator.engine import LoadedAdapter
from tether_services.generator.verification import CONFIG_NAME, WEIGHTS_NAME, AdapterShape, expected_tensors

ZERO_NUMBER = 2**31 - 1
"""Numbers of pushed adapters count up from 1."""


def write_zero_adapter(linear_shapes: Mapping[str, tuple[int, int]]) -> LoadedAdapter:
    """Return an all-zero adapter of rank 1 on one kind of layer, in a new temporary folder that the caller removes."""
    import numpy as np
    from safetensors.numpy import save_file

    folder = Path(tempfile.mkdtemp(prefix="tether-zero-adapter-"))
    target = next(iter(linear_shapes)).rpartition(".")[2]
    expected = expected_tensors(linear_shapes, AdapterShape(1, frozenset({target})))
    save_file({name: np.zeros(shape, dtype=np.float32) for name, shape in expected.items()}, folder / WEIGHTS_NAME)
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": [target], "bias": "none"}
    (folder / CONFIG_NAME).write_text(json.dumps(config), encoding="utf-8")
    return LoadedAdapter(ZERO_NUMBER, "base@0", "", 0, "", folder)
