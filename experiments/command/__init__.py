"""The `lpsim` command: `cli` parses it; every command is a module with `add`, and calls the rooms that do the work.

It imports every other room, lazily, so that `lpsim formats` loads no training code. Nothing imports it.
"""
