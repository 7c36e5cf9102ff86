"""What a run is: its config, the settings it is made of, models, data, optimizers, the one training loop.

In: a `Config`. Out: a run folder, which `record` writes. It imports lpsim and lmd, and no other room of experiments.
"""
