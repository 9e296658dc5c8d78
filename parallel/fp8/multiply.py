"""Matrix products of float8 values: torch's scaled product on a GPU, an emulation elsewhere.

Both take what `recipes` makes, so there is one code for scales. The emulation multiplies the values
stood for in the dtype of the result, sums in float32, and rounds once, as the GPU does.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.experts import grouped_mm
from parallel.fp8.recipes import TILE, Backend, Quantised

_ROWS = 16  # values; cuBLAS wants the summed and the last dim to be multiples of it


def multiply(
    a: Quantised, b: Quantised, dtype: torch.dtype, backend: Backend, *, fast: bool
) -> Tensor:
    """a·bᵀ. a: (M, K), b: (N, K), both in rows along the summed dim -> (M, N).

    fast: sum in the tensor cores' own registers, enough for a forward product.
    """
    if backend == "emulated":
        out = a.plain(dtype) @ b.plain(dtype).transpose(-2, -1)
        return out[: a.shape[0], : b.shape[0]]
    if a.tile is None and b.tile is None:
        return _scaled_mm(a, b, dtype, fast)
    return _scaled_tiles(a, b, dtype, fast)


def _scaled_mm(a: Quantised, b: Quantised, dtype: torch.dtype, fast: bool) -> Tensor:
    out = torch._scaled_mm(
        _padded(a.data, (1, _ROWS)),
        _padded(b.data, (_ROWS, _ROWS)).t(),
        scale_a=a.inverse,
        scale_b=b.inverse,
        out_dtype=dtype,
        use_fast_accum=fast,
    )
    return out[:, : b.data.shape[0]]


def _scaled_tiles(a: Quantised, b: Quantised, dtype: torch.dtype, fast: bool) -> Tensor:
    """Tiles of 1×128, of b perhaps 128×128.

    Not run here: it needs a Hopper GPU and CUDA 12.9. Source: torch.nn.functional.scaled_mm and its
    tests, for where scales lie.
    """
    kinds = {(1, TILE): F.ScalingType.BlockWise1x128, (TILE, TILE): F.ScalingType.BlockWise128x128}
    assert a.tile is not None
    assert b.tile is not None
    columns = _padded(b.data, (_ROWS, TILE))
    if b.tile == (TILE, TILE):
        # why: cuBLAS wants a multiple of 4 tiles along the summed dim, next to each other.
        scales = F.pad(b.inverse, (0, -b.inverse.shape[1] % 4)).contiguous().t()
    else:
        missing = columns.shape[0] - b.inverse.shape[0]
        scales = _rows_together(F.pad(b.inverse, (0, 0, 0, missing), value=1.0))
    out = F.scaled_mm(
        _padded(a.data, (1, TILE)),
        columns.t(),
        scale_a=_rows_together(a.inverse),
        scale_recipe_a=kinds[a.tile],
        scale_b=scales,
        scale_recipe_b=kinds[b.tile],
        output_dtype=dtype,
        use_fast_accum=fast,
    )
    return out[: a.shape[0], : b.shape[0]]


def _rows_together(scales: Tensor) -> Tensor:
    """The same, the scales of one column of tiles next to each other, as cuBLAS reads 1×128."""
    return scales.t().contiguous().t()


def _padded(data: Tensor, multiples: tuple[int, int]) -> Tensor:
    """Rows in memory, each dim filled up with zeros to a multiple."""
    down, right = (-n % m for n, m in zip(data.shape, multiples, strict=True))
    if not down and not right:
        return data.contiguous()
    # why: a float8 tensor cannot be padded, its bytes can; zero is the zero byte.
    return F.pad(data.contiguous().view(torch.uint8), (0, right, 0, down)).view(data.dtype)


def multiply_grouped(
    x: Quantised, w: Quantised, counts: Tensor, dtype: torch.dtype, backend: Backend, *, fast: bool
) -> Tensor:
    """Rows of each expert with its matrix, as `parallel.experts.grouped_mm`.

    x: (T, K); w: (E, N, K), both with scales that do not change along K -> (T, N).
    """
    if backend == "emulated":
        return grouped_mm(x.plain(dtype), w.plain(dtype), counts)
    experts, outer = w.data.shape[:2]
    spread = _Spread.of(counts, experts, x.data.shape[0])
    out = torch._scaled_grouped_mm(
        _padded(spread.forth(x.data), (1, _ROWS)),
        _padded_last(w.data, (_ROWS, _ROWS)).transpose(1, 2),
        spread.forth(_per_row(x)),
        F.pad(_per_row(w), (0, -outer % _ROWS), value=1.0),
        offs=spread.ends,
        out_dtype=dtype,
        use_fast_accum=fast,
    )
    return spread.back(out)[:, :outer]


def multiply_grouped_weight(
    grad: Quantised,
    x: Quantised,
    counts: Tensor,
    experts: int,
    dtype: torch.dtype,
    backend: Backend,
) -> Tensor:
    """Gradient of the weights. grad: (N, T); x: (K, T), scales not along T -> (E, N, K)."""
    if backend == "emulated":
        by_row = (q.plain(dtype).t().contiguous() for q in (grad, x))
        return torch.ops.dit_pretrain.grouped_mm_weight_grad(*by_row, counts, experts)
    spread = _Spread.of(counts, experts, x.data.shape[1])
    outer, inner = grad.data.shape[0], x.data.shape[0]
    left, right = (_padded(spread.forth(q.data.t()), (1, _ROWS)) for q in (grad, x))
    out = torch._scaled_grouped_mm(
        left.t().contiguous(),
        right.t().contiguous().t(),
        F.pad(_per_row(grad), (0, -outer % _ROWS), value=1.0).repeat(experts),
        F.pad(_per_row(x), (0, -inner % _ROWS), value=1.0).repeat(experts),
        offs=spread.ends,
        out_dtype=dtype,
        use_fast_accum=False,
    )
    return out[:, :outer, :inner]


def _per_row(x: Quantised) -> Tensor:
    """A scale for each row, whatever it stands for: (..., rows)."""
    return x.inverse.expand(*x.data.shape[:-1], 1)[..., 0].contiguous()


def _padded_last(data: Tensor, multiples: tuple[int, int]) -> Tensor:
    down, right = (-n % m for n, m in zip(data.shape[1:], multiples, strict=True))
    whole = data.contiguous().view(torch.uint8)
    return F.pad(whole, (0, right, 0, down)).view(data.dtype)


class _Spread(NamedTuple):
    """Rows moved so that each expert's begin at a multiple of 16; room for the worst case, so that
    nobody waits for the counts.
    """

    places: Tensor  # (T,) where each row goes; past the end of what is multiplied: nobody's
    ends: Tensor  # (E,) int32
    room: int

    @staticmethod
    def of(counts: Tensor, experts: int, rows: int) -> "_Spread":
        wide = (counts + (_ROWS - 1)) // _ROWS * _ROWS
        shift = (wide - counts).cumsum(0) - (wide - counts)
        owner = torch.searchsorted(
            counts.cumsum(0), torch.arange(rows, device=counts.device), right=True
        )
        places = torch.arange(rows, device=counts.device) + shift[owner]
        room = (rows + counts.shape[0] * (_ROWS - 1) + _ROWS - 1) // _ROWS * _ROWS
        return _Spread(places, wide.cumsum(0)[:experts].to(torch.int32), room)

    def forth(self, x: Tensor) -> Tensor:
        """Zero where there is no row. x: (T, ...)."""
        bits = x.view(torch.uint8) if x.dtype.itemsize == 1 else x
        out = bits.new_zeros(self.room, *bits.shape[1:])
        return out.index_copy_(0, self.places, bits).view(x.dtype)

    def back(self, out: Tensor) -> Tensor:
        """The rows that were given, nobody's zero: the kernel does not write these."""
        real = self.places < self.ends[-1]
        return torch.where(real[:, None], out[self.places], 0)
