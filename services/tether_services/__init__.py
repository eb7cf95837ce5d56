"""The services of tether: generator, reward, reference and orchestrator."""
