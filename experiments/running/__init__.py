"""How runs are run: `grid` decides what is to do and `executors` where it is computed, here or on a cluster.

In: configs. Out: run folders and a row for each. It imports the rooms training and grids; the command imports it.
"""
