"""How tensors are quantized: `quantizer` is the front, `plan` turns a format into what kernels take.

`cpu` (Numba, with `cpu_kernels`) and `gpu` (Triton, with `gpu_kernels`) are the backends; `storage` packs codes and
`optimizer_state` keeps an optimizer's tensors in formats. In: a tensor, a format, a rounding and a key. Out: a tensor
of representable values, or its codes. It imports `formats`; conformance, adapters, accumulators and machine import it.
"""
