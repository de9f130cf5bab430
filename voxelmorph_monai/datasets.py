"""Data sets as they are published, read into the lists of scans and pairs that ``data`` works with.

A reader looks at one layout on disk and gives sections: ``"training"``, ``"validation"``, ``"test"`` and, where the
protocol has one, ``"atlas"``, each a list of scans or of pairs (see ``data``). :func:`write_datalist` writes them as
``datalist.json``, which the bundle takes as its ``dataset_dir``. Nothing is resampled: scans have to be prepared, as
those that are published here are (affinely aligned, skull-stripped, on one grid).
"""

import io
import json
import pickle
import random
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import ignite.distributed as idist
import numpy as np
from ignite.engine import Engine, Events
from numpy.typing import NDArray
from scipy import ndimage

from voxelmorph_monai.data import pair, take_apart
from voxelmorph_monai.files import atomic, read_table, write_json
from voxelmorph_monai.spaces import save_image

__all__ = ["LAYOUTS", "SaveSubmission", "load_submission", "read_pickle", "write_datalist"]

Item = dict[str, str]
Sections = dict[str, list[Item]]


def _require(source: Path, there: bool, what: str) -> None:
    if not there:
        raise FileNotFoundError(f"{source} must hold {what}.")


def _scan(image: Path, label: Path | None) -> Item:
    return {"image": str(image)} if label is None else {"image": str(image), "label": str(label)}


def _pair(moving: Item, fixed: Item) -> Item:
    return pair(moving["image"], fixed["image"], moving.get("label"), fixed.get("label"))


def _read_ixi(source: Path) -> Sections:
    """Give the sections of the IXI release for TransMorph (Chen et al., Medical Image Analysis 2022)."""
    folders = {"training": "Train", "validation": "Val", "test": "Test"}
    sections = {section: sorted((source / name).glob("*.pkl")) for section, name in folders.items()}
    atlas = source / "atlas.pkl"
    _require(source, all(sections.values()) and atlas.is_file(), "Train/*.pkl, Val/*.pkl, Test/*.pkl and atlas.pkl")
    sections["atlas"] = [atlas]
    names = [path.stem for paths in sections.values() for path in paths]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"each scan of {source} must have a name of its own, got {twice}.pkl more than once.")
    return {section: [_scan(path, path) for path in paths] for section, paths in sections.items()}


# The subjects from here on are those of Learn2Reg 2021's validation: 20, in 19 pairs of neighbours.
_OASIS_VALIDATION = 438


def _read_oasis(source: Path) -> Sections:
    """Give the sections of neurite-OASIS (Hoopes et al., IPMI 2021), split as in Learn2Reg 2021, task 3."""
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
    """Give the sections of a Learn2Reg task of scans of different people, such as ``OASIS_dataset.json``."""
    found = sorted(source.glob("*_dataset.json"))
    _require(source, len(found) == 1, "one NAME_dataset.json of Learn2Reg")

    def scan(image: str) -> Item:
        path = source / image
        label = path.parent.with_name(path.parent.name.replace("images", "labels")) / path.name
        return _scan(path, label if label.is_file() else None)

    try:
        content = json.loads(found[0].read_text(encoding="utf-8"))
        training = [scan(item["image"]) for item in content["training"]]
        validation, test = (
            [_pair(scan(item["moving"]), scan(item["fixed"])) for item in items]
            for items in (content["registration_val"], content.get("registration_test", []))
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{found[0]} must list 'training' (objects with 'image') and 'registration_val' ('moving', 'fixed'), "
            f"but: {error!r}."
        ) from error
    paired = {item[role] for item in [*validation, *test] for role in ("moving", "fixed")}
    unpaired = [item for item in training if item["image"] not in paired]
    return {"training": unpaired, "validation": validation, "test": test}


def _read_lpba40(source: Path) -> Sections:
    """Give the sections of LPBA40 (Shattuck et al., NeuroImage 2008) as registration papers share it.

    S11 to S40 are for training; S02 to S10 are the test, with the atlas S01: as the fixed image of each pair, or as one
    of ten scans in all ordered pairs. There is no published validation: its scans are the last five for training, and
    what is validated are pairs that the network has seen, without their labels.
    """

    def scan(image: Path, name: str) -> Item:
        label = source / "label" / f"{name}.delineation.structure.label.nii.gz"
        _require(source, label.is_file(), f"the label map {label.relative_to(source)} of {image.relative_to(source)}")
        return _scan(image, label)

    images = {part: sorted((source / part).glob("S[0-9][0-9].*.nii.gz")) for part in ("train", "test")}
    there = all(images.values()) and (source / "fixed.nii.gz").is_file()
    _require(source, there, "train/S11.delineation.skullstripped.nii.gz, ..., test/S02..., and fixed.nii.gz (S01)")
    atlas = scan(source / "fixed.nii.gz", "S01")
    training, test = ([scan(image, image.name[:3]) for image in images[part]] for part in ("train", "test"))
    return {"training": training, "validation": training[-5:], "test": [atlas, *test], "atlas": [atlas]}


def _read_folder(source: Path) -> Sections:
    """Scans ``images/NAME.nii.gz`` and, where there are any, their labels ``labels/NAME.nii.gz``, not yet split."""
    images = sorted((source / "images").glob("*.nii.gz"))
    _require(source, bool(images), "images/NAME.nii.gz (and labels/NAME.nii.gz, if there are labels)")
    labels = sorted((source / "labels").glob("*.nii.gz"))
    alone = {path.name for path in labels} - {path.name for path in images}
    if alone:
        raise ValueError(f"each label map of {source / 'labels'} must have its image, but not {sorted(alone)[:5]}.")
    names = {path.name for path in labels}
    return {"": [_scan(path, source / "labels" / path.name if path.name in names else None) for path in images]}


_SCAN_COLUMNS = ("image", "label")
_SECTIONS = ("", "training", "validation", "test", "atlas")
_PAIR_COLUMNS = ("moving", "fixed", "moving_label", "fixed_label")


def _read_csv(source: Path) -> Sections:
    """Scans or pairs, one a line, of a table with the columns ``image``, ``label`` or ``moving``, ``fixed``, ...

    ``section`` says where a line belongs; if no scan but an atlas has one, scans are split. Paths are relative to the
    table.
    """
    header, lines = read_table(source, "a table")
    columns = [name for name in header if name != "section"]
    for known, needed in ((_SCAN_COLUMNS, {"image"}), (_PAIR_COLUMNS, {"moving", "fixed"})):
        if needed <= set(columns) <= set(known):
            break
    else:
        raise ValueError(
            f"{source} must have the columns image, [label], [section] or moving, fixed, [moving_label], "
            f"[fixed_label], section, got {header}."
        )
    if not lines:
        raise ValueError(f"{source} must have a line for each scan or pair below its columns, got none.")
    sections: Sections = {}
    for number, cells in lines:
        line = dict(zip(header, cells, strict=False))
        if len(cells) > len(header) or not all(line.get(name) for name in needed):
            raise ValueError(
                f"line {number} of {source} must give {', '.join(sorted(needed))}, got {cells} in the columns {header}."
            )
        item = {name: str(source.parent / line[name]) for name in columns if line.get(name)}
        section = line.get("section", "")
        if section not in _SECTIONS:
            raise ValueError(
                f"section in line {number} of {source} must be empty or one of {', '.join(_SECTIONS[1:])}, "
                f"got '{section}'."
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
    """Split ``scans``: of ``num_folds`` equal parts ``fold`` is the test, the next one the validation."""
    if not (num_folds >= 3 and 0 <= fold < num_folds):
        raise ValueError(f"fold must be 0 to folds - 1, of at least 3 folds, got fold {fold} of {num_folds}.")
    if len(scans) < num_folds:
        raise ValueError(f"the scans must be at least as many as the {num_folds} folds, got {len(scans)}.")
    shuffled = random.Random(seed).sample(scans, len(scans))
    parts = [shuffled[k::num_folds] for k in range(num_folds)]
    test, validation = fold, (fold + 1) % num_folds
    training = [scan for k, part in enumerate(parts) if k not in (test, validation) for scan in part]
    return {"training": training, "validation": parts[validation], "test": parts[test]}


def _by_image(items: Sequence[Item]) -> dict[Path, Item]:
    """Scans of ``items`` (scans or pairs), each once, by its image; with its label, if any of ``items`` gives one."""
    found: dict[Path, Item] = {}
    for item in items:
        for scan in take_apart([item])[0]:
            image = str(scan["image"])
            known = found.setdefault(Path(image).resolve(), {"image": image})
            if "label" in scan:
                label = str(scan["label"])
                other = known.setdefault("label", label)
                if Path(other).resolve() != Path(label).resolve():
                    raise ValueError(f"image {image} must have one label map, got {other} and {label}.")
    return found


def _split(sections: Sections, folds: int | None, fold: int, seed: int) -> Sections:
    """Put scans without a section or, with ``folds``, all but the atlas into the sections of a cross-validation."""
    if folds is None and "" not in sections:
        return sections
    if take_apart(sections.get("", []))[1] is not None:
        raise ValueError("pairs must each have a section: training, validation or test.")
    placed = [f"{len(items)} in {name}" for name, items in sections.items() if name not in ("", "atlas")]
    if folds is None and placed:
        raise ValueError(
            "scans must all have a section or, but for an atlas, none (or be split anew, with folds), "
            f"got {len(sections[''])} without one beside {', '.join(placed)}."
        )
    atlas = sections.get("atlas", [])
    kept, every = _by_image(atlas), _by_image([item for items in sections.values() for item in items])
    scans = [scan for image, scan in every.items() if image not in kept]
    return _cross_validation(scans, folds or 5, fold, seed) | ({"atlas": atlas} if atlas else {})


def _reconstructors() -> dict[tuple[str, str], Callable[..., object]]:
    """What a pickled array may call, under the names that NumPy 1 and 2 give it."""
    array = np.zeros(1)
    reconstruct, frombuffer = array.__reduce__()[0], array.__reduce_ex__(5)[0]
    found: dict[tuple[str, str], Callable[..., object]] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _to_bytes,
    }
    for core in ("numpy.core", "numpy._core"):
        found[f"{core}.multiarray", "_reconstruct"] = reconstruct  # type: ignore[assignment]
        found[f"{core}.numeric", "_frombuffer"] = frombuffer  # type: ignore[assignment]
    return found


def _to_bytes(text: str, encoding: str) -> bytes:
    """Encode as pickles of protocol 0 to 2 do; of all codecs that Python has, this one alone."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text may be encoded as latin1 alone, not {encoding}")
    return text.encode("latin1")


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickle NumPy arrays, in lists and tuples, and nothing that could run code."""

    allowed = _reconstructors()

    def find_class(self, module: str, name: str) -> Callable[..., object]:
        """Give what may be called, else raise."""
        try:
            return self.allowed[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, and arrays alone are allowed") from None


def read_pickle(path: str | Path) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Image and labels, both ``(X, Y, Z)``, of a file of the IXI release: a pickled pair of arrays.

    A pickle can run any program. This one may hold arrays and nothing else.

    Raises:
        ValueError: anything but an image and a label map of one shape.
    """
    try:
        content = _ArrayUnpickler(io.BytesIO(Path(path).read_bytes())).load()
        image, label = (np.asarray(array) for array in content)
        is_number = image.dtype.kind in "fiu" and label.dtype.kind in "fiu"
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        raise ValueError(f"{path} must be a pickled pair of arrays (image, labels), but: {error}.") from error
    if not is_number or image.ndim != 3 or image.shape != label.shape:
        raise ValueError(
            f"{path} must hold an image and its labels, numbers of one shape (X, Y, Z), got {image.dtype} "
            f"{list(image.shape)} and {label.dtype} {list(label.shape)}."
        )
    if not np.isfinite(image).all() or not (label == np.round(label)).all():
        raise ValueError(f"{path} must hold finite intensities and whole numbers as labels.")
    return image.astype(np.float32), label.astype(np.int32)


def _to_nifti(item: Item, output: Path) -> Item:
    """Write what ``item`` names, a pickle, as NIfTI into ``output``, if it is not there yet.

    Pickles say nothing of physical space: voxels are 1 mm, axes run left, inferior, anterior, as FreeSurfer's do, and
    the middle of the grid is the origin.
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
    """Name files in ``output`` relative to it, others in full."""
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
    """Write ``output/datalist.json`` for the data set ``source``, and give its path.

    Args:
        layout: one of :data:`LAYOUTS`. ``"ixi"``: pickles, which are written as NIfTI into ``output``; ``"oasis"``:
            neurite-OASIS; ``"learn2reg"``: a Learn2Reg task; ``"lpba40"``; ``"folder"``: ``images/`` and ``labels/``;
            ``"csv"``: a table of scans or pairs.
        source: its folder, or table.
        output: folder of the datalist.
        folds: split all scans but the atlas anew, into this many parts, whatever section they are in; None: as
            published or, if no scan has a section, 5.
        fold: the part that is the test; the next one is the validation, the others are for training.
        seed: of the draw of the parts.

    Raises:
        FileNotFoundError, ValueError: what the layout needs is not there, or wrong; without ``folds``, a table of scans
            that gives only some of them a section.
        FileExistsError: there is a datalist already.
    """
    source, output = Path(source), Path(output)
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got '{layout}'.")
    path = output / "datalist.json"
    if path.exists():
        raise FileExistsError(f"output must not hold a datalist yet, but there is a {path}.")
    sections = _split(LAYOUTS[layout](source), folds, fold, seed)
    missing = [str(file) for file in _files(sections) if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"{source} must hold all files that it lists, but there is no {missing[0]}.")
    output.mkdir(parents=True, exist_ok=True)
    if layout == "ixi":
        sections = {name: [_to_nifti(item, output) for item in items] for name, items in sections.items()}
    # Without empty sections, of which MONAI makes an IndexError.
    content = {name: [_relative(item, output) for item in items] for name, items in sections.items() if items}
    write_json(path, content)
    return path


def _subject(path: str) -> int:
    """Number of the OASIS subject whose scan ``path`` is, in the folder of neurite-OASIS or of Learn2Reg."""
    found = re.findall(r"OASIS_(?:OAS1_)?(\d{4})", path)
    if not found:
        raise ValueError(f"a scan to submit must be named OASIS_0438_0000.nii.gz or so, got {path}.")
    return int(found[-1])


class SaveSubmission:
    """Write the displacements of an evaluation as Learn2Reg takes them: half resolution, float16.

    One file ``disp_FIXED_MOVING.npz`` a pair, with the array ``arr_0`` ``(3, *spatial / 2)``: displacements in voxels
    of the full grid, resampled with splines of order 2 (Hering et al., IEEE TMI 2023; its evaluation enlarges them the
    same way, :func:`load_submission`).

    Args:
        output_dir: folder to write to.
        overwrite: replace the fields of an earlier evaluation; else they are an error.
    """

    def __init__(self, output_dir: str, overwrite: bool = False) -> None:
        self.output_dir = Path(output_dir)
        self.overwrite = overwrite

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def start(self, engine: Engine) -> None:
        """Look at the folder before any work is done."""
        there = next(self.output_dir.glob("disp_*.npz"), None)
        if there is not None and not self.overwrite:
            raise FileExistsError(
                f"{self.output_dir} must hold no fields yet, or overwrite be true, but {there} exists."
            )
        idist.barrier()  # no process writes before all have looked

    def __call__(self, engine: Engine) -> None:
        """Write the pairs of the batch that ``engine`` has registered."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        for item, found in zip(engine.state.batch, engine.state.output, strict=True):  # type: ignore[call-overload]
            fixed, moving = (_subject(item[role].meta["filename_or_obj"]) for role in ("fixed", "moving"))
            ddf = found["ddf"].cpu().numpy()
            if any(n % 2 for n in ddf.shape[1:]):
                raise ValueError(f"a field to submit must have even sizes, got {list(ddf.shape[1:])}.")
            half = np.stack([ndimage.zoom(component, 0.5, order=2, mode="nearest") for component in ddf])
            with atomic(self.output_dir / f"disp_{fixed:04d}_{moving:04d}.npz") as temporary:
                np.savez_compressed(temporary, half.astype(np.float16))


def load_submission(path: str | Path) -> NDArray[np.float32]:
    """Displacement ``(3, *spatial)`` in voxels that Learn2Reg's evaluation makes of a submitted file."""
    half = np.load(path)["arr_0"].astype(np.float32)
    return np.stack([ndimage.zoom(component, 2, order=2) for component in half])
