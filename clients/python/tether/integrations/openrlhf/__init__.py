"""The reward scorer as OpenRLHF's remote reward model, as a function in a file or as an HTTP endpoint.

As a function, `--reward.remote_url` names `reward_file.py` of this package or a file of your own:

    from tether.integrations.openrlhf import make_reward_func

    reward_func = make_reward_func("127.0.0.1:50052", model="helpfulness")

As an endpoint: `python -m tether.integrations.openrlhf --reward 127.0.0.1:50052 --port 5000`, and
`--reward.remote_url http://127.0.0.1:5000/get_reward`; or `app` behind any ASGI server.
"""

from tether.integrations.openrlhf.endpoint import EndpointLimits, RewardEndpoint, app
from tether.integrations.openrlhf.functions import make_reward_func, reward_func
from tether.integrations.openrlhf.queries import QueryForm, split_queries

__all__ = ["EndpointLimits", "QueryForm", "RewardEndpoint", "app", "make_reward_func", "reward_func", "split_queries"]
