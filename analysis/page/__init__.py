"""The report: `report` puts it together. `first` is its first screen, with `answer`, or `claims` where a grid makes
any; then come `task`, for every model and data set, with `telemetry` and `worst`, `explore`, where one looks for single
runs, and `provenance`; `html` sets it all. `scripts` embeds libraries, the script in assets/ and `explore_data`.

In: a grid's folder. Out: one HTML file that needs nothing else; its tables as CSV and Parquet, its figures as SVG, PDF.
"""
