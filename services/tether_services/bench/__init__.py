"""Load on a reward service: arrivals that wait for no answer, latencies from when they were due, answers checked."""
