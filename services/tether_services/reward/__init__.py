"""The reward scorer: reward models and verifiable rules behind one RPC."""
