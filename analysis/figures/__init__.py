"""Frames to pictures: `plots` draws one thing on given axes, `drawings` and the modules beside it decide which figures
a grid needs, `saving` makes files of them; `interactive` has the charts that the page's script draws.

In: frames of load and statistics. Out: axes, drawings (SVG and PDF with their alternative text), Vega-Lite charts. The
room page imports it.
"""
