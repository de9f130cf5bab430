r"""Pose of a brain in a scan of any contrast, and affine maps between brains.

The template is the anatomy of the mean brain MNI152: the probability of each structure, from the anatomy network. There
are two methods:

* :func:`find_poses` needs only the brain, in any pose. It tries 500 rotations of the template, with voxels of 8 mm, and
  improves the best ones. The score of a rotation is the :math:`R^2` of a regression of the image on the template's
  tissues. It does not depend on contrast and brightness, because each tissue has its own coefficient.
* :func:`fit` needs the structures. It fits their centres by weighted least squares, and then minimises the squared
  differences of their probabilities by Gauss-Newton, with voxels of 4 mm. The template is linearised instead of the
  image (inverse composition: Baker and Matthews, IJCV 2004), so that the Hessian is computed only once.

A map is a 4 x 4 matrix from points to points (RAS, mm).
"""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from voxelmorph_monai.affines import Affine, apply_affine, even_rotations
from voxelmorph_monai.blocks import sample
from voxelmorph_monai.lazy import lazy

__all__ = [
    "Anatomy",
    "Pose",
    "anatomy_of_mni152",
    "find_poses",
    "fit",
    "fit_centres",
    "likeness",
    "rotation_of",
]

linalg, spatial = lazy("scipy.linalg"), lazy("scipy.spatial.transform")

# Tissue of each structure, in the order of the anatomy network: 0 ventricles, 1 fluid around the brain, 2 white matter
# of the cerebrum, 3 cortex, 4 cerebellum, 5 brain stem, 6 nuclei and structures of similar brightness.
_TISSUES = (2, 2, 3, 3, 0, 0, 4, 4, 4, 4, *[6] * 8, 0, 0, 5, *[6] * 6, 5, 5, 1)
_NUM_ROTATIONS = 500  # neighbouring rotations differ by about 30 degrees
_EVERY = 3  # use every third voxel: enough to fit 12 parameters, and to rank rotations
_APART = 25.0  # smallest angle between two candidates, degrees: closer ones are improved to the same pose
_NUM_CANDIDATES = 6
_FILE = Path(__file__).parent / "sample" / "mni152_anatomy.npz"  # found by the anatomy network; 255 is 1
_STEPS = 12  # largest number of Gauss-Newton steps of a fit; the last ones are below 0.1 mm
_FEW_STEPS = 6  # number of Gauss-Newton steps that improve a candidate, enough to rank it
_WORSE = 0.05  # stop improving a candidate when its R2 has dropped by this much
_LEAST = 300.0  # smallest volume of a structure whose centre is used, mm3
_NEAR = 4.0  # error of a centre at which its weight is halved, mm


class Anatomy(NamedTuple):
    """Probability of each structure of a brain, on a grid.

    Attributes:
        posteriors: probability of each structure, ``(K, X, Y, Z)``; 1 minus their sum is the background.
        affine: affine of the grid (RAS, mm).
        seen: mask of the voxels that the scan shows, ``(X, Y, Z)``; None if it shows all.
    """

    posteriors: Tensor
    affine: Affine
    seen: Tensor | None = None

    def coarser(self, factor: int) -> "Anatomy":
        """Average blocks of ``factor`` voxels a side."""
        affine = self.affine @ np.diag([factor, factor, factor, 1.0])
        affine[:3, 3] = (self.affine @ [*[(factor - 1) / 2] * 3, 1.0])[:3]
        seen = None if self.seen is None else F.avg_pool3d(self.seen[None, None].float(), factor)[0, 0] > 0.99
        return Anatomy(F.avg_pool3d(self.posteriors[None], factor)[0], affine, seen)

    def centres(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Centres of the structures (RAS, mm), ``(K, 3)``, and their volumes in mm3, ``(K,)``."""
        means, plane = [], self.posteriors.sum(3)
        alongs = [plane.sum(2), plane.sum(1), self.posteriors.sum((1, 2))]
        mass = alongs[0].double().sum(1)
        for along in alongs:
            means.append((along * torch.arange(along.shape[1])).double().sum(1) / mass.clamp(min=1e-6))
        points = apply_affine(self.affine, torch.stack(means).numpy()).T
        return points, mass.numpy() * abs(np.linalg.det(self.affine[:3, :3]))

    @property
    def middle(self) -> NDArray[np.float64]:
        """Centre of the brain (RAS, mm), ``(3,)``."""
        index = _centre_of(self.posteriors.sum(0))
        return apply_affine(self.affine, index)


class Pose(NamedTuple):
    """Pose of a brain.

    Attributes:
        mapping: map from points of MNI152 to points of the scan, 4 x 4.
        explained: :math:`R^2` of the regression of the scan on the tissues, at most 1.
    """

    mapping: Affine
    explained: float


@cache
def anatomy_of_mni152() -> Anatomy:
    """Anatomy of the mean adult brain MNI152, with voxels of 4 mm: posteriors ``(30, 40, 44, 50)``."""
    with np.load(_FILE) as file:
        return Anatomy(torch.from_numpy(file["posteriors"]).float() / 255, file["affine"])


def rotation_of(mapping: Affine) -> Affine:
    r"""The rotation, 3 x 3, that is nearest to the linear part :math:`A` of a map, 4 x 4.

    With :math:`A = U \Sigma V^T` it is :math:`U \operatorname{diag}(1, 1, \det U V^T) V^T` (Kabsch, Acta
    Crystallographica A 1976).
    """
    u, _, vt = np.linalg.svd(mapping[:3, :3])
    turn: Affine = u @ np.diag([1, 1, np.linalg.det(u @ vt)]) @ vt
    return turn


def _centre_of(weight: Tensor) -> NDArray[np.float64]:
    """Mean index of the voxels of ``weight`` ``(X, Y, Z)``."""
    weight = weight.double()
    along = [weight.sum([e for e in range(3) if e != d]) for d in range(3)]
    return np.array([float((w * torch.arange(len(w))).sum() / w.sum()) for w in along])


class _Points:
    """Points of a template to compare with an image: positions, values and gradients.

    Args:
        values: channels of the template, ``(C, X, Y, Z)``.
        affine: affine of its grid (RAS, mm).
        near: mask of the voxels to use, ``(X, Y, Z)``.
        every: use one in this many voxels of the mask.
    """

    def __init__(self, values: Tensor, affine: Affine, near: Tensor, every: int = 1) -> None:
        index = near.nonzero()[::every].T
        place = apply_affine(affine, index.numpy().astype(np.float64))
        self.points = torch.from_numpy(place).float()  # (3, N), RAS mm
        x, y, z = index
        self.values = values[:, x, y, z]  # (C, N)
        slopes = torch.stack([torch.gradient(values, dim=axis)[0][:, x, y, z] for axis in (1, 2, 3)])
        per_mm = torch.from_numpy(np.linalg.inv(affine[:3, :3]).T).float()
        self.slopes = torch.einsum("de,ecn->dcn", per_mm, slopes)  # (3, C, N), per mm


def _generators(kind: str, centre: NDArray[np.float64]) -> NDArray[np.float64]:
    """Basis ``(P, 4, 4)`` of the changes of a map of this kind.

    A change by one of the matrices moves the centre, or points at 100 mm from it, by about 1 mm.
    """
    moves = np.zeros((12, 4, 4))
    for number in range(12):
        moves[number, number // 4, number % 4] = 1.0 if number % 4 == 3 else 0.01
    if kind != "affine":
        turns = [moves[a * 4 + b] - moves[b * 4 + a] for a, b in ((0, 1), (0, 2), (1, 2))]
        grow = [moves[0] + moves[5] + moves[10]] if kind == "similarity" else []
        moves = np.stack([*turns, *grow, moves[3], moves[7], moves[11]])
    to_centre = np.eye(4)
    to_centre[:3, 3] = -centre
    return np.linalg.inv(to_centre) @ moves @ to_centre


def _normal_equations(
    points: _Points, slopes: Tensor, residual: Tensor, weight: Tensor
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Hessian ``(12, 12)`` and right-hand side ``(12,)`` of the least squares for a small change of a 3 x 4 matrix."""
    ones = torch.ones_like(points.points[:1])
    homogeneous = torch.cat([points.points, ones])
    squares = (homogeneous[:, None] * homogeneous[None]).flatten(0, 1)
    outer = torch.einsum("dcn,ecn->den", slopes * weight, slopes).flatten(0, 1)
    hessian = (outer.double() @ squares.double().T).view(3, 3, 4, 4).transpose(1, 2).reshape(12, 12)
    push = torch.einsum("dcn,cn->dn", slopes, residual * weight)
    return hessian.numpy(), (push.double() @ homogeneous.double().T).reshape(12).numpy()


def _solve(hessian: NDArray[np.float64], side: NDArray[np.float64], moves: NDArray[np.float64]) -> Affine:
    """Change ``(4, 4)`` in the span of ``moves`` that solves the normal equations, slightly damped."""
    along = moves[:, :3].reshape(len(moves), 12)
    matrix = along @ hessian @ along.T
    matrix += 1e-4 * np.trace(matrix) / len(matrix) * np.eye(len(matrix))
    step: Affine = np.tensordot(np.linalg.solve(matrix, along @ side), moves, axes=1)
    return step


def _read(image: Tensor, affine: Affine, places: NDArray[np.float64]) -> Tensor:
    """Values of ``image`` ``(C, X, Y, Z)`` at points ``(3, N)`` (RAS, mm): ``(C, N)``, and 0 outside the image."""
    index = torch.from_numpy(apply_affine(np.linalg.inv(affine), places)).float()
    return sample(image[None], index.view(1, 3, -1, 1, 1), padding_mode="zeros")[0, :, :, 0, 0]


class _Tissues:
    """Tissues of MNI152 with voxels of 8 mm, prepared for the regression of an image on them."""

    def __init__(self) -> None:
        anatomy = anatomy_of_mni152().coarser(2)
        size = anatomy.posteriors.shape[1:]
        maps = torch.zeros(7, *size).index_add_(0, torch.tensor(_TISSUES), anatomy.posteriors)
        brain = maps.sum(0)
        near = F.max_pool3d(brain[None], 3, 1, 1)[0] > 0.05
        self.points = _Points(maps, anatomy.affine, near)
        self.regressors = torch.cat([self.points.values, torch.ones_like(self.points.values[:1])]).T  # (N, 8)
        self.orthonormal, self.mixing = torch.linalg.qr(self.regressors)
        self.centre = anatomy.middle
        self.litres = float(brain.sum() * abs(np.linalg.det(anatomy.affine[:3, :3]))) * 1e-6

    def explained(self, seen: Tensor, some: slice | None = None) -> Tensor:
        """R2 of the regression of images ``(..., N)``, read at the points of the template or at ``some`` of them."""
        orthonormal = self.orthonormal if some is None else torch.linalg.qr(self.regressors[some])[0]
        left = seen.square().sum(-1) - (seen @ orthonormal).square().sum(-1)
        return 1 - left / (seen - seen.mean(-1, keepdim=True)).square().sum(-1).clamp(min=1e-6)


@cache
def _tissues() -> _Tissues:
    return _Tissues()


def find_poses(image: Tensor, brain: Tensor, affine: Affine) -> list[Pose]:
    r"""Possible poses of MNI152 in a scan of any contrast whose brain was found, the likeliest first.

    A pose is a similarity. It is scored by how much of the intensities :math:`I` a linear combination of the template's
    tissues :math:`t_k` and 1 explains at the points of the template :math:`x`,

    .. math:: R^2 = 1 - \min_c \frac{\sum_x (I(\phi(x)) - c_0 - \sum_k c_k t_k(x))^2}{\sum_x (I(\phi(x)) - \bar I)^2}

    which is the correlation ratio (Roche et al., MICCAI 1998) if each point is of one tissue. The score is the mean of
    those of the intensities within the brain and of the probability of brain.

    Args:
        image: scan with voxels of about 4 mm, ``(X, Y, Z)``.
        brain: probability that a voxel is brain, of the same shape.
        affine: affine of the voxels (RAS, mm).
    """
    tissues = _tissues()
    centre = apply_affine(affine, _centre_of(brain))
    litres = float(brain.double().sum()) * abs(np.linalg.det(affine[:3, :3])) * 1e-6
    scale = (litres / tissues.litres) ** (1 / 3)
    shown = F.avg_pool3d(torch.stack([image * brain, brain])[None], 3, 1, 1)[0]  # blurred about like the template
    rotations = even_rotations(_NUM_ROTATIONS)
    some = slice(None, None, _EVERY)
    away = scale * rotations @ (tissues.points.points[:, some].double().numpy() - tissues.centre[:, None])
    places = np.moveaxis(away, 1, 0).reshape(3, -1) + centre[:, None]
    seen = _read(shown, affine, places).view(2, len(rotations), -1)
    score = tissues.explained(seen, some).sum(0).numpy()
    chosen: list[int] = []
    for number in np.argsort(-score):
        angles = (
            spatial.Rotation.from_matrix(rotations[chosen].transpose(0, 2, 1) @ rotations[number]).magnitude()
            if chosen
            else []
        )
        if np.degrees(np.min(angles, initial=np.pi)) > _APART:
            chosen.append(int(number))
        if len(chosen) == _NUM_CANDIDATES:
            break
    poses = []
    for number in chosen:
        start = np.eye(4)
        start[:3, :3] = scale * rotations[number]
        start[:3, 3] = centre - start[:3, :3] @ tissues.centre
        poses.append(_improve(start, shown, affine))
    return sorted(poses, key=lambda pose: -pose.explained)


def _improve(mapping: Affine, shown: Tensor, affine: Affine) -> Pose:
    """Improve a pose by a few Gauss-Newton steps, which minimise the residual of the regression on the tissues.

    Args:
        mapping: map to start from.
        shown: blurred brain and its mask, ``(2, X, Y, Z)``.
        affine: affine of their voxels (RAS, mm).
    """
    tissues = _tissues()
    points = tissues.points
    moves = _generators("similarity", tissues.centre)
    best = Pose(mapping, -1.0)
    for _ in range(_FEW_STEPS):
        seen = _read(shown, affine, apply_affine(mapping, points.points.double().numpy()))
        explained = float(tissues.explained(seen).mean())
        if explained > best.explained:
            best = Pose(mapping, explained)
        along = seen @ tissues.orthonormal
        coefficients = torch.linalg.solve_triangular(tissues.mixing, along.T, upper=True)[:-1].T  # (C, 7)
        size = (seen - seen.mean(1, keepdim=True)).square().sum(1).sqrt()[:, None]
        if explained < best.explained - _WORSE or not size.min() > 0:  # the map has left the brain
            break
        residual = (seen - along @ tissues.orthonormal.T) / size
        slopes = torch.einsum("ck,dkn->dcn", coefficients / size, points.slopes)
        step = _solve(*_normal_equations(points, slopes, residual, torch.ones_like(residual[0])), moves)
        mapping = mapping @ linalg.expm(-step)
    return best


def fit_centres(anatomy: Anatomy, template: Anatomy) -> tuple[Affine, float]:
    r"""Affine map from points of ``template`` to those of ``anatomy`` by the centres of their structures.

    Least squares, reweighted ten times (Holland and Welsch, Communications in Statistics 1977),

    .. math:: \min_\phi \sum_k w_k \, |c_k - \phi(t_k)|^2, \quad w_k = \frac{\min(V_k, T_k)}{\max(V_k, T_k)}
        \cdot \frac{1}{1 + (|c_k - \phi(t_k)| / 4 \text{ mm})^2}

    with the centres :math:`c_k` and volumes :math:`V_k` of the structures, and those of the template, :math:`t_k` and
    :math:`T_k`. Structures whose volumes differ count less, and those that lie far from where the others put them.

    Returns:
        The map, 4 x 4, and its root mean square error at the centres in mm. If fewer than 6 structures are known, these
        are the identity and infinity.
    """
    (there, volumes), (places, sizes) = anatomy.centres(), template.centres()
    weight = np.minimum(volumes / sizes.clip(1), sizes / volumes.clip(1)) * (np.minimum(volumes, sizes) > _LEAST)
    weight[-1] = 0.0  # the last class, the rest of the brain mask, has no meaningful centre
    known = weight > 0
    if known.sum() < 6:
        return np.eye(4), float("inf")
    there, places, weight = there[known], places[known], weight[known]
    homogeneous = np.concatenate([places, np.ones((len(places), 1))], axis=1)
    robust, away = np.ones(len(weight)), np.zeros(len(weight))
    mapping = np.eye(4)
    for _ in range(10):
        w = (weight * robust)[:, None]
        mapping[:3] = np.linalg.lstsq(np.sqrt(w) * homogeneous, np.sqrt(w) * there, rcond=None)[0].T
        away = np.linalg.norm(there - homogeneous @ mapping[:3].T, axis=1)
        robust = 1 / (1 + (away / _NEAR) ** 2)
    return mapping, float(np.sqrt((weight * away**2).sum() / weight.sum()))


def fit(anatomy: Anatomy, template: Anatomy, kind: str = "affine", start: Affine | None = None) -> Affine:
    r"""Map from points of ``template`` to points of ``anatomy`` by their structures: 4 x 4.

    Gauss-Newton on the squared differences of the probabilities of all structures,

    .. math:: \min_\phi \sum_x m(\phi(x)) \, |p(\phi(x)) - t(x)|^2, \quad \phi \leftarrow \phi \circ \exp(-\delta)

    over the points :math:`x` in and near the template's brain, where :math:`m` is 1 in the scan and 0 beyond. The step
    :math:`\delta`, a matrix of the kind's Lie algebra, warps the template, not the scan: inverse composition (Baker and
    Matthews, IJCV 2004).

    Args:
        anatomy: anatomy of a scan, with voxels of at most about 4 mm.
        template: anatomy of another scan, or of MNI152.
        kind: ``"affine"``, ``"similarity"`` or ``"rigid"``.
        start: map to start from, reduced to this kind (default: the result of :func:`fit_centres`).

    Raises:
        ValueError: ``kind`` is unknown.
    """
    if kind not in ("affine", "similarity", "rigid"):
        raise ValueError(f"kind is '{kind}'. Choose 'affine', 'similarity' or 'rigid'.")
    if start is None:
        start, _ = fit_centres(anatomy, template)
    brain = template.posteriors.sum(0)
    near = F.max_pool3d(brain[None], 3, 1, 1)[0] > 0.05
    if template.seen is not None:
        near &= template.seen
    points = _Points(template.posteriors, template.affine, near, _EVERY)
    centre = points.points.double().mean(1).numpy()
    mapping = start if kind == "affine" else _nearest(start, kind, centre)
    moves = _generators(kind, centre)
    seen = torch.ones_like(anatomy.posteriors[:1]) if anatomy.seen is None else anatomy.seen[None].float()
    values = torch.cat([anatomy.posteriors, seen])
    hessian: NDArray[np.float64] | None = None
    for _ in range(_STEPS):
        read = _read(values, anatomy.affine, apply_affine(mapping, points.points.double().numpy()))
        weight = read[-1] if anatomy.seen is not None else torch.ones_like(read[-1])
        found, side = _normal_equations(points, points.slopes, read[:-1] - points.values, weight)
        hessian = found if hessian is None or anatomy.seen is not None else hessian
        step = _solve(hessian, side, moves)
        mapping = mapping @ linalg.expm(-step)
        if np.abs(step[:3] @ [*centre, 1.0]).max() < 0.01 and np.abs(step[:3, :3]).max() < 1e-4:  # 0.01 mm
            break
    return mapping


def likeness(anatomy: Anatomy, template: Anatomy, mapping: Affine) -> float:
    r"""Mean Dice of the structures of two brains, by their probabilities, once ``mapping`` has aligned them: 0 to 1.

    .. math:: \frac{1}{K} \sum_k \frac{2 \sum_x \min(p_k(\phi(x)), t_k(x))}{\sum_x p_k(\phi(x)) + t_k(x)}

    over the voxels :math:`x` of the template that are brain with a probability above 0.3.

    Args:
        anatomy: one brain, with probabilities :math:`p`.
        template: the other one, with probabilities :math:`t`.
        mapping: map :math:`\phi` from points of ``template`` to points of ``anatomy``, 4 x 4.
    """
    near = template.posteriors.sum(0) > 0.3
    there = template.posteriors[:, near]
    points = apply_affine(mapping, apply_affine(template.affine, near.nonzero().T.numpy().astype(np.float64)))
    seen = _read(anatomy.posteriors, anatomy.affine, points)
    return float((2 * torch.minimum(seen, there).sum(1) / (seen.sum(1) + there.sum(1)).clamp(min=1e-6)).mean())


def _nearest(mapping: Affine, kind: str, centre: NDArray[np.float64]) -> Affine:
    """Rigid map or similarity that is closest to ``mapping``, and maps ``centre`` to the same point."""
    size = np.linalg.det(mapping[:3, :3]) ** (1 / 3) if kind == "similarity" else 1.0
    found = np.eye(4)
    found[:3, :3] = size * rotation_of(mapping)
    found[:3, 3] = (mapping @ [*centre, 1.0])[:3] - found[:3, :3] @ centre
    return found
