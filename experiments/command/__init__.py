"""The `lpsim` command: `cli` parses it and calls the rooms that do the work; `formats` serves `lpsim formats`.

It imports every other room, lazily, so that `lpsim formats` loads no training code. Nothing imports it.
"""
