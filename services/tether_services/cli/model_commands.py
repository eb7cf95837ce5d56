"""`tether model`: which reward models a service holds, and which of them it serves."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import sys
from collections.abc import Awaitable, Callable
from typing import TypeAlias

from tether.errors import InvalidArgumentError
from tether.reward_models import LoadedRewardModel, LoadedRewardModels, RewardModelClient, RewardModelShadow
from tether_services.cli.connection import add_connection, credential_options

__all__ = ["add_model"]

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Act = Callable[[RewardModelClient, argparse.Namespace], Awaitable[None]]

ADDRESS = "127.0.0.1:50062"


def add_model(commands: Commands) -> None:
    """Add `tether model` to the command."""
    text = "list, load, unload, switch and compare the reward models of a service"
    parser = commands.add_parser("model", help=text, description=f"{text.capitalize()}.")
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    _add(actions, "list", "list what is held, with cache and shadow", _list).add_argument(
        "--json", action="store_true", help="print JSON"
    )
    loading = _add(actions, "load", "load a version from the service's model store", _load, model="as in the store")
    loading.add_argument("--sha256", default="", metavar="HEX", help="content hash that it must have (any)")
    _add(actions, "unload", "free a version once its last call has ended", _unload, model="to unload")
    switching = _add(actions, "set-default", "have calls without a version use this one", _set_default, model="to use")
    switching.add_argument(
        "--expected", default="", metavar="NAME@VERSION", help="what must be the default now (whatever is)"
    )
    switching.add_argument(
        "--name-only", action="store_true", help="only for calls that give its name, not for those without one"
    )
    _add_shadow(actions)


def _add(actions: Commands, name: str, text: str, act: Act, *, model: str = "") -> argparse.ArgumentParser:
    """Add an action that takes the address of the service and, if there is a `model` to explain, NAME@VERSION."""
    inner = actions.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    if model:
        inner.add_argument("model", metavar="NAME@VERSION", help=model)
    add_connection(inner, ADDRESS, of="admin port of the reward service, its admin_address", timeout_seconds=600.0)
    inner.set_defaults(run=_run, act=act)
    return inner


def _add_shadow(actions: Commands) -> None:
    text = "have a candidate score along and count how it differs, or stop that"
    inner = _add(actions, "shadow", text, _shadow)
    inner.add_argument("model", metavar="NAME@VERSION", nargs="?", help="candidate")
    inner.add_argument("--base", default="", metavar="NAME@VERSION", help="whose calls it scores (the default model)")
    inner.add_argument("--fraction", type=float, default=1.0, metavar="F", help="share of the calls, in (0, 1] (1)")
    inner.add_argument("--clear", action="store_true", help="stop, and print the last figures")


def _run(known: argparse.Namespace) -> int:
    """Carry out an action and return 0."""
    return asyncio.run(_act(known))


async def _act(known: argparse.Namespace) -> int:
    act: Act = known.act
    async with RewardModelClient(known.address, timeout_seconds=known.timeout, **credential_options(known)) as client:
        await act(client, known)
    return 0


async def _list(client: RewardModelClient, known: argparse.Namespace) -> None:
    held = await client.list_loaded()
    if known.json:
        print(json.dumps(dataclasses.asdict(held), indent=2, default=str))
        return
    print(*model_lines(held.models), sep="\n")
    cache, shadow = held.cache, held.shadow
    if cache.max_item_count:
        print(f"cache: {cache.item_count} of {cache.max_item_count} scores, {cache.size_bytes} bytes, {hit_rate(held)}")
    if shadow is not None:
        print(shadow_line(shadow))


async def _load(client: RewardModelClient, known: argparse.Namespace) -> None:
    loaded = await client.load(*split_label(known.model), expected_sha256=known.sha256)
    print(f"{loaded.name}@{loaded.version} is {loaded.state}", file=sys.stderr)
    print(loaded.model_sha256)


async def _unload(client: RewardModelClient, known: argparse.Namespace) -> None:
    await client.unload(*split_label(known.model))
    print(f"{known.model} is unloaded", file=sys.stderr)


async def _set_default(client: RewardModelClient, known: argparse.Namespace) -> None:
    name, version = split_label(known.model)
    expected = known.expected or default_label(await client.list_loaded(), name if known.name_only else "")
    previous = await client.set_default(name, version, expected_current=expected, name_only=known.name_only)
    print(f"{known.model} is the default; {previous} was before", file=sys.stderr)


async def _shadow(client: RewardModelClient, known: argparse.Namespace) -> None:
    if known.clear == bool(known.model):
        raise InvalidArgumentError("Give a candidate or --clear.", field="model", reason="INVALID_CONFIG")
    if known.clear:
        last = await client.clear_shadow()
        print("there was no shadow" if last is None else f"cleared; at last {shadow_line(last)}")
        return
    name, version = split_label(known.model)
    print(shadow_line(await client.set_shadow(name, version, fraction=known.fraction, base=known.base)))


def split_label(text: str) -> tuple[str, str]:
    """Return (name, version) of "name@version".

    Raises:
        InvalidArgumentError: It is not of that form.
    """
    name, _, version = text.partition("@")
    if not name or not version:
        raise InvalidArgumentError(f"{text!r} is not NAME@VERSION.", field="model", reason="INVALID_CONFIG")
    return name, version


def default_label(held: LoadedRewardModels, name: str) -> str:
    """Return the default "name@version" of a name, or of the service where it is empty.

    Raises:
        InvalidArgumentError: There is no such name.
    """
    for model in held.models:
        if (model.default_version and model.name == name) if name else model.default_model:
            return f"{model.name}@{model.version}"
    raise InvalidArgumentError(f"There is no reward model {name!r}.", field="model", reason="INVALID_CONFIG")


def model_lines(models: tuple[LoadedRewardModel, ...]) -> list[str]:
    """Return a line per version below a heading, in columns; * is the default model, + the default of its name."""
    rows: list[tuple[str, ...]] = [("", "model", "state", "engine", "requests", "sha256", "ready (UTC)")]
    for model in models:
        mark = "*" if model.default_model else "+" if model.default_version else ""
        ready = model.create_time.strftime("%Y-%m-%d %H:%M:%S") if model.create_time else ""
        name, requests = f"{model.name}@{model.version}", str(model.active_request_count)
        rows.append((mark, name, model.state, model.engine, requests, model.model_sha256[:12], ready))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def hit_rate(held: LoadedRewardModels) -> str:
    """Return the share of items that were answered from the cache, in words."""
    hits = sum(model.cache_hit_count for model in held.models)
    lookups = hits + sum(model.cache_miss_count for model in held.models)
    return f"{100 * hits / lookups:.1f} % of {lookups} items found" if lookups else "nothing looked up"


def shadow_line(shadow: RewardModelShadow) -> str:
    """Return what is compared and how it differs."""
    agreement = ""
    if shadow.pair_count:
        share = 100 * shadow.agreeing_pair_count / shadow.pair_count
        agreement = f", same order of {share:.1f} % of {shadow.pair_count} pairs"
    return (
        f"shadow: {shadow.candidate} beside {shadow.base} on {100 * shadow.fraction:g} % of the calls: "
        f"{shadow.scored_count} items scored, {shadow.dropped_count} dropped, {shadow.failed_count} failed, "
        f"difference {shadow.mean_difference:+.4f} in the mean, {shadow.mean_abs_difference:.4f} absolute{agreement}"
    )
