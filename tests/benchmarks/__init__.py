"""Benchmarks, run by hand: `pytest -m benchmark tests/benchmarks -s`. See README.md."""
