"""The embedded demonstration: `tether demo`."""
