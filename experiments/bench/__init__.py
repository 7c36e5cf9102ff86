"""Benchmarks: one module each, run by `lpsim bench NAME`; every figure is a ratio within one run.

In: options. Out: a printed table. It imports training, lpsim and lmd; the command imports it.
"""
