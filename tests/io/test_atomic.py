"""Files and folders appear whole or not at all; JSON is JSON."""

import json
import os
from pathlib import Path

import pytest

from voxelmorph_monai.io.atomic import atomic, atomic_folder, require_new, require_replaceable, sweep, write_json
from voxelmorph_monai.io.formats import scan_files, stamp


@pytest.mark.parametrize("name", ["a.nii.gz", "new/folder/a.nii.gz"])
def test_a_folder_that_cannot_be_written_to_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    require_new(tmp_path / name)
    monkeypatch.setattr(os, "access", lambda folder, mode: (folder, mode) != (tmp_path, os.W_OK))
    with pytest.raises(ValueError, match=f"cannot create .*{name}: .*{tmp_path.name} is not a folder"):
        require_new(tmp_path / name)


def test_an_error_while_writing_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("old")

    def fail() -> None:
        with atomic(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        fail()
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]
    assert path.read_text() == "old"
    with atomic(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]
    assert path.read_text() == "new"


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "new" / "out"

    def fail() -> None:
        with atomic_folder(target) as folder:
            (folder / "half").write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert list((tmp_path / "new").iterdir()) == []
    for text in ("first", "second"):
        with atomic_folder(target) as folder:
            assert folder.parent == target.parent  # one file system: a rename is enough
            (folder / text).write_text(text)
        assert [path.name for path in target.iterdir()] == [text]
    assert list((tmp_path / "new").iterdir()) == [target]


def test_what_a_killed_process_of_the_same_number_left_is_in_nobody_s_way(tmp_path: Path) -> None:
    for name in ("out", "notes.txt"):  # as in a container, where every process has the number 1
        (tmp_path / f".{os.getpid()}.{name}").mkdir()
    with atomic_folder(tmp_path / "out") as folder, atomic_folder(tmp_path / "out") as other:
        assert folder != other
        (folder / "whole").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["whole"]
    with atomic(tmp_path / "notes.txt") as temporary, atomic(tmp_path / "notes.txt") as other:
        assert temporary != other
        temporary.write_text("whole")
        other.write_text("whole")
    assert (tmp_path / "notes.txt").read_text() == "whole"


def test_a_folder_stays_where_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, replace = tmp_path / "out", os.replace
    target.mkdir()
    (target / "old").touch()

    def fail_for_the_new_one(source: Path, to: Path) -> None:
        if (source / "new").exists():
            raise PermissionError("in use")
        replace(source, to)

    monkeypatch.setattr(os, "replace", fail_for_the_new_one)
    with pytest.raises(PermissionError, match="in use"), atomic_folder(target) as folder:
        (folder / "new").touch()
    assert [path.name for path in target.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [target]


def test_what_may_be_written(tmp_path: Path) -> None:
    new, folder, file = tmp_path / "new", tmp_path / "folder", tmp_path / "a.csv"
    folder.mkdir()
    for path in (file, folder / "a.csv", folder / "b1.png"):
        path.touch()
    for overwrite in (None, False, True):
        require_new(new, overwrite)
    require_new(file, True)
    with pytest.raises(FileExistsError, match=r"a\.csv already exists\. [^-]*$"):
        require_new(file)
    with pytest.raises(FileExistsError, match=r"a\.csv already exists\. .*--overwrite"):
        require_new(file, False)
    require_replaceable(new, False, "he", ["a.csv"])
    require_replaceable(folder, True, "he", ["a.csv", "*.png"])
    with pytest.raises(FileExistsError, match=r"folder already exists\. .*--overwrite"):
        require_replaceable(folder, False, "he", ["a.csv", "*.png"])
    for path, patterns in ((folder, ["a.csv"]), (file, ["a.csv"])):
        with pytest.raises(ValueError, match=f"{path.name} is not overwritten, because it "):
            require_replaceable(path, True, "he", patterns)


def test_what_killed_processes_left_is_swept(tmp_path: Path) -> None:
    for name in ("data.csv", ".lock", ".hidden.txt", ".2024.notes.txt", ".2024-05-01.txt", ".1-abcdefgh.txt"):
        (tmp_path / name).touch()
    kept = {*tmp_path.iterdir(), tmp_path / "out", tmp_path / "notes.txt"}
    with atomic_folder(tmp_path / "out") as folder, atomic(tmp_path / "notes.txt") as file:
        file.touch()
    (folder / "images").mkdir(parents=True)
    file.touch()
    sweep(tmp_path)
    assert set(tmp_path.iterdir()) == kept


def test_json_has_null_for_what_is_no_number(tmp_path: Path) -> None:
    path, nan, inf = tmp_path / "x.json", float("nan"), float("inf")
    write_json(path, {"a": nan, "b": [1.5, -inf, {"c": (nan, "text", 3, None, True)}]})
    found = json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert found == {"a": None, "b": [1.5, None, {"c": [None, "text", 3, None, True]}]}
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == found
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_to_a_folder_stays_one(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "old").touch()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with atomic_folder(tmp_path / "link") as temporary:
        (temporary / "new").touch()
    assert (tmp_path / "link").is_symlink()
    assert [path.name for path in (tmp_path / "real").iterdir()] == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


@pytest.mark.parametrize(
    ("scan", "files"),
    [
        ("series", {"series/1.dcm": "", "series/2.dcm": ""}),
        ("a.mhd", {"a.mhd": "NDims = 3\nElementDataFile = voxels [1].raw\n", "voxels [1].raw": ""}),
        ("a.mhd", {"a.mhd": "ElementDataFile = s%02d.raw 1 2 1\n", "s01.raw": "", "s02.raw": ""}),
        ("a.mhd", {"a.mhd": "ElementDataFile = LIST\nx.raw\ny.raw\n", "x.raw": "", "y.raw": ""}),
        ("a.nhdr", {"a.nhdr": "NRRD0004\ndata file: deep/v.raw\nencoding: raw\n", "deep/v.raw": ""}),
        ("a.hdr", {"a.hdr": "", "a.img": ""}),
        ("a.img", {"a.hdr": "", "a.img": "", "a.mat": ""}),
        ("a.mha", {"a.mha": "ElementDataFile = LOCAL\nother.raw\n"}),
        ("a.nii.gz", {"a.nii.gz": ""}),
    ],
)
def test_a_scan_is_the_same_if_all_its_files_are(scan: str, files: dict[str, str], tmp_path: Path) -> None:
    for name, content in {**files, "other.raw": "", "b.img": ""}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert scan_files(tmp_path / scan) == [tmp_path / name for name in sorted(files)]
    for name in files:
        before = stamp(tmp_path / scan)
        status = (tmp_path / name).stat()
        os.utime(tmp_path / name, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        assert stamp(tmp_path / scan) != before
