"""The reliability suite: real services under injected faults, and a checker that reads only what was recorded."""
