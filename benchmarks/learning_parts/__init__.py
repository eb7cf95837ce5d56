"""The parts of `benchmarks/learning.py`: measures, runs on the real services, the three studies, tables and plots."""
