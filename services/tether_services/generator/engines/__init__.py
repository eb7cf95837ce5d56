"""The engines; each is imported only when chosen."""

from __future__ import annotations

from tether_services.generator.config import GeneratorSettings
from tether_services.generator.engine import Engine
from tether_services.runtime.metrics import QueueMetrics


def build_engine(settings: GeneratorSettings, queue: QueueMetrics) -> Engine:
    """Return the engine that the settings name, not yet started.

    Args:
        settings: Of the service.
        queue: Where the engine reports its queue and batches.
    """
    if settings.engine == "fake":
        from tether_services.generator.engines.fake import FakeEngine

        return FakeEngine(settings)
    if settings.engine == "transformers":
        from tether_services.generator.engines.transformers import TransformersEngine

        return TransformersEngine(settings, queue)
    from tether_services.generator.engines.vllm import VllmEngine

    return VllmEngine(settings, queue)
