"""The reference-logprob server: log-probabilities of given responses under the frozen reference policy."""
