"""Run folders -> tidy pandas frames -> tables, figures and one self-contained HTML report.

`load` reads, `tables` and `stability` compute, `plots` draws on axes it is given, `report` puts the page together.
Nothing here imports torch, lpsim, lmd or experiments: a run folder is all that is needed to make a table.
"""
