"""Generated from protos/tether/v1. Never edited; `make protos` writes it."""
