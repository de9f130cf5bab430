"""Samples of the posterior: their moments, their seed, what they say of labels, and whether that is calibrated."""

import json
import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from voxelmorph_monai.apps.options import Options
from voxelmorph_monai.apps.uncertainty import (
    MEANING,
    RunningVariance,
    Uncertainty,
    _calibration,
    calibration_error,
    estimate_uncertainty,
    reliability,
    uncertainty_files,
)
from voxelmorph_monai.io.images import save_image
from voxelmorph_monai.networks import Registration, VoxelMorph
from voxelmorph_monai.space.scan import Scan
from voxelmorph_monai.space.template import WorkingGrid

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = (20, 24, 16)
AFFINE = np.diag([-6.0, 6.0, 8.0, 1.0])
GRID = WorkingGrid((32, 32, 32), 6.0)


def network(log_variance: float = -2.0, seed: int = 0, spatial_dims: int = 3) -> Registration:
    """A network whose velocity has the same variance everywhere, its mean almost 0."""
    torch.manual_seed(seed)
    found = VoxelMorph("diffeomorphic", spatial_dims)
    torch.nn.init.zeros_(found.log_variance.weight)
    torch.nn.init.constant_(found.log_variance.bias, log_variance)
    return Registration(found, bidirectional=True).eval()


def scan(seed: int) -> tuple[NDArray[np.float32], NDArray[np.int16]]:
    """Image and label map (labels 3 and 40) of an ellipsoid."""
    x, y, z = ((grid - (n - 1) / 2) / (n / 2 - 2) for grid, n in zip(np.indices(SIZE), SIZE, strict=True))
    radius = np.sqrt(x**2 + y**2 + z**2)
    noise = gaussian_filter(np.random.default_rng(seed).uniform(size=SIZE), 1)
    labels = np.where(radius < 0.5, 40, np.where(radius < 1, 3, 0)).astype(np.int16)
    return ((labels > 0) * (0.3 + noise)).astype(np.float32), labels


def estimate(seed: int = 0, num_samples: int = 4, log_variance: float = -2.0, labels: bool = True) -> Uncertainty:
    (moving, moving_labels), (fixed, _) = scan(1), scan(2)
    return estimate_uncertainty(
        Scan(moving, AFFINE),
        Scan(fixed, AFFINE),
        Options(network(log_variance), space="fixed", alignment="none", grid=GRID),
        moving_labels=Scan(moving_labels, AFFINE) if labels else None,
        num_samples=num_samples,
        seed=seed,
    )


def test_running_variance_is_that_of_numpy() -> None:
    values = 1e6 + np.random.default_rng(0).standard_normal((9, 3, 4))  # naive sums of squares would lose 6 digits
    spread = RunningVariance()
    for value in values:
        spread.add(value)
    np.testing.assert_allclose(spread.mean, values.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(spread.variance, values.var(axis=0, ddof=1), rtol=1e-9)


def test_the_seed_is_all_that_matters() -> None:
    torch.manual_seed(1)
    first = estimate(seed=3)
    torch.rand(5)
    again, other = estimate(seed=3), estimate(seed=4)
    assert np.array_equal(first.sd_mm, again.sd_mm)
    assert np.array_equal(first.counts, again.counts)
    assert not np.array_equal(first.sd_mm, other.sd_mm)


def test_spread_grows_with_the_deviation_of_the_velocity_and_is_in_millimetres() -> None:
    inside = (slice(6, -6),) * 3
    small, large = (estimate(log_variance=v, labels=False, num_samples=12).sd_mm[inside] for v in (-12.0, -10.0))
    ratio = large.mean() / small.mean()
    assert ratio == pytest.approx(np.e, rel=0.005)  # exp(1) in the velocity; so small a displacement is linear in it
    # Velocity voxels of 12.4 mm (half resolution), three independent components. Between its voxels the velocity is
    # interpolated, with weights whose squares sum to 1 at a voxel and to 1/8 in the middle of a cell.
    whole = np.sqrt(3) * 6 * 31 / 15 * np.exp(-6.0)
    assert whole * np.sqrt(1 / 8) < small.mean() < whole


def test_slices_are_sampled_within_their_plane() -> None:
    images = [Scan(scan(n)[0][..., 8:9], AFFINE) for n in (1, 2)]
    grid = WorkingGrid((32, 32), 6.0)
    small, large = (
        estimate_uncertainty(
            *images,
            Options(network(log_variance, spatial_dims=2), space="fixed", alignment="none", grid=grid),
            num_samples=12,
        ).sd_mm[6:-6, 6:-6]
        for log_variance in (-12.0, -10.0)
    )
    assert large.mean() / small.mean() == pytest.approx(np.e, rel=0.005)  # as above
    whole = np.sqrt(2) * 6 * 31 / 15 * np.exp(-6.0)  # two components; the squares of the weights sum to 1/4 or more
    assert whole * np.sqrt(1 / 4) < small.mean() < whole


def test_counts_are_those_of_the_samples() -> None:
    found = estimate(num_samples=6, log_variance=0.0)
    assert found.labels is not None
    assert found.counts is not None
    assert found.labels.tolist() == [0, 3, 40]
    assert (found.counts.sum(axis=0) == 6).all()
    label, confidence = found.most_probable()
    assert set(np.unique(label)) == {0, 3, 40}
    ranked = np.sort(found.counts, axis=0)
    assert np.array_equal(confidence, ranked[-1].astype(np.float32) / np.float32(6))
    assert 0 < (confidence < 1).mean() < 0.9
    still = estimate(log_variance=-30.0)
    assert still.sd_mm.max() < 1e-3
    _, fixed_confidence = still.most_probable()
    assert (fixed_confidence == 1).all()
    # Without spread each sample is the registration itself, here almost the identity.
    assert (still.most_probable()[0] == scan(1)[1]).mean() > 0.99


def test_calibration_of_predictions_that_are_known() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.integers(1, 51, 400_000) / 50
    calibrated = reliability(confidence.astype(np.float32), rng.uniform(size=len(confidence)) < confidence)
    assert calibrated["up_to"].tolist() == pytest.approx(np.linspace(0.1, 1, 10))
    assert calibrated["count"].sum() == len(confidence)
    assert (
        calibrated["count"].min() > 0.9 * calibrated["count"].max()
    )  # 5 of the 50 values each, none on the wrong side
    assert calibration_error(calibrated) < 0.01  # 40,000 draws a bin: 0.0025
    boastful = reliability(np.array([1.0, 1.0, 0.6, 0.6]), np.array([True, False, True, True]))
    assert boastful[["count", "confidence", "accuracy"]].to_numpy().tolist() == [[2, 0.6, 1], [2, 1, 0.5]]
    assert calibration_error(boastful) == pytest.approx((0.4 + 0.5) / 2)
    uneven = reliability(np.array([1.0, 0.25, 0.25, 0.25]), np.array([False, False, False, True]), num_bins=4)
    assert calibration_error(uneven) == pytest.approx(1 / 4 + (1 / 3 - 1 / 4) * 3 / 4)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_k_of_n_is_in_the_kth_of_n_bins(dtype: type) -> None:
    for n in range(1, 101):  # rounded, k / n may be above the end of its bin, as 7 / 13 is, and 54 / 100
        confidence = np.arange(1, n + 1, dtype=dtype) / dtype(n)
        table = reliability(confidence, np.ones(n, bool), num_bins=n)
        np.testing.assert_allclose(table["up_to"], confidence, rtol=1e-7)  # float32
        assert (table["count"] == 1).all()


def test_structures_out_of_sight_leave_nothing_to_calibrate() -> None:
    assert np.isnan(calibration_error(reliability(np.array([]), np.array([], bool))))
    (_, labels), found = scan(1), estimate(num_samples=2)
    assert found.counts is not None
    background = np.zeros_like(found.counts)
    background[0] = 2
    assert _calibration(found, labels) is not None
    assert _calibration(found._replace(counts=background), labels) is None


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    for number in (1, 2):
        for name, array in zip(("image", "labels"), scan(number), strict=True):
            save_image(tmp_path / f"{name}{number}.nii.gz", array, AFFINE)
    torch.save(network(0.0).network.state_dict(), tmp_path / "model.pt")
    return {path.name.split(".")[0]: path for path in tmp_path.iterdir()}


def test_what_is_written(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    how = Options(files["model"], "diffeomorphic", space="fixed", alignment="none", grid=GRID)
    options: dict[str, Any] = {"options": how, "num_samples": 4}
    labels = {"moving_labels": files["labels1"], "fixed_labels": files["labels2"]}
    images = files["image1"], files["image2"]
    summary = uncertainty_files(*images, tmp_path / "out", progress=True, **options, **labels)
    spread = f"mean spread {summary['sd_mm']['mean']:.3f} mm"  # that of all samples
    shown = re.sub(r"\d\d:\d\d", "TIME", capsys.readouterr().err)
    assert shown == f"sample: 4 of 4 samples in TIME, {spread}\n"
    expected = {"sd_mm.nii.gz", "label.nii.gz", "label_probability.nii.gz", "probabilities", "summary.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == expected
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    assert summary["meaning"] == MEANING
    shares = [nib.load(tmp_path / "out" / "probabilities" / f"{n}.nii.gz").get_fdata() for n in (3, 40)]
    assert {path.name for path in (tmp_path / "out" / "probabilities").iterdir()} == {"3.nii.gz", "40.nii.gz"}
    top = nib.load(tmp_path / "out" / "label_probability.nii.gz")
    assert np.array_equal(top.get_fdata(), np.maximum(np.maximum(*shares), 1 - sum(shares)))
    np.testing.assert_allclose(top.affine, AFFINE)
    sd = nib.load(tmp_path / "out" / "sd_mm.nii.gz").get_fdata()
    assert summary["sd_mm"]["mean"] == pytest.approx(sd[scan(2)[0] > 0].mean(), rel=1e-5)  # float32
    rows = summary["calibration"]["reliability"]
    assert sum(row["count"] for row in rows) == (sum(shares) > 0).sum()
    label = nib.load(tmp_path / "out" / "label.nii.gz").get_fdata()
    right = sum(row["count"] * row["accuracy"] for row in rows)
    assert right == pytest.approx((label == scan(2)[1])[sum(shares) > 0].sum())
    with pytest.raises(FileExistsError, match="already exists"):
        uncertainty_files(*images, tmp_path / "out", **options)
    bare = uncertainty_files(*images, tmp_path / "bare", **options)
    assert not capsys.readouterr().err
    assert bare["calibration"] is None
    assert {path.name for path in (tmp_path / "bare").iterdir()} == {"sd_mm.nii.gz", "summary.json"}


def test_what_is_wrong_is_said(files: dict[str, Path], tmp_path: Path) -> None:
    images = [Scan(scan(n)[0], AFFINE) for n in (1, 2)]
    for weights, reason in ((Registration(VoxelMorph("dense")).eval(), "^the preset dense "), ("none", "no network")):
        with pytest.raises(ValueError, match=reason):
            estimate_uncertainty(*images, Options(weights))
    with pytest.raises(ValueError, match=r"^num_samples is 1. .*2 to 65535"):
        estimate(num_samples=1)
    with pytest.raises(ValueError, match=r"^seed is -1. .*0 or more"):
        estimate(seed=-1)
    paths = files["image1"], files["image2"], tmp_path / "out"
    with pytest.raises(ValueError, match=r"^fixed_labels .*moving_labels"):
        uncertainty_files(*paths, options=Options(files["model"]), fixed_labels=files["labels2"])
    with pytest.raises(ValueError, match="cannot create "):
        uncertainty_files(*paths[:2], files["image1"] / "out", options=Options("never read"))
    assert not (tmp_path / "out").exists()
