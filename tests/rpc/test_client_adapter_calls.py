"""The client's calls about adapters beside the push, against a scripted service."""

from __future__ import annotations

import uuid

import pytest

from tests.rpc.adapter_store import Store, with_store
from tether import (
    AbortedError,
    AdapterClient,
    InvalidArgumentError,
)


def test_an_activation_is_repeated_with_its_request_id_and_returns_the_version_before() -> None:
    store = Store()
    store.unavailable = 1

    async def use(client: AdapterClient) -> int:
        return await client.activate("run-a", 3, expected_run_id="run-a", expected_policy_version=2, epoch=1)

    assert with_store(store, use) == 2
    assert len(store.activations) == 2
    assert len({request.request_id for request in store.activations}) == 1
    assert store.activations[0].epoch == 1


def test_a_lost_compare_and_set_is_raised_at_once() -> None:
    store = Store()

    async def use(client: AdapterClient) -> None:
        with pytest.raises(AbortedError):
            await client.activate("run-a", 3, expected_run_id="run-a", expected_policy_version=1, epoch=1)

    with_store(store, use)
    assert len(store.activations) == 1


def test_lists_follow_their_pages_to_the_end() -> None:
    adapters = with_store(Store(), lambda client: client.list_adapters())
    assert [adapter.policy_version for adapter in adapters] == [1, 2, 3]
    assert adapters[0].state == "retiring"


def test_the_base_model_is_an_active_version_without_adapter() -> None:
    active = with_store(Store(), lambda client: client.get_active_adapter())
    assert (active.run_id, active.policy_version, active.adapter) == ("run-a", 0, None)


def test_a_rollback_is_repeated_with_its_request_id_and_returns_the_version_in_use() -> None:
    store = Store()
    store.unavailable = 2
    assert with_store(store, lambda client: client.rollback("run-a", expected_policy_version=3, epoch=6)) == 2
    assert len(store.rollbacks) == 3
    assert len({request.request_id for request in store.rollbacks}) == 1
    assert store.rollbacks[0].epoch == 6


def test_a_deletion_is_repeated_with_its_request_id() -> None:
    store = Store()
    store.unavailable = 2
    with_store(store, lambda client: client.delete("run-a", 1, epoch=6))
    assert len(store.deletions) == 3
    assert len({request.request_id for request in store.deletions}) == 1
    assert store.deletions[0].epoch == 6


def test_the_callers_request_id_names_activations_rollbacks_and_deletions() -> None:
    store, name = Store(), str(uuid.uuid4())

    async def use(client: AdapterClient) -> None:
        await client.activate(
            "run-a", 3, expected_run_id="run-a", expected_policy_version=2, epoch=1, request_id=name.upper()
        )
        await client.rollback("run-a", expected_policy_version=3, epoch=1, request_id=name)
        await client.delete("run-a", 1, epoch=1, request_id=name)
        with pytest.raises(InvalidArgumentError):
            await client.delete("run-a", 1, epoch=1, request_id="x")

    with_store(store, use)
    sent = (store.activations[0].request_id, store.rollbacks[0].request_id, store.deletions[0].request_id)
    assert sent == (name, name, name)
