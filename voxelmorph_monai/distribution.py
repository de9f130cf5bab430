"""Bundles that travel: one zip file for each version, in the layout in which MONAI's model zoo publishes bundles."""

import hashlib
import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

from monai.bundle import ConfigParser

from voxelmorph_monai.files import atomic, write_json
from voxelmorph_monai.networks import load_weights

__all__ = ["Packed", "pack_bundle"]

_NEEDED = ("LICENSE", "configs/metadata.json", "configs/inference.json", "docs/README.md", "models/model.pt")
_PARTS = re.compile(r"LICENSE|configs/[^/]+|docs/.+|models/model\.(pt|ts|onnx)")  # all else came from running it
_EARLIEST = (1980, 1, 1, 0, 0, 0)  # that a zip file can tell
_MODE = 0o644 << 16  # -rw-r--r--, where Unix looks for it


class Packed(NamedTuple):
    """What :func:`pack_bundle` wrote.

    Attributes:
        archive: the zip file.
        files: what it holds, as paths in the bundle.
        left_out: what stands in the bundle's folder and is not part of it, as names there.
    """

    archive: Path
    files: list[str]
    left_out: list[str]


def pack_bundle(bundle: str | Path, output: str | Path, url: str = "") -> Packed:
    """Write ``output/<name>_v<version>.zip`` and enter it in ``output/model_info.json``.

    The zip holds the folder ``<name>`` with ``LICENSE``, ``configs/``, ``docs/`` and the network in ``models/``, and
    nothing that running the bundle left there. The same bundle gives the same bytes on any machine: files are sorted,
    of one date, and stored as they are (weights hardly shrink, and what deflates them depends on the version of zlib).
    An entry of ``model_info.json`` is ``"<name>_v<version>": {"checksum": SHA-1 of the zip, "source": its address}``.

    Args:
        bundle: its folder, whose name is the bundle's.
        output: folder to write, new or of earlier versions and other bundles.
        url: address of the folder that the zip will be published in (default: none, ``source`` is the file's name).

    Raises:
        FileNotFoundError: the bundle lacks a file.
        FileExistsError: ``output`` has this version already, with another content.
        ValueError: name, metadata or weights are not what they should be.
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
            f"version {version} of {name} must be new, but {output} has it with another content or address: "
            "raise it in configs/metadata.json."
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
    """Paths of what belongs to ``bundle``, relative to it."""
    hidden = re.compile(r"(^|/)(\.|__pycache__/)")
    return [path for path in _all(bundle) if _PARTS.fullmatch(path) and not hidden.search(path)]


def _zip(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, _EARLIEST)
            entry.external_attr, entry.create_system = _MODE, 3  # Unix, whatever it is written on
            archive.writestr(entry, content)
    return buffer.getvalue()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON, got: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}.")
    return content


def _check_name(bundle: Path) -> str:
    for file in _NEEDED:
        if not (bundle / file).is_file():
            raise FileNotFoundError(f"bundle {bundle} must hold {file}, but there is no such file.")
    if not re.fullmatch(r"\w+", bundle.name) or "_v" in bundle.name:  # MONAI splits <name>_v<version> at the first _v
        raise ValueError(f"a bundle's name must be of letters, digits and _, without '_v', got '{bundle.name}'.")
    return bundle.name


def _check_metadata(bundle: Path) -> str:
    path = bundle / "configs" / "metadata.json"
    metadata = _read_json(path)
    version, changelog = metadata.get("version"), metadata.get("changelog")
    if not isinstance(version, str) or not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise ValueError(f"version in {path} must be like '1.2.3', got {version!r}.")
    if not isinstance(changelog, dict) or version not in changelog:
        raise ValueError(f"changelog in {path} must say what is new in version {version}, but does not name it.")
    return version


def _check_network(bundle: Path) -> None:
    """Have the network of ``inference.json`` take the weights."""
    parser = ConfigParser()
    parser.read_config(str(bundle / "configs" / "inference.json"))
    if "network_def" not in parser:
        raise ValueError(f"{bundle / 'configs' / 'inference.json'} must have the entry network_def, but has none.")
    parser["bundle_root"] = str(bundle)
    load_weights(parser.get_parsed_content("network_def"), str(bundle / "models" / "model.pt"))
