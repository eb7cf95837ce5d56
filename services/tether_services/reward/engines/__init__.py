"""Engines of the reward service; the library of each is imported only when it is chosen."""

from __future__ import annotations

from tether_services.reward.config import ComponentSettings, RewardSettings
from tether_services.reward.engine import RewardEngine
from tether_services.runtime.text import TextCodec


def build_engine(
    component: ComponentSettings, settings: RewardSettings, codec: TextCodec | None, *, field: str
) -> RewardEngine:
    """Return the engine of a component, not started; its library is imported only now, so call it in a thread."""
    if component.engine == "fake":
        from tether_services.reward.engines.fake import FakeRewardEngine

        return FakeRewardEngine(codec, salt=component.salt)
    if component.engine == "rules":
        from tether_services.reward.engines.rules import RulesEngine

        return RulesEngine(component.function, component.arguments, rule_seconds=settings.rule_seconds, field=field)
    from tether_services.reward.engines.transformers import TransformersRewardEngine

    return TransformersRewardEngine(component.path, settings, field=f"{field}.path" if settings.models else "model")
