"""What goes into the network, what comes out timed, and how pairs are called."""

import ctypes
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from monai.data import MetaTensor
from torch.testing import assert_close

from voxelmorph_monai import engines
from voxelmorph_monai.engines import TimedInferer, keep_freed_memory, pair_names, prepare_pair


def batch(**extra):
    shape, generator = (2, 1, 5, 6, 4), torch.Generator().manual_seed(0)
    return {key: MetaTensor(torch.rand(shape, generator=generator)) for key in ("moving", "fixed")} | extra


def test_prepare_pair_puts_the_moving_image_first():
    data = batch()
    pair, target = prepare_pair(data, "cpu")
    assert_close(pair[:, :1], data["moving"].as_tensor(), rtol=0, atol=0)
    assert_close(pair[:, 1:], data["fixed"].as_tensor(), rtol=0, atol=0)
    assert target.keys() == {"moving", "fixed"}


def test_prepare_pair_gives_plain_tensors_and_passes_labels():
    labels = {"moving_label": MetaTensor(torch.ones(2, 1, 5, 6, 4).int())}
    pair, target = prepare_pair(batch(**labels, filename=["a", "b"]))
    assert target.keys() == {"moving", "fixed", "moving_label"}
    assert {type(value) for value in (pair, *target.values())} == {torch.Tensor}
    assert target["moving_label"].dtype == torch.int32


def test_prepare_pair_moves_everything():
    pair, target = prepare_pair(batch(fixed_label=torch.zeros(2, 1, 5, 6, 4)), torch.device("meta"), non_blocking=True)
    assert {value.device.type for value in (pair, *target.values())} == {"meta"}


def test_prepare_pair_names_what_is_wrong():
    with pytest.raises(ValueError, match=r"batch must have 'moving' and 'fixed', got only \['image', 'moving'\]\."):
        prepare_pair({"moving": torch.zeros(1, 1, 4, 4), "image": torch.zeros(1, 1, 4, 4)})
    message = r"moving and fixed must have the same shape, got \[2, 1, 5, 6, 4\] and \[2, 1, 5, 6, 3\]\."
    with pytest.raises(ValueError, match=message):
        prepare_pair({"moving": batch()["moving"], "fixed": torch.zeros(2, 1, 5, 6, 3)})


def test_timed_inferer_shares_the_time_among_the_pairs(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(engines.time, "perf_counter", lambda: clock[0])

    def network(inputs, shift, *, scale):
        clock[0] += 3
        return {"ddf": inputs * scale + shift}

    inputs = torch.ones(4, 2, 3)
    found = TimedInferer()(inputs, network, 1, scale=3)
    expected = {"ddf": 4 * inputs, "seconds": torch.full((4,), 0.75)}
    assert_close(found, expected, rtol=0, atol=0)


def test_pairs_are_called_after_their_files():
    def image(path):
        return MetaTensor(torch.zeros(1, 2, 2), meta={"filename_or_obj": path})

    items = [
        {"moving": image("/data/images/1005.nii.gz"), "fixed": image("/data/images/1018.nii.gz")},
        {"moving": image("a.b.mgz"), "fixed": image("/x/c.nii.gz")},
    ]
    assert pair_names(items) == [{"filename_or_obj": "1005 to 1018"}, {"filename_or_obj": "a.b.mgz to c"}]


FAULTS = """
import resource, torch
from voxelmorph_monai.engines import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults(), keep_freed_memory(), faults(), faults())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library has no mallopt")
def test_freed_memory_is_kept():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    before, taken, _, after = done.stdout.split()
    assert taken == "True"
    assert int(before) >= 32  # 64 MiB in pages of 4 KiB, or at the largest of 2 MiB
    assert int(after) <= 4  # the same pages again; a few are for small objects


def test_other_c_libraries_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    assert not keep_freed_memory()
