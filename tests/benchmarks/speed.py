"""What the benchmark times: each path of this package, and what its peers offer for it.

A contender is a function of the spatial size that prepares and returns the work: a function without arguments that is
timed, and whose named tensors tell whether two contenders found the same. All take the same images, fields and weights.
"""

import resource
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import monai.losses
import monai.networks.nets
import numpy as np
import torch
import torch.nn.functional as F
from monai.metrics import compute_dice, compute_hausdorff_distance
from monai.networks.blocks import DVF2DDF, Warp
from monai.networks.utils import one_hot
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from torch.utils.flop_counter import flop_registry

from voxelmorph_monai.blocks import integrate, warp
from voxelmorph_monai.data import PairDataset
from voxelmorph_monai.engines import prepare_pair
from voxelmorph_monai.losses import GradientLoss, LNCCLoss, RegistrationLoss
from voxelmorph_monai.memory import keep_freed_memory
from voxelmorph_monai.metrics import dice, hausdorff95
from voxelmorph_monai.networks import Registration, VoxelMorph
from voxelmorph_monai.space.template import mni152_tissue

Size = tuple[int, ...]
Answer = dict[str, Tensor]
Work = Callable[[], Answer]

NUM_LABELS = 35
STRIDE = 4  # of the voxels whose results are compared
MONAI_DEFAULT = (16, 32, 32, 32, 32, 32)  # channels in the example of MONAI's own docstring
MONAI_DENSE = (16, 32, 32, 32, 32, 32, 32, 32)  # with one level more it is our "dense"


# What all contenders get


def smooth(size: Size, channels: int, seed: int, *, step: int = 16) -> Tensor:
    """Random numbers of about N(0, 1/4), ``(1, channels, *size)``, that change over ``step`` voxels."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, channels, *(max(n // step, 2) for n in size), generator=generator)
    return F.interpolate(coarse, size, mode="trilinear", align_corners=True)


def image(size: Size, seed: int) -> Tensor:
    """Image ``(1, 1, *size)`` in [0, 1] with contrast everywhere, as MONAI's LNCC needs it."""
    return torch.sigmoid(2 * smooth(size, 1, seed) + smooth(size, 1, seed + 100, step=3))


def images(size: Size) -> Tensor:
    """Moving and fixed image, ``(1, 2, *size)``: different ones."""
    return torch.cat([image(size, 1), image(size, 2)], dim=1)


def field(size: Size, scale: float) -> Tensor:
    """Field ``(1, 3, *size)`` in voxels."""
    return scale * smooth(size, 3, seed=3)


def labels(size: Size, seed: int) -> Tensor:
    """Label map ``(1, 1, *size)`` of a brain, as our readers give it: 35 structures, as thin, large and small as real.

    The cortex and the white matter of both sides, and fluid, of MNI152 at about 1 mm for 160 x 192 x 224 voxels; 30
    cells of a ball in its middle; all bent by a few voxels, differently for each ``seed``.
    """
    box = 160, 192, 224  # mm
    tissue = torch.from_numpy(mni152_tissue().array).permute(0, 2, 1)  # 1 fluid, 2 gray matter, 3 white matter
    points = []  # mm from the middle
    for axis, (n, side) in enumerate(zip(size, box, strict=True)):
        points.append((torch.arange(n) + 0.5) * side / n - side / 2)
        middle = tissue.shape[axis] / 2
        tissue = tissue.index_select(axis, (points[-1] + middle).long().clamp(0, tissue.shape[axis] - 1))
    grid = torch.stack(torch.meshgrid(*points, indexing="ij"), dim=-1)
    label = torch.where(tissue > 1, 2 * tissue.int() - 3 + (grid[..., 0] < 0).int(), 5)
    deep, radius = torch.linalg.vector_norm(grid, dim=-1) < 40, 40 / 3**0.5
    seeds = radius * (2 * torch.rand(NUM_LABELS - 5, 3, generator=torch.Generator().manual_seed(0)) - 1)
    label[deep] = 6 + torch.cdist(grid[deep], seeds).argmin(1).int()
    label[tissue == 0] = 0
    return warp(label[None, None], 3 * smooth(size, 3, seed), mode="nearest")


def our_network(preset: str, **changes: object) -> VoxelMorph:
    """Our network with fixed weights that displace by about half a voxel."""
    torch.manual_seed(0)
    network = VoxelMorph(preset, **changes)
    torch.nn.init.normal_(network.flow.weight, std=0.02)
    return network


def monai_network(channels: tuple[int, ...]) -> monai.networks.nets.VoxelMorph:
    """MONAI's network; with the channels of ``dense``, its weights too."""
    backbone = monai.networks.nets.VoxelMorphUNet(3, 2, 32, channels, final_conv_channels=(16, 16))
    if channels == MONAI_DENSE:
        names = list(backbone.state_dict())
        state = []
        for name, weight in our_network("dense").state_dict().items():
            after_skip = name.startswith("unet.decoder") and name.endswith(".0.conv.weight") and ".0.0." not in name
            state.append(torch.cat([weight[:, 32:], weight[:, :32]], dim=1) if after_skip else weight)  # [skip, up]
        backbone.load_state_dict(dict(zip(names, state, strict=True)))
    return monai.networks.nets.VoxelMorph(backbone)


# Contenders


def register(preset: str, size: Size, device: str = "cpu", *, amp: bool = True, **changes: object) -> Work:
    """Prepare a pass of our network without a gradient, as ``vxm`` and the bundle do it."""
    registration = Registration(our_network(preset, **changes), amp=amp).to(device).eval()
    pair = images(size).to(device)

    def work() -> Answer:
        with torch.no_grad():
            return {"ddf": registration(pair)["ddf"]}

    return work


def register_monai(channels: tuple[int, ...], size: Size) -> Work:
    """Prepare a pass of MONAI's network."""
    network = monai_network(channels).eval()
    moving, fixed = images(size).split(1, dim=1)

    def work() -> Answer:
        with torch.no_grad():
            return {"ddf": network(moving, fixed)[1]}

    return work


def register_voxelmorph(size: Size) -> Work:
    """Prepare a pass of the network of ``voxelmorph`` 0.3.4."""
    import voxelmorph  # an optional dependency

    network = voxelmorph.nn.models.VxmPairwise(3, 1, 1).eval()
    moving, fixed = images(size).split(1, dim=1)

    def work() -> Answer:
        with torch.no_grad():
            return {"ddf": network(moving, fixed, return_warped_source=True)[0]}

    return work


def train(preset: str, size: Size, device: str = "cpu", *, amp: bool = True) -> Work:
    """Prepare a step of our training, as the bundle does it."""
    registration = Registration(our_network(preset), amp=amp).to(device).train()
    loss = RegistrationLoss(LNCCLoss(), GradientLoss())
    optimizer = torch.optim.Adam(registration.parameters(), lr=1e-4)
    pair = images(size).to(device)
    target = dict(zip(("moving", "fixed"), pair.split(1, dim=1), strict=True))

    def work() -> Answer:
        optimizer.zero_grad()
        found = registration(pair)
        terms = loss.terms(found, target)
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
        return {"similarity": terms["similarity"], "ddf": found["ddf"]}

    return work


def train_monai(channels: tuple[int, ...], size: Size, device: str = "cpu") -> Work:
    """Prepare a step of training with MONAI's network and losses."""
    network = monai_network(channels).to(device).train()
    similarity = monai.losses.LocalNormalizedCrossCorrelationLoss(3, kernel_size=9)
    smoothness = monai.losses.DiffusionLoss()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
    moving, fixed = images(size).to(device).split(1, dim=1)

    def work() -> Answer:
        optimizer.zero_grad()
        warped, ddf = network(moving, fixed)
        value = similarity(warped, fixed)
        (value + smoothness(ddf)).backward()
        optimizer.step()
        return {"similarity": value, "ddf": ddf}

    return work


def lncc(loss: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype, size: Size) -> Work:
    """Prepare a loss with its gradient."""
    warped, fixed = images(size).to(dtype).split(1, dim=1)
    warped.requires_grad_()

    def work() -> Answer:
        warped.grad = None
        value = loss(warped, fixed)
        value.backward()
        return {"value": value, "gradient": warped.grad * warped.numel()}

    return work


def warped_and_gradients(function: Callable[[Tensor, Tensor], Tensor], size: Size) -> Work:
    """Prepare a warp with both of its gradients."""
    moving, ddf = image(size, 1).requires_grad_(), field(size, 4.0).requires_grad_()

    def work() -> Answer:
        moving.grad = ddf.grad = None
        result = function(moving, ddf)
        result.sum().backward()
        return {"warped": result, "of_ddf": ddf.grad, "of_image": moving.grad}

    return work


def integral_and_gradient(function: Callable[[Tensor], Tensor], size: Size) -> Work:
    """Prepare an integration with its gradient."""
    dvf = field(size, 4.0).requires_grad_()

    def work() -> Answer:
        dvf.grad = None
        result = function(dvf)
        result.sum().backward()
        return {"ddf": result, "of_dvf": dvf.grad}

    return work


def overlap(size: Size) -> Work:
    """Prepare our Dice."""
    a, b = labels(size, 1), labels(size, 2)
    return lambda: {"dice": dice(a, b, NUM_LABELS)}


def overlap_monai(size: Size) -> Work:
    """Prepare MONAI's Dice, of the same maps of labels."""
    a, b = labels(size, 1), labels(size, 2)
    return lambda: {"dice": compute_dice(a, b, include_background=False, num_classes=NUM_LABELS + 1)}


def distance(size: Size) -> Work:
    """Prepare our distance of surfaces."""
    a, b = labels(size, 1), labels(size, 2)
    return lambda: {"distance": hausdorff95(a, b, NUM_LABELS)}


def distance_monai(size: Size) -> Work:
    """Prepare MONAI's, which takes one-hot images alone."""
    a, b = labels(size, 1), labels(size, 2)

    def work() -> Answer:
        both = (one_hot(x, NUM_LABELS + 1) for x in (a, b))
        return {"distance": compute_hausdorff_distance(*both, percentile=95)}

    return work


def load(size: Size) -> Work:
    """Prepare the next pair of a training, from scans in memory."""
    scans = PairDataset([{"image": image(size, seed)[0]} for seed in (1, 2)], cache_rate=0.0)
    loader = DataLoader(scans)
    return lambda: {"pair": prepare_pair(next(iter(loader)))[0]}


def _kept(prepare: Callable[[Size], Work]) -> Callable[[Size], Work]:
    """Prepare our work in a process that keeps the memory it frees, as ``vxm`` and the bundle do."""

    def prepared(size: Size) -> Work:
        keep_freed_memory()
        return prepare(size)

    return prepared


def _monai_lncc(size: Size, dtype: torch.dtype = torch.float32) -> Work:
    return lncc(monai.losses.LocalNormalizedCrossCorrelationLoss(3, kernel_size=9), dtype, size)


CONTENDERS: dict[str, Callable[[Size], Work]] = {
    "register dense": _kept(partial(register, "dense")),
    "register dense, full resolution": _kept(partial(register, "dense", integration_level=0)),
    "register dense, float32": _kept(partial(register, "dense", amp=False)),
    "register dense, MONAI": partial(register_monai, MONAI_DENSE),
    "register diffeomorphic": _kept(partial(register, "diffeomorphic")),
    "register diffeomorphic, float32": _kept(partial(register, "diffeomorphic", amp=False)),
    "register wide": _kept(partial(register, "wide")),
    "register, MONAI": partial(register_monai, MONAI_DEFAULT),
    "register, voxelmorph": register_voxelmorph,
    "train dense": _kept(partial(train, "dense")),
    "train dense, MONAI": partial(train_monai, MONAI_DENSE),
    "train diffeomorphic": _kept(partial(train, "diffeomorphic")),
    "lncc": _kept(partial(lncc, LNCCLoss(), torch.float32)),
    "lncc, MONAI": _monai_lncc,
    "lncc, MONAI in float64": partial(_monai_lncc, dtype=torch.float64),
    "warp": _kept(partial(warped_and_gradients, warp)),
    "warp, MONAI": lambda size: warped_and_gradients(Warp(padding_mode="border"), size),
    "integrate": _kept(partial(integral_and_gradient, integrate)),
    "integrate, MONAI": lambda size: integral_and_gradient(DVF2DDF(padding_mode="border"), size),
    "dice": overlap,
    "dice, MONAI": overlap_monai,
    "hausdorff95": distance,
    "hausdorff95, MONAI": distance_monai,
    "load": load,
}


# Measures


class Measurement(NamedTuple):
    """What one child process found."""

    seconds: float
    cpu_seconds: float
    memory: float  # GiB, the peak of the process above what it takes without any work
    answer: dict[str, np.ndarray]


def _memory(name: str) -> float:
    """GiB of the process: ``VmRSS`` now, ``VmHWM`` at most (getrusage remembers the parent's peak as well)."""
    with open("/proc/self/status", encoding="utf-8") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name)) / 2**20


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _timed(work: Work) -> tuple[float, float, Answer]:
    wall, cpu = time.perf_counter(), _cpu()
    answer = work()
    return time.perf_counter() - wall, _cpu() - cpu, answer


def measure(contender: str, size: Size) -> Measurement:
    """Time one contender: not the first time, which pays for the memory, but the second one, or the median of three."""
    idle = _memory("VmRSS")
    work = CONTENDERS[contender](size)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts here, without the preparation's
    first, _, answer = _timed(work)
    # before work is repeated: a training step changes its network
    some = (..., *[slice(None, None, STRIDE)] * 3)
    sampled = {k: (v[some] if v.ndim == 5 else v).detach().double().numpy() for k, v in answer.items()}
    again = [_timed(work)[:2] for _ in range(3 if first < 2 else 1)]
    seconds, cpu = (median(times) for times in zip(*again, strict=True))
    return Measurement(seconds, cpu, _memory("VmHWM") - idle, sampled)


def ceilings(n: int) -> dict[str, float]:
    """What the machine can do: products of two ``n x n`` matrices (FLOP/s), copies of ``n^2`` floats (bytes/s).

    And ``idle``: GiB of a process that does nothing yet.
    """
    found = {"idle": _memory("VmRSS")}
    a, b = torch.rand(2, n, n).unbind()
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        x, y = a.to(dtype), b.to(dtype)
        found[name] = 2 * n**3 / min(_timed(lambda x=x, y=y: {"": x @ y})[0] for _ in range(4))  # type: ignore[misc]
    out, source = torch.zeros(2, 4, n, n).unbind()  # 4 x 4 x 4096^2 bytes do not fit a cache
    found["copy"] = 2 * 16 * n**2 / min(_timed(lambda: {"": out.copy_(source)})[0] for _ in range(4))
    return found


class Cost(NamedTuple):
    """What a work takes at least."""

    flops: float
    bytes: float
    seconds: float  # each operator at the speed of the machine's product or copy, whichever takes longer


class _Counter(TorchDispatchMode):
    """Adds up convolutions and samplings: their FLOPs, and their inputs and outputs once each."""

    def __init__(self, ceiling: dict[str, float]) -> None:
        super().__init__()
        self.ceiling = ceiling
        self.cost = Cost(0, 0, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket
        if name in flop_registry or "grid_sampler" in str(name):
            flops = flop_registry[name](*args, **(kwargs or {}), out_val=out) if name in flop_registry else 0
            tensors = [x for x in (*args, *(out if isinstance(out, tuple) else (out,))) if isinstance(x, Tensor)]
            moved = sum(x.numel() * x.element_size() for x in tensors)
            kind = "bfloat16" if tensors[0].dtype == torch.bfloat16 else "float32"
            seconds = max(flops / self.ceiling[kind], moved / self.ceiling["copy"])
            self.cost = Cost(*(a + b for a, b in zip(self.cost, (flops, moved, seconds), strict=True)))
        return out


def count(contender: str, size: Size, ceiling: dict[str, float]) -> Cost:
    """Count what a contender's convolutions and samplings take at least."""
    torch.set_num_threads(1)  # warp copies the image for each thread
    work = CONTENDERS[contender](size)
    with _Counter(ceiling) as counter:
        work()
    return counter.cost


@contextmanager
def quiet() -> Iterator[None]:
    """Peers warn of what they are going to change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def answer(connection: Connection, function: str, *args: Any) -> None:
    """Run ``measure``, ``count`` or ``ceilings`` in a child process, and send what it gives."""
    with quiet():
        try:
            connection.send({"measure": measure, "count": count, "ceilings": ceilings}[function](*args))
        except (
            ImportError,
            NotImplementedError,
            RuntimeError,
        ) as error:  # a peer that is not installed, or fails as it does
            connection.send(str(error))
