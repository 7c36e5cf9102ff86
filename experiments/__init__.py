"""Training runs and grids of runs, in rooms: training, grids, running, bench, command.

Importing the package loads nothing: a worker process sets its thread counts before torch is imported.
"""
