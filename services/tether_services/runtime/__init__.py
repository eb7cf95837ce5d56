"""What every service has: settings, server, errors, limits, batching, health, metrics and logs."""
