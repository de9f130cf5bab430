r"""Estimate the uncertainty of a registration by samples of a probabilistic network, and test its calibration.

The network predicts a normal distribution of velocities, :math:`q(v) = N(\mu, diag(\sigma^2))`, an approximation of the
posterior given the two scans (Dalca et al., MICCAI 2018). Each sample is integrated and applied like the mean. Their
spread is the uncertainty under the image noise and the smoothness prior that the training assumed. It is not an error
bar: it does not include a wrong affine alignment, scans unlike the training data, or other solutions.
The noise is independent between voxels of the velocity, so integration and interpolation average much of it out.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from voxelmorph_monai.apps.options import Options
from voxelmorph_monai.apps.outputs import check_output_folder
from voxelmorph_monai.apps.register import network_input, padded_field, register_scans
from voxelmorph_monai.apps.result import RegistrationResult
from voxelmorph_monai.apps.shipped import network_of, weights_file
from voxelmorph_monai.io.atomic import atomic_folder, write_json
from voxelmorph_monai.maps.spatial_map import warp_scan
from voxelmorph_monai.networks import Registration
from voxelmorph_monai.progress import Progress
from voxelmorph_monai.space.resampling import SCALINGS
from voxelmorph_monai.space.scan import Scan

__all__ = [
    "MEANING",
    "RunningVariance",
    "Uncertainty",
    "calibration_error",
    "estimate_uncertainty",
    "reliability",
    "uncertainty_files",
]

MEANING = (
    "sd_mm is the spread of a voxel's position in the moving scan under the model's approximate posterior, for this "
    "pair and these weights, given the image noise and the smoothness that the training assumed. It is not the error "
    "of the registration: it does not include a wrong alignment, unusual scans or other solutions."
)


class Uncertainty(NamedTuple):
    """Registration with its uncertainty from samples of the posterior.

    Attributes:
        result: registration by the mean velocity.
        sd_mm: ``(X, Y, Z)`` on the fixed grid, in mm: spread of the position of each voxel in the moving scan, the
            square root of the summed variances of its three coordinates.
        labels: values of the moving label map, background 0 first, ``(K,)``; None without labels.
        counts: number of samples in which each voxel gets each label, ``(K, X, Y, Z)``; None without labels.
        num_samples: number of samples.
    """

    result: RegistrationResult
    sd_mm: NDArray[np.float32]
    labels: NDArray[Any] | None
    counts: NDArray[np.uint16] | None
    num_samples: int

    def most_probable(self) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """Most frequent label of each voxel (the smallest of equally frequent ones), and its probability."""
        assert self.labels is not None
        assert self.counts is not None
        confidence = self.counts.max(axis=0).astype(np.float32) / np.float32(self.num_samples)
        return self.labels[self.counts.argmax(axis=0)], confidence


class RunningVariance:
    """Mean and variance of arrays that are added one by one and not stored (Welford, Technometrics 1962).

    >>> spread = RunningVariance()
    >>> for value in (1.0, 2.0, 6.0):
    ...     spread.add(np.array([value]))
    >>> spread.mean.tolist(), spread.variance.tolist()
    ([3.0], [7.0])
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: NDArray[np.floating[Any]] = np.zeros(())
        self._squares: NDArray[np.floating[Any]] = np.zeros(())

    def add(self, values: NDArray[np.floating[Any]]) -> None:
        """Add one more array, of the same shape as the others."""
        self.count += 1
        before = values - self.mean
        self.mean = self.mean + before / self.count
        self._squares = self._squares + before * (values - self.mean)

    @property
    def variance(self) -> NDArray[np.floating[Any]]:
        """Sample variance of the arrays added so far (sum of squares divided by n - 1)."""
        return self._squares / (self.count - 1)

    @property
    def deviation(self) -> NDArray[np.floating[Any]]:
        """Square root of the variances so far, summed over the first axis."""
        return np.sqrt(self.variance.sum(axis=0))


def _check(network: Registration | None, num_samples: int, seed: int) -> None:
    if network is None or network.network.log_variance is None:
        given = (
            "there is no network" if network is None else f"the preset {network.network.preset} is not probabilistic"
        )
        raise ValueError(
            f"{given}. Uncertainty needs the weights of a probabilistic network, for example of preset diffeomorphic."
        )
    if not 2 <= num_samples <= 65535:
        raise ValueError(f"num_samples is {num_samples}. Give a number from 2 to 65535.")
    if seed < 0:
        raise ValueError(f"seed is {seed}. Give 0 or more.")


def _samples(network: Registration, pair: Tensor, num_samples: int, seed: int) -> Iterator[Tensor]:
    """Sample displacements ``(1, D, *spatial)`` one by one; drawn on the CPU, so that devices give equal samples."""
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode():
        prediction = network(pair)
        mean, deviation = prediction["dvf"], torch.exp(0.5 * prediction["log_variance"])
        for _ in range(num_samples):
            noise = torch.randn(mean.shape, generator=generator).to(mean)
            ddf = network.network.displacement(mean + deviation * noise)
            yield network.network.full(ddf, list(pair.shape[2:]))


def estimate_uncertainty(
    moving: Scan,
    fixed: Scan,
    options: Options,
    *,
    moving_labels: Scan | None = None,
    num_samples: int = 50,
    seed: int = 0,
    progress: bool = False,
) -> Uncertainty:
    """Register two scans like :func:`~voxelmorph_monai.apps.register.register`, and sample the network's posterior.

    Memory does not grow with the number of samples; the label counts take 2 bytes per voxel and label.

    Args:
        moving: moving scan.
        fixed: fixed scan.
        options: options of the registration; ``weights`` must belong to a probabilistic network, and ``refine`` is
            ignored: the displacement is not refined.
        moving_labels: label map on the grid of the moving scan, warped by each sample (to the nearest voxel).
        num_samples: number of samples.
        seed: random seed of the samples.
        progress: show what is being done, on standard error.

    Raises:
        ValueError: the network is not probabilistic, or a scan or an option cannot be used.
    """
    dims = 2 if fixed.is_slice else 3
    network, card = network_of(options, dims) or (None, None)
    _check(network, num_samples, seed)
    assert network is not None
    result = register_scans(moving, fixed, replace(options, refine=False), progress=progress)
    forward = result.forward
    assert result.grid is not None
    grid = result.grid.around(fixed if options.space == "fixed" else None)
    to_scans = np.asarray(forward.post, np.float64), np.linalg.inv(forward.pre).astype(np.float64)
    scale = SCALINGS["percentile" if card is None else card.intensities]
    scaled = scale(moving), scale(fixed)
    pair = network_input(scaled, to_scans, grid, dims).to(next(network.parameters()).device)
    labels = counts = None
    if moving_labels is not None:
        labels = np.union1d([0], moving_labels.array).astype(moving_labels.array.dtype)
        counts = np.zeros((len(labels), *fixed.shape), np.uint16)
    spread = RunningVariance()
    with Progress("sample", num_samples, "sample", shown=progress) as told:
        for sample in _samples(network, pair, num_samples, seed):
            ddf = forward._replace(field=padded_field(sample, grid.affine)).on_grid(fixed.grid)
            spread.add(np.tensordot(fixed.affine[:3, :3].astype(np.float32), ddf, axes=1))
            if moving_labels is not None and labels is not None and counts is not None:
                place = np.searchsorted(labels, warp_scan(moving_labels, ddf, fixed, order=0).array)[None]
                np.put_along_axis(counts, place, np.take_along_axis(counts, place, 0) + np.uint16(1), 0)
            known = progress and spread.count > 1
            told.advance(notes=f"mean spread {spread.deviation[fixed.array > 0].mean():.3f} mm" if known else "")
    return Uncertainty(result, spread.deviation.astype(np.float32), labels, counts, num_samples)


def reliability(confidence: NDArray[np.floating[Any]], correct: NDArray[np.bool_], num_bins: int = 10) -> pd.DataFrame:
    """Reliability diagram as a table: how often predictions of each confidence are correct.

    Args:
        confidence: probability of each prediction, 0 to 1.
        correct: whether each prediction is correct, same shape.
        num_bins: number of intervals of equal width, closed above, such as (0.9, 1]; 0 is in the first.

    Returns:
        A row for each bin with predictions: ``up_to`` (its upper end), ``count``, mean ``confidence``, and
        ``accuracy``, the fraction that is correct. For a calibrated model the last two are equal.
    """
    bins = np.clip(
        np.ceil(confidence.ravel() * num_bins * (1 - 1e-6)), 1, num_bins
    )  # tolerates that float32 rounds k / n
    frame = pd.DataFrame({"up_to": bins / num_bins, "confidence": confidence.ravel(), "accuracy": correct.ravel()})
    return (
        frame.astype(float)
        .groupby("up_to")
        .agg(count=("accuracy", "size"), confidence=("confidence", "mean"), accuracy=("accuracy", "mean"))
        .reset_index()
    )


def calibration_error(table: pd.DataFrame) -> float:
    r"""Expected calibration error of a :func:`reliability` table: :math:`\sum_b n_b |accuracy_b - confidence_b| / n`.

    0 for a calibrated model (Naeini et al., AAAI 2015; Guo et al., ICML 2017); NaN if there are no predictions.
    """
    if table.empty:
        return math.nan
    gaps = (table["accuracy"] - table["confidence"]).abs()
    return float(np.average(gaps, weights=table["count"]))


def _calibration(uncertainty: Uncertainty, fixed_labels: NDArray[Any]) -> dict[str, Any] | None:
    """Calibration of the most probable label, over voxels with a label above 0 in any sample; None without any."""
    assert uncertainty.counts is not None
    label, confidence = uncertainty.most_probable()
    counted = uncertainty.counts[0] < uncertainty.num_samples
    if not counted.any():
        return None
    table = reliability(confidence[counted], (label == fixed_labels)[counted])
    return {"expected_calibration_error": calibration_error(table), "reliability": table.to_dict("records")}


def uncertainty_files(
    moving: str | Path,
    fixed: str | Path,
    output: str | Path,
    *,
    options: Options,
    moving_labels: str | Path | None = None,
    fixed_labels: str | Path | None = None,
    num_samples: int = 50,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """Estimate the uncertainty of registering two files, and write it to the new folder ``output``, all or nothing.

    The files are on the grid of the fixed scan. ``sd_mm.nii.gz`` is the spread of the displacement. With moving labels,
    ``label.nii.gz`` is the most probable label, ``label_probability.nii.gz`` its probability, and
    ``probabilities/LABEL.nii.gz`` the probability of each label. ``summary.json`` contains the numbers. With fixed
    labels these include the calibration, unless no sample has a structure within the fixed grid. For the options see
    :func:`estimate_uncertainty`.

    Returns:
        The content of ``summary.json``.
    """
    output = Path(output).absolute()
    paths = moving, fixed, weights_file(options), moving_labels, fixed_labels
    inputs = [Path(path) for path in paths if path is not None]
    check_output_folder(output, inputs, (), overwrite=None)
    if fixed_labels is not None and moving_labels is None:
        raise ValueError(
            f"fixed_labels {fixed_labels} cannot be compared without moving_labels. Give both, or neither."
        )
    scans = Scan.read(moving), Scan.read(fixed)
    labels = [None if path is None else Scan.read_labels(path) for path in (moving_labels, fixed_labels)]
    for scan, given in zip(scans, labels, strict=True):
        if given is not None:
            scan.check_same_grid(given)
    uncertainty = estimate_uncertainty(
        *scans, options, moving_labels=labels[0], num_samples=num_samples, seed=seed, progress=progress
    )
    inside = uncertainty.sd_mm[scans[1].array > 0]
    summary = {
        "meaning": MEANING,
        "num_samples": num_samples,
        "seed": seed,
        "sd_mm": {"mean": float(inside.mean()), "median": float(np.median(inside)), "largest": float(inside.max())},
        "calibration": None if labels[1] is None else _calibration(uncertainty, labels[1].array),
    }
    with atomic_folder(output) as folder:
        maps = {"sd_mm": uncertainty.sd_mm}
        if uncertainty.labels is not None and uncertainty.counts is not None:
            maps["label"], maps["label_probability"] = uncertainty.most_probable()
            (folder / "probabilities").mkdir()
            for value, count in zip(uncertainty.labels[1:], uncertainty.counts[1:], strict=True):
                maps[f"probabilities/{value}"] = count.astype(np.float32) / np.float32(num_samples)
        for name, array in maps.items():
            scans[1].like(array).save(folder / f"{name}.nii.gz")
        write_json(folder / "summary.json", summary)
    return summary
