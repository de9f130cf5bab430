"""Bundles travel: packed, downloaded, checked as MONAI's zoo checks them, exported, and run on real scans.

Everything here is done to what was downloaded, in a folder away from the bundle it was packed from.
"""

import functools
import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import monai.bundle
import nibabel as nib
import numpy as np
import onnxruntime
import pytest
import requests
import torch
from monai.apps.utils import check_hash
from monai.bundle import ConfigWorkflow

import voxelmorph_monai
from voxelmorph_monai.apps.pack_bundle import pack_bundle
from voxelmorph_monai.cli import main
from voxelmorph_monai.networks import VoxelMorph

ROOT = Path(__file__).parents[2]
BUNDLES = sorted(path.parent for path in (ROOT / "bundles").glob("*/configs"))
REGISTRATION = ROOT / "bundles" / "brain_t1_registration"

pytestmark = [
    # printed for every config that is parsed; what it asks is said in the README
    pytest.mark.filterwarnings("ignore:parsing config_file.*"),
    # torch 2.13 itself, inside its exporters
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:onnxscript.*"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    # MONAI downloads without a hash when it is given an address
    pytest.mark.filterwarnings("ignore:No hash value provided"),
]


class Release(NamedTuple):
    """A folder with one zip of each bundle and model_info.json, and the address that it is served at."""

    folder: Path
    url: str


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Release]:
    """Every bundle, packed and served as the assets of a release on GitHub are."""
    root = tmp_path_factory.mktemp("server")
    path = "owner/repository/releases/download/v1"
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(root)))
    url = f"http://127.0.0.1:{server.server_port}/{path}"
    for bundle in BUNDLES:
        pack_bundle(bundle, root / path, url)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Release(root / path, url)
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module", params=BUNDLES, ids=lambda path: path.name)
def travelled(request: pytest.FixtureRequest, release: Release, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle as it was downloaded from the address that model_info.json gives."""
    return _download(request.param.name, release, tmp_path_factory.mktemp("downloaded"))


def _key(name: str) -> str:
    metadata = json.loads((ROOT / "bundles" / name / "configs" / "metadata.json").read_text(encoding="utf-8"))
    return f"{name}_v{metadata['version']}"


def _download(name: str, release: Release, target: Path) -> Path:
    info = json.loads((release.folder / "model_info.json").read_text(encoding="utf-8"))
    monai.bundle.download(name=name, url=info[_key(name)]["source"], bundle_dir=str(target), progress=False)
    return target / name


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _configs(bundle: Path, **more: object) -> dict[str, object]:
    """What MONAI's checks and exports are told about a bundle, wherever the working directory is."""
    return {
        "net_id": "network_def",
        "meta_file": str(bundle / "configs" / "metadata.json"),
        "config_file": str(bundle / "configs" / "inference.json"),
        "bundle_root": str(bundle),
        **more,
    }


def _network(bundle: Path) -> torch.nn.Module:
    network = monai.bundle.load(bundle.name, bundle_dir=str(bundle.parent), workflow_type="inference")
    assert isinstance(network, torch.nn.Module)
    return network.eval()


def _input(bundle: Path) -> torch.Tensor:
    """Noise, of the channels and the size that the metadata ask for, small where they leave it open."""
    image = monai.bundle.ConfigParser.load_config_file(bundle / "configs" / "metadata.json")["network_data_format"]
    image = image["inputs"]["image"]
    size = [n if isinstance(n, int) else small for n, small in zip(image["spatial_shape"], (32, 48, 16), strict=True)]
    return torch.rand(1, image["num_channels"], *size, generator=torch.Generator().manual_seed(0))


def test_there_are_bundles() -> None:
    assert REGISTRATION in BUNDLES


def test_what_was_packed_arrives(travelled: Path) -> None:
    packed, arrived = _files(ROOT / "bundles" / travelled.name), _files(travelled)
    assert {"LICENSE", "configs/logging.conf", "docs/README.md", "models/model.pt"} <= arrived.keys()
    assert arrived == {name: content for name, content in packed.items() if name in arrived}
    left = {name for name in packed.keys() - arrived.keys() if name.split("/")[0] in ("configs", "docs")}
    assert not left


# The zoo's ci/verify_bundle.py, in its order: first what it does on a CPU ("min"), then the rest ("full").
def test_zoos_checks_pass(travelled: Path, release: Release, tmp_path: Path) -> None:
    for name in ("configs/metadata.json", "LICENSE", "models/model.pt", "configs/inference.json"):
        assert (travelled / name).is_file(), name
    metadata = json.loads((travelled / "configs" / "metadata.json").read_text(encoding="utf-8"))
    assert metadata["version"] in metadata["changelog"]
    schema = tmp_path / "schema.json"  # where MONAI would download it to, and does not if it is there
    shutil.copy(ROOT / "tests" / "metadata_schema.json", schema)
    checked = {"filepath": str(schema), "hash_val": hashlib.md5(schema.read_bytes()).hexdigest()}
    monai.bundle.verify_metadata(meta_file=str(travelled / "configs" / "metadata.json"), **checked)
    del metadata["task"]
    broken = tmp_path / "metadata.json"
    broken.write_text(json.dumps(metadata), encoding="utf-8")
    with pytest.raises(ValueError, match="'task' is a required property"):
        monai.bundle.verify_metadata(meta_file=str(broken), **checked)

    monai.bundle.verify_net_in_out(**_configs(travelled))
    scripted = tmp_path / "verify_model.ts"
    weights = str(travelled / "models" / "model.pt")
    monai.bundle.ckpt_export(**_configs(travelled, filepath=str(scripted), ckpt_file=weights))
    image = _input(travelled)
    with torch.no_grad():
        # A script goes by torch, the network by compiled loops, which add up in another order: float32, twice where a
        # field bends another one
        torch.testing.assert_close(torch.jit.load(scripted)(image), _network(travelled)(image), rtol=1e-5, atol=3e-4)


def test_onnx_gives_what_the_network_gives(travelled: Path, tmp_path: Path) -> None:
    image, weights, path = _input(travelled), str(travelled / "models" / "model.pt"), str(tmp_path / "model.onnx")
    monai.bundle.onnx_export(**_configs(travelled, filepath=path, ckpt_file=weights, input_shape=tuple(image.shape)))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    with torch.no_grad():
        expected = _network(travelled)(image).numpy()
    # sums in another order: float32 rounding of a result of this size, and more at a few edges that the maps move over
    error = np.abs(found - expected) / np.abs(expected).max()
    assert (error > 1e-4).mean() < 1e-5
    assert error.max() < 1e-3


def test_metadata_name_this_package(travelled: Path) -> None:
    metadata = json.loads((travelled / "configs" / "metadata.json").read_text(encoding="utf-8"))
    assert metadata["required_packages_version"]["voxelmorph_monai"] == voxelmorph_monai.__version__


# Sections of the zoo's docs/readme_template.md, in its order.
def test_model_card_has_the_zoos_sections(travelled: Path) -> None:
    card = (travelled / "docs" / "README.md").read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", card, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    sections = ["Authors", "Tags", "Model Description", "Data", "Performance", "Additional Usage Steps"]
    sections += ["System Configuration", "Limitations", "Citation", "References", "License"]
    found = [heading for heading in headings if heading in sections]
    optional = {"Additional Usage Steps", "System Configuration"}
    assert found == [section for section in sections if section not in optional or section in found]
    assert card.startswith("# ")


def test_links_of_the_card_lead_nowhere_outside(travelled: Path) -> None:
    card = travelled / "docs" / "README.md"
    targets = re.findall(r"\]\(([^)\s]+)\)", card.read_text(encoding="utf-8"))
    local = [target.split("#")[0] for target in targets if not target.startswith(("http", "#"))]
    for target in local:
        assert (card.parent / target).resolve().is_relative_to(travelled.resolve()), target
        assert (card.parent / target).is_file(), target


def test_inference_has_the_properties_monai_expects(travelled: Path) -> None:
    configs = travelled / "configs"
    found = ConfigWorkflow(
        str(configs / "inference.json"),
        meta_file=str(configs / "metadata.json"),
        logging_file=False,
        workflow_type="infer",
        bundle_root=str(travelled),
    )
    found.initialize()
    assert found.check_properties() == []


def test_a_zip_beside_you_is_downloaded_too(release: Release, tmp_path: Path) -> None:
    name = REGISTRATION.name
    url = (release.folder / f"{_key(name)}.zip").as_uri()
    monai.bundle.download(name=name, url=url, bundle_dir=str(tmp_path), progress=False)
    network = monai.bundle.load(name, bundle_dir=str(tmp_path))
    expected = torch.load(REGISTRATION / "models" / "model.pt", weights_only=True)
    assert isinstance(network, VoxelMorph)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in network.state_dict().items())


def test_release_is_laid_out_as_monai_reads_it(
    release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``source="github"``: which host that is, is the one thing that MONAI takes from no argument."""
    name, get = REGISTRATION.name, requests.get
    host = release.url.split("/owner/")[0]
    monkeypatch.setattr(requests, "get", lambda url, **options: get(f"{release.url}/model_info.json", **options))
    monkeypatch.setattr(
        "monai.bundle.scripts._get_git_release_url",
        lambda owner, repository, tag_name, filename: (
            f"{host}/{owner}/{repository}/releases/download/{tag_name}/{filename}"
        ),
    )
    version = _key(name).removeprefix(f"{name}_v")
    assert monai.bundle.get_bundle_versions(name)["latest_version"] == version
    monai.bundle.download(  # of the latest version
        name=name, source="github", repo="owner/repository/v1", bundle_dir=str(tmp_path), progress=False
    )
    assert _files(tmp_path / name).keys() == {
        file.removeprefix(f"{name}/") for file in zipfile.ZipFile(release.folder / f"{_key(name)}.zip").namelist()
    }


def test_checksum_is_what_the_zoo_compares(release: Release) -> None:
    info = json.loads((release.folder / "model_info.json").read_text(encoding="utf-8"))
    assert info.keys() == {_key(bundle.name) for bundle in BUNDLES}
    for key, entry in info.items():
        assert check_hash(release.folder / f"{key}.zip", entry["checksum"], "sha1")
        assert not check_hash(release.folder / "model_info.json", entry["checksum"], "sha1")


def test_downloaded_bundle_registers_real_scans(release: Release, real_pair: dict[str, Path], tmp_path: Path) -> None:
    bundle = _download(REGISTRATION.name, release, tmp_path / "elsewhere")
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", "configs/inference.json"]
    command += [word for role, path in real_pair.items() for word in (f"--{role}", str(path))]
    done = subprocess.run(
        [*command, "--output_dir", str(tmp_path / "out")],
        cwd=bundle,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    paths = (*real_pair.values(), tmp_path / "out" / "warped.nii.gz")
    moving, fixed, warped = (nib.load(path).get_fdata().ravel() for path in paths)
    before, after = (np.corrcoef(image, fixed)[0, 1] for image in (moving, warped))
    # 1e-3: inference scales intensities once more and clips some
    assert summary["correlation_before"] == pytest.approx(before, abs=1e-3)
    assert summary["correlation_after"] == pytest.approx(after, abs=1e-3)
    assert 1 - after < 0.6 * (1 - before)  # random weights of this network leave 1 - before as it is
    assert summary["folding_percent"] == 0


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A copy of the registration bundle, to change."""
    return Path(shutil.copytree(REGISTRATION, tmp_path / REGISTRATION.name))


def test_the_same_bundle_gives_the_same_bytes_and_no_leftovers(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = pack_bundle(bundle, tmp_path / "first").archive
    for path in bundle.rglob("*"):
        os.utime(path, (2e9, 2e9))
        path.chmod(0o700)
    leftovers = ["training/model.pt", "models/checkpoint.pt", "models/events.out.tfevents.1", "eval/schema.json"]
    leftovers += ["configs/.train.json.swp", "configs/__pycache__/a.pyc", "docs/__pycache__/a.pyc", "mlruns.db"]
    for name in leftovers:
        (bundle / name).parent.mkdir(exist_ok=True)
        (bundle / name).write_bytes(b"left over")
    assert main(["pack-bundle", str(bundle), "--output", str(tmp_path / "second")]) == 0
    said = capsys.readouterr().out
    assert all(name.split("/")[0] in said for name in leftovers)
    assert all(name in said for name in leftovers if name.startswith(("models", "configs", "docs")))
    assert (tmp_path / "second" / first.name).read_bytes() == first.read_bytes()
    names = zipfile.ZipFile(first).namelist()
    assert names == sorted(names)
    assert {name.split("/")[0] for name in names} == {bundle.name}


def _set(bundle: Path, **changes: object) -> None:
    path = bundle / "configs" / "metadata.json"
    metadata = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps({key: value for key, value in metadata.items() if value is not None}), encoding="utf-8")


def test_model_info_is_extended_and_no_version_is_replaced(bundle: Path, tmp_path: Path) -> None:
    output, url = tmp_path / "release", "https://host/v1"
    other = {"another_v1.0.0": {"checksum": "0" * 40, "source": "https://host/another_v1.0.0.zip"}}
    output.mkdir()
    (output / "model_info.json").write_text(json.dumps(other), encoding="utf-8")
    _set(bundle, version="1.0.0", changelog={"1.0.0": "first"})
    old = pack_bundle(bundle, output, url).archive
    pack_bundle(bundle, output, f"{url}/")  # the same once more
    before = _files(output)
    (bundle / "configs" / "mine.yaml").write_text("seed: 1\n", encoding="utf-8")
    with pytest.raises(FileExistsError, match=r"already has version 1\.0\.0 of brain_t1_registration\b"):
        pack_bundle(bundle, output, url)
    (bundle / "configs" / "mine.yaml").unlink()
    with pytest.raises(FileExistsError, match="with another content or address"):
        pack_bundle(bundle, output, "https://elsewhere")
    old.write_bytes(b"another content")
    with pytest.raises(FileExistsError, match="with another content or address"):
        pack_bundle(bundle, output, url)
    old.write_bytes(before[old.name])
    assert _files(output) == before
    _set(bundle, version="1.1.0", changelog={"1.0.0": "first", "1.1.0": "second"})
    pack_bundle(bundle, output, url)
    info = json.loads((output / "model_info.json").read_text(encoding="utf-8"))
    assert list(info) == ["another_v1.0.0", f"{bundle.name}_v1.0.0", f"{bundle.name}_v1.1.0"]
    assert info[f"{bundle.name}_v1.1.0"]["source"] == f"{url}/{bundle.name}_v1.1.0.zip"
    assert _files(output)[old.name] == before[old.name]


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda bundle: (bundle / "configs" / "metadata.json").unlink(), r"has no configs/metadata\.json"),
        (lambda bundle: (bundle / "models" / "model.pt").unlink(), r"is incomplete: it has no models/model\.pt"),
        (lambda bundle: (bundle / "LICENSE").unlink(), "is incomplete: it has no LICENSE"),
        (lambda bundle: (bundle / "configs" / "metadata.json").write_text("{"), r"metadata\.json is not valid JSON:"),
        (lambda bundle: (bundle / "configs" / "metadata.json").write_text("[]"), r"metadata\.json holds a list"),
        (lambda bundle: _set(bundle, version=None), r"version in .*metadata\.json is None\b"),
        (lambda bundle: _set(bundle, version="0.2"), r"version in .*metadata\.json is '0\.2'"),
        (lambda bundle: _set(bundle, version="9.0.0"), r"changelog in .* version 9\.0\.0\b"),
        (lambda bundle: _set(bundle, changelog=None), "changelog in .* no entry for version"),
        (
            lambda bundle: torch.save(VoxelMorph("vm2").state_dict(), bundle / "models" / "model.pt"),
            "do not fit the network",
        ),
        (lambda bundle: (bundle / "configs" / "inference.json").write_text("{}"), "has no entry network_def"),
    ],
)
def test_a_bundle_that_is_not_whole_is_not_packed(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], object], match: str
) -> None:
    spoil(bundle)
    assert main(["pack-bundle", str(bundle), "--output", str(tmp_path / "release")]) == 2
    assert re.search(match, capsys.readouterr().err)
    assert not (tmp_path / "release").exists()


def test_what_else_is_wrong_is_said(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^'brain_voxelmorph' .*'_v'"):
        pack_bundle(bundle.rename(tmp_path / "brain_voxelmorph"), tmp_path / "release")
    (tmp_path / "release").mkdir()
    (tmp_path / "release" / "model_info.json").write_text("nothing", encoding="utf-8")
    with pytest.raises(ValueError, match=r"model_info\.json is not valid JSON"):
        pack_bundle(REGISTRATION, tmp_path / "release")
    assert [path.name for path in (tmp_path / "release").iterdir()] == ["model_info.json"]


def test_the_page_names_the_version_that_is_packed() -> None:
    page = (ROOT / "docs" / "distribution.md").read_text(encoding="utf-8")
    named = re.findall(r"brain_t1_registration_v([\d.]+)\.zip|--version ([\d.]+)", page)
    metadata = json.loads((REGISTRATION / "configs" / "metadata.json").read_text(encoding="utf-8"))
    assert {first or second for first, second in named} == {metadata["version"]}
