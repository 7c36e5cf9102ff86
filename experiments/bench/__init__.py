"""Benchmarks: one module each, run by `lpsim bench NAME`."""
