"""The file to give to OpenRLHF as `--reward.remote_url`; the environment says where the reward scorer is.

Its path: `python -c "import tether.integrations.openrlhf.reward_file as file; print(file.__file__)"`. OpenRLHF runs
it as a module outside its package, so that it has nothing but this one import.
"""

from tether.integrations.openrlhf import reward_func

__all__ = ["reward_func"]
