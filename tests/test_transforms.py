"""Scans in, registrations out: what the files say is what NumPy, SciPy and ITK find."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.data import MetaTensor
from scipy.ndimage import gaussian_filter, map_coordinates
from torch.testing import assert_close

from voxelmorph_monai import report as results
from voxelmorph_monai.blocks import warp
from voxelmorph_monai.data import load_scans, pair
from voxelmorph_monai.transforms import LoadScand, MergeLabelsd, SaveRegistrationd, WarpLabelsd

pytestmark = pytest.mark.usefixtures("one_thread")
FILES = {"warped.nii.gz", "displacement.nii.gz", "inverse_displacement.nii.gz", "jacobian.nii.gz", "report.png"}


def files(prepared):
    """The pair of files of the tests, with labels; the moving image in its scanner's units."""
    moving, fixed = load_scans(str(prepared), "validation")
    return pair(moving["image"], fixed["image"], moving["label"], fixed["label"])


def save(path, array, affine=None, dtype=None):
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine, dtype=dtype), path)
    return str(path)


# LoadScand


def test_load_gives_images_in_the_unit_range_and_labels_as_they_are(tmp_path, prepared):
    scan = load_scans(str(prepared), "training")[0]
    image, labels = (nib.load(scan[key]) for key in ("image", "label"))
    raw = np.asarray(image.dataobj) * 700 - 50
    path = save(tmp_path / "raw.nii.gz", raw, image.affine)
    loaded = LoadScand(["image", "label", "moving_label"], allow_missing_keys=True)(
        {"image": path, "label": scan["label"], "age": 33}
    )
    assert loaded.keys() == {"image", "label", "age"}
    assert isinstance(loaded["image"], MetaTensor)
    assert isinstance(loaded["label"], MetaTensor)
    expected = torch.tensor((raw - raw.min()) / (raw.max() - raw.min()))[None]
    assert_close(loaded["image"].as_tensor(), expected, rtol=0, atol=1e-6)  # float32
    assert loaded["image"].dtype == torch.float32
    assert (loaded["image"].min(), loaded["image"].max()) == (0, 1)
    assert loaded["image"].meta["minimum"] == raw.min()
    assert loaded["image"].meta["maximum"] == raw.max()
    assert loaded["image"].meta["filename_or_obj"] == path
    assert_close(loaded["label"].as_tensor(), torch.tensor(np.asarray(labels.dataobj)).int()[None], rtol=0, atol=0)
    for key in ("image", "label"):
        assert_close(loaded[key].affine, torch.tensor(image.affine), rtol=0, atol=0)


def test_load_takes_big_endian_mgz_and_reversed_axes(tmp_path):
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    nib.save(nib.MGHImage(array, np.eye(4)), tmp_path / "a.mgz")
    reversed_axes = nib.Nifti1Image(array, np.eye(4)).slicer[::-1]
    nib.save(reversed_axes, tmp_path / "b.nii")
    assert_close(LoadScand("image")({"image": tmp_path / "a.mgz"})["image"].as_tensor() * 23, torch.tensor(array)[None])
    flipped = LoadScand("image")({"image": tmp_path / "b.nii"})["image"]
    assert_close(flipped.as_tensor() * 23, torch.tensor(array[::-1].copy())[None])


def test_load_needs_its_keys(prepared):
    with pytest.raises(KeyError, match="label"):
        LoadScand(["image", "label"])({"image": load_scans(str(prepared), "test")[0]["image"]})


ARRAY = np.random.default_rng(0).random((4, 5, 6)).astype(np.float32)


def changed(index, value):
    array = ARRAY.copy()
    array[index] = value
    return array


@pytest.mark.parametrize(
    ("key", "array", "message"),
    [
        ("image", changed(0, np.nan), r"has 30 voxels of NaN"),
        ("image", changed((0, 0, 0), np.inf), r"has 1 voxels of NaN"),
        ("image", np.zeros_like(ARRAY), r"is constant: every voxel is 0"),
        ("image", np.stack([ARRAY, ARRAY], axis=-1), r"is not one 3-D volume: its shape is \(4, 5, 6, 2\)"),
        ("label", ARRAY, r"is not a label map: 120 .* not whole numbers"),
        ("label", np.rint(ARRAY) - 1, r"is not a label map: .* values run from"),
        ("label", np.zeros(ARRAY.shape, np.uint8), r"is not a label map: .* values run from"),
        ("label", np.full(ARRAY.shape, 2**32 + 5, np.uint64), r"holds the label 4294967301\b"),
    ],
)
def test_load_names_the_bad_file(tmp_path, key, array, message):
    path = save(tmp_path / "bad.nii.gz", array, dtype=array.dtype)
    with pytest.raises(ValueError, match=f"{path} {message}"):
        LoadScand(key)({key: path})


@pytest.mark.parametrize("keys", [("image", "label"), ("moving", "fixed")])
def test_load_wants_one_grid(tmp_path, keys):
    labels = np.rint(ARRAY).astype(np.uint8)
    moved = np.eye(4)
    moved[2, 3] = 2
    paths = {
        keys[0]: save(tmp_path / "one.nii.gz", ARRAY),
        "shape": save(tmp_path / "two.nii.gz", labels[:-1]),
        "grid": save(tmp_path / "three.nii.gz", labels, moved),
    }
    for name in ("shape", "grid"):
        with pytest.raises(
            ValueError, match=rf"{paths[keys[0]]} .*{paths[name]}.* {dict(shape='has', grid='2 mm')[name]}"
        ):
            LoadScand(keys)({keys[0]: paths[keys[0]], keys[1]: paths[name]})


# MergeLabelsd

TABLE = {"thalamus": [10, 49], "cortex": [3], "none of these": [77]}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32, torch.int64])
def test_merging_numbers_structures_in_order(dtype):
    labels = torch.tensor([[[0, 3, 10], [49, 11, 100]]]).to(dtype)
    merged = MergeLabelsd("label", TABLE)({"label": labels, "image": 1})
    expected = torch.tensor([[[0, 2, 1], [1, 0, 0]]], dtype=torch.int32)
    assert_close(merged["label"], expected, rtol=0, atol=0)
    assert merged["image"] == 1


def test_merging_sets_what_no_structure_has_to_zero():
    labels = torch.tensor([-1, -10, 76, 77, 78, 79, 10**6, 2**31 - 1], dtype=torch.int32)
    expected = torch.tensor([0, 0, 0, 3, 0, 0, 0, 0], dtype=torch.int32)
    assert_close(MergeLabelsd("label", TABLE)({"label": labels})["label"], expected, rtol=0, atol=0)


def test_merging_nothing():
    data = {"label": torch.tensor([0, 7])}
    assert MergeLabelsd("label")(data) == data
    assert MergeLabelsd("label", TABLE, allow_missing_keys=True)({"image": 1}) == {"image": 1}
    with pytest.raises(KeyError, match="label"):
        MergeLabelsd("label", TABLE)({"image": 1})


def test_labels_of_unsigned_types_are_compared_and_kept():
    labels = torch.tensor([[0, 2, 40000]], dtype=torch.uint16)
    with pytest.raises(ValueError, match=r"^label holds the label 40000, but num_labels is 3\."):
        MergeLabelsd("label", num_labels=3)({"label": labels})
    kept = MergeLabelsd("label", num_labels=40000, kept=[2])({"label": labels})["label"]
    assert kept.tolist() == [[0, 2, 0]]


def test_merged_labels_keep_their_header(prepared):
    loaded = LoadScand("label")(load_scans(str(prepared), "test")[0])
    merged = MergeLabelsd("label", {"core": [2]})(loaded)["label"]
    assert_close(merged.affine, loaded["label"].affine, rtol=0, atol=0)
    assert_close(merged.as_tensor(), (loaded["label"].as_tensor() == 2).int(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("table", "wrong"),
    [
        ({"a": [0]}, "'a' .*0, but labels start"),
        ({"a": [4], "b": [5, -1]}, "'b' .*-1, but labels start"),
        ({"a": [4], "b": [5, 4]}, "'b' .*4, but it is listed"),
        ({"a": [4, 4]}, "'a' .*4, but it is listed"),
    ],
)
def test_tables_that_cannot_be(table, wrong):
    with pytest.raises(ValueError, match=rf"structure {wrong}"):
        MergeLabelsd("label", table)


def test_labels_past_what_is_measured_are_refused(prepared):
    loaded = LoadScand("label")(load_scans(str(prepared), "test")[0])
    assert_close(MergeLabelsd("label", num_labels=4)(loaded)["label"].as_tensor(), loaded["label"].as_tensor())
    message = rf"{loaded['label'].meta['filename_or_obj']} holds the label 4, but num_labels is 3\."
    with pytest.raises(ValueError, match=message):
        MergeLabelsd("label", num_labels=3)(loaded)
    with pytest.raises(ValueError, match=r"label holds the label 4, but num_labels is 3\."):
        MergeLabelsd("label", num_labels=3)({"label": torch.tensor([4])})


def test_structures_that_are_kept_keep_their_numbers():
    labels = torch.tensor([[[0, 3, 10], [49, 11, 77]]])
    kept = MergeLabelsd("label", TABLE, kept=["none of these", "cortex"])({"label": labels})["label"]
    assert_close(kept, torch.tensor([[[0, 2, 0], [0, 0, 3]]], dtype=torch.int32), rtol=0, atol=0)
    plain = MergeLabelsd("label", num_labels=80, kept=[77, 3])({"label": labels.int()})["label"]
    assert_close(plain, torch.tensor([[[0, 3, 0], [0, 0, 77]]], dtype=torch.int32), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"^kept is \['pons'\], .*\['thalamus', "):
        MergeLabelsd("label", TABLE, kept=["pons"])
    with pytest.raises(ValueError, match=r"^kept is \[\], .*\[1, 2\]"):
        MergeLabelsd("label", num_labels=2, kept=[])


# WarpLabelsd


def smooth_field(size, amplitude=1.5, seed=0):
    rng = np.random.default_rng(seed)
    noise = np.stack([gaussian_filter(rng.standard_normal(size), 4) for _ in size])
    return torch.tensor(amplitude * noise / noise.std(), dtype=torch.float32)


def phi(ddf):
    """Where each voxel looks, for ``map_coordinates``, which like us continues an image with its border ("nearest")."""
    return np.indices(ddf.shape[1:]) + ddf.numpy()


def test_labels_warp_by_nearest_or_by_the_largest_share(prepared):
    data = LoadScand("moving_label")({"moving_label": load_scans(str(prepared), "test")[0]["label"]})
    labels = data["moving_label"].as_tensor()[0].numpy()
    ddf = smooth_field(labels.shape)
    nearest = WarpLabelsd()({**data, "ddf": ddf})
    expected = map_coordinates(labels, phi(ddf), order=0, mode="nearest")
    assert nearest.keys() == {"moving_label", "ddf", "warped_label"}
    assert_close(nearest["warped_label"], torch.tensor(expected)[None], rtol=0, atol=0)
    shares = [map_coordinates((labels == n) * 1.0, phi(ddf), order=1, mode="nearest") for n in range(5)]
    linear = WarpLabelsd("linear")({**data, "ddf": ddf})["warped_label"][0].numpy()
    agree = linear == np.argmax(shares, axis=0)
    assert agree.mean() > 0.9999  # float32 decides otherwise where two labels have the same share
    assert (linear != expected).mean() > 0.001


def test_labels_warp_in_one_of_two_ways():
    with pytest.raises(ValueError, match=r"mode is 'cubic'.*'nearest' or 'linear'"):
        WarpLabelsd("cubic")


# SaveRegistrationd


def registered(prepared, folder, *, labels=True, seconds=None):
    """What an evaluator hands to its postprocessing: a pair whose moving image was scanned in other units."""
    paths = files(prepared)
    image = nib.load(paths["moving"])
    paths["moving"] = save(folder / "scan.nii.gz", np.asarray(image.dataobj) * 700 - 50, image.affine)
    if not labels:
        paths = pair(paths["moving"], paths["fixed"])
    data = LoadScand(list(paths))(paths)
    ddf = smooth_field(data["moving"].shape[1:]) + torch.tensor([1.25, -0.75, 0.5]).view(3, 1, 1, 1)
    data |= {"ddf": ddf, "warped": warp(data["moving"].as_tensor()[None], ddf[None])[0]}
    return (data | {"seconds": torch.tensor(seconds)} if seconds else data), paths


@pytest.fixture(scope="module")
def registration(prepared, tmp_path_factory):
    """The items, the paths, the folder of results and the summary of one registration."""
    folder = tmp_path_factory.mktemp("registration")
    data, paths = registered(prepared, folder, seconds=2.5)
    summary = SaveRegistrationd(str(folder / "new" / "results"))(data)["summary"]
    return data, paths, folder / "new" / "results", summary


def read(folder, name):
    return nib.load(folder / name)


def test_all_files_lie_on_the_fixed_grid(registration):
    _, paths, folder, _ = registration
    assert {path.name for path in folder.iterdir()} == FILES | {"summary.json", "warped_labels.nii.gz"}
    fixed = nib.load(paths["fixed"])
    for path in folder.glob("*.nii.gz"):
        image = nib.load(path)
        assert image.shape[:3] == fixed.shape
        np.testing.assert_allclose(image.affine, fixed.affine, rtol=0, atol=1e-5)  # float32 in the header
    assert read(folder, "warped_labels.nii.gz").get_data_dtype() == np.int32
    assert read(folder, "warped.nii.gz").get_data_dtype() == np.float32


def itk_warp(folder, moving, fixed, name, interpolator):
    """Resample ``moving`` through a displacement file on the grid of ``fixed``: ``(X, Y, Z)``, NaN outside."""
    field = sitk.DisplacementFieldTransform(sitk.ReadImage(str(folder / name), sitk.sitkVectorFloat64))
    image = sitk.ReadImage(moving, sitk.sitkFloat64)
    found = sitk.Resample(image, sitk.ReadImage(fixed), field, interpolator, float("nan"))
    return sitk.GetArrayFromImage(found).T


def test_itk_warps_as_we_do(registration):
    _, paths, folder, _ = registration
    for name, key, interpolator in [
        ("warped.nii.gz", "moving", sitk.sitkLinear),
        ("warped_labels.nii.gz", "moving_label", sitk.sitkNearestNeighbor),
    ]:
        expected = itk_warp(folder, paths[key], paths["fixed"], "displacement.nii.gz", interpolator)
        inside = np.isfinite(expected)
        found = np.asarray(read(folder, name).dataobj)
        assert inside.mean() > 0.7
        # mm in float32, so 1e-6 voxels of 100 wrong, times a slope of at most 700 a voxel
        np.testing.assert_allclose(found[inside], expected[inside], rtol=0, atol=0.02)
    assert np.asarray(read(folder, "warped.nii.gz").dataobj).min() < -40  # in the units of the scanner


def test_the_inverse_file_undoes_the_other(registration):
    _, paths, folder, _ = registration
    there, back = (
        sitk.DisplacementFieldTransform(sitk.ReadImage(str(folder / f"{name}.nii.gz"), sitk.sitkVectorFloat64))
        for name in ("displacement", "inverse_displacement")
    )
    fixed = sitk.ReadImage(paths["fixed"])
    apart, alone = [], []
    for index in np.ndindex(*(n - 12 for n in fixed.GetSize())):  # away from the border, where ITK's fields end
        point = np.array(fixed.TransformIndexToPhysicalPoint([i + 6 for i in index]))
        apart.append(np.linalg.norm(there.TransformPoint(back.TransformPoint(point)) - point))
        alone.append(np.linalg.norm(back.TransformPoint(point) - point))
    assert np.mean(alone) > 10  # mm
    assert np.max(apart) < 0.1  # of a voxel of 8 mm a hundredth, which is what the iteration stops at


def test_the_jacobian_is_that_of_numpy(registration):
    data, _, folder, summary = registration
    gradient = np.stack([np.stack(np.gradient(axis)) for axis in phi(data["ddf"]).astype(float)])
    expected = np.linalg.det(np.moveaxis(gradient, (0, 1), (-2, -1)))
    np.testing.assert_allclose(np.asarray(read(folder, "jacobian.nii.gz").dataobj), expected, rtol=0, atol=1e-5)
    assert summary["folding_percent"] == pytest.approx(100 * (expected <= 0).mean())
    assert summary["sdlogj"] == pytest.approx(np.log(expected[expected > 0]).std(), rel=1e-4)  # float32


def test_the_summary_tells_what_was_gained(registration):
    data, paths, folder, summary = registration
    assert json.loads((folder / "summary.json").read_text()) == summary
    moving, fixed, before, reference = (
        np.asarray(nib.load(paths[key]).dataobj) for key in ("moving", "fixed", "moving_label", "fixed_label")
    )
    warped, moved = (np.asarray(read(folder, name).dataobj) for name in ("warped.nii.gz", "warped_labels.nii.gz"))
    at = phi(data["ddf"])
    last = np.reshape(fixed.shape, (3, 1, 1, 1)) - 1
    inside = np.all((at > -1e-3) & (at < last + 1e-3), axis=0)  # a thousandth of a voxel is rounding
    after = np.corrcoef(warped[inside], fixed[inside])[0, 1]  # what lies outside the moving image does not count
    assert abs(after - np.corrcoef(warped.ravel(), fixed.ravel())[0, 1]) > 1e-3
    assert summary["correlation_before"] == pytest.approx(np.corrcoef(moving.ravel(), fixed.ravel())[0, 1], abs=1e-5)
    assert summary["correlation_after"] == pytest.approx(after, abs=1e-5)
    for key, labels in (("before", before), ("after", moved)):
        overlaps = {}
        for n in (1, 2, 3, 4):
            both = (labels == n) & (reference == n)
            overlaps[str(n)] = 2 * both.sum() / ((labels == n).sum() + (reference == n).sum())
        assert summary["dice"][key] == pytest.approx(overlaps | {"mean": np.mean(list(overlaps.values()))})
    assert summary["seconds"] == 2.5
    similarity, field = {"correlation_before", "correlation_after"}, {"folding_percent", "sdlogj"}
    assert summary.keys() == similarity | field | {"inverse_consistency_mm", "seconds", "dice"}


def test_without_labels_and_with_the_inverse_of_the_network(prepared, tmp_path):
    data, _ = registered(prepared, tmp_path, labels=False)
    inverse = smooth_field(data["ddf"].shape[1:], seed=1)
    summary = SaveRegistrationd(str(tmp_path / "out"))({**data, "inverse_ddf": inverse})["summary"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES | {"summary.json"}
    assert summary["dice"] is None
    assert summary["seconds"] is None
    image = read(tmp_path / "out", "inverse_displacement.nii.gz")
    expected = np.einsum("ij,j...->...i", np.diag([-1, -1, 1]) @ image.affine[:3, :3], inverse.numpy())
    np.testing.assert_allclose(np.asarray(image.dataobj)[..., 0, :], expected, rtol=0, atol=1e-4)  # mm in float32
    ddf = data["ddf"]
    error = ddf.numpy() + [map_coordinates(u, phi(ddf), order=1, mode="nearest") for u in inverse.numpy()]
    distance = np.linalg.norm(error * np.reshape((8, 6, 10), (3, 1, 1, 1)), axis=0)  # mm a voxel
    brain = data["fixed"][0].numpy() > 0
    assert summary["inverse_consistency_mm"] == pytest.approx(distance[brain].mean(), rel=1e-4)  # float32
    assert abs(distance[brain].mean() - distance.mean()) > 1


def test_labels_absent_from_both_are_left_out(prepared, tmp_path):
    data, _ = registered(prepared, tmp_path)
    for key in ("moving_label", "fixed_label"):
        data[key] = torch.where(data[key] == 2, 7, data[key])
    summary = SaveRegistrationd(str(tmp_path / "out"))(data)["summary"]
    assert list(summary["dice"]["after"]) == ["1", "3", "4", "7", "mean"]


def test_an_earlier_registration_is_kept_or_replaced_as_a_whole(prepared, tmp_path):
    data, _ = registered(prepared, tmp_path)
    SaveRegistrationd(str(tmp_path / "out"))(data)
    summary = tmp_path / "out" / "summary.json"
    with pytest.raises(FileExistsError, match=r"out already holds \['warped.nii.gz', .*overwrite"):
        SaveRegistrationd(str(tmp_path / "out"))
    for key in ("moving_label", "fixed_label"):
        del data[key]
    SaveRegistrationd(str(tmp_path / "out"), overwrite=True)(data)
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES | {"summary.json"}
    assert json.loads(summary.read_text())["dice"] is None


def several(prepared, folder, names):
    """Items of several pairs, whose files are called ``names``; and the pairs."""
    data, _ = registered(prepared, folder, labels=False)
    items, pairs = [], []
    for moving, fixed in names:
        item = dict(data)
        for role, name in (("moving", moving), ("fixed", fixed)):
            item[role] = data[role].clone()
            item[role].meta["filename_or_obj"] = str(folder / name)
        items.append(item)
        pairs.append(pair(str(folder / moving), str(folder / fixed)))
    return items, pairs


@pytest.mark.parametrize(
    ("names", "folders"),
    [
        ([("a.nii.gz", "b.nii.gz"), ("b.nii.gz", "a.nii.gz")], ["a_to_b", "b_to_a"]),
        ([("1/t1.nii.gz", "2/t1.nii.gz"), ("3/t1.nii.gz", "2/t1.nii.gz")], ["1_t1_to_2_t1", "3_t1_to_2_t1"]),
        ([("a.nii", "b.mgz"), ("a.nii", "b.nii"), ("b.mgz", "b.nii")], None),
    ],
)
def test_each_of_several_pairs_gets_its_folder(prepared, tmp_path, names, folders):
    items, pairs = several(prepared, tmp_path, names)
    save = SaveRegistrationd(str(tmp_path / "out"), pairs=pairs)
    assert not (tmp_path / "out").exists()
    for i, item in enumerate(items):
        item["ddf"] = item["ddf"] + i
        save(item)
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert made == set(folders) if folders else len(made) == len(names)
    fields = {(tmp_path / "out" / name / "displacement.nii.gz").read_bytes() for name in made}
    assert len(fields) == len(names)
    with pytest.raises(FileExistsError, match=rf"{tmp_path / 'out'}/.* already holds"):
        SaveRegistrationd(str(tmp_path / "out"), pairs=pairs)
    SaveRegistrationd(str(tmp_path / "out"), overwrite=True, pairs=pairs)(items[0])


@pytest.mark.parametrize("overwrite", [False, True])
def test_no_pair_replaces_another_one_of_its_run(prepared, tmp_path, overwrite):
    (first, second), pairs = several(prepared, tmp_path, [("a.nii", "b.nii"), ("c.nii", "b.nii")])
    save = SaveRegistrationd(str(tmp_path / "out"), overwrite)
    save(first)
    kept = (tmp_path / "out" / "displacement.nii.gz").stat().st_mtime_ns
    with pytest.raises(FileExistsError, match=r"holds the registration of .*a\.nii to .*b\.nii\. .*'pairs'"):
        save(second)
    assert (tmp_path / "out" / "displacement.nii.gz").stat().st_mtime_ns == kept
    if overwrite:
        save(first)  # the same pair once more
    else:
        with pytest.raises(FileExistsError, match=r"out already holds"):
            save(first)
    alone = SaveRegistrationd(str(tmp_path / "one"), pairs=pairs[:1])
    alone(first)
    assert (tmp_path / "one" / "summary.json").is_file()


@pytest.mark.parametrize(
    "names", [[("a.nii", "b.nii")] * 2, [("x/t1.nii", "y/t1.nii"), ("x_t1.nii", "y/t1.nii"), ("z/t1.nii", "x/t1.nii")]]
)
def test_pairs_that_would_share_a_folder_are_refused(prepared, tmp_path, names):
    _, pairs = several(prepared, tmp_path, names)
    with pytest.raises(ValueError, match=r"out/\w+_to_\w+: .* listed twice"):
        SaveRegistrationd(str(tmp_path / "out"), pairs=pairs)


def test_a_pair_that_is_not_listed_has_no_folder(prepared, tmp_path):
    _, pairs = several(prepared, tmp_path, [("a.nii", "b.nii"), ("b.nii", "a.nii")])
    ((other,), _) = several(prepared, tmp_path, [("a.nii", "z.nii")])
    save = SaveRegistrationd(str(tmp_path / "out"), pairs=pairs)
    with pytest.raises(ValueError, match=r"z\.nii is missing from 'pairs'"):
        save(other)
    assert not (tmp_path / "out").exists()


def test_output_must_be_a_folder(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(NotADirectoryError, match=rf"output_dir {tmp_path / 'out'} is a file"):
        SaveRegistrationd(str(tmp_path / "out"))


@pytest.mark.parametrize("earlier", [False, True])
def test_no_summary_of_a_registration_that_failed(prepared, tmp_path, monkeypatch, earlier):
    data, _ = registered(prepared, tmp_path)
    if earlier:
        SaveRegistrationd(str(tmp_path / "out"))(data)

    def fail(path, *arguments, **options):
        assert Path(path).name == "report.png"
        raise OSError("disk full")

    monkeypatch.setattr(results, "save_registration_picture", fail)
    with pytest.raises(OSError, match="disk full"):
        SaveRegistrationd(str(tmp_path / "out"), overwrite=earlier)(data)
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == (FILES | {"warped_labels.nii.gz", "summary.json"} if earlier else set())
    monkeypatch.undo()
    SaveRegistrationd(str(tmp_path / "out"), overwrite=earlier)(data)
