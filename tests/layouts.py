"""Small data sets in exactly the layouts they are published in, for the tests of readers and bundles."""

import csv
import json
import pickle

import numpy as np

from voxelmorph_monai.io.images import save_image

SIZE = (8, 6, 10)
LABELS = (0, 2, 21, 42)  # of them IXI, OASIS and LPBA40 have two each


def volumes(seed):
    rng = np.random.default_rng(seed)
    return rng.random(SIZE, dtype=np.float32), rng.choice(np.array(LABELS, np.uint8), SIZE)


def write_scan(seed, image, label=None):
    for path, array in zip((image, label), volumes(seed), strict=True):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_image(path, array, np.eye(4))


def write_pickle(path, content, protocol=4):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol))


def ixi(folder, train=3):
    numbers = {"Train": range(1, 1 + train), "Val": (11, 12), "Test": (21, 22, 23)}
    for section, subjects in numbers.items():
        for n in subjects:
            write_pickle(folder / section / f"subject_{n}.pkl", volumes(n))
    write_pickle(folder / "atlas.pkl", volumes(0))
    return folder


def oasis(folder, numbers=(1, 2, 4, 436, 438, 439, 440)):
    for n in numbers:
        subject = folder / f"OASIS_OAS1_{n:04d}_MR1"
        write_scan(n, subject / "aligned_norm.nii.gz", subject / "aligned_seg35.nii.gz")
        write_scan(n + 1000, subject / "norm.nii.gz", subject / "seg35.nii.gz")  # in its own space: not for training
    (folder / "subjects.txt").write_text("\n".join(f"OASIS_OAS1_{n:04d}_MR1" for n in numbers))
    return folder


def learn2reg(folder):
    def image(n, part="Tr"):
        return f"./images{part}/OASIS_{n:04d}_0000.nii.gz"

    for n in (1, 2, 395, 396, 397):
        write_scan(n, folder / image(n), folder / image(n).replace("images", "labels"))
    for n in (415, 416):
        write_scan(n, folder / image(n, "Ts"))
    content = {
        "name": "OASIS",
        "tensorImageShape": {"0": list(SIZE)},
        "numTraining": 5,
        "training": [{"image": image(n), "label": image(n).replace("images", "labels")} for n in (1, 2, 395, 396, 397)],
        "test": [image(n, "Ts") for n in (415, 416)],
        "registration_val": [{"fixed": image(n), "moving": image(n + 1)} for n in (395, 396)],
        "registration_test": [{"fixed": image(415, "Ts"), "moving": image(416, "Ts")}],
    }
    (folder / "OASIS_dataset.json").write_text(json.dumps(content))
    return folder


def lpba40(folder):
    label = folder / "label"
    write_scan(1, folder / "fixed.nii.gz", label / "S01.delineation.structure.label.nii.gz")
    for part, numbers in (("train", range(11, 41)), ("test", range(2, 11))):
        for n in numbers:
            name = f"S{n:02d}.delineation"
            write_scan(n, folder / part / f"{name}.skullstripped.nii.gz", label / f"{name}.structure.label.nii.gz")
    return folder


def images_and_labels(folder, count=10, labels=10):
    for n in range(count):
        label = folder / "labels" / f"{n}.nii.gz" if n < labels else None
        write_scan(n, folder / "images" / f"{n}.nii.gz", label)
    return folder


def table(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path
