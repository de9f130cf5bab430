"""Read published data sets into lists of scans and pairs for ``data``.

Each reader handles one layout on disk and returns sections: ``"training"``, ``"validation"``, ``"test"`` and, if the
protocol has one, ``"atlas"``, each a list of scans or of pairs (see ``data``). :func:`write_datalist` writes them to
``datalist.json``, whose folder the bundle takes as its ``dataset_dir``. Nothing is resampled: like the published data
sets below, scans must be affinely aligned, skull-stripped and on one grid.
"""

import io
import json
import pickle
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from voxelmorph_monai.data import pair, split_pairs
from voxelmorph_monai.io.atomic import write_json
from voxelmorph_monai.io.images import save_image
from voxelmorph_monai.io.tables import read_table

__all__ = ["LAYOUTS", "read_pickle", "write_datalist"]

Item = dict[str, str]
Sections = dict[str, list[Item]]


def _require(source: Path, complete: bool, what: str) -> None:
    if not complete:
        raise FileNotFoundError(f"{source} is incomplete. This layout needs {what}.")


def _scan(image: Path, label: Path | None) -> Item:
    return {"image": str(image)} if label is None else {"image": str(image), "label": str(label)}


def _pair(moving: Item, fixed: Item) -> Item:
    return pair(moving["image"], fixed["image"], moving.get("label"), fixed.get("label"))


def _read_ixi(source: Path) -> Sections:
    """Read the IXI release for TransMorph (Chen et al., Medical Image Analysis 2022)."""
    folders = {"training": "Train", "validation": "Val", "test": "Test"}
    sections = {section: sorted((source / name).glob("*.pkl")) for section, name in folders.items()}
    atlas = source / "atlas.pkl"
    _require(source, all(sections.values()) and atlas.is_file(), "Train/*.pkl, Val/*.pkl, Test/*.pkl and atlas.pkl")
    sections["atlas"] = [atlas]
    names = [path.stem for paths in sections.values() for path in paths]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{source} holds several scans with the name {twice}.pkl. Rename all but one.")
    return {section: [_scan(path, path) for path in paths] for section, paths in sections.items()}


# The validation set of Learn2Reg 2021 starts with this subject: 20 scans, in 19 pairs of consecutive numbers.
_OASIS_VALIDATION = 438


def _read_oasis(source: Path) -> Sections:
    """Read neurite-OASIS (Hoopes et al., IPMI 2021), split like task 3 of Learn2Reg 2021."""
    folders = sorted(source.glob("OASIS_OAS1_[0-9][0-9][0-9][0-9]_MR1"))
    files = "aligned_norm.nii.gz", "aligned_seg35.nii.gz"
    _require(source, bool(folders), "folders OASIS_OAS1_0001_MR1, ... of neurite-OASIS")
    for folder in folders:
        _require(folder, all((folder / name).is_file() for name in files), f"{files[0]} and {files[1]}")
    scans = [(int(folder.name[11:15]), _scan(folder / files[0], folder / files[1])) for folder in folders]
    validation = [scan for number, scan in scans if number >= _OASIS_VALIDATION]
    return {
        "training": [scan for number, scan in scans if number < _OASIS_VALIDATION],
        "validation": [_pair(moving, fixed) for fixed, moving in pairwise(validation)],
    }


def _read_learn2reg(source: Path) -> Sections:
    """Read a Learn2Reg task with scans of different people, such as ``OASIS_dataset.json``."""
    listings = sorted(source.glob("*_dataset.json"))
    _require(source, len(listings) == 1, "one NAME_dataset.json of Learn2Reg")

    def scan(image: str) -> Item:
        path = source / image
        label = path.parent.with_name(path.parent.name.replace("images", "labels")) / path.name
        return _scan(path, label if label.is_file() else None)

    try:
        content = json.loads(listings[0].read_text(encoding="utf-8"))
        training = [scan(item["image"]) for item in content["training"]]
        validation, test = (
            [_pair(scan(item["moving"]), scan(item["fixed"])) for item in items]
            for items in (content["registration_val"], content.get("registration_test", []))
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{listings[0]} cannot be read ({error!r}). It needs the lists 'training' (objects with 'image') and "
            "'registration_val' (with 'moving' and 'fixed')."
        ) from error
    paired = {item[role] for item in [*validation, *test] for role in ("moving", "fixed")}
    unpaired = [item for item in training if item["image"] not in paired]
    return {"training": unpaired, "validation": validation, "test": test}


def _read_lpba40(source: Path) -> Sections:
    """Read LPBA40 (Shattuck et al., NeuroImage 2008) in the form used by registration papers.

    S11 to S40 are for training. S02 to S10 and the atlas S01 are for testing: S01 is the fixed image of each pair, or
    one of ten scans that form all ordered pairs. As there is no published validation set, the last five training scans
    are used for validation. The network has seen these scans, but not their labels.
    """

    def scan(image: Path, name: str) -> Item:
        label = source / "label" / f"{name}.delineation.structure.label.nii.gz"
        _require(source, label.is_file(), f"the label map {label.relative_to(source)} of {image.relative_to(source)}")
        return _scan(image, label)

    images = {part: sorted((source / part).glob("S[0-9][0-9].*.nii.gz")) for part in ("train", "test")}
    complete = all(images.values()) and (source / "fixed.nii.gz").is_file()
    _require(source, complete, "train/S11.delineation.skullstripped.nii.gz, ..., test/S02..., and fixed.nii.gz (S01)")
    atlas = scan(source / "fixed.nii.gz", "S01")
    training, test = ([scan(image, image.name[:3]) for image in images[part]] for part in ("train", "test"))
    return {"training": training, "validation": training[-5:], "test": [atlas, *test], "atlas": [atlas]}


def _read_folder(source: Path) -> Sections:
    """Read scans ``images/NAME.nii.gz`` and their labels ``labels/NAME.nii.gz``, if any; not split yet."""
    images = sorted((source / "images").glob("*.nii.gz"))
    _require(source, bool(images), "images/NAME.nii.gz (and labels/NAME.nii.gz, if there are labels)")
    labels = sorted((source / "labels").glob("*.nii.gz"))
    orphans = {path.name for path in labels} - {path.name for path in images}
    if orphans:
        raise ValueError(
            f"{sorted(orphans)[:5]} in {source / 'labels'} have no image of the same name in {source / 'images'}. Add "
            "the images, or remove the labels."
        )
    names = {path.name for path in labels}
    return {"": [_scan(path, source / "labels" / path.name if path.name in names else None) for path in images]}


_SCAN_COLUMNS = ("image", "label")
_SECTIONS = ("", "training", "validation", "test", "atlas")
_PAIR_COLUMNS = ("moving", "fixed", "moving_label", "fixed_label")


def _read_csv(source: Path) -> Sections:
    """Read a table with one scan or pair per line: columns ``image``, ``label``, or ``moving``, ``fixed``, ...

    ``section`` gives the section of a line. If only an atlas has one, the scans are split. Paths are relative to the
    table.
    """
    header, lines = read_table(source, "a table")
    columns = [name for name in header if name != "section"]
    for known, needed in ((_SCAN_COLUMNS, {"image"}), (_PAIR_COLUMNS, {"moving", "fixed"})):
        if needed <= set(columns) <= set(known):
            break
    else:
        raise ValueError(
            f"{source} has the columns {header}. Use image, [label], [section] for scans, or moving, fixed, "
            "[moving_label], [fixed_label], section for pairs."
        )
    if not lines:
        raise ValueError(f"{source} lists nothing. Add a line for each scan or pair below its columns.")
    sections: Sections = {}
    for number, cells, line in lines:
        if len(cells) > len(header) or not all(line.get(name) for name in needed):
            raise ValueError(
                f"line {number} of {source} is {cells} in the columns {header}. It needs {', '.join(sorted(needed))}, "
                "and no more cells than columns."
            )
        item = {name: str(source.parent / line[name]) for name in columns if line.get(name)}
        section = line.get("section", "")
        if section not in _SECTIONS:
            raise ValueError(
                f"line {number} of {source} has the section '{section}'. Use {', '.join(_SECTIONS[1:])}, or none."
            )
        sections.setdefault(section, []).append(item)
    return sections


LAYOUTS: dict[str, Callable[[Path], Sections]] = {
    "ixi": _read_ixi,
    "oasis": _read_oasis,
    "learn2reg": _read_learn2reg,
    "lpba40": _read_lpba40,
    "folder": _read_folder,
    "csv": _read_csv,
}


def _cross_validation(scans: Sequence[Item], num_folds: int, fold: int, seed: int) -> Sections:
    """Split ``scans`` into ``num_folds`` parts: ``fold`` for testing, the next for validation, others for training."""
    if num_folds < 3:
        raise ValueError(f"folds is {num_folds}. At least 3 are needed: for training, validation and test.")
    if not 0 <= fold < num_folds:
        raise ValueError(f"fold is {fold}. Choose one from 0 to {num_folds - 1}, as there are {num_folds} folds.")
    if len(scans) < num_folds:
        raise ValueError(f"{len(scans)} scans are too few for {num_folds} folds. Use fewer folds.")
    shuffled = random.Random(seed).sample(scans, len(scans))
    parts = [shuffled[k::num_folds] for k in range(num_folds)]
    test, validation = fold, (fold + 1) % num_folds
    training = [scan for k, part in enumerate(parts) if k not in (test, validation) for scan in part]
    return {"training": training, "validation": parts[validation], "test": parts[test]}


def _by_image(items: Sequence[Item]) -> dict[Path, Item]:
    """Collect the scans of ``items`` (scans or pairs) by image, each once, with its label if an item has one."""
    scans: dict[Path, Item] = {}
    for item in items:
        for scan in split_pairs([item])[0]:
            image = str(scan["image"])
            known = scans.setdefault(Path(image).resolve(), {"image": image})
            if "label" in scan:
                label = str(scan["label"])
                other = known.setdefault("label", label)
                if Path(other).resolve() != Path(label).resolve():
                    raise ValueError(f"image {image} is listed with two label maps, {other} and {label}. Remove one.")
    return scans


def _split(sections: Sections, folds: int | None, fold: int, seed: int) -> Sections:
    """Split scans without a section, or with ``folds`` all scans except the atlas, for a cross-validation."""
    if folds is None and "" not in sections:
        return sections
    if split_pairs(sections.get("", []))[1] is not None:
        raise ValueError("some pairs have no section. Give each one: training, validation or test.")
    placed = [f"{len(items)} in {name}" for name, items in sections.items() if name not in ("", "atlas")]
    if folds is None and placed:
        raise ValueError(
            f"{len(sections[''])} scans have no section, but others do: {', '.join(placed)}. Give all scans a section, "
            "or none except an atlas, or split all scans again with --folds."
        )
    atlas = sections.get("atlas", [])
    kept, every = _by_image(atlas), _by_image([item for items in sections.values() for item in items])
    scans = [scan for image, scan in every.items() if image not in kept]
    return _cross_validation(scans, folds or 5, fold, seed) | ({"atlas": atlas} if atlas else {})


def _reconstructors() -> dict[tuple[str, str], Callable[..., object]]:
    """Functions that a pickled array may call, under their names in NumPy 1 and 2."""
    array = np.zeros(1)
    reconstruct, frombuffer = array.__reduce__()[0], array.__reduce_ex__(5)[0]
    allowed: dict[tuple[str, str], Callable[..., object]] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _to_bytes,
    }
    for core in ("numpy.core", "numpy._core"):
        allowed[f"{core}.multiarray", "_reconstruct"] = reconstruct  # type: ignore[assignment]
        allowed[f"{core}.numeric", "_frombuffer"] = frombuffer  # type: ignore[assignment]
    return allowed


def _to_bytes(text: str, encoding: str) -> bytes:
    """Replace Python's codecs, of which pickles of protocol 0 to 2 need only latin1."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the codec {encoding}, and only latin1 is allowed")
    return text.encode("latin1")


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickle NumPy arrays in lists and tuples, but nothing that could run code."""

    allowed = _reconstructors()

    def find_class(self, module: str, name: str) -> Callable[..., object]:
        """Look up an allowed function; raise an error for any other."""
        try:
            return self.allowed[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, and only arrays are allowed") from None


def read_pickle(path: str | Path) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Read image and labels, both ``(X, Y, Z)``, from a file of the IXI release, a pickled pair of arrays.

    A pickle can run any program, so only arrays are accepted.

    Raises:
        ValueError: the file holds anything but an image and a label map of one shape.
    """
    try:
        content = _ArrayUnpickler(io.BytesIO(Path(path).read_bytes())).load()
        image, label = (np.asarray(array) for array in content)
        is_number = image.dtype.kind in "fiu" and label.dtype.kind in "fiu"
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        raise ValueError(f"{path} is not a pickled pair of arrays (image, labels): {error}.") from error
    if not is_number or image.ndim != 3 or image.shape != label.shape:
        raise ValueError(
            f"{path} holds {image.dtype} {list(image.shape)} and {label.dtype} {list(label.shape)}. It needs an "
            "image and its labels, as two arrays of numbers of one shape (X, Y, Z)."
        )
    if not np.isfinite(image).all():
        raise ValueError(f"the image in {path} contains NaN or infinity.")
    if not (label == np.round(label)).all():
        raise ValueError(f"the labels in {path} are not whole numbers.")
    return image.astype(np.float32), label.astype(np.int32)


def _to_nifti(item: Item, output: Path) -> Item:
    """Convert the pickle that ``item`` names to NIfTI in ``output``, unless that exists.

    Pickles have no header: voxels are 1 mm, axes run left, inferior, anterior like FreeSurfer's, and the origin is the
    middle of the grid.
    """
    source = Path(item["image"])
    files = {kind: output / f"{kind}s" / f"{source.stem}.nii.gz" for kind in ("image", "label")}
    if not all(path.is_file() for path in files.values()):
        image, label = read_pickle(source)
        affine = np.array([[-1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
        affine[:3, 3] = -affine[:3, :3] @ ((np.array(image.shape) - 1) / 2)
        for kind, array in (("image", image), ("label", label)):
            files[kind].parent.mkdir(parents=True, exist_ok=True)
            save_image(files[kind], array.astype(np.int16) if kind == "label" else array, affine)
    return {kind: str(path) for kind, path in files.items()}


def _relative(item: Item, output: Path) -> Item:
    """Make paths of files in ``output`` relative to it, others absolute."""
    full = {key: Path(path).absolute() for key, path in item.items()}
    root = output.absolute()
    return {key: str(path.relative_to(root) if path.is_relative_to(root) else path) for key, path in full.items()}


def _files(sections: Sections) -> Iterator[Path]:
    for items in sections.values():
        for item in items:
            yield from map(Path, item.values())


def write_datalist(
    layout: str, source: str | Path, output: str | Path, *, folds: int | None = None, fold: int = 0, seed: int = 0
) -> Path:
    """Write ``output/datalist.json`` for the data set ``source``; returns its path.

    Args:
        layout: one of :data:`LAYOUTS`. ``"ixi"``: pickles, which are converted to NIfTI in ``output``; ``"oasis"``:
            neurite-OASIS; ``"learn2reg"``: a Learn2Reg task; ``"lpba40"``; ``"folder"``: ``images/`` and ``labels/``;
            ``"csv"``: a table of scans or pairs.
        source: folder or table of the data set.
        output: folder of the datalist.
        folds: number of parts into which all scans except the atlas are split, regardless of their sections (default:
            the published sections, or 5 parts if no scan has a section).
        fold: part for testing; the next one is for validation, the others are for training.
        seed: random seed of the split.

    Raises:
        FileNotFoundError, ValueError: files of the layout are missing or wrong; without ``folds``, a table in which
            only some scans have a section.
        FileExistsError: ``output`` already has a datalist.
    """
    source, output = Path(source), Path(output)
    if layout not in LAYOUTS:
        raise ValueError(f"layout '{layout}' is unknown. Choose one of {', '.join(LAYOUTS)}.")
    path = output / "datalist.json"
    if path.exists():
        raise FileExistsError(f"{path} already exists. Choose another output folder, or remove it.")
    sections = _split(LAYOUTS[layout](source), folds, fold, seed)
    missing = [str(file) for file in _files(sections) if not file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{source} lists files that do not exist. Missing: {len(missing)}, the first is {missing[0]}."
        )
    output.mkdir(parents=True, exist_ok=True)
    if layout == "ixi":
        sections = {name: [_to_nifti(item, output) for item in items] for name, items in sections.items()}
    # Leave out empty sections, for which MONAI raises an IndexError.
    content = {name: [_relative(item, output) for item in items] for name, items in sections.items() if items}
    write_json(path, content)
    return path
