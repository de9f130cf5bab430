"""Folds of a displacement, where a map turns space inside out: find them and smooth them away."""

from collections.abc import Sequence
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from voxelmorph_monai.blocks import determinant, jacobian_determinant
from voxelmorph_monai.kernels import loops

__all__ = ["remove_folds"]

_PART = 1 << 18  # voxels that are checked together, with their neighbours, if there are few


def _tight(ddf: Tensor, volume: float) -> Tensor:
    """Where a map leaves a voxel ``volume`` or less, by central or forward differences: ``(B, 1, *spatial)``."""
    return ~((jacobian_determinant(ddf) > volume) & (jacobian_determinant(ddf, "forward") > volume))


def _neighbours(index: Tensor, size: Sequence[int]) -> Tensor:
    """Flat indices ``(N, 3**D)`` of the voxels around those of ``index``, none of them at the border of ``size``."""
    offsets = torch.zeros(1, dtype=torch.int64, device=index.device)
    for n in size:
        step = torch.arange(-1, 2, device=index.device)
        offsets = (offsets[:, None] * n + step).flatten()
    return index[:, None] + offsets


def _grown(index: Tensor, inner: Tensor, size: Sequence[int]) -> Tensor:
    """``index`` and the voxels next to it, as far as they are ``inner``."""
    found = torch.zeros_like(inner)
    found[_neighbours(index, size).flatten()] = True
    return (found & inner).nonzero().flatten()


def _volumes(place: Tensor, ddf: Tensor) -> tuple[Tensor, Tensor]:
    """Share of their volume ``(N,)`` that the voxels ``place`` ``(N, D)`` keep, by central and forward differences.

    Bit by bit what ``jacobian_determinant`` says of the whole field.
    """
    flat, size = ddf.flatten(2)[0], ddf.shape[2:]
    voxel, step = torch.zeros_like(place[:, 0]), ddf[0, 0].numel()
    for n, at in zip(size, place.unbind(1), strict=True):
        voxel = voxel * n + at
    here = flat[:, voxel]
    central: list[list[Tensor]] = []
    forward: list[list[Tensor]] = []
    for axis, (n, at) in enumerate(zip(size, place.unbind(1), strict=True)):
        step //= n
        ahead = flat[:, voxel + step * (at < n - 1)] - here
        back = here - flat[:, voxel - step * (at > 0)]
        ahead, back = torch.where(at < n - 1, ahead, back), torch.where(at > 0, back, ahead)
        for rows, slope in ((central, (ahead + back) * 0.5), (forward, ahead)):
            rows.append([*slope])
            rows[axis][axis] = slope[axis] + 1.0
    return determinant(central), determinant(forward)


def _still_tight(index: Tensor, ddf: Tensor, volume: float) -> Tensor:
    """The voxels of ``index`` that keep ``volume`` or less: flat indices into ``ddf`` with one voxel around it."""
    found = [index[:0]]
    for part in index.split(_PART):
        central, forward = _volumes(_place(part, ddf.shape[2:]), ddf)
        found.append(part[~((central > volume) & (forward > volume))])
    return torch.cat(found)


def _flat(place: Tensor, size: Sequence[int]) -> Tensor:
    """Flat indices of the voxels ``place`` ``(N, D)`` of a grid of ``size`` when one more voxel surrounds it."""
    index = torch.zeros_like(place[:, 0])
    for n, at in zip(size, place.unbind(1), strict=True):
        index = index * (n + 2) + at + 1
    return index


def _unravel(index: Tensor, size: Sequence[int]) -> Tensor:
    """Voxels ``(N, D)`` of flat indices, without ``torch.unravel_index``, which imports SymPy: 0.7 s."""
    place = []
    for n in reversed(size):
        place.append(index % n)
        index = index // n
    return torch.stack(place[::-1], dim=1)


def _place(index: Tensor, size: Sequence[int]) -> Tensor:
    """Undo ``_flat``."""
    return _unravel(index, [n + 2 for n in size]) - 1


def _find_tight(ddf: Tensor, volume: float) -> Tensor:
    """Voxels ``(N, D)`` that keep ``volume`` or less."""
    compiled = loops(ddf)
    if compiled is None:
        return _tight(ddf, volume)[0, 0].nonzero()
    size = ddf.shape[2:]
    suspects = _unravel(compiled.suspects(ddf, volume), size)
    return _place(_still_tight(_flat(suspects, size), ddf, volume), size) if len(suspects) else suspects


def remove_folds(ddf: Tensor, least: float = 0.0) -> Tensor:
    """Smooth a displacement around its folds until there are none, by central or forward differences.

    There are few folds, so only the voxels around them are changed and checked again, in growing circles, until none is
    left.

    Args:
        ddf: ``(1, D, *spatial)`` in voxels; a field without folds is returned as it is.
        least: fraction of its volume that a voxel has to keep at first; with 0 only folds are changed.
    """
    if len(ddf) != 1 or min(ddf.shape[2:]) < 2:
        raise ValueError(
            f"ddf has shape {list(ddf.shape)}. Give the field of one pair, (1, D, *spatial), with at least 2 voxels "
            "along each axis."
        )
    if not bool(ddf.sum().isfinite() or ddf.isfinite().all()):  # a sum takes a tenth of the time
        raise ValueError(f"ddf has {int((~ddf.isfinite()).sum())} values of NaN or infinity.")
    place = _find_tight(ddf, least)
    if not len(place):
        return ddf
    ddf = ddf.clone(memory_format=torch.contiguous_format)
    margin = [1] * (2 * place.shape[1])
    inside: tuple[Any, ...] = (..., *[slice(1, -1)] * place.shape[1])
    kernel = ddf.new_ones(1)
    for _ in margin[::2]:
        kernel = (kernel[:, None] * ddf.new_tensor([0.25, 0.5, 0.25])).flatten()
    for attempt in count():
        if not len(place):
            break
        # 8 voxels are enough for what is narrow, and many times that only help where it is not
        radius = 2 ** min(attempt, max(3, attempt // 4))
        # Only what is touched, looked at again, or next to that: no round goes over the whole field.
        start = (place.amin(0) - (radius + 3)).clamp_min_(0)
        stop = place.amax(0) + (radius + 4)
        box: tuple[Any, ...] = (..., *map(slice, start.tolist(), stop.tolist()))
        piece = ddf[box]
        whole = F.pad(piece, margin, mode="replicate")
        size = whole.shape[2:]
        inner = F.pad(torch.ones_like(piece[:, :1], dtype=torch.bool), margin).flatten()
        rings = [_flat(place - start, piece.shape[2:])]
        for _ in range(radius):
            rings.append(_grown(rings[-1], inner, size))
        values = whole.flatten(2)[0]
        for ring in reversed(rings):  # the closer to a fold, the smoother
            for part in ring.split(_PART):
                values[:, part] = values[:, _neighbours(part, size)] @ kernel
        piece.copy_(whole[inside])
        # even shrinking over many voxels is not a fold, and would take ever wider circles to smooth
        index = _still_tight(_grown(rings[-1], inner, size), piece, least / 4**attempt)
        place = _place(index, piece.shape[2:]) + start
    return ddf
