"""Deformations drawn at random, for tests of what bends and unbends."""

import torch

from voxelmorph_monai.blocks import smooth
from voxelmorph_monai.metrics import folding

SIZES = [(48, 61), (34, 40, 29)]  # unequal, odd and even sides


def noise(size, sigma, channels=1, seed=0):
    """Smooth random field, of standard deviation 1."""
    generator = torch.Generator().manual_seed(seed)
    field = smooth(torch.randn(1, channels, *size, generator=generator), sigma)
    return field / field.std()


def unfolded(ddf):
    return all(float(folding(ddf, scheme=scheme)) == 0 for scheme in ("central", "forward"))
