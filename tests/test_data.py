"""Scans on disk become pairs: every pair that there is, each as often as asked, in an order that can be repeated."""

import json
import re
from itertools import permutations
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import DataLoader
from monai.transforms import Compose, Lambda, RandFlipd, Randomizable, Transform

from voxelmorph_monai.data import PairDataset, PairSampler, check_scans, fingerprint, load_scans, pair

SCANS = [{"image": n, "label": 10 * n} for n in range(1, 6)]
ATLAS = {"image": 9, "label": 90}


def images(item):
    return item["moving"], item["fixed"]


def processes(monkeypatch, rank, world):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: world)


# Scans


def test_load_scans_gives_the_paths_of_a_section(prepared):
    assert [len(load_scans(str(prepared), section)) for section in ("training", "validation", "test")] == [3, 2, 2]
    for number, scan in enumerate(load_scans(str(prepared), "validation"), start=4):
        assert scan == {kind: str(prepared / f"{kind}s" / f"{number}.nii.gz") for kind in ("image", "label")}


def test_load_scans_without_datalist(tmp_path, prepared):
    with pytest.raises(FileNotFoundError, match=rf"dataset_dir {tmp_path} .*datalist\.json"):
        load_scans(str(tmp_path), "training")
    with pytest.raises(ValueError, match="rehearsal"):
        load_scans(str(prepared), "rehearsal")


def test_check_scans_accepts_what_is_right(prepared):
    check_scans(load_scans(str(prepared), "training"), keys=("image", "label"))
    image_only = [{"image": scan["image"]} for scan in load_scans(str(prepared), "training")]
    check_scans(image_only)
    check_scans(image_only[:1], image_only[1])  # with an atlas one is enough


def test_check_scans_names_what_is_wrong(prepared, tmp_path):
    scans = load_scans(str(prepared), "training")
    with pytest.raises(ValueError, match=r"scans for validation: 1\b.* 2\b"):
        check_scans(scans[:1], purpose="validation")
    with pytest.raises(ValueError, match=r"scans for training: 0\b.* 1\b"):
        check_scans([], scans[0])
    again = Path(scans[0]["image"]).parent / ".." / "images" / Path(scans[0]["image"]).name
    with pytest.raises(ValueError, match=rf"scans for training .*{scans[0]['image']} more than once"):
        check_scans([*scans, {"image": str(again)}])
    bare = rf"{scans[0]['image']}.* no 'label'"
    with pytest.raises(ValueError, match=bare):
        check_scans([*scans[1:], {"image": scans[0]["image"]}], keys=("image", "label"))
    with pytest.raises(ValueError, match=bare):
        check_scans(scans[1:], {"image": scans[0]["image"]}, keys=("image", "label"))
    missing = str(tmp_path / "missing.nii.gz")
    with pytest.raises(FileNotFoundError, match=missing):
        check_scans([*scans, {"image": missing, "label": missing}])
    check_scans([scans[1], {**scans[0], "label": missing}])  # what is not asked for need not be there


@pytest.mark.parametrize("key", ["image", "label"])
def test_check_scans_wants_one_grid(prepared, tmp_path, key):
    scans = load_scans(str(prepared), "training")
    image = nib.load(scans[1][key])
    moved = image.affine.copy()
    moved[1, 3] += 1
    for name, other in [("shape", image.slicer[:, :-1]), ("moved", nib.Nifti1Image(np.asarray(image.dataobj), moved))]:
        path = str(tmp_path / f"{name}.nii.gz")
        nib.save(other, path)
        with pytest.raises(ValueError, match=rf"{scans[0]['image']} .*{path}.* one grid|1 mm apart"):
            check_scans([scans[0], {**scans[1], key: path}], keys=("image", "label"))


def test_fingerprint_is_of_the_files_wherever_their_folder_is():
    def found(root, *items, outside=()):
        listed = [{key: f"{root}/{path}" for key, path in item.items()} for item in items]
        return fingerprint([*listed, *({"image": path} for path in outside)], root)

    first, second = {"image": "i/1", "label": "l/1"}, {"label": "l/2", "image": "i/2"}
    same = found("/data", first, second)
    assert same == found("/moved/data", first, dict(reversed(second.items())))
    outside = [found("/data", first, outside=[path]) for path in ("/a/i/1", "/b/i/1", "/data2/i/1")]
    others = [found("/data", second, first), found("/data", first), found("/data", first, {"image": "i/2"})]
    assert len({same, *outside, *others}) == 7


def test_pair_leaves_out_what_is_none():
    assert pair("a", "b") == {"moving": "a", "fixed": "b"}
    assert pair("a", "b", fixed_label="d") == {"moving": "a", "fixed": "b", "fixed_label": "d"}
    assert pair("a", "b", "c", "d") == {"moving": "a", "fixed": "b", "moving_label": "c", "fixed_label": "d"}


# PairDataset


def test_all_ordered_pairs_of_different_scans():
    pairs = PairDataset(SCANS, cache_rate=0)
    assert len(pairs) == 20
    found = [pairs[i] for i in range(20)]
    assert sorted(map(images, found)) == sorted(permutations(range(1, 6), 2))
    assert all(i["moving_label"] == 10 * i["moving"] and i["fixed_label"] == 10 * i["fixed"] for i in found)


@pytest.mark.parametrize(("role", "order"), [("moving", 1), ("fixed", -1)])
@pytest.mark.parametrize("data", [SCANS, [*SCANS[:2], ATLAS, *SCANS[2:]]], ids=["apart", "among the scans"])
def test_atlas_with_every_other_scan(role, order, data):
    pairs = PairDataset(data, atlas=dict(ATLAS), atlas_role=role, cache_rate=0)
    assert [images(pairs[i]) for i in range(len(pairs))] == [(9, n)[::order] for n in range(1, 6)]


def test_pairs_without_both_labels_have_none():
    pairs = PairDataset([{"image": 1}, {"image": 2, "label": 20}], cache_rate=0)
    assert pairs[0] == {"moving": 1, "fixed": 2}


def test_each_scan_is_loaded_once():
    loaded = []

    def negative(scan):
        loaded.append(scan["image"])
        return {"image": -scan["image"]}

    load = Lambda(negative)  # MONAI's cache trusts only its own transforms to give the same again
    pairs = PairDataset(SCANS[:3], load, atlas=ATLAS)
    assert sorted(loaded) == [1, 2, 3, 9]
    assert [images(pairs[i]) for i in range(3)] == [(-9, -1), (-9, -2), (-9, -3)]
    assert len(loaded) == 4
    uncached = PairDataset(SCANS[:3], load, cache_rate=0)
    assert len(loaded) == 4
    assert images(uncached[0]) == (-1, -2)
    assert len(loaded) == 6


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (SCANS[:1], {}, r"scans for a pair: 1\. .*2 scans"),
        ([ATLAS], {"atlas": ATLAS}, r"atlas \{'image': 9, 'label': 90\}: 0\. .*1 other"),
        (SCANS, {"atlas_role": "fixed"}, r"atlas_role is 'fixed', but there is no atlas\."),
        (SCANS, {"atlas": ATLAS, "atlas_role": "source"}, r"^atlas_role is 'source'.*'moving' or 'fixed'"),
    ],
)
def test_pairs_that_cannot_be(data, options, message):
    with pytest.raises(ValueError, match=message):
        PairDataset(data, **options)


PAIRS = [
    {"moving": 1, "fixed": 2, "moving_label": 10, "fixed_label": 20},
    {"moving": 3, "fixed": 2, "moving_label": 30, "fixed_label": 20},
    {"moving": 2, "fixed": 1, "moving_label": 20, "fixed_label": 10},
]


def test_listed_pairs_are_those_and_load_each_scan_once():
    loaded = []

    def load(scan):
        loaded.append(scan["image"])
        return scan

    pairs = PairDataset(PAIRS, Lambda(load))
    assert [pairs[i] for i in range(len(pairs))] == PAIRS
    assert sorted(loaded) == [1, 2, 3]
    assert [PairDataset([{"moving": 1, "fixed": 2}], cache_rate=0)[0]] == [{"moving": 1, "fixed": 2}]
    half = [{"moving": 1, "fixed": 2, "moving_label": 10}]
    assert PairDataset(half, cache_rate=0)[0] == {"moving": 1, "fixed": 2}


def test_listed_pairs_are_checked(prepared):
    scans = load_scans(str(prepared), "training")
    listed = [pair(a["image"], b["image"], a["label"], b["label"]) for a, b in permutations(scans, 2)]
    check_scans(listed, keys=("image", "label"))
    with pytest.raises(ValueError, match=rf"^\{{'image': '{scans[0]['image']}'.* no 'label'"):
        check_scans([*listed[1:], pair(scans[0]["image"], scans[1]["image"])], keys=("image", "label"))
    with pytest.raises(ValueError, match=rf"pairs for training .*{scans[0]['image']} to .* more than once"):
        check_scans([*listed, listed[0]])
    with pytest.raises(ValueError, match=r"scans for training: 0\b.* 2\b"):
        check_scans([])


@pytest.mark.parametrize("wrong", [{"image": 1, "label": 10}, {"moving": 1}, {"moving": 1, "fixed": 2, "image": 3}])
def test_a_list_holds_scans_or_pairs(wrong):
    with pytest.raises(ValueError, match=re.escape(str(wrong)) + ".*'image'.*'moving', 'fixed'"):
        PairDataset([*PAIRS, wrong], cache_rate=0)
    with pytest.raises(ValueError, match=r"atlas \{'image': 9.*pairs"):
        PairDataset(PAIRS, atlas=ATLAS, cache_rate=0)


# Augmentation


class Draw(Randomizable, Transform):
    """What a random transform of MONAI draws, in place of images."""

    def __call__(self, item):
        return item | {"drawn": self.R.randint(1 << 30)}


class DrawImage(Draw):
    """The same, in place of a scan's image."""

    def __call__(self, item):
        return item | {"image": self.R.randint(1 << 30)}


def test_without_its_sampler_augmentation_draws_from_torch():
    def drawn(seed):
        torch.manual_seed(seed)
        pairs = PairDataset(SCANS, augmentation=Compose([Draw()]), cache_rate=0)
        return [pairs[i]["drawn"] for i in (0, 1, 0)]

    first = drawn(0)
    assert len(set(first)) == 3
    assert drawn(0) == first
    assert not set(drawn(1)) & set(first)


def loaded(epoch=1, num_workers=0, *, seed=0, transform=None, augmentation=None, before=1, persistent=False):
    """What is drawn for each pair of ``epoch``, as a loader of MONAI gives it; ``before``: where it starts."""
    torch.manual_seed(epoch + 100 * num_workers)  # whatever else draws
    pairs = PairDataset(SCANS[:3], transform, augmentation=augmentation)
    sampler = PairSampler(pairs, 7, seed=seed)
    loader = DataLoader(pairs, sampler=sampler, num_workers=num_workers, persistent_workers=persistent)
    for number in range(before, epoch + 1):
        sampler.set_epoch(number)
        found = [[int(value) for key, value in sorted(pair.items()) if "label" not in key] for pair in loader]
    return found


WORKERS = [(1, False, 1), (1, True, 1), (2, True, 1), (2, True, 2), (2, False, 3)]


@pytest.mark.parametrize(("num_workers", "persistent", "before"), WORKERS)
@pytest.mark.parametrize("place", ["transform", "augmentation"])
def test_what_an_epoch_shows_does_not_depend_on_who_loads_it(num_workers, persistent, before, place):
    random = {place: DrawImage() if place == "transform" else Compose([Draw()])}
    alone = loaded(3, **random, before=3)
    assert loaded(3, num_workers, **random, before=before, persistent=persistent) == alone
    draws = {tuple(pair) for pair in alone} | {tuple(pair) for pair in loaded(4, **random)}
    assert len(draws) == 14  # 7 pairs an epoch of 6 that there are, and no draw comes twice
    assert loaded(3, **random, seed=1) != alone


def test_processes_augment_their_own_pairs(monkeypatch):
    draws = []
    for rank in range(2):
        processes(monkeypatch, rank, 2)
        draws.append(loaded(augmentation=Draw()))
    monkeypatch.undo()
    alone = [pair for pairs in zip(*draws, strict=True) for pair in pairs]
    assert alone[:7] == loaded(augmentation=Draw())


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, True, None, "0"])
def test_a_seed_is_a_whole_number_that_numpy_takes(seed):
    with pytest.raises(ValueError, match=rf"seed is {seed}\. .* 0 to 4294967295"):
        PairSampler(PairDataset(SCANS, cache_rate=0), seed=seed)
    for right in (0, 2**32 - 1):
        assert sorted(PairSampler(PairDataset(SCANS, cache_rate=0), seed=right)) == list(range(20))


def test_augmentation_changes_a_pair_and_not_what_is_cached():
    scans = [{"image": torch.full((1, 3, 4, 5), n) + torch.arange(5.0), "label": torch.arange(60).view(1, 3, 4, 5)}
             for n in range(2)]  # fmt: skip
    keys = ["moving", "fixed", "moving_label", "fixed_label"]
    pairs = PairDataset(scans, Lambda(lambda scan: scan), augmentation=RandFlipd(keys, prob=1, spatial_axis=2))
    for _ in range(2):
        flipped = pairs[1]
        assert torch.equal(flipped["moving"], scans[1]["image"].flip(-1))
        assert torch.equal(flipped["fixed_label"], scans[0]["label"].flip(-1))


# PairSampler


def epoch(sampler, number):
    sampler.set_epoch(number)
    indices = list(sampler)
    assert len(indices) == len(sampler)
    return indices


def test_an_epoch_is_decided_by_seed_and_number():
    pairs = PairDataset(SCANS, cache_rate=0)
    first, second = PairSampler(pairs), PairSampler(pairs)
    torch.manual_seed(1)
    orders = [epoch(first, n) for n in (1, 2, 3)]
    torch.manual_seed(2)
    assert epoch(second, 3) == orders[2]  # without the epochs before, and whatever else draws
    assert epoch(first, 1) == orders[0]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert epoch(PairSampler(pairs, seed=1), 1) not in orders
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert epoch(PairSampler(pairs, num_samples=7), 1) == orders[0][:7]


def test_more_samples_than_pairs_take_each_pair_equally_often():
    order = epoch(PairSampler(PairDataset(SCANS, cache_rate=0), num_samples=45), 1)
    counts = np.bincount(order, minlength=20)
    assert len(order) == 45
    assert set(counts) == {2, 3}
    assert sorted(order[:20]) == sorted(order[20:40]) == list(range(20))
    assert order[:20] != order[20:40]


def test_in_order():
    pairs = PairDataset(SCANS, cache_rate=0)
    assert epoch(PairSampler(pairs, shuffle=False), 5) == list(range(20))
    assert epoch(PairSampler(pairs, 3, shuffle=False), 5) == [0, 1, 2]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("num_samples", [None, 9, 50])
@pytest.mark.parametrize("shuffle", [True, False])
def test_processes_share_an_epoch(monkeypatch, world, num_samples, shuffle):
    pairs = PairDataset(SCANS, cache_rate=0)
    wanted = num_samples or 20
    shares = []
    for rank in range(world):
        processes(monkeypatch, rank, world)
        shares.append(epoch(PairSampler(pairs, num_samples, shuffle=shuffle), 4))
    monkeypatch.undo()
    together = [share[i] for i in range(max(map(len, shares))) for share in shares if i < len(share)]
    if shuffle:  # as many steps in every process, or the others would wait for ever: up to world - 1 pairs more
        assert {len(share) for share in shares} == {-(-wanted // world)}
        alone = epoch(PairSampler(pairs, len(together)), 4)
    else:  # an evaluation counts each pair once
        alone = epoch(PairSampler(pairs, num_samples, shuffle=False), 4)
    assert together == alone


def test_sampler_needs_samples():
    with pytest.raises(ValueError, match=r"num_samples is 0\b.* 1 "):
        PairSampler(PairDataset(SCANS, cache_rate=0), 0)


def test_each_process_needs_a_pair(monkeypatch):
    processes(monkeypatch, 0, 3)
    with pytest.raises(ValueError, match=r"^2 pairs .* 3 processes"):
        PairSampler(PairDataset(SCANS[:2], cache_rate=0))


def test_datalist_holds_paths_relative_to_its_folder(prepared):
    content = json.loads((prepared / "datalist.json").read_text())
    assert content["test"][0] == {"image": "images/6.nii.gz", "label": "labels/6.nii.gz"}
