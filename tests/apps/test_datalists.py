"""Data sets in exactly the layout they are published in, small: what is read, and what is said of a wrong one."""

import codecs
import json
import os
import pickle
import re
from itertools import permutations
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from layouts import images_and_labels, ixi, learn2reg, lpba40, oasis, table, volumes, write_pickle

from voxelmorph_monai.apps.datalists import LAYOUTS, read_pickle, write_datalist
from voxelmorph_monai.cli import main
from voxelmorph_monai.data import PairDataset, check_scans, load_scans

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def read(layout, source, output, **options):
    """Sections of the datalist, with paths as the bundle gets them."""
    path = write_datalist(layout, source, output, **options)
    assert path == output / "datalist.json"
    return {section: load_scans(str(output), section) for section in json.loads(path.read_text())}


def seeds(items):
    """Which scan each file holds, found by its voxels: that file and no other was listed."""
    known = {volumes(n)[kind].tobytes(): n for n in range(450) for kind in (0, 1)}
    found = []
    for item in items:
        numbers = {}
        for key, path in item.items():
            array = np.asarray(nib.load(path).dataobj)
            array = array.astype(np.uint8 if key.endswith("label") else np.float32)
            numbers[key] = known.get(array.tobytes())
        found.append(numbers)
    return found


def scans(*numbers):
    return [{"image": n, "label": n} for n in numbers]


def pairs(*numbers):
    return [{"moving": m, "fixed": f, "moving_label": m, "fixed_label": f} for m, f in numbers]


# Layouts


def test_ixi(tmp_path):
    found = read("ixi", ixi(tmp_path / "IXI_data"), tmp_path / "ixi")
    sections = {"training": (1, 2, 3), "validation": (11, 12), "test": (21, 22, 23), "atlas": (0,)}
    assert {name: seeds(items) for name, items in found.items()} == {n: scans(*s) for n, s in sections.items()}
    check_scans(found["training"], found["atlas"][0], keys=("image", "label"))
    image = nib.load(found["test"][0]["image"])
    assert nib.aff2axcodes(image.affine) == ("L", "I", "A")
    np.testing.assert_allclose(image.affine @ [3.5, 2.5, 4.5, 1], [0, 0, 0, 1], atol=1e-6)  # float32 in the header
    assert all(
        str(tmp_path) not in path for path in json.loads((tmp_path / "ixi/datalist.json").read_text())["test"][0]
    )


def test_ixi_goes_on_where_it_was_interrupted(tmp_path):
    source = ixi(tmp_path / "IXI_data")
    broken = source / "Test" / "subject_23.pkl"
    good = broken.read_bytes()
    broken.write_bytes(good[:100])
    with pytest.raises(ValueError, match=rf"^{broken} is not a pickled pair of arrays"):
        write_datalist("ixi", source, tmp_path / "ixi")
    assert not (tmp_path / "ixi" / "datalist.json").exists()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "ixi").rglob("*.nii.gz")}
    broken.write_bytes(good)
    assert len(read("ixi", source, tmp_path / "ixi")["test"]) == 3
    assert before
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


def test_oasis(tmp_path):
    found = read("oasis", oasis(tmp_path / "neurite-oasis.v1.0"), tmp_path / "oasis")
    assert seeds(found["training"]) == scans(1, 2, 4, 436)
    assert seeds(found["validation"]) == pairs((439, 438), (440, 439))  # moving, fixed
    assert set(found) == {"training", "validation"}  # the labels of the test are not published
    assert len(PairDataset(found["validation"], cache_rate=0)) == 2
    check_scans(found["validation"], keys=("image", "label"))


def test_learn2reg(tmp_path):
    found = read("learn2reg", learn2reg(tmp_path / "OASIS"), tmp_path / "l2r")
    assert seeds(found["training"]) == scans(1, 2)  # who is validated is not trained on
    assert seeds(found["validation"]) == pairs((396, 395), (397, 396))
    assert seeds(found["test"]) == [{"moving": 416, "fixed": 415}]
    with pytest.raises(ValueError, match=r"OASIS_0416_0000.* no 'label'"):
        check_scans(found["test"], keys=("image", "label"))


def test_lpba40(tmp_path):
    found = read("lpba40", lpba40(tmp_path / "LPBA40"), tmp_path / "lpba")
    assert seeds(found["training"]) == scans(*range(11, 41))
    assert seeds(found["validation"]) == scans(*range(36, 41))
    assert seeds(found["test"]) == scans(*range(1, 11))
    assert seeds(found["atlas"]) == scans(1)
    with_atlas = PairDataset(found["test"], atlas=found["atlas"][0], atlas_role="fixed", cache_rate=0)
    assert [len(with_atlas), len(PairDataset(found["test"], cache_rate=0))] == [9, 90]
    assert len(PairDataset(found["training"], cache_rate=0)) == 870


def test_folder(tmp_path):
    found = read("folder", images_and_labels(tmp_path / "mine", labels=7), tmp_path / "out")
    assert {name: len(items) for name, items in found.items()} == {"training": 6, "validation": 2, "test": 2}
    every = sorted(seeds(found["training"] + found["validation"] + found["test"]), key=lambda item: item["image"])
    assert every == [*scans(*range(7)), {"image": 7}, {"image": 8}, {"image": 9}]


def test_a_folder_may_hold_its_own_datalist(tmp_path):
    images_and_labels(tmp_path)
    write_datalist("folder", tmp_path, tmp_path)
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    check_scans(load_scans(str(moved), "training"), keys=("image", "label"))


def test_table_of_scans(tmp_path):
    images_and_labels(tmp_path / "data", count=6)
    sections = ["training"] * 3 + ["validation"] + ["test"] * 2
    rows = [
        {"image": f"data/images/{n}.nii.gz", "label": f"data/labels/{n}.nii.gz" if n else "", "section": section}
        for n, section in enumerate(sections)
    ]
    found = read("csv", table(tmp_path / "scans.csv", rows), tmp_path / "out")
    assert seeds(found["training"]) == [{"image": 0}, *scans(1, 2)]
    assert [seeds(found["validation"]), seeds(found["test"])] == [scans(3), scans(4, 5)]
    for row in rows:
        del row["section"], row["label"]
    drawn = read("csv", table(tmp_path / "images.csv", rows), tmp_path / "drawn")
    assert sorted(item["image"] for items in drawn.values() for item in seeds(items)) == [0, 1, 2, 3, 4, 5]


def rows_with_sections(folder, **sections):
    """A row for each scan, as many in each section as are asked for; "none" has none."""
    names = [name for name, count in sections.items() for _ in range(count)]
    images_and_labels(folder, count=len(names))
    return [{"image": f"images/{n}.nii.gz", "section": "" if name == "none" else name} for n, name in enumerate(names)]


def test_sections_are_given_to_all_scans_or_to_none(tmp_path):
    rows = rows_with_sections(tmp_path, training=2, none=4, test=2)
    path = table(tmp_path / "scans.csv", rows)
    with pytest.raises(
        ValueError,
        match=r"^4 scans have no section, .*: 2 in training, 2 in test\. .*folds",
    ):
        write_datalist("csv", path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    found = read("csv", path, tmp_path / "folds", folds=4)
    assert {name: len(items) for name, items in found.items()} == {"training": 4, "validation": 2, "test": 2}


def test_an_atlas_stands_beside_scans_that_are_split(tmp_path):
    rows = rows_with_sections(tmp_path, atlas=1, none=5)
    found = read("csv", table(tmp_path / "scans.csv", rows), tmp_path / "out")
    assert seeds(found.pop("atlas")) == [{"image": 0}]
    assert sorted(item["image"] for items in found.values() for item in seeds(items)) == [1, 2, 3, 4, 5]


def test_table_of_pairs(tmp_path):
    images_and_labels(tmp_path, count=4)
    rows = [
        {"section": section, "fixed": f"images/{f}.nii.gz", "moving": f"images/{m}.nii.gz",
         "moving_label": f"labels/{m}.nii.gz", "fixed_label": f"labels/{f}.nii.gz"}
        for m, f, section in ((0, 1, "training"), (2, 1, "training"), (3, 0, "test"))
    ]  # fmt: skip
    found = read("csv", table(tmp_path / "pairs.csv", rows), tmp_path / "out")
    assert seeds(found["training"]) == pairs((0, 1), (2, 1))
    assert seeds(found["test"]) == pairs((3, 0))
    rows[0]["section"] = ""
    with pytest.raises(ValueError, match=r"^some pairs have no section"):
        write_datalist("csv", table(tmp_path / "some.csv", rows), tmp_path / "some")
    for row in rows:
        row["section"] = ""
    with pytest.raises(ValueError, match=r"^some pairs have no section\. .*training, validation or test\.$"):
        write_datalist("csv", table(tmp_path / "none.csv", rows), tmp_path / "none")


def test_names_of_sections_may_stand_between_blanks(tmp_path):
    rows = rows_with_sections(tmp_path, training=1, test=1)
    for row in rows:
        row["section"] = f" {row['section']} "
    assert set(read("csv", table(tmp_path / "scans.csv", rows), tmp_path / "out")) == {"training", "test"}


# Folds


def test_each_scan_is_in_the_test_of_one_fold(tmp_path):
    source = images_and_labels(tmp_path / "mine", count=11)
    tests, validations = [], []
    for fold in range(4):
        found = read("folder", source, tmp_path / f"fold{fold}", folds=4, fold=fold, seed=3)
        parts = [{item["image"] for item in found[name]} for name in ("training", "validation", "test")]
        assert len(set.union(*parts)) == sum(map(len, parts)) == 11
        assert {len(part) for part in parts[1:]} <= {2, 3}
        tests.append(parts[2])
        validations.append(parts[1])
    assert validations == [*tests[1:], tests[0]]
    assert len(set.union(*tests)) == sum(map(len, tests)) == 11
    other = read("folder", source, tmp_path / "other", folds=4, seed=4)
    assert {item["image"] for item in other["test"]} != tests[0]


def test_published_scans_can_be_split_anew(tmp_path):
    found = read("lpba40", lpba40(tmp_path / "LPBA40"), tmp_path / "lpba", folds=3, fold=2)
    assert {name: len(items) for name, items in found.items()} == {
        "training": 13, "validation": 13, "test": 13, "atlas": 1,
    }  # fmt: skip
    numbers = [seeds(items) for name, items in found.items() if name != "atlas"]
    assert sorted(n["image"] for part in numbers for n in part) == list(range(2, 41))  # the atlas is in none
    found = read("oasis", oasis(tmp_path / "oasis"), tmp_path / "out", folds=3)
    assert sorted(n["image"] for items in found.values() for n in seeds(items)) == [1, 2, 4, 436, 438, 439, 440]


def test_each_scan_of_listed_pairs_is_in_one_part(tmp_path):
    images_and_labels(tmp_path, count=4)
    rows = [
        {"moving": f"images/{m}.nii.gz", "fixed": f"./images/{f}.nii.gz", "section": "training",
         "moving_label": f"labels/{m}.nii.gz"}
        for m, f in permutations(range(4), 2) if m != 3
    ]  # fmt: skip
    found = read("csv", table(tmp_path / "pairs.csv", rows), tmp_path / "out", folds=4)
    listed = [item for items in found.values() for item in seeds(items)]
    assert sorted(listed, key=lambda item: item["image"]) == [*scans(0, 1, 2), {"image": 3}]
    rows[0]["moving_label"] = "labels/2.nii.gz"
    with pytest.raises(ValueError, match=r"0\.nii\.gz .*label maps, .*2\.nii\.gz and .*0\.nii\.gz\."):
        write_datalist("csv", table(tmp_path / "wrong.csv", rows), tmp_path / "wrong", folds=4)


@pytest.mark.parametrize(
    ("folds", "fold", "message"),
    [
        (2, 0, r"^folds is 2\b.* 3 "),
        (3, 3, r"^fold is 3\b.* 0 to 2,.* 3 folds"),
        (3, -1, r"^fold is -1\b"),
        (11, 0, r"^10 scans .* 11 folds"),
    ],
)
def test_folds_that_cannot_be(folds, fold, message, tmp_path):
    source = images_and_labels(tmp_path / "mine")
    with pytest.raises(ValueError, match=message):
        write_datalist("folder", source, tmp_path / "out", folds=folds, fold=fold)


# What is wrong with a wrong one


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "csv"])
def test_an_empty_folder_is_no_data_set(layout, tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"^{tmp_path} is incomplete\. .+\.$"):
        write_datalist(layout, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("layout", "make", "gone", "message"),
    [
        ("ixi", ixi, "atlas.pkl", r"data is incomplete\. .* Train/\*\.pkl, Val/\*\.pkl, Test/\*\.pkl and atlas\.pkl\."),
        (
            "oasis",
            oasis,
            "OASIS_OAS1_0002_MR1/aligned_seg35.nii.gz",
            r"0002_MR1 is incomplete\. .* aligned_norm.nii.gz and ali",
        ),
        ("learn2reg", learn2reg, "OASIS_dataset.json", r"data is incomplete\. .* one NAME_dataset\.json"),
        (
            "learn2reg",
            learn2reg,
            "imagesTr/OASIS_0002_0000.nii.gz",
            r"data lists .* Missing: 1, .*OASIS_0002_0000\.nii\.gz",
        ),
        ("lpba40", lpba40, "fixed.nii.gz", r"data is incomplete\. .* train/S11.*, and fixed\.nii\.gz \(S01\)\."),
        (
            "lpba40",
            lpba40,
            "label/S17.delineation.structure.label.nii.gz",
            r"the label map label/S17\.delineation\.structure\.label\.nii\.gz of train/S17\.delineation\.skullstripped",
        ),
    ],
)
def test_what_is_missing_is_named(layout, make, gone, message, tmp_path):
    source = make(tmp_path / "data")
    (source / gone).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        write_datalist(layout, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"^layout 'ixy' .* ixi, oasis, "):
        write_datalist("ixy", tmp_path, tmp_path / "out")
    write_pickle(ixi(tmp_path / "ixi") / "Val" / "subject_2.pkl", volumes(2))
    with pytest.raises(ValueError, match=r"ixi holds several .*subject_2\.pkl"):
        write_datalist("ixi", tmp_path / "ixi", tmp_path / "out")
    (images_and_labels(tmp_path / "mine") / "images" / "3.nii.gz").unlink()
    with pytest.raises(ValueError, match=r"^\['3\.nii\.gz'\] in .*labels have no image"):
        write_datalist("folder", tmp_path / "mine", tmp_path / "out")
    for content in ("{", "[]", '{"training": []}', '{"training": [1], "registration_val": []}'):
        (learn2reg(tmp_path / "l2r") / "OASIS_dataset.json").write_text(content)
        with pytest.raises(ValueError, match=r"OASIS_dataset\.json .*'training' \(objects with 'image'\) and "):
            write_datalist("learn2reg", tmp_path / "l2r", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("moving,fixd\na,b\n", r"table\.csv has the columns \['moving', 'fixd'\]\. .*image, \[label\], "),
        ("image,fixed\na,b\n", r"has the columns \['image', 'fixed'\]"),
        ("", r"has the columns \[\]"),
        (
            "image,label\na,b\n,c\n",
            r"line 3 of .* is \['', 'c'\] in the columns \['image', 'label'\]\. .* image\b",
        ),
        ("image,label\na,b,c\n", r"line 2 of .* is \['a', 'b', 'c'\] .*no more cells than columns"),
        (
            "image,section\na,training\nb,Test\n",
            r"line 3 of .* section 'Test'\. .*training, .*, atlas",
        ),
        ("image,section\n", r"table\.csv lists nothing"),
        ("moving,fixed,section\na,,test\n", r"line 2 of .* is \['a', '', 'test'\] .* fixed, moving\b"),
        ("moving,fixed,section\na\n", r"line 2 of .* is \['a'\] .* fixed, moving\b"),
        (b"\xff\xfei\0m\0a\0g\0e\0", r"table\.csv is not a CSV file in UTF-8: 'utf-8' codec"),
    ],
)
def test_tables_that_cannot_be_read(text, message, tmp_path):
    path = tmp_path / "table.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        write_datalist("csv", path, tmp_path / "out")


def test_files_of_a_table_have_to_be_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"scans\.csv does not exist\. .*a table"):
        write_datalist("csv", tmp_path / "scans.csv", tmp_path / "out")
    path = table(tmp_path / "scans.csv", [{"image": "nowhere.nii.gz", "section": "test"}])
    with pytest.raises(
        FileNotFoundError,
        match=rf"scans\.csv lists files that do not exist\. Missing: 1, the first is {tmp_path / 'nowhere.nii.gz'}\.",
    ):
        write_datalist("csv", path, tmp_path / "out")


def test_a_datalist_is_not_overwritten(tmp_path):
    source = images_and_labels(tmp_path / "mine")
    path = write_datalist("folder", source, tmp_path / "out")
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match=rf"^{path} already exists"):
        write_datalist("folder", source, tmp_path / "out", seed=1)
    assert path.read_bytes() == before


def test_command(tmp_path, capsys):
    source = images_and_labels(tmp_path / "mine")
    assert main(["datalist", "folder", str(source), str(tmp_path / "out"), "--folds", "10", "--fold", "3"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out' / 'datalist.json'}\n"
    assert len(load_scans(str(tmp_path / "out"), "training")) == 8
    with pytest.raises(SystemExit, match="2"):
        main(["datalist", "ixy", str(source), str(tmp_path / "other")])
    said = capsys.readouterr().err
    assert "invalid choice: 'ixy'" in said
    assert set(re.findall(r"\w+", said.split("choose from")[1])) == LAYOUTS.keys()


# Pickles


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_every_protocol_are_read(protocol, order, tmp_path):
    content = tuple(np.asarray(array, order=order) for array in volumes(7))
    write_pickle(tmp_path / "a.pkl", content, protocol)
    for found, expected in zip(read_pickle(tmp_path / "a.pkl"), content, strict=True):
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("core", ["numpy.core.", "numpy._core."])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_pickles_of_both_numpy_generations_are_read(core, protocol, tmp_path):
    ours = pickle.dumps(volumes(7), protocol)
    here = b"numpy._core." if b"numpy._core." in ours else b"numpy.core."
    other = pickle.dumps(volumes(7), 2).replace(here, core.encode()) if protocol == 2 else ours
    (tmp_path / "a.pkl").write_bytes(other)
    assert np.array_equal(read_pickle(tmp_path / "a.pkl")[1], volumes(7)[1])


class Attack:
    """What runs a command when it is unpickled."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "content",
    [
        Attack(os.system, "touch attacked"),
        [volumes(0)[0], Attack(eval, "open('attacked', 'w')")],
        (volumes(0)[0], np.array([Attack(os.mkdir, "attacked"), None], dtype=object)),
        (volumes(0)[0], np.dtype([("a", "f4")]), Attack(Path.touch, Path("attacked"))),
        (volumes(0)[0], Attack(np.save, "attacked.npy", volumes(0)[1])),
        (volumes(0)[0], Attack(getattr, np.ndarray, "tofile")),
    ],
)
def test_programs_are_not_run(content, protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_pickle(tmp_path / "a.pkl", content, protocol)
    with pytest.raises(ValueError, match=r"a\.pkl is not a pickled pair .*, and only arrays are allowed\."):
        read_pickle("a.pkl")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.pkl"]


def test_codecs_are_not_run(tmp_path):
    write_pickle(tmp_path / "a.pkl", Attack(codecs.encode, "gur svyr", "rot13"))
    with pytest.raises(ValueError, match=r"codec rot13, and only latin1"):
        read_pickle(tmp_path / "a.pkl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (volumes(0)[0], r"a\.pkl is not a pickled pair of arrays"),  # of 8 slices
        (3, r"a\.pkl is not a pickled pair of arrays"),
        (
            (volumes(0)[0], volumes(0)[1][:-1]),
            r"holds float32 \[8, 6, 10\] and uint8 \[7, 6, 10\]\. .*of one shape \(X, Y, Z\)",
        ),
        ((volumes(0)[0][0], volumes(0)[1][0]), r"holds float32 \[6, 10\]"),
        (("image", "label"), r"holds <U5"),
        ((volumes(0)[0] * np.nan, volumes(0)[1]), r"image in .*a\.pkl .*NaN"),
        ((volumes(0)[0], volumes(0)[1] + 0.5), r"labels in .*a\.pkl are not whole numbers"),
    ],
)
def test_other_pickles_are_refused(content, message, tmp_path):
    write_pickle(tmp_path / "a.pkl", content)
    with pytest.raises(ValueError, match=message):
        read_pickle(tmp_path / "a.pkl")


def test_every_ordered_pair_is_both_orders():
    data = [{"image": n} for n in range(3)]
    found = [(p["moving"], p["fixed"]) for p in PairDataset(data, cache_rate=0)]
    assert sorted(found) == sorted(permutations(range(3), 2))
