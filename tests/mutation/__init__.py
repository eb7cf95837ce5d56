"""Wrong edits of the PPO mathematics, one at a time, each of which a test must notice: `python -m tests.mutation`."""
