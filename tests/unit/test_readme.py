"""What the README tells a reader to type fits what the code accepts."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from tether_services.cli.local_commands import local_options
from tether_services.cli.main import build_parser
from tether_services.generator.config import GeneratorSettings
from tether_services.local.deployment import SERVICES, Addresses, service_settings
from tether_services.orchestrator.run_config import parse_run_config
from tether_services.reference.config import ReferenceSettings
from tether_services.runtime.settings import merge_overrides

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
ADDRESSES = Addresses("h:1", "h:2", "h:3", "h:7", "h:4", "h:5", *[dict.fromkeys(SERVICES, "h:6")] * 2)


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [content for name, content in found if name == language]


def commands() -> list[list[str]]:
    """Return the arguments of every `tether` command in the README's shell blocks."""
    lines = "".join(blocks("")).replace("\\\n", " ").splitlines()
    split = [shlex.split(line, comments=True) for line in lines]
    return [words[1:] for words in split if words and words[0].endswith("/tether")]


def run_toml() -> str:
    (document,) = blocks("toml")
    return document


def test_every_tether_command_is_accepted() -> None:
    assert len(commands()) >= 3
    for arguments in commands():
        build_parser().parse_args(arguments)


def test_the_run_trains_in_the_numeric_type_that_the_services_compute_in() -> None:
    config = parse_run_config(run_toml())
    (up,) = (arguments for arguments in commands() if arguments[0] == "up" and "--model" in arguments)
    known = build_parser().parse_args(up)
    overrides: dict[str, dict[str, object]] = {}
    merge_overrides(overrides, known.overrides)
    options = local_options(known, settings=overrides)
    chosen = service_settings(options, ADDRESSES)
    generator = GeneratorSettings.model_validate(chosen["generator"])
    reference = ReferenceSettings.model_validate(chosen["reference"])
    assert generator.dtype == reference.dtype == config.trainer.dtype
    assert chosen["generator"]["model"] == config.model
