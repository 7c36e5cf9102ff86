"""Convolutions as matrix products: the left operand is the matrix of the input's patches (im2col).

fprop sums over (input channel, kernel position), flattened in this order, so its blocks lie along that axis; dgrad sums
over output channels, wgrad over (batch, output position). Patches overlap, so the matrix repeats elements, and each
copy is rounded with the blocks of its own row, as in a matrix unit; the image itself is not rounded. Gathering patches
(unfold) only moves data; the gradients of overlapping patches are added in the compute dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

from lpsim.machine.ops.site import Call

Size = int | Sequence[int]


def _convolution(dims: int) -> Callable[..., Tensor]:
    def convolution(
        call: Call,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
    ) -> Tensor:
        """input [B, C, *size] or unbatched, weight [O, C / groups, *kernel], bias [O]: [B, O, *out]."""
        if input.dim() == dims + 1:
            return convolution(call, input[None], weight, bias, stride, padding, dilation, groups).squeeze(0)
        kernel = weight.shape[2:]
        strides, dilations = _sizes(stride, dims), _sizes(dilation, dims)
        columns, out = _patches(_padded(input, kernel, strides, padding, dilations), kernel, strides, dilations)
        batch, outputs = input.shape[0], weight.shape[0]
        rows = columns.view(batch, groups, -1, math.prod(out)).permute(1, 0, 3, 2)  # [G, B, L, C / G * kernel]
        rows = rows.reshape(groups, batch * math.prod(out), -1)
        kernels = weight.reshape(groups, outputs // groups, -1)
        if groups == 1:
            result = call.gemm(rows[0], kernels[0], bias, rhs_axis=-1)[None]
        else:
            result = call.product(rows, kernels, rhs_axis=-1)  # [G, B * L, O / G]
            result = call.out(result if bias is None else result + bias.view(groups, 1, -1))
        result = result.view(groups, batch, math.prod(out), outputs // groups)
        return result.permute(1, 0, 3, 2).reshape(batch, outputs, *out)

    return convolution


def _transposed_convolution(dims: int) -> Callable[..., Tensor]:
    def convolution(
        call: Call,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        groups: int = 1,
        dilation: Size = 1,
    ) -> Tensor:
        """input [B, C, *size] or unbatched, weight [C, O / groups, *kernel], bias [O]: [B, O, *out].

        The product sums over the input channels and gives patches; these and the bias are added in the compute dtype.
        """
        if input.dim() == dims + 1:
            return convolution(
                call, input[None], weight, bias, stride, padding, output_padding, groups, dilation
            ).squeeze(0)
        kernel, size, (batch, channels) = weight.shape[2:], input.shape[2:], input.shape[:2]
        strides, dilations = _sizes(stride, dims), _sizes(dilation, dims)
        pads, extra = _sizes(padding, dims), _sizes(output_padding, dims)
        rows = input.reshape(batch, groups, channels // groups, -1).permute(1, 0, 3, 2)  # [G, B, L, C / G]
        rows = rows.reshape(groups, -1, channels // groups)
        result = call.product(rows, weight.reshape(groups, channels // groups, -1))  # [G, B * L, O / G * kernel]
        columns = result.view(groups, batch, math.prod(size), -1).permute(1, 0, 3, 2)
        columns = columns.reshape(batch, -1, math.prod(size))  # [B, O * kernel, L]
        full = [
            (n - 1) * s + d * (k - 1) + 1 + e
            for n, s, d, k, e in zip(size, strides, dilations, kernel, extra, strict=True)
        ]
        image = _added(columns, full, size, kernel, strides, dilations)
        for axis, (pad, length) in enumerate(zip(pads, full, strict=True), start=2):
            image = image.narrow(axis, pad, length - 2 * pad)
        if bias is not None:
            image = image + bias.view(-1, *[1] * dims)
        return call.out(image)

    return convolution


def _sizes(value: Size, dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


def _padded(
    x: Tensor, kernel: Sequence[int], strides: Sequence[int], padding: Size | str, dilations: Sequence[int]
) -> Tensor:
    """x with zeros around it; if "same" needs an odd number of them, the end gets one more."""
    if padding == "valid":
        return x
    if padding == "same":
        if any(s != 1 for s in strides):
            raise ValueError("padding='same' is not defined for a convolution with a stride")
        totals = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
        pairs = [(t // 2, t - t // 2) for t in totals]
    elif isinstance(padding, str):
        raise ValueError(f"padding must be a number, 'same' or 'valid', got {padding!r}")
    else:
        pairs = [(p, p) for p in _sizes(padding, len(kernel))]
    flat = [p for pair in reversed(pairs) for p in pair]
    return F.pad(x, flat) if any(flat) else x


def _patches(
    x: Tensor, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> tuple[Tensor, list[int]]:
    """The patches of x [B, C, *size] as [B, C * kernel, L], and the size of the grid of L patches."""
    out = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(x.shape[2:], kernel, strides, dilations, strict=True)]
    if min(out) < 1:
        raise ValueError(f"a kernel of {tuple(kernel)} does not fit into an input of {tuple(x.shape[2:])}")
    if len(kernel) == 1:
        return _patches(x[:, :, None], (1, *kernel), (1, *strides), (1, *dilations))[0], out
    if len(kernel) == 2:
        return F.unfold(x, tuple(kernel), dilation=tuple(dilations), stride=tuple(strides)), out
    batch, channels, depth = x.shape[:3]
    planes = x.transpose(1, 2).flatten(0, 1)  # [B * D, C, H, W]
    columns, _ = _patches(planes, kernel[1:], strides[1:], dilations[1:])  # [B * D, C * kh * kw, L]
    columns = columns.view(batch, depth, channels, -1, columns.shape[-1])
    taps = columns.unfold(1, dilations[0] * (kernel[0] - 1) + 1, strides[0])[..., :: dilations[0]]
    # [B, out, C, kh * kw, L, kd] -> [B, C, kd, kh * kw, out, L]
    return taps.permute(0, 2, 5, 3, 1, 4).reshape(batch, -1, math.prod(out)), out


def _added(
    columns: Tensor,
    full: Sequence[int],
    grid: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> Tensor:
    """The reverse of _patches: patches [B, C * kernel, L] of a grid, added up into an image [B, C, *full]."""
    if len(kernel) == 1:
        image = _added(columns, (1, *full), (1, *grid), (1, *kernel), (1, *strides), (1, *dilations))
        return image.squeeze(2)
    if len(kernel) == 2:
        # F.fold needs an image that the patches fill exactly; output padding adds rows that no patch reaches
        filled = [(n - 1) * s + d * (k - 1) + 1 for n, s, d, k in zip(grid, strides, dilations, kernel, strict=True)]
        image = F.fold(columns, tuple(filled), tuple(kernel), dilation=tuple(dilations), stride=tuple(strides))
        return F.pad(image, (0, full[1] - filled[1], 0, full[0] - filled[0]))
    batch = columns.shape[0]
    taps = columns.view(batch, -1, kernel[0], math.prod(kernel[1:]), grid[0], math.prod(grid[1:]))
    planes = taps.permute(0, 4, 2, 1, 3, 5).flatten(0, 2).flatten(1, 2)  # [B * out * kd, C * kh * kw, L]
    planes = _added(planes, full[1:], grid[1:], kernel[1:], strides[1:], dilations[1:])
    planes = planes.view(batch, grid[0] * kernel[0], -1, math.prod(full[1:])).transpose(1, 2)  # [B, C, out * kd, H * W]
    channels = planes.shape[1]
    planes = planes.view(batch, channels, grid[0], kernel[0], -1).permute(0, 1, 4, 3, 2).flatten(0, 1)
    image = _added(  # along the depth: each pixel's column is a 1-d image of its own
        planes.flatten(1, 2).view(-1, kernel[0], grid[0]), full[:1], grid[:1], kernel[:1], strides[:1], dilations[:1]
    )
    return image.view(batch, channels, *full[1:], full[0]).movedim(-1, 2)


conv1d, conv2d, conv3d = (_convolution(dims) for dims in (1, 2, 3))
conv_transpose1d, conv_transpose2d, conv_transpose3d = (_transposed_convolution(dims) for dims in (1, 2, 3))
