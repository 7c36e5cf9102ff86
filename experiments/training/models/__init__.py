"""The two model families, written as plain torch, and `zoo`: small models that a simulation must run.

In: a model's settings. Out: an nn.Module. No low-precision code lives here.
"""
