"""The simulated machine: `simulate` runs every operation of a model as a recipe says; `audit` reports what was done.

`recipes` say which formats a machine computes in, `ops` how each torch function is simulated, `module_paths` and
`checkpoints` which module a call belongs to, `places` which site of the recipe that is, `refusals` what is an error,
`telemetry` what rounding did, `attribution` which of a machine's `pieces` costs what in a trained model (`measured`).
In: an unmodified model and a recipe. Out: rounded results and gradients, an audit, rows of telemetry. It imports
formats, quantization and accumulators; no other room of lpsim imports it.
"""
