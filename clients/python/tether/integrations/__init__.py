"""Adapters that make the reward scorer the reward function of other trainers.

`tether.integrations.trl`, `tether.integrations.openrlhf` and `tether.integrations.verl` import none of the libraries
that they are for: each is a function or an endpoint with the signature that the library calls.
"""
