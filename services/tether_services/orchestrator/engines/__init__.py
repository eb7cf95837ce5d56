"""Engines of the orchestrator."""
