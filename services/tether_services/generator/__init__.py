"""The policy generator: samples completions and takes new adapters while it serves."""
