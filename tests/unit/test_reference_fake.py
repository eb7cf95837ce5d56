from __future__ import annotations

import asyncio

import pytest

from tether_services.generator.engines.fake import fake_logprob
from tether_services.reference.config import ReferenceSettings
from tether_services.reference.engine import LogprobTask
from tether_services.reference.engines import build_engine
from tether_services.reference.engines.fake import fake_entropies, fake_ref_logprobs
from tether_services.runtime.fake_policy import FAKE_BASE_SHA256


def test_the_engine_answers_with_the_oracle() -> None:
    engine = build_engine(ReferenceSettings(engine="fake"))
    tasks = [LogprobTask((1, 5), (7, 2), 1.0, False), LogprobTask((9,), (3,), 0.7, True)]
    plain, entropic = asyncio.run(engine.compute_logprobs(tasks))
    assert plain.ref_logprobs == fake_ref_logprobs((1, 5), (7, 2))
    assert plain.entropies == []
    assert entropic.entropies == fake_entropies((9,), (3,)) == [-entropic.ref_logprobs[0]]


def test_values_are_pinned_so_that_users_can_rely_on_them() -> None:
    assert fake_ref_logprobs([1, 68], [2]) == pytest.approx([-1.2540767150742553], abs=1e-15)


def test_a_value_depends_on_every_token_before_it_and_on_none_after_it() -> None:
    base = fake_ref_logprobs([1, 2, 3], [4, 5])
    assert fake_ref_logprobs([9, 2, 3], [4, 5])[0] != base[0]
    assert fake_ref_logprobs([1, 2, 3], [4, 9])[0] == base[0]
    assert fake_ref_logprobs([1, 2], [3, 4, 5])[1:] == base
    assert all(-2.0 < value <= -1.0 for value in base)


def test_it_is_the_fake_generator_at_version_0() -> None:
    ids = [1, 40, 41, 2, 77]
    expected = [fake_logprob(ids, position, 0) for position in range(2, 5)]
    assert fake_ref_logprobs(ids[:2], ids[2:]) == expected
    assert build_engine(ReferenceSettings(engine="fake")).description.base_model_sha256 == FAKE_BASE_SHA256
