"""The numbers of public test suites on sampling and stopping, computed by the generator's own decoding code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.golden_vectors import assert_vector, load_vector
from tether_services.generator.engine import Sampling
from tether_services.generator.engines.decoding import DecodingModel, Row, decode_batch
from tether_services.generator.engines.sampling import filter_logits
from tether_services.runtime.text import ByteCodec

VOCAB_SIZE = 1000


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_vector_top_k_openai(dtype: torch.dtype) -> None:
    vector = load_vector("top_k_openai")
    logits = torch.tensor([vector.inputs["logits"]], dtype=dtype)
    for k, expected in vector.expected.items():
        got = filter_logits(logits, top_p=torch.ones(1), top_k=torch.tensor([int(k)]))[0]
        dropped = torch.tensor(expected) < -1e9
        assert got.isneginf().equal(dropped)
        assert_vector(got[~dropped], [x for x in expected if x > -1e9], tol=1e-6, dtype=dtype)


def test_vector_truncate_stop_torchtune() -> None:
    # A model that says the given sequences: a row ends at its first stop token, which stays. Row i is told apart by
    # its prompt of i + 1 tokens.
    vector = load_vector("truncate_stop_torchtune")
    sequences, stop = torch.tensor(vector.inputs["seqs"]), vector.inputs["stop"]
    width, calls = sequences.shape[1], 0

    def forward(*, position_ids: Tensor, **_: Any) -> Any:
        nonlocal calls
        rows = position_ids[:, -1] - calls
        logits = torch.nn.functional.one_hot(sequences[rows, calls], VOCAB_SIZE).float()[:, None]
        calls += 1
        return type("Output", (), {"logits": logits})

    model = DecodingModel(forward, None, ByteCodec(), (), VOCAB_SIZE, torch.device("cpu"))
    sampling = Sampling(width, temperature=0.0, stop_token_ids=tuple(stop))
    rows = [Row((1,) * (i + 1), sampling, seed=i) for i in range(len(sequences))]
    completions = decode_batch(model, rows, lambda: None)
    assert [[*c.token_ids, *[0] * (width - len(c.token_ids))] for c in completions] == vector.expected
    assert [c.finish_reason == "stop" for c in completions] == [bool({*row} & {*stop}) for row in sequences.tolist()]
