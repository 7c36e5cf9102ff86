"""The report: `report` puts it together; `answer`, or `claims` where the grid makes any, is its first screen, then come
sentences (`summary`), tables, figures and `telemetry`; `html` sets it.

In: a grid's folder. Out: one HTML file that needs nothing else, and its tables as CSV and Parquet.
"""
