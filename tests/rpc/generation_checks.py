"""What a real engine must satisfy, compared with plain transformers and PEFT forward passes; shared by both engines."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.rpc.adapter_files import AdapterBytes, activate, begin_request, push, read_adapter
from tests.rpc.generator_serving import Serving
from tether.v1 import adapter_pb2, generator_pb2
from tether_services.runtime.content_hash import hash_model_folder

RUN_ID = "run-a"
NUM_CALLERS = 16
PROBES = ((1, 40, 50, 60, 70, 80), (1, 300, 200, 100))


class Oracle:
    """A base model and its adapters in plain transformers and PEFT, in float32."""

    def __init__(self, folder: Path, adapters: dict[str, Path] | None = None) -> None:
        self.folder = folder
        self.sha256 = hash_model_folder(folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.peft: Any = None
        for name, path in (adapters or {}).items():
            if self.peft is None:
                self.peft = PeftModel.from_pretrained(self.model, str(path), adapter_name=name)
            else:
                self.peft.load_adapter(str(path), adapter_name=name)
        if self.peft is not None:
            self.peft.eval()

    @torch.no_grad()
    def logits(self, token_ids: Sequence[int], adapter: str | None = None) -> Tensor:
        """[T, V] logits after each token."""
        inputs = {"input_ids": torch.tensor([list(token_ids)])}
        if self.peft is None:
            output = self.model(**inputs)
        elif adapter is None:
            with self.peft.disable_adapter():
                output = self.peft(**inputs)
        else:
            self.peft.set_adapter(adapter)
            output = self.peft(**inputs)
        logits: Tensor = output.logits[0].float()
        return logits

    def logprobs(
        self,
        prompt: Sequence[int],
        response: Sequence[int],
        *,
        adapter: str | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
    ) -> list[float]:
        """Log-probabilities of the response under temperature and filters, by loops over single positions."""
        logits = self.logits([*prompt, *response], adapter)[len(prompt) - 1 : -1] / temperature
        if top_p == 1 and not top_k:
            values: list[float] = (
                torch.log_softmax(logits, -1).gather(-1, torch.tensor(response)[:, None])[:, 0].tolist()
            )
            return values
        return [
            float(torch.log_softmax(filter_slowly(row, top_p, top_k), dim=-1)[token])
            for row, token in zip(logits, response, strict=True)
        ]

    def probes(self, adapter: str | None) -> list[adapter_pb2.AdapterProbe]:
        """Proofs of an adapter."""
        return [
            adapter_pb2.AdapterProbe(token_ids=ids, logprobs=self.logprobs(ids[:1], ids[1:], adapter=adapter))
            for ids in PROBES
        ]


def filter_slowly(logits: Tensor, top_p: float, top_k: int) -> Tensor:
    """The kept logits of one position, chosen one at a time."""
    order = sorted(range(len(logits)), key=lambda token: -float(logits[token]))
    if top_k:
        order = order[:top_k]
    mass = torch.softmax(logits[order].double(), dim=-1).tolist()
    kept, total = [], 0.0
    for token, share in zip(order, mass, strict=True):
        kept.append(token)
        total += share
        if total >= top_p:
            break
    filtered = torch.full_like(logits, -torch.inf)
    filtered[kept] = logits[kept]
    return filtered


async def push_real(
    serving: Serving, oracle: Oracle, name: str, folder: Path, version: int, **changes: Any
) -> AdapterBytes:
    """Push a PEFT folder with the proofs that the oracle computes."""
    adapter = read_adapter(folder)
    run_id = changes.pop("run_id", RUN_ID)
    fields: dict[str, Any] = {"base_model_sha256": oracle.sha256, "probes": oracle.probes(name)}
    await push(serving.adapters, begin_request(adapter, run_id, version, **(fields | changes)), adapter)
    return adapter


async def check_golden_story(serving: Serving, stories: Path) -> None:
    """Greedy decoding of the reference model gives its golden tokens, text and total log-probability."""
    golden = json.loads((stories / "golden.json").read_text())
    response = await serving.generate(golden["prompt_token_ids"], max_tokens=golden["num_new_tokens"], temperature=0.0)
    (completion,) = response.completions
    assert list(completion.token_ids) == golden["greedy_token_ids"]
    assert completion.text == golden["greedy_text"]
    assert abs(sum(completion.logprobs) - -94.6836) < 1e-3
    assert completion.finish_reason == generator_pb2.FINISH_REASON_LENGTH
    to_end = await serving.generate(golden["prompt_token_ids"], max_tokens=400, temperature=0.0)
    (whole,) = to_end.completions
    assert (len(whole.token_ids), whole.token_ids[-1]) == (346, 1)
    assert whole.finish_reason == generator_pb2.FINISH_REASON_STOP
    assert whole.text == golden["greedy_full_story"]


async def check_logprobs(serving: Serving, oracle: Oracle, *, tolerance: float) -> None:
    """Returned log-probabilities are those of the distribution sampled from, computed independently."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 1.0},
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 5},
        {"temperature": 0.9, "top_p": 0.8},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.6},
        {"temperature": 1.0, "top_k": 1},
    ]
    prompts = [(1, 300 + i, 40, 50 + i) for i in range(len(kinds))]
    responses = await asyncio.gather(
        *(
            serving.generate(prompt, n=2, max_tokens=24, seed=9, ignore_eos=True, **kind)
            for prompt, kind in zip(prompts, kinds, strict=True)
        )
    )
    for prompt, kind, response in zip(prompts, kinds, responses, strict=True):
        for completion in response.completions:
            expected = oracle.logprobs(prompt, list(completion.token_ids), **kind)
            assert len(expected) == 24
            for given, value in zip(completion.logprobs, expected, strict=True):
                assert abs(given - value) < tolerance, kind
    top_1 = responses[-1].completions[0]
    assert list(top_1.logprobs) == [0.0] * 24


async def check_greedy_logprobs(serving: Serving, oracle: Oracle, *, tolerance: float) -> None:
    """At temperature 0 the tokens are the most likely ones and the values those of temperature 1, filters or not."""
    plain = await serving.generate((1, 40, 50), max_tokens=24, temperature=0.0, ignore_eos=True)
    filtered = await serving.generate((1, 40, 50), max_tokens=24, temperature=0.0, ignore_eos=True, top_k=3, top_p=0.5)
    tokens = list(plain.completions[0].token_ids)
    assert list(filtered.completions[0].token_ids) == tokens
    assert oracle.logits([1, 40, 50, *tokens])[2:-1].argmax(dim=-1).tolist() == tokens
    expected = oracle.logprobs((1, 40, 50), tokens)
    for response in (plain, filtered):
        worst = max(abs(a - b) for a, b in zip(response.completions[0].logprobs, expected, strict=True))
        assert worst < tolerance


async def check_seeds(serving: Serving) -> None:
    """A seed gives the same tokens alone, again, and in the company of other requests and other lengths."""
    prompts = [(1, 40, 50), (1, 60), (1, 70, 80, 90, 100), (1, 200, 201)]
    alone = [
        [list(c.token_ids) for c in (await serving.generate(p, n=2, max_tokens=32, seed=i)).completions]
        for i, p in enumerate(prompts)
    ]
    again = await serving.generate(prompts[0], n=2, max_tokens=32, seed=0)
    assert [list(c.token_ids) for c in again.completions] == alone[0]
    together = await asyncio.gather(*(serving.generate(p, n=2, max_tokens=32, seed=i) for i, p in enumerate(prompts)))
    assert [[list(c.token_ids) for c in response.completions] for response in together] == alone
    assert alone[0][0] != alone[0][1]
    other = await serving.generate(prompts[0], n=2, max_tokens=32, seed=1)
    assert [list(c.token_ids) for c in other.completions] != alone[0]


async def check_stops(serving: Serving) -> None:
    """Stop ids and stop texts end a completion, stay in it, and say why it ended."""
    free = (await serving.generate((1, 40, 50), max_tokens=40, seed=4, ignore_eos=True)).completions[0]
    assert (len(free.token_ids), free.finish_reason) == (40, generator_pb2.FINISH_REASON_LENGTH)
    ended = (await serving.generate((1, 40, 50), max_tokens=40, seed=4)).completions[0]  # perhaps by itself
    assert len(ended.token_ids) > 4
    assert list(ended.token_ids) == list(free.token_ids)[: len(ended.token_ids)]
    stop_id = ended.token_ids[len(ended.token_ids) // 2]
    by_id = (await serving.generate((1, 40, 50), max_tokens=40, seed=4, stop_token_ids=[stop_id])).completions[0]
    end = list(free.token_ids).index(stop_id) + 1
    assert list(by_id.token_ids) == list(free.token_ids)[:end]
    assert by_id.finish_reason == generator_pb2.FINISH_REASON_STOP
    assert len(by_id.logprobs) == end
    word = ended.text[len(ended.text) // 2 :][:4]
    by_text = (await serving.generate((1, 40, 50), max_tokens=40, seed=4, stop=["no such text", word])).completions[0]
    assert by_text.finish_reason == generator_pb2.FINISH_REASON_STOP
    assert word in by_text.text
    assert free.text.startswith(by_text.text)
    assert list(by_text.token_ids) == list(free.token_ids)[: len(by_text.token_ids)]


async def check_adapter_parity(
    serving: Serving, oracle: Oracle, folders: dict[str, Path], *, tolerance: float, run_id: str = RUN_ID
) -> None:
    """Swapping v1, v2, v1, base with one long prompt: each output is its own version's, by PEFT's forward pass."""
    names = list(folders)
    for version, name in enumerate(names, start=1):
        await push_real(serving, oracle, name, folders[name], version, run_id=run_id)
    prompt = [1, *range(100, 299)]
    seen: dict[int, list[int]] = {}
    for version in (1, 2, 1, 0, 2):
        await activate(serving.adapters, run_id, version)
        response = await serving.generate(prompt, max_tokens=16, seed=3, temperature=0.8, ignore_eos=True)
        tokens = list(response.completions[0].token_ids)
        adapter = names[version - 1] if version else None
        assert response.policy_version == version
        expected = oracle.logprobs(prompt, tokens, adapter=adapter, temperature=0.8)
        worst = max(abs(a - b) for a, b in zip(response.completions[0].logprobs, expected, strict=True))
        assert worst < tolerance, (version, worst)
        assert seen.setdefault(version, tokens) == tokens
    assert len({tuple(tokens) for tokens in seen.values()}) == 3


async def check_versions_side_by_side(
    serving: Serving, oracle: Oracle, folders: dict[str, Path], *, tolerance: float, run_id: str = RUN_ID
) -> None:
    """Requests for the base and two adapters at the same time: each gets its own policy, proofs too."""
    names = list(folders)[:2]
    for version, name in enumerate(names, start=1):
        await push_real(serving, oracle, name, folders[name], version, run_id=run_id)
    await activate(serving.adapters, run_id, 0)
    pins = [number % 3 for number in range(24)]
    running = [
        asyncio.ensure_future(
            serving.generate((1, 40 + number), policy_version=pin, max_tokens=20, ignore_eos=True, run_id=run_id)
        )
        for number, pin in enumerate(pins)
    ]
    third = list(folders)[2]
    await push_real(serving, oracle, third, folders[third], 3, run_id=run_id)  # its proof compares with the base
    for number, (pin, response) in enumerate(zip(pins, await asyncio.gather(*running), strict=True)):
        (completion,) = response.completions
        assert response.policy_version == pin
        expected = oracle.logprobs(
            (1, 40 + number), list(completion.token_ids), adapter=names[pin - 1] if pin else None
        )
        assert max(abs(a - b) for a, b in zip(completion.logprobs, expected, strict=True)) < tolerance, pin


def best_match(
    oracle: Oracle, prompt: Sequence[int], completion: generator_pb2.Completion, names: Sequence[str]
) -> str:
    """The one adapter whose forward pass gives the completion's log-probabilities; fails if it is not exactly one."""
    matching = []
    for name in names:
        expected = oracle.logprobs(prompt, list(completion.token_ids), adapter=name)
        if max(abs(a - b) for a, b in zip(completion.logprobs, expected, strict=True)) < 1e-4:
            matching.append(name)
    assert len(matching) == 1, matching
    return matching[0]


async def check_swaps_under_load(
    serving: Serving, oracle: Oracle, folders: dict[str, Path], *, swaps: int, run_id: str = RUN_ID
) -> None:
    """Push and activate many versions while callers generate: no failure, each response exactly one version's."""
    names = list(folders)
    done = asyncio.Event()
    seen: list[tuple[Sequence[int], generator_pb2.GenerateResponse]] = []

    async def call(number: int) -> None:
        prompt = [1, 40 + number, 50, 60 + number][: 2 + number % 3]
        while not done.is_set():
            seen.append((prompt, await serving.generate(prompt, max_tokens=10, ignore_eos=True)))

    await push_real(serving, oracle, names[1 % len(names)], folders[names[1 % len(names)]], 1, run_id=run_id)
    await activate(serving.adapters, run_id, 1)
    tasks = [asyncio.ensure_future(call(number)) for number in range(NUM_CALLERS)]
    for version in range(2, swaps + 1):
        name = names[version % len(names)]
        await push_real(serving, oracle, name, folders[name], version, run_id=run_id)
        await activate(serving.adapters, run_id, version)
    done.set()
    await asyncio.gather(*tasks)
    for prompt, response in seen[:: max(1, len(seen) // 200)]:
        name = best_match(oracle, prompt, response.completions[0], names)
        assert name == names[response.policy_version % len(names)]
    assert len({response.policy_version for _, response in seen}) > swaps // 4
    await serving.service.adapters.settle()
    assert len([path for path in serving.stored_files() if run_id in path.parts]) == 2 * 3
