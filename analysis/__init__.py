"""Run folders -> tidy pandas frames -> tables, figures and one self-contained HTML report.

`run_files` reads one file, `load` a folder, `statistics` computes, `figures` draws, `page` puts the report together;
each imports those before it. Nothing here imports torch, lpsim, lmd or experiments: a run folder is all that is needed
to make a table.
"""
