"""Checks of adapter files as pure functions."""

from __future__ import annotations

import json
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from tests.rpc.adapter_files import fake_adapter, fake_tensors, peft_config
from tether.errors import FailedPreconditionError
from tether_services.generator.engines.fake import FAKE_LINEAR_SHAPES
from tether_services.generator.proof import (
    check_base,
    check_change,
    check_claim,
    check_effect,
    default_tolerance,
    trainer_change,
)
from tether_services.generator.uploads import DeclaredFile, Probe, split_at_files
from tether_services.generator.verification import (
    AdapterShape,
    check_finite,
    check_hash,
    check_targets,
    check_tensors,
    expected_tensors,
    normalise_adapter_config,
    read_safetensors_header,
)

SHAPE = AdapterShape(2, frozenset({"q_proj", "v_proj"}))
TARGETS = ("q_proj", "v_proj")


def write(folder: Path, weights: bytes) -> Path:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(weights)
    return path


def reason_of(check: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(FailedPreconditionError) as caught:
        check(*arguments, **options)
    return caught.value.reason


def test_header_names_type_shape_and_place_of_every_tensor(tmp_path: Path) -> None:
    tensors: dict[str, np.ndarray[Any, Any]] = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.ones(4, dtype=np.float16),
    }
    path = write(tmp_path, save(tensors))
    entries = read_safetensors_header(path)
    content = path.read_bytes()
    assert {name: entry.shape for name, entry in entries.items()} == {"a": (2, 3), "b": (4,)}
    for name, entry in entries.items():
        assert content[entry.begin : entry.end] == tensors[name].tobytes()


def test_metadata_of_the_header_is_no_tensor(tmp_path: Path) -> None:
    path = write(tmp_path, save({"a": np.zeros(1, dtype=np.float32)}, metadata={"format": "pt"}))
    assert list(read_safetensors_header(path)) == ["a"]


def test_header_alone_is_read(tmp_path: Path) -> None:
    weights = fake_adapter(1).weights
    (length,) = struct.unpack("<Q", weights[:8])
    path = write(tmp_path, weights[: 8 + length] + b"\xff" * (len(weights) - 8 - length))
    assert set(read_safetensors_header(path)) == set(fake_tensors(1))


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_refused_or_read_but_never_crash(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes
) -> None:
    path = write(tmp_path_factory.mktemp("fuzz"), raw)
    try:
        read_safetensors_header(path)
    except FailedPreconditionError as error:
        assert error.reason in ("NOT_SAFETENSORS", "BAD_DTYPE")


@given(position=st.integers(0, 500), value=st.integers(0, 255))
def test_changed_byte_of_the_header_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    weights = bytearray(fake_adapter(1).weights)
    weights[position] = value
    path = write(tmp_path_factory.mktemp("fuzz"), bytes(weights))
    expected = expected_tensors(FAKE_LINEAR_SHAPES, SHAPE)
    try:
        entries = read_safetensors_header(path)
        check_tensors(entries, expected)
    except FailedPreconditionError as error:
        assert error.reason.isupper()
    else:
        assert {name: entry.shape for name, entry in entries.items()} == expected


@given(
    raw=st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    )
)
def test_arbitrary_json_as_configuration_is_refused(raw: object) -> None:
    assert reason_of(normalise_adapter_config, json.dumps(raw).encode(), SHAPE) == "BAD_ADAPTER_CONFIG"


def test_expected_tensors_are_those_of_the_targets_on_this_base() -> None:
    shapes = {"model.layers.0.self_attn.q_proj": (8, 16), "model.layers.0.mlp.up_proj": (8, 32)}
    expected = expected_tensors(shapes, AdapterShape(4, frozenset({"up_proj"})))
    assert expected == {
        "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": (4, 8),
        "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight": (32, 4),
    }


def test_right_tensors_pass_and_each_kind_of_wrong_one_has_its_reason(tmp_path: Path) -> None:
    expected = expected_tensors(FAKE_LINEAR_SHAPES, SHAPE)
    entries = read_safetensors_header(write(tmp_path, fake_adapter(1).weights))
    check_tensors(entries, expected)
    name = next(iter(entries))
    assert reason_of(check_tensors, {k: v for k, v in entries.items() if k != name}, expected) == "MISSING_TENSOR"
    assert reason_of(check_tensors, entries | {"other": entries[name]}, expected) == "UNKNOWN_TENSOR"
    assert reason_of(check_tensors, entries, expected | {name: (9, 9)}) == "WRONG_SHAPE"


def bfloat16_file(bits: list[int]) -> bytes:
    header = {"a": {"dtype": "BF16", "shape": [len(bits)], "data_offsets": [0, 2 * len(bits)]}}
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + struct.pack(f"<{len(bits)}H", *bits)


@pytest.mark.parametrize(
    ("bits", "finite"),
    [(0x3F80, True), (0x7F7F, True), (0xFF7F, True), (0x0001, True), (0x7F80, False), (0xFF80, False), (0x7FC0, False)],
)
def test_bfloat16_is_checked_by_its_bits(tmp_path: Path, bits: int, finite: bool) -> None:
    path = write(tmp_path, bfloat16_file([0, bits, 0]))
    entries = read_safetensors_header(path)
    if finite:
        check_finite(path, entries)
    else:
        assert reason_of(check_finite, path, entries) == "NOT_FINITE"


@pytest.mark.parametrize("kind", [np.float32, np.float16])
@pytest.mark.parametrize(
    ("value", "finite"), [("max", True), ("tiny", True), ("inf", False), ("-inf", False), ("nan", False)]
)
def test_floats_are_checked_by_their_bits(tmp_path: Path, kind: Any, value: str, finite: bool) -> None:
    number = getattr(np.finfo(kind), value) if value in ("max", "tiny") else float(value)
    path = write(tmp_path, save({"a": np.array([1, -1, number], dtype=kind), "b": np.zeros(3, dtype=kind)}))
    entries = read_safetensors_header(path)
    if finite:
        check_finite(path, entries)
    else:
        assert reason_of(check_finite, path, entries) == "NOT_FINITE"


def test_last_value_of_a_tensor_longer_than_a_chunk_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tether_services.generator.verification.FINITE_CHUNK_ITEMS", 4)
    values = np.zeros(11, dtype=np.float32)
    path = write(tmp_path, save({"a": values}))
    check_finite(path, read_safetensors_header(path))
    values[-1] = np.nan
    path = write(tmp_path, save({"a": values}))
    assert reason_of(check_finite, path, read_safetensors_header(path)) == "NOT_FINITE"


def test_configuration_is_rewritten_from_what_matters() -> None:
    stored = normalise_adapter_config(peft_config(2, TARGETS, lora_alpha=7.5, use_rslora=True), SHAPE)
    assert stored == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 2,
        "lora_alpha": 7.5,
        "use_rslora": True,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }


def test_configuration_that_peft_itself_writes_passes(tmp_path: Path) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=2, lora_alpha=4, target_modules=list(TARGETS), task_type="CAUSAL_LM", lora_dropout=0.1)
    config.save_pretrained(str(tmp_path))
    stored = normalise_adapter_config((tmp_path / "adapter_config.json").read_bytes(), SHAPE)
    again = LoraConfig.from_pretrained(str(tmp_path))
    assert (stored["r"], stored["lora_alpha"], set(stored["target_modules"])) == (
        again.r,
        again.lora_alpha,
        set(TARGETS),
    )


def test_wrong_hash_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, b"abc")
    check_hash(path, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    assert reason_of(check_hash, path, "0" * 64) == "HASH_MISMATCH"


def test_targets_must_be_layers_of_the_base() -> None:
    check_targets(FAKE_LINEAR_SHAPES, TARGETS)
    for bad in ("lm_head", "proj", "self_attn.q_proj", "q_proj ", ""):
        assert reason_of(check_targets, FAKE_LINEAR_SHAPES, ["q_proj", bad]) == "UNKNOWN_TARGET_MODULE"


def test_claim_is_the_mean_absolute_difference() -> None:
    assert check_claim([-1.0, -2.0], [-1.5, -2.1], tolerance=0.5) == pytest.approx(0.3)
    assert reason_of(check_claim, [-1.0, -2.0], [-1.5, -2.1], tolerance=0.29) == "PROOF_FAILED"
    assert reason_of(check_claim, [float("nan")], [-1.0], tolerance=1.0) == "PROOF_FAILED"


def probe(logprobs: list[float], base_logprobs: list[float]) -> Probe:
    return Probe(tuple(range(len(logprobs) + 1)), tuple(logprobs), tuple(base_logprobs))


def test_without_the_trainers_view_of_the_base_the_effect_must_be_as_declared() -> None:
    silent = [probe([-1.0], [])]
    check_effect([-1.0, -2.0], [-1.0, -2.1], [probe([-1.0, -2.0], [])], differs=True, tolerance=1e-3)
    check_effect([-1.0], [-1.0], silent, differs=False, tolerance=1e-3)
    check_effect([-1.0], [-1.0005], silent, differs=False, tolerance=1e-3)
    assert reason_of(check_effect, [-1.0], [-1.0], silent, differs=True, tolerance=1e-3) == "SAME_AS_BASE"
    assert reason_of(check_effect, [-1.0], [-1.01], silent, differs=False, tolerance=1e-3) == "DIFFERS_FROM_BASE"


def test_half_of_a_clear_effect_must_be_there() -> None:
    base, trained = [-1.5, -2.5], [probe([-1.0, -2.0], [-1.5, -2.5])]  # 0.5 nats on average
    for served in ([-1.25, -2.25], [-0.75, -2.5], [-1.0, -2.0]):
        check_effect(served, base, trained, differs=True, tolerance=0.049)
    weak = [-1.375, -2.375]
    assert reason_of(check_effect, weak, base, trained, differs=True, tolerance=0.049) == "EFFECT_TOO_SMALL"
    check_effect(weak, base, trained, differs=True, tolerance=0.05)  # ten tolerances or less may be arithmetic


def test_no_effect_at_all_is_accepted_only_where_the_trainer_saw_next_to_none() -> None:
    same: list[float] = [-1.0, -2.0]
    tiny, small = probe(same, [-1.0, -2.0 - 1e-6]), probe(same, [-1.0, -2.0 - 1e-3])
    check_effect(same, same, [tiny], differs=True, tolerance=1e-3)
    assert reason_of(check_effect, same, same, [small], differs=True, tolerance=1e-3) == "SAME_AS_BASE"
    # In bfloat16 that much vanishes.
    check_effect(same, same, [small], differs=True, tolerance=0.05)


def test_an_engine_that_computes_nonsense_proves_nothing() -> None:
    nan = float("nan")
    trained = [probe([-1.0], [-1.4])]
    assert reason_of(check_effect, [nan], [-1.4], trained, differs=True, tolerance=1e-3) == "EFFECT_TOO_SMALL"


def test_a_version_shows_more_than_a_hundredth_of_the_change_that_its_trainer_saw() -> None:
    before = [-1.0, -2.0]
    check_change([-1.002, -2.0], before, seen=0.099)  # 0.001 on average
    for served in (before, [-1.002, -2.0]):
        assert reason_of(check_change, served, before, seen=0.101) == "SAME_AS_BEFORE"


def test_the_change_that_a_trainer_saw_is_known_where_the_probes_are_of_the_same_tokens() -> None:
    new, old = probe([-1.0, -2.0], []), probe([-1.5, -2.1], [])
    assert trainer_change([new], [old]) == pytest.approx(0.3)
    assert trainer_change([new, new], [old]) is None
    assert trainer_change([new], [Probe((2, 1, 0), (-1.5, -2.1))]) is None


def test_a_base_that_has_changed_is_noticed_beyond_the_rounding_of_its_type() -> None:
    before = [-1.0, -2.0]
    check_base([-1.00019, -2.0], before, dtype="float32")
    assert reason_of(check_base, [-1.00021, -2.0], before, dtype="float32") == "BASE_CHANGED"
    check_base([-1.09, -2.0], before, dtype="bfloat16")
    assert reason_of(check_base, [-1.11, -2.0], before, dtype="bfloat16") == "BASE_CHANGED"
    assert reason_of(check_base, [float("nan"), -2.0], before, dtype="float32") == "BASE_CHANGED"


def test_tolerance_depends_on_the_type_of_the_weights() -> None:
    assert (default_tolerance("float32"), default_tolerance("bfloat16")) == (1e-3, 0.05)


@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 60), max_size=6),
)
def test_pieces_of_a_run_of_bytes_rebuild_the_files(sizes: list[int], cuts: list[int]) -> None:
    data = bytes(range(sum(sizes)))
    files = [DeclaredFile(str(index), size, "") for index, size in enumerate(sizes)]
    bounds = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    rebuilt = {file.name: bytearray(file.size_bytes) for file in files}
    for begin, end in pairwise(bounds):
        for name, start, piece in split_at_files(files, begin, data[begin:end]):
            rebuilt[name][start : start + len(piece)] = piece
    assert b"".join(rebuilt.values()) == data
