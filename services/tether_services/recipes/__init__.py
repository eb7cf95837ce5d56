"""Offline training stages; each writes a folder that the services and the next stage load."""
