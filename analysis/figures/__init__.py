"""Frames to pictures: `plots` draws one thing on given axes, `drawings` and the modules beside it decide which figures
a grid needs, `saving` makes files of them.

In: frames of load and statistics. Out: axes, and drawings: SVG and PDF with their alternative text. The room page
imports it.
"""
