"""Keeps other libraries' talk off the terminal."""

from __future__ import annotations

import logging

import datasets
from transformers.utils import logging as transformers_logging

__all__ = ["quiet_libraries"]

CHATTY = ("accelerate", "bitsandbytes", "datasets", "peft", "trl")
"""Libraries whose warnings are about their own affairs."""


def quiet_libraries() -> None:
    """Turn off the libraries' own bars and notices for the rest of the process; their errors still show."""
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
