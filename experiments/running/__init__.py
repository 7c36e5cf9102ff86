"""How runs are run: `grid` decides what is to do; `executors` and `slurm` where it is computed, here or on a
cluster; `processes` shares a run among several.

In: configs. Out: run folders and a row for each. It imports the rooms training and grids; the command imports it.
"""
