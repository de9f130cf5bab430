"""Who is registered to whom: pairs made from a plain list of scans, or listed one by one.

A scan is a dict ``{"image": path, "label": path}`` (the label optional), as MONAI's datalists hold them, so that every
tool that fills a bundle's ``train#dataset#data`` can fill ours. A pair is a dict with ``moving`` and ``fixed``, and
``moving_label`` and ``fixed_label`` where scans have labels. A list holds one or the other.
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

from voxelmorph_monai.spaces import open_volume, require_same_grid

__all__ = [
    "PairDataset",
    "PairSampler",
    "check_labels",
    "check_scans",
    "fingerprint",
    "load_scans",
    "pair",
    "process",
    "take_apart",
]

Scan = Mapping[str, object]


def load_scans(dataset_dir: str, section: str) -> list[dict[str, str]]:
    """Scans (or pairs) of one section (``"training"``, ``"validation"``, ``"test"``) of ``dataset_dir/datalist.json``.

    ``vxm prepare`` and ``vxm datalist`` write such a folder. Paths in it are relative to the folder.
    """
    datalist = Path(dataset_dir) / "datalist.json"
    if not datalist.is_file():
        raise FileNotFoundError(f"dataset_dir must hold a datalist.json (vxm prepare makes one), got {dataset_dir}.")
    return load_decathlon_datalist(str(datalist), is_segmentation=True, data_list_key=section)


def fingerprint(scans: Sequence[Scan], dataset_dir: str) -> str:
    """How many ``scans`` (or pairs) there are, and a checksum of their files' names, in order.

    Files in ``dataset_dir`` are named relative to it, so that the folder may move; others in full.

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
    """Rank of this process, and how many processes work together."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def take_apart(data: Sequence[Scan]) -> tuple[list[Scan], list[tuple[int, int]] | None]:
    """Scans of ``data``, each once; and, if it holds pairs, the indices of moving and fixed scan of each.

    >>> take_apart([{"moving": "b", "fixed": "a"}, {"moving": "c", "fixed": "a", "fixed_label": "l"}])[1]
    [(0, 1), (2, 3)]
    >>> take_apart([{"image": "a"}, {"image": "b"}])
    ([{'image': 'a'}, {'image': 'b'}], None)
    """
    if all("image" in item for item in data):
        return list(data), None
    places: dict[tuple[object, object], int] = {}  # of scans that are known by now
    pairs = []
    for item in data:
        if "image" in item or not {"moving", "fixed"} <= set(item):
            raise ValueError(
                f"data must hold scans with 'image', or pairs with 'moving' and 'fixed', got {dict(item)}."
            )
        moving, fixed = (
            places.setdefault((item[role], item.get(f"{role}_label")), len(places)) for role in ("moving", "fixed")
        )
        pairs.append((moving, fixed))
    scans: list[Scan] = [
        {"image": image} if label is None else {"image": image, "label": label} for image, label in places
    ]
    return scans, pairs


def check_scans(
    scans: Sequence[Scan], atlas: Scan | None = None, *, keys: Sequence[str] = ("image",), purpose: str = "training"
) -> None:
    """Check the headers of ``scans`` before any long work: enough for a pair, complete, all files there, on one grid.

    Args:
        scans: what pairs are made of, or pairs.
        atlas: the scan that takes part in every pair, if there is one.
        keys: what each of them must have.
        purpose: what they are for, to be named in errors.

    Raises:
        ValueError: no pair can be made; a scan without one of ``keys``; a scan or pair given twice; grids that differ.
        FileNotFoundError: an image or label that is not there.
    """
    scans, pairs = take_apart(scans)
    num_scans = 1 if atlas else 2
    if len(scans) < num_scans:
        raise ValueError(f"the scans for {purpose} must be at least {num_scans}, got {len(scans)}.")
    files = [str(_file(scan)) for scan in scans]
    listed = files if pairs is None else [f"{files[moving]} to {files[fixed]}" for moving, fixed in pairs]
    if len(set(listed)) < len(listed):
        twice, _ = Counter(listed).most_common(1)[0]
        what = "scans" if pairs is None else "pairs"
        raise ValueError(f"the {what} for {purpose} must all be different, got {twice} more than once.")
    first = None
    for scan in [*scans, *([atlas] if atlas else [])]:
        for key in keys:
            if key not in scan:
                raise ValueError(f"each scan must have {list(keys)}, got one with {dict(scan)}.")
            path = str(scan[key])
            volume = open_volume(path)
            if first is None:
                first = (volume, path)
            require_same_grid(first[0], volume, (first[1], path))


def check_labels(structures: Mapping[str, object] | None, num_labels: int) -> None:
    """Check before any long work that ``num_labels`` is the number of ``structures``, if there is such a table."""
    if structures and num_labels != len(structures):
        raise ValueError(
            f"structures or num_labels must be given, not both, got {len(structures)} structures and num_labels = "
            f"{num_labels}."
        )


def pair(moving: str, fixed: str, moving_label: str | None = None, fixed_label: str | None = None) -> dict[str, str]:
    """One pair of files, its labels left out where they are None."""
    items = {"moving": moving, "fixed": fixed, "moving_label": moving_label, "fixed_label": fixed_label}
    return {key: path for key, path in items.items() if path is not None}


def _file(scan: Scan) -> Path:
    return Path(str(scan["image"])).resolve()


class PairDataset(Dataset[dict[str, object]]):
    """Ordered pairs of different scans; with an atlas, the atlas with every scan; or the pairs that are listed.

    Args:
        data: the scans, ``[{"image": ..., "label": ...}, ...]``, or pairs, ``[{"moving": ..., "fixed": ...}, ...]``.
        transform: what loads and prepares one scan; its result must keep the key ``image``. MONAI's transforms alone
            are cached, up to the first random one.
        augmentation: a random transform of MONAI for loaded pairs. It draws from a seed that it is given anew for each
            pair, from torch's generator, so that what an epoch shows depends on its number alone.
        atlas: the scan that takes part in every pair.
        atlas_role: ``"moving"`` or ``"fixed"``.
        cache_rate: share of the scans that stay in memory (they are transformed before the first pair is asked for).

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
            raise ValueError(f"atlas_role must be 'moving' or 'fixed', got '{atlas_role}'.")
        data, pairs = take_apart(data)
        if atlas is not None:  # it may be one of the scans, but is no pair with itself
            if pairs is not None:
                raise ValueError(f"pairs that are listed leave no place for an atlas, got {atlas}.")
            data = [scan for scan in data if _file(scan) != _file(atlas)]
        n = len(data)
        if n < (1 if atlas else 2):
            raise ValueError(f"pairs need at least 2 scans, or an atlas and 1 other, got {n} and atlas {atlas}.")
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
        moving, fixed = (self.scans[i] for i in self.pairs[index])
        pair = {"moving": moving["image"], "fixed": fixed["image"]}
        if "label" in moving and "label" in fixed:
            pair |= {"moving_label": moving["label"], "fixed_label": fixed["label"]}
        if self.augmentation is not None:
            self.augmentation.set_random_state(int(torch.randint(2**32, ())))
            pair = self.augmentation(pair)  # type: ignore[operator] # MONAI's random transforms are callable
        return pair


class PairSampler(Sampler[int]):
    """Which pairs an epoch takes, decided by ``(seed, epoch)`` alone, so that a resumed training sees the same ones.

    In several processes each takes its share; the shares of a shuffled epoch are equally long.

    Args:
        dataset: the pairs.
        num_samples: pairs an epoch, over all processes; None: every pair once.
        shuffle: draw them in random order; else in order, each once, whoever takes it.
        seed: with the epoch set by :meth:`set_epoch`, determines the draw.
    """

    def __init__(
        self, dataset: PairDataset, num_samples: int | None = None, *, shuffle: bool = True, seed: int = 0
    ) -> None:
        if num_samples is not None and num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}.")
        self.num_pairs = len(dataset)
        self.num_samples = num_samples or self.num_pairs
        _, world = process()
        if self.num_samples < world:
            raise ValueError(f"each of {world} processes needs a pair, got {self.num_samples} altogether.")
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Make the next iteration that of ``epoch``."""
        self.epoch = epoch

    def _indices(self) -> list[int]:
        rank, world = process()
        wanted = -(-self.num_samples // world) * world if self.shuffle else self.num_samples
        if not self.shuffle:
            return [i % self.num_pairs for i in range(rank, wanted, world)]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        drawn: list[int] = []
        while len(drawn) < wanted:
            drawn += torch.randperm(self.num_pairs, generator=generator).tolist()
        return drawn[rank:wanted:world]

    def __iter__(self) -> Iterator[int]:
        return iter(self._indices())

    def __len__(self) -> int:
        rank, world = process()
        if self.shuffle:
            return -(-self.num_samples // world)
        return len(range(rank, self.num_samples, world))
