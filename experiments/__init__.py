"""Training runs and grids of runs: config, models, data, the one training loop, run folders, executors, the `lpsim`
command.

Importing the package loads nothing: a worker process sets its thread counts before torch is imported.
"""
