"""Example requests of the OpenAPI documents; a test sends each to a service."""

from __future__ import annotations

from typing import Any, Final

EXAMPLES: Final[dict[str, dict[str, Any]]] = {
    "GeneratorService.Generate": {
        "text": {
            "prompt": "Once upon a time",
            "n": 2,
            "sampling": {"max_tokens": 32, "temperature": 0.8, "top_p": 0.95, "seed": "7"},
        },
        "chat": {
            "messages": [{"role": "user", "content": "Tell me a story."}],
            "n": 1,
            "sampling": {"max_tokens": 64, "stop": ["The end"]},
        },
    },
    "RewardService.Score": {
        "text": {
            "items": [
                {"prompt": "Once upon a time", "response": " there was a happy dog."},
                {"prompt": "Once upon a time", "response": " it rained."},
            ]
        },
        "chat": {
            "items": [
                {
                    "messages": [
                        {"role": "user", "content": "Is it warm?"},
                        {"role": "assistant", "content": "Yes, 25 degrees."},
                    ]
                }
            ]
        },
        "token ids": {"items": [{"prompt_token_ids": [1, 82], "response_token_ids": [35, 107, 2]}]},
    },
    "RewardService.Compare": {
        "text": {"prompt": "Once upon a time", "responses": [" there was a happy dog.", " it rained."]}
    },
    "RewardService.ListRewardModels": {"first page": {}, "two": {"page_size": 2}},
    "ReferenceService.ComputeLogprobs": {
        "token ids": {
            "items": [{"prompt_token_ids": [1, 82], "response_token_ids": [35, 107, 2]}],
            "temperature": 1.0,
            "include_entropies": True,
        }
    },
    "OrchestratorService.GetRun": {"run": {"run_id": "run-1"}},
}
"""Method -> name -> body."""
