"""What all threads compress together is one stream of gzip, which any reader takes."""

import gzip
import zlib
from pathlib import Path

import numpy as np
import pytest

from voxelmorph_monai.io.gzip_files import write_gzip

BLOCK = 1 << 20


def content(size: int) -> bytes:
    return np.random.default_rng(1).integers(0, 4, size, dtype=np.uint8).tobytes()


@pytest.mark.parametrize("threads", ["1", "3"])
@pytest.mark.parametrize("noise", [True, False])
@pytest.mark.parametrize("size", [0, 1, BLOCK, BLOCK + 1, 3 * BLOCK + 17])
def test_it_is_read_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, noise: bool, threads: str
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    write_gzip(tmp_path / "file.gz", content(size), noise=noise)
    stored = (tmp_path / "file.gz").read_bytes()
    assert gzip.decompress(stored) == content(size)  # with its checksum and length
    one = zlib.decompressobj(16 + zlib.MAX_WBITS)
    assert one.decompress(stored) == content(size)
    assert one.unused_data == b""  # some readers stop after the first of several streams
    assert one.eof


def test_noise_becomes_no_larger_than_by_zlib(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    image = rng.normal(0, 10, (40, 80, 80)).astype(np.float32)
    image[:10] = 0  # a background
    write_gzip(tmp_path / "file.gz", image.tobytes(), noise=True)
    assert (tmp_path / "file.gz").stat().st_size < 1.01 * len(zlib.compress(image.tobytes(), 1))
