"""The mathematics of PPO as pure functions on tensors.

Conventions of every function here:

- `[B, T]` tensors are in response coordinates: column 0 is the first response token.
- A mask is bool (or 0 and 1), True means keep; where it may be `None`, that keeps every entry. What is outside has no
  influence. Nothing is spread over rows or tokens silently.
- Half-precision input is computed in float32; float32 and float64 stay as they are.
- A wrong call raises ValueError; nothing here logs, reads a clock or draws random numbers.
"""
