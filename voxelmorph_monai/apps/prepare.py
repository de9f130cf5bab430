"""Prepare scans for training: align them to one space, on one grid, with one range of intensities.

Each scan is aligned to the mean adult brain MNI152 by an affine transform and resampled once. The axes of the grid run
left, inferior, anterior (LIA, like FreeSurfer's), and its centre is the centre of the template's brain. The default,
160 x 192 x 224 voxels of 1 mm, is the grid that is common in the literature.
"""

import csv
import json
import random
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from voxelmorph_monai.apps.heads import align_to_mni152, find_brain
from voxelmorph_monai.apps.processes import Processes, default_jobs, failures
from voxelmorph_monai.io.atomic import atomic, require_writable, sweep, write_json
from voxelmorph_monai.io.formats import stamp
from voxelmorph_monai.maps.itk_files import save_linear
from voxelmorph_monai.pages.cohort import save_index
from voxelmorph_monai.space.resampling import resample, resample_intensities, rescale
from voxelmorph_monai.space.scan import Scan
from voxelmorph_monai.space.template import STANDARD_GRID, WorkingGrid, check_brain, check_in_grid, mni152
from voxelmorph_monai.synthesis import paint

__all__ = ["Prepared", "prepare"]

_MEMORY = 3 * 2**30  # bytes per process; measured: 1.7 GiB for a brain of 1 mm


class _Source(NamedTuple):
    """One scan to prepare; if ``image`` is the label map itself, an image is painted from it."""

    name: str
    image: Path
    label: Path | None

    def outputs(self) -> dict[str, str]:
        """Files to write, relative to the folder of the datalist."""
        kinds = ["image", "label"] if self.label else ["image"]
        return {kind: f"{kind}s/{self.name}.nii.gz" for kind in kinds}

    def inputs(self) -> list[list[Any]]:
        """Size and time of each file, to detect changes."""
        return [stamp(path) for path in (self.image, self.label) if path]


class Prepared(NamedTuple):
    """Result of :func:`prepare`.

    Attributes:
        datalist: path of the datalist.
        errors: reasons of failed scans, by name of the scan.
    """

    datalist: Path
    errors: dict[str, str]


@cache
def _template(grid: WorkingGrid) -> NDArray[np.float32]:
    return resample(mni152(), grid.around(), np.eye(4)).array


def _abbreviate(names: Sequence[Any]) -> str:
    """List at most five names, and the number of further ones."""
    listed = ", ".join(str(name) for name in names[:5])
    return listed if len(names) <= 5 else f"{listed} and {len(names) - 5} more"


def _match(entries: Sequence[Path], pattern: str) -> dict[tuple[Path, str], Path]:
    """Find files that match ``pattern``; the keys are the folder where it starts and the text that ``*`` matches."""
    if "*" not in pattern or "**" in pattern or Path(pattern).is_absolute():
        raise ValueError(
            f"'{pattern}' is not a pattern of scans. Give a relative path with '*' for the name of a scan."
        )
    first, *others = (re.escape(part) for part in pattern.split("*"))
    matcher = re.compile(first + "([^/.][^/]*)" + r"\1".join(others))
    depth = len(Path(pattern).parts)
    matches = {}
    for entry in entries:
        for path in sorted(entry.glob(pattern)) if entry.is_dir() else [entry]:
            match = matcher.fullmatch("/".join(path.parts[-depth:]))
            if match:
                matches[path.parents[depth - 1], match[1]] = path
            elif path is entry:
                raise ValueError(f"{path} does not match '{pattern}'. Rename it, or change --images.")
    return matches


def _find_scans(inputs: Sequence[str | Path], images: str, labels: str | None) -> list[_Source]:
    entries = [Path(entry).absolute() for entry in inputs]
    missing = [entry for entry in entries if not entry.exists()]
    if missing:
        raise FileNotFoundError(f"these inputs do not exist: {_abbreviate(missing)}.")
    matches = _match(entries, images)
    if not matches:
        raise ValueError(
            f"no scan matches '{images}' in {_abbreviate(entries) or 'no input'}. Give other folders, or another "
            "pattern (--images)."
        )
    scans = []
    for (folder, name), path in matches.items():
        scans.append(_Source(name, path, folder / labels.replace("*", name) if labels else None))
    names = [scan.name for scan in scans]
    twice = [scan.image for scan in scans if names.count(scan.name) > 1]
    if twice:
        raise ValueError(f"these scans have the same name: {_abbreviate(twice)}. Rename them.")
    if labels:
        bare = [scan.label for scan in scans if scan.label and not scan.label.exists()]
        if bare:
            raise FileNotFoundError(f"some scans have no labels; these files do not exist: {_abbreviate(bare)}.")
        used = {scan.label for scan in scans}
        orphans = [path for path in _match([e for e in entries if e.is_dir()], labels).values() if path not in used]
        if orphans:
            raise ValueError(f"these labels belong to no scan that matches '{images}': {_abbreviate(orphans)}.")
    return sorted(scans)


def _read(scan: _Source) -> tuple[Scan, Scan | None]:
    """Read the image (or paint it) and the label map of a scan, None without labels."""
    if scan.label == scan.image:
        labels = Scan.read_labels(scan.image)
        image = labels.like(
            paint(torch.from_numpy(labels.array.astype(np.int64))).numpy(), f"the brain in {scan.image}"
        )
        check_brain(image)
        return image, labels
    image = Scan.read(scan.image)
    if scan.label is None:
        return image, None
    labels = Scan.read_labels(scan.label)
    image.check_same_grid(labels)
    return image, labels


def _check(scan: _Source) -> None:
    image, _ = _read(scan)
    if scan.label == scan.image or find_brain(image) is None:
        check_brain(image)


def _record(output: Path, name: str) -> Path:
    return output / "transforms" / f"{name}.json"


def _prepare_scan(scan: _Source, grid: WorkingGrid, output: Path) -> None:
    """Prepare one scan. Its record is written last, so a scan without a record is not complete."""
    inputs = scan.inputs()
    image, labels = _read(scan)
    head = None if scan.label == scan.image else find_brain(image)
    image = rescale(image if head is None else head.brain)
    mapping, target = align_to_mni152(image, head, "affine"), grid.around()
    check_in_grid(image, mapping, target)
    prepared = resample_intensities(image, target, mapping)
    prepared.save(output / scan.outputs()["image"])
    if labels is not None:
        resample(labels, target, mapping, order=0).save(output / scan.outputs()["label"])
    save_linear(output / "transforms" / f"{scan.name}.txt", mapping)
    template = _template(grid)
    ncc = np.corrcoef(prepared.array[template > 0], template[template > 0])[0, 1]
    volume = np.linalg.det(mapping[:3, :3])
    write_json(
        _record(output, scan.name), {"inputs": inputs, "ncc": round(float(ncc), 4), "volume": round(float(volume), 4)}
    )


def _numbers(output: Path, name: str) -> dict[str, float]:
    """Numbers in the record of a scan: correlation with the template, and volume relative to it before alignment."""
    record = json.loads(_record(output, name).read_text(encoding="utf-8"))
    return {key: record[key] for key in ("ncc", "volume") if key in record}  # older records have no volume


def _is_done(scan: _Source, output: Path) -> bool:
    record = _record(output, scan.name)
    written = record.exists() and all((output / path).exists() for path in scan.outputs().values())
    if not written:
        return False
    try:
        return bool(json.loads(record.read_text(encoding="utf-8"))["inputs"] == scan.inputs())
    except (ValueError, KeyError, TypeError):  # a damaged record does not count
        return False


def _grid_json(grid: WorkingGrid) -> dict[str, Any]:
    return {"size": list(grid.size), "spacing": grid.spacing, "orientation": "LIA"}


def _require_ours(output: Path, grid: WorkingGrid) -> None:
    """Raise ValueError unless ``output`` is new, empty, or from an earlier call with the same grid, and writable."""
    mark = output / "grid.json"
    if mark.exists():
        recorded, asked = json.loads(mark.read_text(encoding="utf-8")), _grid_json(grid)
        if recorded != asked:
            raise ValueError(
                f"{output} was prepared on the grid {recorded}, not {asked}. Use the same grid, or another folder."
            )
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} was not made by 'vxm prepare', and is not empty. Choose another folder.")
    require_writable(mark)


def _create_output(output: Path, grid: WorkingGrid) -> None:
    """Create the folder ``output`` with its record, and remove leftovers of an earlier call."""
    for folder in (output, *(output / part for part in ("images", "labels", "transforms"))):
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
    write_json(output / "grid.json", _grid_json(grid))


def _given_sections(split: Path, names: Sequence[str]) -> dict[str, list[str]]:
    try:
        sections = json.loads(split.read_text(encoding="utf-8"))
        if not all(isinstance(section, list) for section in sections.values()):
            raise TypeError("a section is not a list")
        listed = [str(name) for section in sections.values() for name in section]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{split} is not a JSON object with a list of scan names for each section: {error}."
        ) from error
    if "grid" in sections:
        raise ValueError(f"{split} has a section 'grid', a name that the datalist uses for the grid. Rename it.")
    if sorted(listed) != sorted(names):
        extra, missing = sorted(set(listed) - set(names)), sorted(set(names) - set(listed))
        twice = sorted({name for name in listed if listed.count(name) > 1})
        raise ValueError(
            f"{split} does not list each scan once. Missing: [{_abbreviate(missing)}]; repeated: "
            f"[{_abbreviate(twice)}]; unknown: [{_abbreviate(extra)}]."
        )
    return {"training": [], "validation": [], "test": [], **sections}


def _random_sections(names: Sequence[str], validation: float, test: float, seed: int) -> dict[str, list[str]]:
    if not (validation >= 0 and test >= 0 and validation + test <= 1):
        raise ValueError(
            f"validation is {validation} and test is {test}. Give fractions from 0 to 1 whose sum is at most 1."
        )
    shuffled = random.Random(seed).sample(names, len(names))
    # A section needs two scans for a pair, so it gets at least two, if as many remain for training.
    least = 2 if len(names) >= 6 else 0
    first, second = (max(least, round(part * len(names))) if part > 0 else 0 for part in (validation, test))
    return {
        "training": sorted(shuffled[first + second :]),
        "validation": sorted(shuffled[:first]),
        "test": sorted(shuffled[first : first + second]),
    }


def _write_datalist(
    scans: Sequence[_Source], sections: Mapping[str, Sequence[str]], grid: WorkingGrid, output: Path
) -> Path:
    entries = {scan.name: scan.outputs() for scan in scans}
    content: dict[str, Any] = {
        section: [entries[name] for name in names if name in entries] for section, names in sections.items()
    }
    content["grid"] = _grid_json(grid)
    path = output / "datalist.json"
    with atomic(path) as temporary:
        write_json(temporary, content)
        if path.exists() and path.read_bytes() != temporary.read_bytes():
            path.replace(output / "datalist.previous.json")  # it may have been edited
    return path


def _write_table(scans: Sequence[_Source], errors: Mapping[str, str], output: Path) -> None:
    """Write ``scans.csv``: for each scan, why it failed, or its numbers."""
    with atomic(output / "scans.csv") as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["name", "reason", "ncc", "volume"], lineterminator="\n")
        writer.writeheader()
        for scan in scans:
            row = {"name": scan.name, "reason": errors.get(scan.name, "")}
            writer.writerow(row if row["reason"] else row | _numbers(output, scan.name))


def prepare(
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    images: str = "*.nii.gz",
    labels: str | None = None,
    maps: bool = False,
    grid: WorkingGrid = STANDARD_GRID,
    split: str | Path | None = None,
    validation: float = 0.1,
    test: float = 0.1,
    seed: int = 0,
    jobs: int | None = None,
) -> Prepared:
    """Align T1 scans to MNI152 and write their brains, with labels, on one grid.

    The brain in a whole head is found first (:func:`~voxelmorph_monai.apps.heads.find_brain`).

    The files in ``output`` are ``images/NAME.nii.gz`` (float32 in [0, 1]), ``labels/NAME.nii.gz`` (nearest neighbour,
    in their original type), ``transforms/NAME.txt`` (ITK: from points of MNI152 to points of the scan),
    ``datalist.json`` with the sections ``training``, ``validation`` and ``test``, ``scans.csv`` (why each scan failed,
    or its correlation with the template and its volume), and ``index.html``, a page to find scans that went wrong.

    All inputs are checked before the work starts. A second call prepares only scans that are missing or have a changed
    input; another grid needs another folder. The work runs in new processes, so a script must call this under
    ``if __name__ == "__main__":``.

    Args:
        inputs: folders or scans, NIfTI or MGZ.
        output: folder that is new, empty or from an earlier call.
        images: pattern of the scans in the folders; ``*`` stands for the name of a scan.
        labels: pattern of their labels, if they have any.
        maps: the inputs are label maps with FreeSurfer's numbers, from which images are painted
            (:func:`~voxelmorph_monai.synthesis.paint`).
        grid: size and spacing (mm) of the grid.
        split: JSON file that lists the names of the scans by section (default: random sections).
        validation: fraction of the scans for validation.
        test: fraction of the scans for testing.
        seed: random seed of the split.
        jobs: number of processes (default: one per processor, but at most one per 3 GiB of free memory).

    Raises:
        ValueError: an input or an option cannot be used.
        FileNotFoundError: an input does not exist.
    """
    output = Path(output).absolute()
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs is {jobs}. At least 1 process is needed.")
    if seed < 0:  # Python's generator ignores the sign
        raise ValueError(f"seed is {seed}. Give 0 or more.")
    grid.around()  # raises an error if the grid does not fit the template
    if maps and labels:
        raise ValueError(f"labels '{labels}' cannot be combined with maps, which are labels themselves.")
    scans = _find_scans(inputs, images, images if maps else labels)
    names = [scan.name for scan in scans]
    sections = _given_sections(Path(split), names) if split else _random_sections(names, validation, test, seed)
    _require_ours(output, grid)
    todo = [scan for scan in scans if not _is_done(scan, output)]
    with Processes(jobs or default_jobs(_MEMORY), threads=1) as pool:
        faults = dict(failures(pool, "check", "scan", _check, {scan.name: [scan] for scan in todo}))
        if faults:
            first = min(faults)
            bad = f"{len(faults)} of {len(todo)} scans ({_abbreviate(sorted(faults))})"
            raise ValueError(f"{bad} cannot be used. {first}: {faults[first]}")
        _create_output(output, grid)
        calls = {scan.name: [scan, grid, output] for scan in todo}
        errors = dict(
            failures(pool, "prepare", "scan", _prepare_scan, calls, lambda name: {"NCC": _numbers(output, name)["ncc"]})
        )
    good = [scan for scan in scans if scan.name not in errors]
    _write_table(scans, errors, output)
    save_index(output)
    return Prepared(_write_datalist(good, sections, grid, output), errors)
