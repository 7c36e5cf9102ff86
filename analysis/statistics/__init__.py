"""Frames to numbers with intervals: `tables` compares arms, `stability` measures how steadily they trained.

In: frames of analysis.load. Out: frames. The rooms figures and page import it.
"""
