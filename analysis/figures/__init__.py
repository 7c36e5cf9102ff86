"""Frames to pictures: `plots` draws one thing on given axes, `drawings` decides which figures a grid needs.

In: frames of load and statistics. Out: axes, and SVG with its alternative text. The room page imports it.
"""
