"""Find folds of a displacement, where the map turns space inside out, and smooth them away.

A voxel is tight if the map shrinks it to a given fraction of its volume or less, by central or forward differences. A
fold is a tight voxel for the fraction 0.
"""

from collections.abc import Sequence
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from voxelmorph_monai.blocks import determinant, jacobian_determinant
from voxelmorph_monai.kernels import loops

__all__ = ["remove_folds"]

_PART = 1 << 18  # number of listed voxels to process at a time


def _tight(ddf: Tensor, volume: float) -> Tensor:
    """Whether each voxel keeps only the fraction ``volume`` or less of its volume: ``(B, 1, *spatial)``."""
    return ~((jacobian_determinant(ddf) > volume) & (jacobian_determinant(ddf, "forward") > volume))


def _neighbours(index: Tensor, size: Sequence[int]) -> Tensor:
    """Flat indices ``(N, 3**D)`` of each voxel in ``index`` ``(N,)`` and its neighbours; none may be at the border."""
    offsets = torch.zeros(1, dtype=torch.int64, device=index.device)
    for n in size:
        step = torch.arange(-1, 2, device=index.device)
        offsets = (offsets[:, None] * n + step).flatten()
    return index[:, None] + offsets


def _grown(index: Tensor, inner: Tensor, size: Sequence[int]) -> Tensor:
    """Flat indices of the voxels in ``index`` and of their neighbours, only where the mask ``inner`` is True."""
    found = torch.zeros_like(inner)
    found[_neighbours(index, size).flatten()] = True
    return (found & inner).nonzero().flatten()


def _volumes(place: Tensor, ddf: Tensor) -> tuple[Tensor, Tensor]:
    """Jacobian determinants ``(N,)`` at the voxels ``place`` ``(N, D)``, by central and by forward differences.

    They are bit by bit those of ``jacobian_determinant``, without computing the rest of the field.
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
    """Voxels in ``index`` that are tight for ``volume``; indices are flat, as in ``_flat``."""
    found = [index[:0]]
    for part in index.split(_PART):
        central, forward = _volumes(_place(part, ddf.shape[2:]), ddf)
        found.append(part[~((central > volume) & (forward > volume))])
    return torch.cat(found)


def _flat(place: Tensor, size: Sequence[int]) -> Tensor:
    """Flat indices ``(N,)`` of the voxels ``place`` ``(N, D)`` in a grid of ``size`` padded by one voxel."""
    index = torch.zeros_like(place[:, 0])
    for n, at in zip(size, place.unbind(1), strict=True):
        index = index * (n + 2) + at + 1
    return index


def _unravel(index: Tensor, size: Sequence[int]) -> Tensor:
    """Voxels ``(N, D)`` of flat indices ``(N,)``; ``torch.unravel_index`` would import SymPy, which takes 0.7 s."""
    place = []
    for n in reversed(size):
        place.append(index % n)
        index = index // n
    return torch.stack(place[::-1], dim=1)


def _place(index: Tensor, size: Sequence[int]) -> Tensor:
    """Inverse of ``_flat``: voxels ``(N, D)`` of flat indices ``(N,)``."""
    return _unravel(index, [n + 2 for n in size]) - 1


def _find_tight(ddf: Tensor, volume: float) -> Tensor:
    """Voxels ``(N, D)`` of the field ``(1, D, *spatial)`` that are tight for ``volume``."""
    compiled = loops(ddf)
    if compiled is None:
        return _tight(ddf, volume)[0, 0].nonzero()
    size = ddf.shape[2:]
    suspects = _unravel(compiled.suspects(ddf, volume), size)
    return _place(_still_tight(_flat(suspects, size), ddf, volume), size) if len(suspects) else suspects


def remove_folds(ddf: Tensor, least: float = 0.0) -> Tensor:
    """Smooth a displacement around its folds, until neither central nor forward differences find one.

    Folds are few, so only voxels around them are smoothed and checked again, within a growing radius.

    Args:
        ddf: displacement in voxels, ``(1, D, *spatial)``.
        least: at first, also smooth voxels that keep this fraction of their volume or less; the limit is reduced in
            each round. With 0 only folds are smoothed.

    Returns:
        The smoothed displacement, of the same shape and unit, or ``ddf`` itself if there is nothing to smooth.
    """
    if len(ddf) != 1 or min(ddf.shape[2:]) < 2:
        raise ValueError(
            f"ddf has shape {list(ddf.shape)}. Give the field of one pair, (1, D, *spatial), with at least 2 voxels "
            "along each axis."
        )
    if not bool(ddf.sum().isfinite() or ddf.isfinite().all()):  # a sum takes a tenth of the time
        raise ValueError(f"ddf has {int((~ddf.isfinite()).sum())} values of NaN or infinity. Give finite numbers.")
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
        # A radius of 8 voxels is enough for narrow folds; it grows further, but slowly, for wide ones.
        radius = 2 ** min(attempt, max(3, attempt // 4))
        # Box of the voxels that are smoothed and checked, with their neighbours: no round processes the whole field.
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
        for ring in reversed(rings):  # from large to small, so that voxels close to a fold are smoothed most
            for part in ring.split(_PART):
                values[:, part] = values[:, _neighbours(part, size)] @ kernel
        piece.copy_(whole[inside])
        # Lower the limit: uniform shrinking over many voxels is not a fold, and smoothing would not remove it.
        index = _still_tight(_grown(rings[-1], inner, size), piece, least / 4**attempt)
        place = _place(index, piece.shape[2:]) + start
    return ddf
