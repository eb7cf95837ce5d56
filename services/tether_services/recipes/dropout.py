"""Dropout in the residual stream of a model whose architecture has none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional

from tether.errors import InvalidArgumentError

__all__ = ["residual_dropout"]


@contextmanager
def residual_dropout(model: Any, *, share: float) -> Iterator[None]:
    """Zero a share of what embeddings, attention and feed-forward add to the residual stream, in training mode only.

    Before a score head also of what the head reads: it is fresh and sees few labels.

    It is hooked in and taken out again, so that the model that is written has none: a small text is read many times.

    Args:
        model: Of the Llama family, with a language-model or a score head, with or without an adapter.
        share: In [0, 1).

    Raises:
        InvalidArgumentError: The layers of the model have other names.
    """

    def drop(module: nn.Module, _: Any, output: Tensor) -> Tensor:
        return functional.dropout(output, share, training=module.training)

    hooks = [source.register_forward_hook(drop) for source in _sources(model)] if share > 0.0 else []
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _sources(model: Any) -> list[nn.Module]:
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    body = getattr(plain, plain.base_model_prefix)
    try:
        parts = [part for layer in body.layers for part in (layer.self_attn.o_proj, layer.mlp.down_proj)]
        read_by_head = [body.norm] if hasattr(plain, "score") else []
        return [body.embed_tokens, *parts, *read_by_head]
    except AttributeError as error:
        message = f"{type(body).__name__} is not built like a Llama; set dropout to 0"
        raise InvalidArgumentError(message, field="dropout") from error
