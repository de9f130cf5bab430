"""VxmDense of any width, against its forward pass as voxelmorph 0.2 has it, written in torch's own functions."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from voxelmorph_monai.vxmdense import VxmDense

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTHS = ([6, 8, 10], [10, 8, 8, 6, 5])
SIZES = [(16, 24), (16, 8, 24)]


def state(dims: int) -> dict[str, Tensor]:
    """Random weights, in their names; the velocity gets some voxels long."""
    generator = torch.Generator().manual_seed(3)
    encoder, decoder = WIDTHS
    layers, inner = {}, 2
    for k, outer in enumerate(encoder):
        layers[f"unet_model.encoder.{k}.0.main"] = (inner, outer)
        inner = outer
    for k, outer in enumerate(decoder[:3]):
        layers[f"unet_model.decoder.{k}.0.main"] = (inner, outer)
        inner = outer + encoder[::-1][k]
    for k, outer in enumerate(decoder[3:]):
        layers[f"unet_model.remaining.{k}.main"] = (inner, outer)
        inner = outer
    layers["flow"] = (inner, dims)
    found = {}
    for name, (n, m) in layers.items():
        found[f"{name}.weight"] = torch.randn(m, n, *[3] * dims, generator=generator) * (2 / (3**dims * n)) ** 0.5
        found[f"{name}.bias"] = 0.2 * torch.randn(m, generator=generator)
    found["flow.bias"] += torch.tensor([1.5, -1.0, 0.6])[:dims]
    return found


def resized(field: Tensor, factor: float) -> Tensor:
    mode = "bilinear" if field.ndim == 4 else "trilinear"
    return (
        F.interpolate(field, scale_factor=factor, mode=mode, align_corners=True, recompute_scale_factor=False) * factor
    )


def transformed(image: Tensor, field: Tensor) -> Tensor:
    """Their SpatialTransformer."""
    size = field.shape[2:]
    grid = torch.stack(torch.meshgrid(*[torch.arange(n) for n in size], indexing="ij"))[None] + field
    unit = [2 * (grid[:, d] / (n - 1) - 0.5) for d, n in enumerate(size)]
    return F.grid_sample(image, torch.stack(unit[::-1], dim=-1), align_corners=True)


def reference(weights: dict[str, Tensor], pair: Tensor, steps: int, downsize: int) -> tuple[Tensor, Tensor]:
    """Velocity and displacement of their forward pass."""
    dims = pair.ndim - 2
    convolve, pool = (F.conv2d, F.max_pool2d) if dims == 2 else (F.conv3d, F.max_pool3d)

    def layer(x: Tensor, name: str) -> Tensor:
        return convolve(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=1)

    x, skips = pair, []
    for k in range(3):
        x = F.leaky_relu(layer(x, f"unet_model.encoder.{k}.0.main"), 0.2)
        skips.append(x)
        x = pool(x, 2)
    for k in range(3):
        x = F.leaky_relu(layer(x, f"unet_model.decoder.{k}.0.main"), 0.2)
        x = torch.cat([F.interpolate(x, scale_factor=2, mode="nearest"), skips.pop()], dim=1)
    for k in range(2):
        x = F.leaky_relu(layer(x, f"unet_model.remaining.{k}.main"), 0.2)
    velocity = layer(x, "flow")
    if steps == 0:
        return velocity, velocity
    velocity = resized(velocity, 1 / downsize) if downsize > 1 else velocity
    field = velocity / 2**steps
    for _ in range(steps):
        field = field + transformed(field, field)
    return velocity, resized(field, downsize) if downsize > 1 else field


def save(path: Path, dims: int, **config: Any) -> None:
    widths = {"inshape": SIZES[dims - 2], "nb_unet_features": WIDTHS}
    torch.save({"config": {**widths, **config}, "model_state": state(dims)}, path)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("steps", "downsize"), [(7, 2), (5, 1), (0, 2)])
def test_it_gives_what_theirs_gives(size: tuple[int, ...], steps: int, downsize: int, tmp_path: Path) -> None:
    save(tmp_path / "theirs.pt", len(size), int_steps=steps, int_downsize=downsize, bidir=True)
    network = VxmDense.load(tmp_path / "theirs.pt").eval()
    source, target = torch.rand(2, 1, 1, *size, generator=torch.Generator().manual_seed(1))
    velocity, ddf = reference(state(len(size)), torch.cat([source, target], dim=1), steps, downsize)
    assert float(ddf.abs().max()) > 0.5
    with torch.no_grad():
        moved, back, found = network(source, target)
        again, displacement = network(source, target, registration=True)
    # float32, some voxels, 16 convolutions and 7 squarings
    torch.testing.assert_close(found, velocity, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(displacement, ddf, atol=5e-5, rtol=1e-4)
    torch.testing.assert_close(moved, transformed(source, ddf), atol=1e-4, rtol=0)
    torch.testing.assert_close(again, moved)
    if steps:
        negative = -velocity / 2**steps
        for _ in range(steps):
            negative = negative + transformed(negative, negative)
        negative = resized(negative, downsize) if downsize > 1 else negative
        torch.testing.assert_close(back, transformed(target, negative), atol=1e-4, rtol=0)


def test_what_is_not_supported_is_named(tmp_path: Path) -> None:
    for changed, message in (
        ({"use_probs": True}, "use_probs is True"),
        ({"nb_unet_conv_per_level": 2}, "nb_unet_conv_per_level is 2"),
        ({"int_downsize": 3}, "int_downsize is 3"),
        ({"src_feats": 2}, "src_feats is 2 and trg_feats 1"),
    ):
        save(tmp_path / "a.pt", 2, **changed)
        with pytest.raises(ValueError, match=message):
            VxmDense.load(tmp_path / "a.pt")
    with pytest.raises(ValueError, match="nb_unet_features has 2"):
        VxmDense((8, 8), [[4, 4], [4, 4]])
    wrong = state(2)
    del wrong["flow.bias"]
    torch.save({"config": {"inshape": (8, 8)}, "model_state": wrong}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt do not fit.*flow\.bias"):
        VxmDense.load(tmp_path / "a.pt")
    torch.save({"something": 1}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"b\.pt cannot be read"):
        VxmDense.load(tmp_path / "b.pt")
