"""The command line: quick help, clear errors, exit statuses."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import tether
from tether.errors import FieldViolation, InvalidArgumentError, UnavailableError
from tether_services.cli.main import SERVICES, STAGES, build_parser, main, report_error

HELPS = [
    ["--version"],
    ["--help"],
    *(["serve", name, "--help"] for name in SERVICES),
    ["serve", "--help"],
    ["train", "--help"],
    *(["train", stage, "--help"] for stage in STAGES),
    ["up", "--help"],
    ["demo", "--help"],
    ["run", "--help"],
    *(
        ["run", action, "--help"]
        for action in ("start", "get", "show", "list", "watch", "cancel", "resume", "rollback")
    ),
    ["score", "--help"],
    ["generate", "--help"],
    ["adapter", "push", "--help"],
    ["bench", "score", "--help"],
]
LIST_MODULES = """
import json, sys
from tether_services.cli.main import main
try:
    main(json.loads(sys.argv[1]))
except SystemExit as end:
    print(json.dumps([end.code, sorted({name.split('.')[0] for name in sys.modules})]), file=sys.stderr)
"""


@pytest.mark.parametrize("arguments", HELPS, ids=" ".join)
def test_help_takes_under_a_second_and_loads_nothing_heavy(arguments: list[str]) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", LIST_MODULES, json.dumps(arguments)], capture_output=True, text=True, timeout=60
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Processor time: the figure for an idle machine, whatever else runs on this one.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
    code, modules = json.loads(done.stderr.splitlines()[-1])
    assert code == 0
    assert not {"torch", "transformers", "vllm", "peft", "trl", "datasets", "numpy", "matplotlib"} & set(modules)
    assert len(done.stdout) > 5


@pytest.mark.parametrize("name", SERVICES)
def test_service_help_lists_its_settings_with_their_meaning(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", name, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert f"tether serve {name}" in shown
    assert "\n  address = " in shown and f"TETHER_{name.upper()}__" in shown


@pytest.mark.parametrize("stage", STAGES)
def test_stage_help_describes_every_setting(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", stage, "--help"])
    lines = capsys.readouterr().out.splitlines()
    settings = [index for index, line in enumerate(lines) if line.startswith("  ") and " = " in line[:60]]
    assert len(settings) > 10
    assert all(lines[index + 1].strip() for index in settings)


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"tether {tether.__version__}\n"


def test_no_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "field"), [("serve", "service"), ("train", "stage")])
def test_an_unknown_name_is_a_configuration_error_that_lists_the_known_ones(
    command: str, field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "nonsense"]) == 42
    shown = capsys.readouterr().err
    assert "nonsense" in shown and "reward" in shown and f"field: {field}" in shown
    assert "Traceback" not in shown and len(shown.splitlines()) == 1


@pytest.mark.parametrize("name", SERVICES)
def test_every_bad_key_of_a_service_has_its_own_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", name, "--set", "nonsense=1", "--set", "threads=0", "--set", "log_level=LOUD"])
    assert ended.value.code == 42
    lines = capsys.readouterr().err.splitlines()
    assert {line.split(":")[0].strip() for line in lines[1:]} >= {"nonsense", "threads", "log_level"}


def test_every_bad_key_of_a_stage_has_its_own_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "pretrain", "--set", "nonsense=1", "--set", "seed=-1"])
    assert ended.value.code == 42
    lines = capsys.readouterr().err.splitlines()
    assert {line.split(":")[0].strip() for line in lines[1:]} == {"nonsense", "seed", "output", "data"}


def test_dry_run_prints_the_resolved_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "reward.toml"
    config.write_text('engine = "fake"\nthreads = 3\n')
    with pytest.raises(SystemExit) as ended:
        main(["serve", "reward", "--config", str(config), "--set", "threads=2", "--dry-run"])
    assert ended.value.code == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["engine"], shown["threads"]) == ("fake", 2)


def test_an_error_of_a_service_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert report_error(UnavailableError("127.0.0.1:1: connection refused")) == 1
    assert capsys.readouterr().err == "error: [UNAVAILABLE] 127.0.0.1:1: connection refused\n"


def test_an_error_of_one_field_is_one_line_that_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert report_error(InvalidArgumentError("n must be at least 1.", field="n")) == 1
    assert capsys.readouterr().err == "error: [INVALID_FIELD] n must be at least 1. (field: n)\n"


def test_an_error_of_several_fields_has_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    violations = (FieldViolation("model", "no folder"), FieldViolation("ppo.lam", "above 1"))
    error = InvalidArgumentError("Two keys are bad.", reason="INVALID_CONFIG", violations=violations)
    assert report_error(error) == 42
    assert capsys.readouterr().err.splitlines() == [
        "error: [INVALID_CONFIG] Two keys are bad.",
        "  model: no folder",
        "  ppo.lam: above 1",
    ]


def test_nobody_listening_is_one_line_and_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", "a", "b", "--address", "127.0.0.1:1", "--timeout", "20"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: [UNAVAILABLE] 127.0.0.1:1:")
    assert len(shown.splitlines()) == 1


def test_a_missing_extra_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    hide = "import sys; sys.modules['rich'] = None; "
    code = hide + "from tether_services.cli.main import main; sys.exit(main(['run', 'list']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "rich" in done.stderr and "pip install" in done.stderr and "Traceback" not in done.stderr


def test_the_module_runs_like_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tether_services", "--version"], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == f"tether {tether.__version__}\n"


def test_the_services_of_the_parser_exist_as_modules() -> None:
    import importlib.util

    for name in SERVICES:
        assert importlib.util.find_spec(f"tether_services.{name}.__main__") is not None
    assert build_parser().prog == "tether"
