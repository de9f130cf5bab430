"""The app for MONAI Label, as its clients meet it: a server on this machine, asked over HTTP in their words."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import SimpleITK as sitk
import torch
from conftest import brain, oblique_lia
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray

from voxelmorph_monai.apps.shipped import load_network, shipped_bundle
from voxelmorph_monai.cli import main
from voxelmorph_monai.io.images import save_image
from voxelmorph_monai.report import overlap
from voxelmorph_monai.space.resampling import resample
from voxelmorph_monai.space.scan import Scan
from voxelmorph_monai.space.template import mni152, mni152_tissue, sample_scan

pytestmark = [
    pytest.mark.skipif(find_spec("monailabel") is None, reason="MONAI Label is not installed: docs/label.md says how"),
    # MONAI Label's client leaves its connections to the garbage collector
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]

NAMES = ["rim", "core", "left nucleus", "right nucleus"]  # of the labels 1, 2, 3, 4 of a brain
OTHER = [0, 4, 3, 2, 1]  # values that study b has for labels 0, 1, 2, 3, 4 of a brain
# 2 mm, and nothing aligned, bent or refined unless a request asks for it: alignment takes seconds
CONF = {"size": "80,96,112", "spacing": "2", "space": "fixed", "alignment": "none", "budget": "0"}
SLICER = {"result_extension": ".nrrd", "result_dtype": "uint8"}  # what 3D Slicer adds to the options that it shows
OHIF = {**SLICER, "result_compress": False, "restore_label_idx": False}


@contextmanager
def serving(folder: Path, app: Path, studies: Path, conf: dict[str, str]) -> Iterator[str]:
    """The address of a server that is gone afterwards, with all that it started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    stubs = folder / "stubs"
    if find_spec("torchvision") is None:  # MONAI Label imports it to draw pictures, which nothing here asks for
        (stubs / "torchvision").mkdir(parents=True, exist_ok=True)
        (stubs / "torchvision" / "__init__.py").touch()
        (stubs / "torchvision" / "utils.py").write_text("make_grid = save_image = None\n", encoding="utf-8")
    command = [sys.executable, "-W", "ignore", "-m", "monailabel.main", "start_server", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--app", str(app), "--studies", str(studies)]
    for key, value in conf.items():
        command += ["--conf", key, value]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(stubs),
        "MONAI_LABEL_SESSION_PATH": str(folder / "sessions"),
    }
    log = folder / "server.log"
    with log.open("ab") as output:
        server = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        for _ in range(1200):
            assert server.poll() is None, log.read_text(errors="replace")[-3000:]
            try:
                requests.get(f"http://127.0.0.1:{port}/info/", timeout=60)
                break
            except requests.ConnectionError:
                time.sleep(0.25)
        yield f"http://127.0.0.1:{port}"
    finally:
        with suppress(ProcessLookupError):  # it ended by itself
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def client(url: str, folder: Path) -> Any:
    """MONAI Label's own client, which is that of 3D Slicer, too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from monailabel.client import MONAILabelClient
    return MONAILabelClient(url, str(folder))


def ask(url: str, model: str, image: str, output: str = "image", **params: Any) -> requests.Response:
    """What OHIF sends."""
    return requests.post(
        f"{url}/infer/{model}",
        params={"image": image, "output": output},
        files={"params": (None, json.dumps(params))},
        timeout=600,
    )


def received(answer: requests.Response, folder: Path, name: str) -> Path:
    assert answer.status_code == 200, answer.text
    path = folder / name
    path.write_bytes(answer.content)
    return path


def assert_on_grid_of(path: Path, study: Path) -> None:
    """Shape and place are those of the study, as ITK reads both, to the last digit that the formats hold."""
    found, expected = sitk.ReadImage(str(path)), sitk.ReadImage(str(study))
    assert found.GetSize() == expected.GetSize()
    # NIfTI holds float32 of about 100 mm, NRRD text of 17 digits: 1e-5 mm.
    for part in ("GetOrigin", "GetSpacing", "GetDirection"):
        assert_allclose(getattr(found, part)(), getattr(expected, part)(), rtol=0, atol=1e-5)


def array_of(path: Path) -> NDArray[Any]:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path))).T


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Individuals a, b and c; and same, who is a."""
    folder = tmp_path_factory.mktemp("studies")
    for name, seed in (("a", 1), ("b", 3), ("same", 1)):
        save_image(folder / f"{name}.nii.gz", brain(seed)[0], place())
    # c lies on a grid of its own: cut, and its axes in another order
    save_image(folder / "c.nii.gz", brain(2)[0].swapaxes(0, 2)[:, 1:], moved())
    return folder


def place() -> NDArray[np.float64]:
    """Affine of an individual whose head is as large as one may be, below 2.5 litres."""
    affine = oblique_lia()
    affine[:3] *= 0.75
    return affine


def moved() -> NDArray[np.float64]:
    affine = place()[:, [2, 1, 0, 3]]
    affine[:, 3] += affine[:, 1]
    return affine


def thinned(scan: Scan) -> Scan:
    return Scan(np.ascontiguousarray(scan.array[::2, ::2, ::2]), scan.affine @ np.diag([2.0, 2, 2, 1]))


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("app") / "voxelmorph"
    assert main(["label-app", str(folder)]) == 0
    bundle = shipped_bundle("brain_t1_atlas_segmentation")
    shutil.copytree(bundle, folder / "model" / bundle.name)
    return folder


@pytest.fixture(scope="module")
def url(app: Path, studies: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The server, once a and b have got their labels, as 3D Slicer submits them."""
    folder = tmp_path_factory.mktemp("server")
    with serving(folder, app, studies, CONF) as url:
        for name, seed, values in (("a", 1, range(5)), ("b", 3, OTHER)):
            path = folder / f"{name}.nii.gz"
            save_image(path, np.array(values, dtype=np.uint8)[brain(seed)[1]], place())
            info = [{"name": NAMES[label - 1], "idx": values[label]} for label in range(1, 5)]
            client(url, folder).save_label(name, str(path), "final", {"label_info": info})
        yield url


def test_the_tasks_are_listed_with_their_options(url: str) -> None:
    info = requests.get(f"{url}/info/", timeout=60).json()
    models = info["models"]
    assert set(models) == {"label_propagation", "register", "brain_t1_atlas_segmentation"}
    assert {name: model["type"] for name, model in models.items()} == {
        "label_propagation": "segmentation",  # clients give others no button
        "brain_t1_atlas_segmentation": "segmentation",
        "register": "registration",
    }
    assert models["label_propagation"]["labels"] == {name: value for value, name in enumerate(NAMES, 1)}
    assert models["label_propagation"]["config"]["moving"] == ["most similar", "a", "b"]
    assert list(info["trainers"]) == ["voxelmorph"]


def test_slicer_gets_the_labels_of_the_same_scan_as_they_are(url: str, studies: Path, tmp_path: Path) -> None:
    """A scan that is registered to itself stays in place: equality, in number and in name."""
    slicer = client(url, tmp_path)
    config = slicer.info()["models"]["label_propagation"]["config"]
    chosen = {key: value[0] if isinstance(value, list) else value for key, value in config.items()}
    path, told = slicer.infer("label_propagation", "same", {**chosen, **SLICER})
    assert path.endswith(".nrrd")
    assert_on_grid_of(Path(path), studies / "same.nii.gz")
    found = array_of(Path(path))
    assert found.dtype == np.uint8
    assert_array_equal(found, brain(1)[1])
    assert list(told["label_names"].items()) == [(name, value) for value, name in enumerate(NAMES, 1)]
    assert told["studies"] == ["a"]
    assert told["similarity"]["a"] == pytest.approx(1, abs=1e-4)  # it is told with 4 digits


def test_ohif_gets_labels_that_follow_the_anatomy(url: str, studies: Path, tmp_path: Path) -> None:
    """Half of what was wrong before is right after, for each name, although a and b number them differently."""
    truth = brain(2)[1].swapaxes(0, 2)[:, 1:]
    for moving, seed in (("a", 1), ("b", 3)):
        answer = ask(url, "label_propagation", "c", moving=moving, budget=30, **OHIF)
        path = received(answer, tmp_path, "found.nrrd")
        assert b"encoding: raw" in path.read_bytes()[:2000]  # which is what OHIF can read
        assert_on_grid_of(path, studies / "c.nii.gz")
        after = overlap({"after": array_of(path)}, truth)["after"]
        before = overlap({"before": brain(seed)[1].swapaxes(0, 2)[:, 1:]}, truth)["before"]
        assert 1 - after["mean"] < 0.5 * (1 - before["mean"])
        assert min(after[str(label)] for label in range(1, 5)) > 0.5  # one structure taken for another has about 0


def test_labels_without_names_are_called_by_their_values(url: str, tmp_path: Path) -> None:
    path = tmp_path / "c.nii.gz"
    save_image(path, 7 * (brain(2)[1].swapaxes(0, 2)[:, 1:] > 0).astype(np.uint8), moved())
    slicer = client(url, tmp_path)
    slicer.save_label("c", str(path), "final", {"label_info": ["a", {"name": "b"}]})
    told = ask(url, "label_propagation", "same", output="json", moving="c").json()
    requests.delete(f"{url}/datastore/label", params={"id": "c", "tag": "final"}, timeout=60)
    assert told["label_names"] == {"label 7": 5}


def test_studies_vote(url: str, tmp_path: Path) -> None:
    answer = ask(url, "label_propagation", "same", moving=["a", "b"])  # 1 to 1: the first decides
    assert_array_equal(array_of(received(answer, tmp_path, "voted.nii.gz")), brain(1)[1])
    told = ask(url, "label_propagation", "same", output="json", num_studies=2).json()
    assert told["studies"] == ["a", "b"]  # the most similar first


def test_a_registration_comes_in_the_form_that_is_asked_for(url: str, studies: Path, tmp_path: Path) -> None:
    """SimpleITK applies the transform to the moving study, and gets the warped image."""
    path, told = client(url, tmp_path).infer("register", "c", {"moving": "a"})
    assert told["result"] == "warped"
    assert told["correlation_after"] > 0.3
    assert "inputs" not in told
    assert str(studies) not in json.dumps(told)
    files = {"warped": Path(path)}
    for result, name in (("transform", "t.h5"), ("displacement", "d.nii.gz"), ("report", "r.png")):
        files[result] = received(ask(url, "register", "c", moving="a", result=result), tmp_path, name)
    assert_on_grid_of(files["warped"], studies / "c.nii.gz")
    assert files["report"].read_bytes().startswith(b"\x89PNG")
    moving = sitk.ReadImage(str(studies / "a.nii.gz"), sitk.sitkFloat32)
    fixed = sitk.ReadImage(str(studies / "c.nii.gz"))
    for form in ("transform", "displacement"):
        if form == "transform":
            transform = sitk.ReadTransform(str(files[form]))
        else:
            field = sitk.ReadImage(str(files[form]), sitk.sitkVectorFloat64)
            transform = sitk.DisplacementFieldTransform(field)
        expected = sitk.GetArrayFromImage(sitk.Resample(moving, fixed, transform)).T
        # Linear interpolation in float32 of intensities in [0, 1]; ITK leaves out the border that we read as its voxel.
        assert_allclose(array_of(files["warped"])[1:-1, 1:-1, 1:-1], expected[1:-1, 1:-1, 1:-1], atol=1e-4)


def test_a_file_can_be_registered_to_a_study_and_a_study_to_a_file(url: str, studies: Path, tmp_path: Path) -> None:
    with (studies / "a.nii.gz").open("rb") as a, (studies / "same.nii.gz").open("rb") as same:
        answer = requests.post(
            f"{url}/infer/register", params={"output": "image"}, files={"file": same, "label": a}, timeout=600
        )
    warped = received(answer, tmp_path, "warped.nii.gz")
    assert_allclose(array_of(warped), brain(1)[0], atol=1e-6)  # float32


def test_a_session_is_a_study_for_a_while(url: str, studies: Path, tmp_path: Path) -> None:
    slicer = client(url, tmp_path)
    session = slicer.create_session(str(studies / "same.nii.gz"))["session_id"]
    path, told = slicer.infer("label_propagation", "", {"moving": "a", **SLICER}, session_id=session)
    assert_array_equal(array_of(Path(path)), brain(1)[1])
    assert told["studies"] == ["a"]


def test_a_batch_saves_labels_with_their_names(url: str, studies: Path) -> None:
    body = {"save_label": True, "multi_gpu": False, "device": "cpu", "label_tag": "automatic", "max_batch_size": 1}
    answer = requests.post(
        f"{url}/batch/infer/label_propagation", params={"images": "all", "run_sync": True}, json=body, timeout=600
    )
    assert answer.status_code == 200, answer.text
    assert list(answer.json()) == ["a"]  # the first by name; its labels come from b, the only other one that has any
    query = {"label": "a", "tag": "automatic"}
    saved = requests.get(f"{url}/datastore/label/info", params=query, timeout=60).json()
    assert set(saved["params"]["label_names"]) == set(NAMES)
    assert_on_grid_of(next((studies / "labels" / "automatic").glob("a.nii.gz")), studies / "a.nii.gz")


BAD = [
    ("label_propagation", {"image": "nobody"}, {}, 404, "no study 'nobody'"),
    ("label_propagation", {"session_id": "nobody"}, {}, 404, "has no study"),
    ("segmentation", {"image": "c"}, {}, 404, "no model 'segmentation'. Choose one of label_propagation, register"),
    ("label_propagation", {"image": "c"}, {"moving": "nobody"}, 404, "no study 'nobody'"),
    ("label_propagation", {"image": "c"}, {"moving": 3}, 422, "moving is 3. Give the id"),
    ("label_propagation", {"image": "c"}, {"moving": "same"}, 422, "study same has no labels that can be read"),
    ("label_propagation", {"image": "c"}, {"moving": ["a"] * 10}, 422, "moving names 10 studies. Name 1 to 9"),
    ("label_propagation", {"image": "c"}, {"budget": "long"}, 422, "budget is 'long'. Give a number from 0 to 600"),
    (
        "label_propagation",
        {"image": "c"},
        {"budget": float("nan")},
        422,
        "budget is 'nan'. Give a number from 0 to 600",
    ),
    (
        "label_propagation",
        {"image": "c"},
        {"num_studies": 0},
        422,
        "num_studies is '0'. Give a whole number from 1 to 9",
    ),
    (
        "label_propagation",
        {"image": "c"},
        {"alignment": "bent"},
        422,
        "alignment is 'bent'. Choose one of affine, rigid, none",
    ),
    ("label_propagation", {"image": "c"}, {"space": "moon"}, 422, "space is 'moon'. Choose one of mni152, fixed"),
    (
        "label_propagation",
        {"image": "c"},
        {"result_extension": ".png"},
        422,
        "result_extension is '.png'. Choose one of .nii",
    ),
    ("label_propagation", {"image": "broken"}, {"moving": "a"}, 422, "not compressed"),
    ("register", {"image": "c"}, {}, 404, "has no study"),
    ("register", {"image": "c"}, {"moving": "../a"}, 404, "no study '../a'"),
    ("register", {"image": "c"}, {"moving": "broken"}, 422, "not compressed"),
    (
        "register",
        {"image": "c"},
        {"moving": "a", "result": "ddf"},
        422,
        "result is 'ddf'. Choose one of warped, transform",
    ),
    ("register", {"image": "c"}, {"moving": "a", "save_label": True}, 422, "a registration has no labels to save"),
    ("brain_t1_atlas_segmentation", {"image": "broken"}, {}, 422, "not compressed"),
]


@pytest.fixture
def broken(studies: Path, url: str) -> Iterator[None]:
    """A study that is no image; the server finds out by itself that it is there."""
    path = studies / "broken.nii.gz"
    path.write_bytes(b"nothing")
    for _ in range(600):
        known = requests.get(f"{url}/datastore/", params={"output": "all"}, timeout=60).json()
        if "broken" in known["objects"]:
            break
        time.sleep(0.1)
    yield
    path.unlink()


@pytest.mark.usefixtures("broken")
def test_bad_requests_get_one_sentence_and_the_server_goes_on(url: str, studies: Path) -> None:
    for model, query, params, status, reason in BAD:
        files = {"params": (None, json.dumps(params))}
        answer = requests.post(f"{url}/infer/{model}", params=query, files=files, timeout=600)
        assert (answer.status_code, reason in answer.text) == (status, True), (model, params, answer.text)
        assert set(answer.json()) == {"detail"}
        assert str(studies) not in answer.text
    answer = requests.post(f"{url}/infer/label_propagation", files={"file": b"nothing"}, timeout=60)
    assert (answer.status_code, answer.json()["detail"][:9]) == (422, "the scan ")
    assert ask(url, "label_propagation", "same", moving="a").status_code == 200


def test_many_at_once_get_what_each_asked_for(url: str, tmp_path: Path) -> None:
    def one(number: int) -> bool:
        study, seed = (("a", 1), ("b", 3))[number % 2]
        answer = ask(url, "label_propagation", "same", moving=study)
        found = array_of(received(answer, tmp_path, f"{number}.nii.gz"))
        return bool((found == brain(seed)[1]).all())

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(one, range(6)))


def test_real_brains_by_the_network(app: Path, tmp_path: Path) -> None:
    """Colin27's tissues for MNI152, both at 2 mm, as the server does it by itself but for the refinement."""
    studies, tissue = tmp_path / "studies", thinned(Scan.read_labels(sample_scan("colin27_tissue")))
    (studies / "labels" / "final").mkdir(parents=True)
    tissue.save(studies / "labels" / "final" / "colin27.nii.gz")
    for name, scan in (("colin27", Scan.read(sample_scan("colin27"))), ("mni152", mni152())):
        thinned(scan).save(studies / f"{name}.nii.gz")
    with serving(tmp_path, app, studies, {"budget": "0"}) as url:
        found, told = client(url, tmp_path).infer("label_propagation", "mni152", dict(SLICER))
    assert_on_grid_of(Path(found), studies / "mni152.nii.gz")
    assert told == {"label_names": {"label 1": 1, "label 2": 2, "label 3": 3}, "studies": ["colin27"]}
    truth = thinned(mni152_tissue())
    before = resample(tissue, truth.grid, np.eye(4), order=0)
    dice = overlap({"before": before.array, "after": array_of(Path(found))}, truth.array)
    for matter in "23":  # grey and white: a fifth of what was wrong is right; refined, at 1 mm, it is half (README)
        assert 1 - dice["after"][matter] < 0.8 * (1 - dice["before"][matter]), dice


def test_training_needs_four_labelled_studies_and_leaves_weights_that_are_used(app: Path, tmp_path: Path) -> None:
    """On MNI152, each time with other noise: what looks like it is aligned to it at once."""
    studies, image, tissue = tmp_path / "studies", mni152().array, mni152_tissue()
    (studies / "labels" / "final").mkdir(parents=True)

    def noisy(path: Path, seed: int) -> None:
        noise = np.random.default_rng(seed).normal(0, 0.002, image.shape).astype(np.float32)
        mni152().like(np.where(image > 0, (image + noise).clip(0.001), 0)).save(path)

    for seed, name in enumerate("abc"):
        noisy(studies / f"{name}.nii.gz", seed)
        tissue.save(studies / "labels" / "final" / f"{name}.nii.gz")
    small = {"max_epochs": 1, "pairs_per_epoch": 2, "learning_rate": "0.001"}
    with serving(tmp_path, app, studies, {"size": "80,96,112", "spacing": "2", "alignment": "none"}) as url:
        train = f"{url}/train/voxelmorph?run_sync=true"
        answer = requests.post(train, json=small, timeout=600)
        assert answer.status_code == 422
        assert "3 studies have labels, of which 2 are for validation" in answer.json()["detail"]
        noisy(tmp_path / "d.nii.gz", 3)
        slicer = client(url, tmp_path)
        slicer.upload_image(str(tmp_path / "d.nii.gz"), "d")
        slicer.save_label("d", str(studies / "labels" / "final" / "a.nii.gz"), "final", {})
        answer = requests.post(train, json=small, timeout=600)
        assert answer.status_code == 200, answer.text
        told = answer.json()
        assert sorted([*told["training"], *told["validation"]]) == ["a", "b", "c", "d"]
        assert 0 < told["dice"] <= 1
        weights = app / "model" / "voxelmorph" / "model.pt"
        trained, shipped = (load_network(path, device="cpu").state_dict() for path in (weights, None))
        assert any(not torch.equal(trained[key], shipped[key]) for key in shipped)
        weights.write_bytes(b"nothing")  # so they are what the next request asks for
        answer = ask(url, "register", "a", moving="b")
        weights.unlink()
        assert (answer.status_code, "weights" in answer.text) == (422, True), answer.text


def test_wrong_options_of_the_server_are_told_before_it_starts(app: Path, studies: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match=r"--conf has unknown options: bugdet\. .* alignment, budget, device, "),
        serving(tmp_path, app, studies, {"bugdet": "5"}),
    ):
        pass


def test_the_stock_app_serves_the_atlas_bundle(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "monailabel.main", "apps", "--download", "--name", "monaibundle"]
    subprocess.run([*command, "--output", str(tmp_path)], check=True, capture_output=True)
    bundle = shipped_bundle("brain_t1_atlas_segmentation")
    shutil.copytree(bundle, tmp_path / "monaibundle" / "model" / bundle.name)
    own = tmp_path / "studies"
    own.mkdir()
    mni152().save(own / "mni152.nii.gz")  # the atlas itself, which is aligned to itself at once
    conf = {"models": bundle.name, "zoo_source": "ngc", "sam2": "false"}  # look nowhere else
    with serving(tmp_path, tmp_path / "monaibundle", own, conf) as url:
        slicer = client(url, tmp_path)
        model = slicer.info()["models"][bundle.name]
        assert model["type"] == "segmentation"
        assert model["labels"] == {"cerebrospinal fluid": 1, "grey matter": 2, "white matter": 3}
        found, told = slicer.infer(bundle.name, "mni152", {"device": "cpu", **SLICER})
        assert_on_grid_of(Path(found), own / "mni152.nii.gz")
        assert list(told["label_names"]) == list(model["labels"])
        dice = overlap({"found": array_of(Path(found))}, mni152_tissue().array)["found"]
        # Less than 1 by two changes of the grid; two brains have 0.66 and 0.70 (README). Fluid is too thin to say much.
        assert min(dice["2"], dice["3"]) > 0.8, dice
        body = {"multi_gpu": False, "device": "cpu"}
        query = {"images": "all", "run_sync": True}
        answer = requests.post(f"{url}/batch/infer/{bundle.name}", params=query, json=body, timeout=600)
        assert answer.status_code == 200, answer.text
        saved = array_of(own / "labels" / "original" / "mni152.nii.gz")
        assert_array_equal(saved, array_of(Path(found)))
        (own / "bad.nii.gz").write_bytes(b"nothing")
        with (own / "bad.nii.gz").open("rb") as bad:
            answer = requests.post(f"{url}/infer/{bundle.name}", files={"file": bad}, timeout=60)
        assert (answer.status_code, "not compressed" in answer.text) == (422, True)
