"""The four services as supervised processes on one machine."""
