"""Engines of the reference service; the library of each is imported only when it is chosen."""

from __future__ import annotations

from tether_services.reference.config import ReferenceSettings
from tether_services.reference.engine import ReferenceEngine


def build_engine(settings: ReferenceSettings) -> ReferenceEngine:
    """Return the engine of the settings, not started; its library is imported only now, so call it in a thread."""
    if settings.engine == "fake":
        from tether_services.reference.engines.fake import FakeReferenceEngine

        return FakeReferenceEngine(settings)
    from tether_services.reference.engines.transformers import TransformersReferenceEngine

    return TransformersReferenceEngine(settings)
