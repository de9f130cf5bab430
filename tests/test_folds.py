"""What folds is found whatever computes it, and smoothed until nothing folds; what does not is left alone."""

import pytest
import torch
from torch.testing import assert_close

from tests.deformations import SIZES, noise, unfolded
from voxelmorph_monai import switch
from voxelmorph_monai.blocks import integrate
from voxelmorph_monai.folds import remove_folds
from voxelmorph_monai.metrics import folding

pytestmark = pytest.mark.usefixtures("one_thread")
sizes = pytest.mark.parametrize("size", SIZES, ids=["2d", "3d"])


@sizes
@pytest.mark.parametrize("least", [0.0, 0.1])
def test_remove_folds_removes_all_folds(size, least):
    folds = 4 * noise(size, 1, len(size))
    assert float(folding(folds)) > 10
    assert unfolded(remove_folds(folds, least))
    smooth = integrate(noise(size, 6, len(size)))
    assert_close(remove_folds(smooth, least), smooth, rtol=0, atol=0)


@sizes
@pytest.mark.parametrize("least", [0.0, 0.1])
@pytest.mark.parametrize("reach", [0.15, 0.4])
def test_folds_are_the_same_on_both_paths(size, least, reach, monkeypatch):
    """To the last bit: what rounding could decide is left to one of them."""
    ddf = reach * noise(size, 1, len(size))
    found = []
    for enabled in (True, False):
        monkeypatch.setattr(switch, "enabled", enabled)
        found.append(remove_folds(ddf, least))
    assert_close(found[0], found[1], rtol=0, atol=0)


def test_a_checkerboard_that_one_scheme_sees_is_found():
    ddf = 0.6 * (1 - 2 * (torch.arange(12)[:, None] + torch.arange(14)) % 2).float().expand(1, 2, 12, 14)
    assert float(folding(ddf)) == 0
    assert unfolded(remove_folds(ddf))


@sizes
def test_remove_folds_leaves_alone_what_is_far_from_a_fold(size):
    ddf = integrate(noise(size, 6, len(size)))
    corner = (..., *[slice(3, 5)] * len(size))
    ddf[corner] += 4.0
    found = remove_folds(ddf)
    assert unfolded(found)
    far = (..., *[slice(20, None)] * len(size))
    assert_close(found[far], ddf[far], rtol=0, atol=0)
    assert not torch.equal(found, ddf)


def test_remove_folds_takes_one_field():
    with pytest.raises(ValueError, match=r"^ddf has shape \[2, 2, 9, 9\]\. .*one pair"):
        remove_folds(torch.zeros(2, 2, 9, 9))
    with pytest.raises(ValueError, match=r"^ddf has shape \[1, 3, 9, 9, 1\]\. .*2 voxels"):
        remove_folds(torch.zeros(1, 3, 9, 9, 1))
    with pytest.raises(ValueError, match=r"^ddf has 162 values of NaN or infinity\b"):
        remove_folds(torch.full((1, 2, 9, 9), torch.nan))
