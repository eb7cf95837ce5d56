"""Offline training stages; each writes a folder that the services and the next stage load."""

import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
"""While it is imported, by PEFT, it warns of an optional kernel that nothing here uses."""
