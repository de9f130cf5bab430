"""Pack bundles for distribution: one zip file per version, in the layout of MONAI's model zoo."""

import hashlib
import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

from monai.bundle import ConfigParser

from voxelmorph_monai.io.atomic import atomic, write_json
from voxelmorph_monai.networks import load_weights

__all__ = ["Packed", "pack_bundle"]

_NEEDED = ("LICENSE", "configs/metadata.json", "configs/inference.json", "docs/README.md", "models/model.pt")
_PARTS = re.compile(
    r"LICENSE|configs/[^/]+|docs/.+|models/model\.(pt|json|ts|onnx)"
)  # all other files were created by running the bundle
_EARLIEST = (1980, 1, 1, 0, 0, 0)  # the earliest date that a zip file can store
_MODE = 0o644 << 16  # -rw-r--r--, in the bits where Unix looks for it


class Packed(NamedTuple):
    """Result of :func:`pack_bundle`.

    Attributes:
        archive: the zip file.
        files: packed files, as paths in the bundle.
        left_out: files and folders in the bundle's folder that were not packed.
    """

    archive: Path
    files: list[str]
    left_out: list[str]


def pack_bundle(bundle: str | Path, output: str | Path, url: str = "") -> Packed:
    """Write ``output/<name>_v<version>.zip`` and list it in ``output/model_info.json``.

    The zip holds the folder ``<name>`` with ``LICENSE``, ``configs/``, ``docs/`` and the network in ``models/``, but no
    files that running the bundle left there. The same bundle gives the same bytes on any machine: files are sorted,
    have one date, and are not compressed (weights hardly shrink, and the result would depend on the version of zlib).
    An entry of ``model_info.json`` is ``"<name>_v<version>": {"checksum": SHA-1 of the zip, "source": its address}``.

    Args:
        bundle: folder of the bundle; its name is the name of the bundle.
        output: folder to write to; it may hold earlier versions and other bundles.
        url: address of the folder where the zip will be published (default: none; ``source`` is then the file name).

    Raises:
        FileNotFoundError: the bundle lacks a file.
        FileExistsError: ``output`` already has this version with another content.
        ValueError: the name, the metadata or the weights are wrong.
    """
    bundle, output = Path(bundle).resolve(), Path(output)
    name, version = _check_name(bundle), _check_metadata(bundle)
    _check_network(bundle)
    files = _files(bundle)
    content = _zip({f"{name}/{file}": (bundle / file).read_bytes() for file in files})
    archive, info_file = output / f"{name}_v{version}.zip", output / "model_info.json"
    info = _read_json(info_file) if info_file.exists() else {}
    source = f"{url.rstrip('/')}/{archive.name}" if url else archive.name
    entry = {"checksum": hashlib.sha1(content, usedforsecurity=False).hexdigest(), "source": source}
    if info.get(archive.stem, entry) != entry or (archive.exists() and archive.read_bytes() != content):
        raise FileExistsError(
            f"{output} already has version {version} of {name} with another content or address. Raise the version in "
            "configs/metadata.json."
        )
    output.mkdir(parents=True, exist_ok=True)
    with atomic(archive) as temporary:
        temporary.write_bytes(content)
    write_json(info_file, {**info, archive.stem: entry})
    inside = {file.split("/")[0] for file in files}
    left_out = [path.name for path in sorted(bundle.iterdir()) if path.name not in inside]
    left_out += [path for path in _all(bundle) if path.split("/")[0] in inside and path not in files]
    return Packed(archive, files, left_out)


def _all(bundle: Path) -> list[str]:
    return sorted(path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file())


def _files(bundle: Path) -> list[str]:
    """Paths of the files that belong to ``bundle``, relative to it."""
    hidden = re.compile(r"(^|/)(\.|__pycache__/)")
    return [path for path in _all(bundle) if _PARTS.fullmatch(path) and not hidden.search(path)]


def _zip(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, _EARLIEST)
            entry.external_attr, entry.create_system = _MODE, 3  # 3 is Unix, also when written on another system
            archive.writestr(entry, content)
    return buffer.getvalue()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__} instead of a JSON object.")
    return content


def _check_name(bundle: Path) -> str:
    for file in _NEEDED:
        if not (bundle / file).is_file():
            raise FileNotFoundError(f"the bundle {bundle} is incomplete: it has no {file}.")
    if not re.fullmatch(r"\w+", bundle.name) or "_v" in bundle.name:  # MONAI splits <name>_v<version> at the first _v
        raise ValueError(
            f"'{bundle.name}' cannot be the name of a bundle. Use letters, digits and _ for its folder, but not '_v'."
        )
    return bundle.name


def _check_metadata(bundle: Path) -> str:
    path = bundle / "configs" / "metadata.json"
    metadata = _read_json(path)
    version, changelog = metadata.get("version"), metadata.get("changelog")
    if not isinstance(version, str) or not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise ValueError(f"the version in {path} is {version!r}. Write it like '1.2.3'.")
    if not isinstance(changelog, dict) or version not in changelog:
        raise ValueError(f"the changelog in {path} has no entry for version {version}. Add one.")
    return version


def _check_network(bundle: Path) -> None:
    """Check that the network of ``inference.json`` can load the weights."""
    parser = ConfigParser()
    parser.read_config(str(bundle / "configs" / "inference.json"))
    if "network_def" not in parser:
        raise ValueError(f"{bundle / 'configs' / 'inference.json'} has no entry network_def, which MONAI needs.")
    parser["bundle_root"] = str(bundle)
    load_weights(parser.get_parsed_content("network_def"), str(bundle / "models" / "model.pt"))
