"""The simulated machine: `simulate` runs a model's every operation as a recipe says, `audit` tells what became of it.

`recipes` say what a machine computes in, `ops` how each torch function is simulated, `module_paths` and `checkpoints`
where a call stands, `telemetry` what rounding did. In: a model, unmodified, and a recipe. Out: rounded results and
gradients, an audit, rows of telemetry. It imports formats, quantization and accumulators; nothing in lpsim imports it.
"""
