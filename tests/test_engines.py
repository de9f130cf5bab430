"""What goes into the network, what comes out timed, and how pairs are called."""

import pytest
import torch
from monai.data import MetaTensor
from torch.testing import assert_close

from voxelmorph_monai import engines
from voxelmorph_monai.engines import TimedInferer, pair_paths, prepare_both_orders, prepare_pair


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


def test_prepare_pair_paths_what_is_wrong():
    with pytest.raises(ValueError, match=r"batch has no \['fixed'\], only \['image', 'moving'\]"):
        prepare_pair({"moving": torch.zeros(1, 1, 4, 4), "image": torch.zeros(1, 1, 4, 4)})
    message = r"moving and fixed .*\[2, 1, 5, 6, 4\] and \[2, 1, 5, 6, 3\]"
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


def test_pairs_are_known_by_their_files():
    def image(path):
        return MetaTensor(torch.zeros(1, 2, 2), meta={"filename_or_obj": path})

    items = [{"moving": image("/a/1005.nii.gz"), "fixed": image("/a/1018.nii.gz")}]
    items += [{"moving": image("b.mgz"), "fixed": image("/x/c.nii")}]
    assert pair_paths(items) == [("/a/1005.nii.gz", "/a/1018.nii.gz"), ("b.mgz", "/x/c.nii")]


def test_both_orders_are_two_batches_in_one():
    labels = {f"{role}_label": torch.full((2, 1, 5, 6, 4), i) for i, role in enumerate(("moving", "fixed"))}
    data = batch(**labels)
    twins = {"moving": "fixed", "fixed": "moving", "moving_label": "fixed_label", "fixed_label": "moving_label"}
    other = {key: data[twin] for key, twin in twins.items()}
    pair, target = prepare_both_orders(data, "cpu")
    halves = [prepare_pair(data), prepare_pair(other)]
    assert_close(pair, torch.cat([half[0] for half in halves]), rtol=0, atol=0)
    assert target.keys() == data.keys()
    for key, tensor in target.items():
        assert_close(tensor, torch.cat([half[1][key] for half in halves]), rtol=0, atol=0)
    assert prepare_both_orders(batch())[1].keys() == {"moving", "fixed"}
