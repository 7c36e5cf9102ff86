"""The report: `report` puts it together from sentences (`summary`), tables, figures and `telemetry`; `html` sets it.

In: a grid's folder. Out: one HTML file that needs nothing else, and its tables as CSV and Parquet.
"""
