"""Benchmarks: ``python -m benchmarks`` writes the report, ``make bench-micro`` runs the files ``test_*.py``."""
