"""Settings of the generator: what is refused, and that help is quick and light."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from tether.errors import InvalidArgumentError
from tether_services.generator.__main__ import main
from tether_services.generator.config import ENV_PREFIX, AdapterSettings, GeneratorSettings
from tether_services.runtime.settings import CONFIG_ERROR_EXIT_CODE, load_settings


def load(**values: Any) -> GeneratorSettings:
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in values.items()]
    return load_settings(GeneratorSettings, env_prefix=ENV_PREFIX, overrides=overrides, environ={})


@pytest.mark.parametrize(
    ("fields", "values"),
    [
        ({"GeneratorSettings"}, {}),
        ({"GeneratorSettings"}, {"engine": "vllm"}),
        ({"GeneratorSettings"}, {"engine": "fake", "model": "x"}),
        ({"GeneratorSettings"}, {"engine": "fake", "dtype": "float32"}),
        ({"GeneratorSettings"}, {"engine": "fake", "gpu_memory_utilization": 0.5}),
        ({"GeneratorSettings"}, {"model": "x", "fake_token_seconds": 0.5}),
        ({"GeneratorSettings"}, {"model": "x", "gpu_memory_utilization": 0.5}),
        ({"GeneratorSettings"}, {"engine": "vllm", "model": "x", "device": "cpu"}),
        ({"GeneratorSettings"}, {"engine": "fake", "max_n": 64, "batch__queue_limit": 63}),
        ({"GeneratorSettings"}, {"engine": "fake", "batch__max_items": 3}),
        ({"GeneratorSettings"}, {"engine": "fake", "batch__training_share": 0.3}),
        ({"GeneratorSettings"}, {"engine": "vllm", "model": "x", "batch__max_delay_seconds": 1}),
        ({"engine"}, {"engine": "tgi"}),
        ({"dtype"}, {"model": "x", "dtype": "int4"}),
        ({"device"}, {"model": "x", "device": "tpu"}),
        ({"max_n"}, {"engine": "fake", "max_n": 0}),
        ({"max_model_len"}, {"engine": "fake", "max_model_len": 1}),
        ({"gpu_memory_utilization"}, {"engine": "vllm", "model": "x", "gpu_memory_utilization": 1.5}),
        ({"adapters.max_rank"}, {"engine": "fake", "adapters__max_rank": 0}),
        ({"adapters.max_bytes"}, {"engine": "fake", "adapters__max_bytes": 10}),
        ({"adapters.free_bytes"}, {"engine": "fake", "adapters__free_bytes": -1}),
        ({"adapters.quota_bytes"}, {"engine": "fake", "adapters__quota_bytes": -1}),
        ({"adapters.keep_versions"}, {"engine": "fake", "adapters__keep_versions": 0}),
        ({"adapters.prove_tolerance"}, {"engine": "fake", "adapters__prove_tolerance": 0}),
        ({"adapters.upload_seconds"}, {"engine": "fake", "adapters__upload_seconds": "nan"}),
        ({"speed", "adapters.path"}, {"engine": "fake", "speed": 1, "adapters__path": "x"}),
    ],
)
def test_bad_setting_is_named(fields: set[str], values: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        load(**values)
    assert {violation.field for violation in caught.value.violations} == fields


def test_defaults_serve_on_loopback() -> None:
    settings = load(model="x")
    assert (settings.address, settings.admin_address) == ("127.0.0.1:50051", "127.0.0.1:50061")
    assert (settings.adapters.free_bytes, settings.adapters.quota_bytes) == (64 * 1024 * 1024, 0)
    assert (settings.engine, settings.max_n, settings.adapters.keep_versions) == ("transformers", 64, 3)


def test_environment_reaches_nested_settings() -> None:
    environ = {"TETHER_GENERATOR__ENGINE": "fake", "TETHER_GENERATOR__ADAPTERS__MAX_RANK": "64"}
    settings = load_settings(GeneratorSettings, env_prefix=ENV_PREFIX, environ=environ)
    assert (settings.engine, settings.adapters.max_rank) == ("fake", 64)


def test_one_changed_batch_setting_leaves_the_others_at_the_generators_defaults() -> None:
    settings = load(model="x", batch__max_items=8)
    assert (settings.batch.max_items, settings.batch.max_tokens, settings.batch.max_delay_seconds) == (8, 65536, 0.05)


def test_every_setting_says_what_it_is() -> None:
    for model in (GeneratorSettings, AdapterSettings):
        for name, field in model.model_fields.items():
            if name not in ("batch", "adapters"):
                assert field.description and len(field.description) > 20, name


def test_bad_setting_on_the_command_line_exits_with_its_own_status(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--set", "engine=fake", "--set", "adapters.rank=3"])
    assert caught.value.code == CONFIG_ERROR_EXIT_CODE
    assert "adapters.rank: unknown key" in capsys.readouterr().err


def test_dry_run_prints_the_resolved_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--set", "engine=fake", "--set", "max_n=5", "--dry-run"])
    assert caught.value.code == 0
    assert '"max_n": 5' in capsys.readouterr().out


def test_help_loads_no_engine_library() -> None:
    script = (
        "import sys\n"
        "from tether_services.generator.__main__ import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'transformers', 'vllm', 'peft', 'numpy'} & set(sys.modules), sorted(sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False)
    assert result.returncode == 0, result.stderr
    assert "adapters.keep_versions" in result.stdout


def test_fake_engine_needs_no_tensor_library() -> None:
    script = (
        "import sys\n"
        "from tether_services.generator.config import GeneratorSettings\n"
        "from tether_services.generator.service import GeneratorService\n"
        "from tether_services.runtime.metrics import new_registry\n"
        "GeneratorService(GeneratorSettings(engine='fake'), new_registry())\n"
        "assert not {'torch', 'transformers', 'vllm', 'peft'} & set(sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False)
    assert result.returncode == 0, result.stderr
