"""The mathematics of PPO as pure functions on tensors.

Conventions of every function here:

- `[B, T]` tensors are in response coordinates: column 0 is the first response token. Any other shape works too, as long
  as all arguments agree; the trainer uses flat `[N]` tensors in its loss.
- A mask is bool, True means keep. `None` keeps every entry.
- Half-precision input is computed in float32; float32 and float64 stay as they are.
- A wrong call raises ValueError; nothing here logs, reads a clock or draws random numbers.
"""
