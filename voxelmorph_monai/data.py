"""Pairs of scans for training and evaluation: made from a list of scans, or listed one by one.

A scan is a dict ``{"image": path, "label": path}`` (label optional), as in MONAI's datalists, so that tools which set
the entry ``train#dataset#data`` of a bundle work with ours. A pair is a dict with ``moving`` and ``fixed``, and with
``moving_label`` and ``fixed_label`` if the scans have labels. A list holds only scans or only pairs.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from os.path import abspath
from pathlib import Path

import torch
import torch.distributed
from monai.data import CacheDataset, load_decathlon_datalist
from monai.transforms import Randomizable
from torch.utils.data import Dataset, Sampler

from voxelmorph_monai.affines import ImageGrid, check_same_grid
from voxelmorph_monai.io.images import open_volume

__all__ = [
    "PairDataset",
    "PairSampler",
    "check_labels",
    "check_scans",
    "check_seed",
    "fingerprint",
    "load_scans",
    "pair",
    "process",
    "split_pairs",
]

Scan = Mapping[str, object]


def load_scans(dataset_dir: str, section: str) -> list[dict[str, str]]:
    """Scans (or pairs) of one section (``"training"``, ``"validation"``, ``"test"``) of ``dataset_dir/datalist.json``.

    ``vxm prepare`` and ``vxm datalist`` write such a folder. Paths in it are relative to the folder.

    Raises:
        FileNotFoundError: the folder has no datalist.
        ValueError: the datalist is not JSON, or has no such section.
    """
    datalist = Path(dataset_dir) / "datalist.json"
    if not datalist.is_file():
        raise FileNotFoundError(
            f"dataset_dir {dataset_dir} has no datalist.json. Make one with 'vxm prepare' or 'vxm datalist'."
        )
    try:
        content = json.loads(datalist.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{datalist} is not valid JSON: {error}. Correct it, or create it again.") from error
    rows = content.get(section) if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(map(_is_row, rows)):
        raise ValueError(
            f"{datalist} has no valid list of scans '{section}'. Write each scan as an object with the paths of its "
            'files, such as {"image": "a.nii.gz"}.'
        )
    return load_decathlon_datalist(str(datalist), is_segmentation=True, data_list_key=section)


def _is_row(row: object) -> bool:
    return isinstance(row, dict) and len(row) > 0 and all(isinstance(file, str) and file for file in row.values())


def fingerprint(scans: Sequence[Scan], dataset_dir: str) -> str:
    """Number of ``scans`` (or pairs), and a checksum of their file names in order, as text.

    Files in ``dataset_dir`` are named relative to it, so that the folder may move; other files by their full path.

    >>> fingerprint([{"image": "a/1.nii.gz"}], "a") == fingerprint([{"image": "/b/1.nii.gz"}], "/b/")
    True
    >>> fingerprint([{"image": "a/1.nii.gz"}], "a")
    '1 listed, sha256 2576295c1189'
    """
    root = Path(abspath(dataset_dir))

    def name(file: object) -> str:
        path = Path(abspath(str(file)))
        return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()

    names = [{key: name(file) for key, file in sorted(scan.items())} for scan in scans]
    return f"{len(scans)} listed, sha256 {hashlib.sha256(json.dumps(names).encode()).hexdigest()[:12]}"


def process() -> tuple[int, int]:
    """Rank of this process, and number of processes of the distributed run (0 and 1 if there is only this process)."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def split_pairs(data: Sequence[Scan]) -> tuple[list[Scan], list[tuple[int, int]] | None]:
    """List each scan of ``data`` once, and its pairs as indices ``(moving, fixed)``, None if ``data`` lists scans.

    >>> split_pairs([{"moving": "b", "fixed": "a"}, {"moving": "c", "fixed": "a", "fixed_label": "l"}])[1]
    [(0, 1), (2, 3)]
    >>> split_pairs([{"image": "a"}, {"image": "b"}])
    ([{'image': 'a'}, {'image': 'b'}], None)
    """
    if all("image" in item for item in data):
        return list(data), None
    indices: dict[tuple[object, object], int] = {}  # by image and label of the scans so far
    pairs = []
    for item in data:
        if "image" in item or not {"moving", "fixed"} <= set(item):
            raise ValueError(
                f"{dict(item)} does not fit the list: all items must be scans ('image'), or all pairs ('moving', "
                "'fixed'). Use one form for the whole list."
            )
        moving, fixed = (
            indices.setdefault((item[role], item.get(f"{role}_label")), len(indices)) for role in ("moving", "fixed")
        )
        pairs.append((moving, fixed))
    scans: list[Scan] = [
        {"image": image} if label is None else {"image": image, "label": label} for image, label in indices
    ]
    return scans, pairs


def check_scans(
    scans: Sequence[Scan], atlas: Scan | None = None, *, keys: Sequence[str] = ("image",), purpose: str = "training"
) -> None:
    """Check before a long run that there are enough scans, and that their files exist and lie on one grid.

    Only headers are read.

    Args:
        scans: scans to make pairs from, or pairs.
        atlas: scan that takes part in every pair, if there is one.
        keys: entries that each scan needs, such as ``"label"``.
        purpose: purpose of the scans, for messages.

    Raises:
        ValueError: there are too few scans for a pair, a scan lacks one of ``keys``, a scan or pair is listed twice, or
            the grids differ.
        FileNotFoundError: an image or label file does not exist.
    """
    scans, pairs = split_pairs(scans)
    num_scans = 1 if atlas else 2
    if len(scans) < num_scans:
        raise ValueError(f"too few scans for {purpose}: {len(scans)}. List at least {num_scans}.")
    files = [str(_file(scan)) for scan in scans]
    listed = files if pairs is None else [f"{files[moving]} to {files[fixed]}" for moving, fixed in pairs]
    if len(set(listed)) < len(listed):
        twice, _ = Counter(listed).most_common(1)[0]
        what = "scans" if pairs is None else "pairs"
        raise ValueError(f"the {what} for {purpose} list {twice} more than once. List it once.")
    first = None
    for scan in [*scans, *([atlas] if atlas else [])]:
        for key in keys:
            if key not in scan:
                raise ValueError(f"{dict(scan)} has no '{key}'. Each scan for {purpose} needs {', '.join(keys)}.")
            path = str(scan[key])
            volume, affine = open_volume(path)
            grid = ImageGrid(volume.shape, affine)
            first = first or (grid, path)
            check_same_grid(first[0], grid, (first[1], path))


def check_labels(structures: Mapping[str, object] | None, num_labels: int) -> None:
    """Check before a long run that ``num_labels`` agrees with the table of ``structures``, if there is one."""
    if not isinstance(num_labels, int) or isinstance(num_labels, bool) or num_labels < 1:
        raise ValueError(f"num_labels is {num_labels}. Give a whole number, 1 or more.")
    if structures and num_labels != len(structures):
        raise ValueError(
            f"num_labels is {num_labels}, but structures lists {len(structures)}. Set only one of the two options."
        )


def check_seed(seed: object) -> int:
    """Return ``seed`` if NumPy accepts it as a random seed: a whole number from 0 to 2^32 - 1."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}. Give a whole number from 0 to {2**32 - 1}.")
    return seed


def pair(moving: str, fixed: str, moving_label: str | None = None, fixed_label: str | None = None) -> dict[str, str]:
    """Dict of one pair of files; labels that are None are left out."""
    items = {"moving": moving, "fixed": fixed, "moving_label": moving_label, "fixed_label": fixed_label}
    return {key: path for key, path in items.items() if path is not None}


def _file(scan: Scan) -> Path:
    return Path(str(scan["image"])).resolve()


class _Turn(int):
    """Index of a pair, with the random seed of its augmentation in this epoch."""

    seed: int


class PairDataset(Dataset[dict[str, object]]):
    """Dataset of pairs: all ordered pairs of different scans; with an atlas, the atlas and each scan; or listed pairs.

    Args:
        data: scans, ``[{"image": ..., "label": ...}, ...]``, or pairs, ``[{"moving": ..., "fixed": ...}, ...]``.
        transform: transform that loads and prepares one scan and keeps the key ``image``. The results of MONAI's
            transforms are cached, up to the first random one.
        augmentation: random MONAI transform of loaded pairs. Both ``augmentation`` and the random transforms in
            ``transform`` use the seed that :class:`PairSampler` attaches to each index, so that an epoch depends only
            on its number, and not on the process that loads a pair. With another sampler, the seeds come from torch's
            generator.
        atlas: scan that takes part in every pair.
        atlas_role: role of the atlas, ``"moving"`` or ``"fixed"``.
        cache_rate: fraction of the scans to keep in memory; these are loaded when the dataset is created.

    >>> scans = [{"image": 1, "label": 10}, {"image": 2, "label": 20}, {"image": 3, "label": 30}]
    >>> pairs = PairDataset(scans, cache_rate=0)
    >>> len(pairs), pairs[1]
    (6, {'moving': 1, 'fixed': 3, 'moving_label': 10, 'fixed_label': 30})
    >>> PairDataset(scans[1:], atlas=scans[0], cache_rate=0)[1]
    {'moving': 1, 'fixed': 3, 'moving_label': 10, 'fixed_label': 30}
    """

    def __init__(
        self,
        data: Sequence[Scan],
        transform: Callable[..., object] | None = None,
        *,
        augmentation: Randomizable | None = None,
        atlas: Scan | None = None,
        atlas_role: str = "moving",
        cache_rate: float = 1.0,
    ) -> None:
        if atlas_role not in ("moving", "fixed"):
            raise ValueError(f"atlas_role is '{atlas_role}'. Use 'moving' or 'fixed'.")
        if atlas is None and atlas_role != "moving":
            raise ValueError(f"atlas_role is '{atlas_role}', but there is no atlas. Give one, or leave the role out.")
        data, pairs = split_pairs(data)
        if atlas is not None:  # it may be one of the scans, but makes no pair with itself
            if pairs is not None:
                raise ValueError(f"atlas {atlas} cannot be combined with listed pairs. Remove it, or list scans.")
            data = [scan for scan in data if _file(scan) != _file(atlas)]
        n = len(data)
        if n < (1 if atlas else 2):
            besides = f" besides the atlas {atlas}" if atlas else ""
            raise ValueError(f"too few scans for a pair{besides}: {n}. Give 2 scans, or an atlas and 1 other scan.")
        if pairs is not None:
            self.pairs = pairs
        elif atlas is None:
            self.pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
        else:
            self.pairs = [(n, i) if atlas_role == "moving" else (i, n) for i in range(n)]
        self.augmentation = augmentation
        self.scans = CacheDataset(
            [*data, atlas] if atlas else data, transform, cache_rate=cache_rate, progress=cache_rate > 0
        )

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, object]:
        seed = index.seed if isinstance(index, _Turn) else int(torch.randint(2**32, ()))
        for random in (self.scans.transform, self.augmentation):
            if isinstance(random, Randomizable):
                random.set_random_state(seed)
        moving, fixed = (self.scans[i] for i in self.pairs[index])
        pair = {"moving": moving["image"], "fixed": fixed["image"]}
        if "label" in moving and "label" in fixed:
            pair |= {"moving_label": moving["label"], "fixed_label": fixed["label"]}
        if self.augmentation is not None:
            pair = self.augmentation(pair)  # type: ignore[operator] # MONAI's random transforms are callable
        return pair


class PairSampler(Sampler[int]):
    """Sampler that chooses the pairs of an epoch, and the seed of each pair's augmentation.

    Both depend only on ``(seed, epoch)``, so that a resumed training sees the same pairs with the same augmentation.

    The pairs are divided among the processes of a distributed run; in a shuffled epoch all get the same number.

    Args:
        dataset: the pairs.
        num_samples: pairs per epoch, over all processes; None: every pair once.
        shuffle: draw pairs in random order; otherwise every pair is used once, in order.
        seed: random seed; together with the epoch from :meth:`set_epoch` it determines the draw.
    """

    def __init__(
        self, dataset: PairDataset, num_samples: int | None = None, *, shuffle: bool = True, seed: int = 0
    ) -> None:
        if num_samples is not None and num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}. An epoch needs at least 1 pair.")
        self.num_pairs = len(dataset)
        self.num_samples = num_samples or self.num_pairs
        _, world = process()
        if self.num_samples < world:
            raise ValueError(
                f"{self.num_samples} pairs are too few for {world} processes. Use at most {self.num_samples} processes."
            )
        self.shuffle = shuffle
        self.seed = check_seed(seed)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the epoch to draw next."""
        self.epoch = epoch

    def _indices(self, generator: torch.Generator) -> list[int]:
        rank, world = process()
        wanted = -(-self.num_samples // world) * world if self.shuffle else self.num_samples
        if not self.shuffle:
            return [i % self.num_pairs for i in range(rank, wanted, world)]
        drawn: list[int] = []
        while len(drawn) < wanted:
            drawn += torch.randperm(self.num_pairs, generator=generator).tolist()
        return drawn[rank:wanted:world]

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        turns = [_Turn(index) for index in self._indices(generator)]
        rank, world = process()
        seeds = torch.randint(2**32, (self.num_samples + world,), generator=generator).tolist()[rank::world]
        for turn, seed in zip(turns, seeds, strict=False):
            turn.seed = seed
        return iter(turns)

    def __len__(self) -> int:
        rank, world = process()
        if self.shuffle:
            return -(-self.num_samples // world)
        return len(range(rank, self.num_samples, world))
