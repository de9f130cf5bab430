"""What goes into the network, what comes out timed, and how pairs are called."""

import json
from pathlib import Path

import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, RandAffined, RandLambda
from torch.testing import assert_close

from voxelmorph_monai import engines
from voxelmorph_monai.engines import (
    TimedInferer,
    check_config,
    fingerprint,
    pair_paths,
    prepare_both_orders,
    prepare_pair,
)

CONFIGS = Path(__file__).parents[1] / "bundles" / "brain_t1_registration" / "configs"


def batch(**extra):
    shape, generator = (2, 1, 5, 6, 4), torch.Generator().manual_seed(0)
    return {key: MetaTensor(torch.rand(shape, generator=generator)) for key in ("moving", "fixed")} | extra


def test_prepare_pair_puts_the_moving_image_first():
    data = batch()
    pair, target = prepare_pair(data, "cpu")
    assert_close(pair[:, :1], data["moving"].as_tensor(), rtol=0, atol=0)
    assert_close(pair[:, 1:], data["fixed"].as_tensor(), rtol=0, atol=0)
    assert target.keys() == {"moving", "fixed"}


def test_prepare_pair_gives_plain_tensors_and_passes_labels():
    labels = {"moving_label": MetaTensor(torch.ones(2, 1, 5, 6, 4).int())}
    pair, target = prepare_pair(batch(**labels, filename=["a", "b"]))
    assert target.keys() == {"moving", "fixed", "moving_label"}
    assert {type(value) for value in (pair, *target.values())} == {torch.Tensor}
    assert target["moving_label"].dtype == torch.int32


def test_prepare_pair_moves_everything():
    pair, target = prepare_pair(batch(fixed_label=torch.zeros(2, 1, 5, 6, 4)), torch.device("meta"), non_blocking=True)
    assert {value.device.type for value in (pair, *target.values())} == {"meta"}


def test_prepare_pair_paths_what_is_wrong():
    with pytest.raises(ValueError, match=r"batch must have 'moving' and 'fixed', got only \['image', 'moving'\]\."):
        prepare_pair({"moving": torch.zeros(1, 1, 4, 4), "image": torch.zeros(1, 1, 4, 4)})
    message = r"moving and fixed must have the same shape, got \[2, 1, 5, 6, 4\] and \[2, 1, 5, 6, 3\]\."
    with pytest.raises(ValueError, match=message):
        prepare_pair({"moving": batch()["moving"], "fixed": torch.zeros(2, 1, 5, 6, 3)})


def test_timed_inferer_shares_the_time_among_the_pairs(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(engines.time, "perf_counter", lambda: clock[0])

    def network(inputs, shift, *, scale):
        clock[0] += 3
        return {"ddf": inputs * scale + shift}

    inputs = torch.ones(4, 2, 3)
    found = TimedInferer()(inputs, network, 1, scale=3)
    expected = {"ddf": 4 * inputs, "seconds": torch.full((4,), 0.75)}
    assert_close(found, expected, rtol=0, atol=0)


def test_pairs_are_known_by_their_files():
    def image(path):
        return MetaTensor(torch.zeros(1, 2, 2), meta={"filename_or_obj": path})

    items = [{"moving": image("/a/1005.nii.gz"), "fixed": image("/a/1018.nii.gz")}]
    items += [{"moving": image("b.mgz"), "fixed": image("/x/c.nii")}]
    assert pair_paths(items) == [("/a/1005.nii.gz", "/a/1018.nii.gz"), ("b.mgz", "/x/c.nii")]


def test_both_orders_are_two_batches_in_one():
    labels = {f"{role}_label": torch.full((2, 1, 5, 6, 4), i) for i, role in enumerate(("moving", "fixed"))}
    data = batch(**labels)
    twins = {"moving": "fixed", "fixed": "moving", "moving_label": "fixed_label", "fixed_label": "moving_label"}
    other = {key: data[twin] for key, twin in twins.items()}
    pair, target = prepare_both_orders(data, "cpu")
    halves = [prepare_pair(data), prepare_pair(other)]
    assert_close(pair, torch.cat([half[0] for half in halves]), rtol=0, atol=0)
    assert target.keys() == data.keys()
    for key, tensor in target.items():
        assert_close(tensor, torch.cat([half[1][key] for half in halves]), rtol=0, atol=0)
    assert prepare_both_orders(batch())[1].keys() == {"moving", "fixed"}


# Misspelt options


def run(files, *options):
    listed = str([str(CONFIGS / name) for name in files]) if len(files) > 1 else str(CONFIGS / files[0])
    program = str(Path("site-packages", "monai", "bundle", "__main__.py"))
    check_config([program, "run", "training", "--config_file", listed, *options])


OVERLAYS = sorted({path.name for path in CONFIGS.glob("*.yaml")} - {"lpba40_56.yaml"})  # which needs another one


@pytest.mark.parametrize("name", [*OVERLAYS, "evaluate.json", "multi_gpu_train.json"])
def test_what_our_configs_hold_is_used(name):
    run(["train.json", name], "--dataset_dir", "data", "--max_epochs=3", "--train#dataset#cache_rate", "0")


def test_inference_and_tracking_are_accepted():
    run(["inference.json"], "--moving", "a.nii.gz", "--logging_file", "configs/logging.conf")
    run(["train.json"], "--tracking", "mlflow", "--tracking_uri", "runs", "--experiment_name=mine")
    run(["train.json"], "--tracking", "mlflow", "--output_dir", "$'out'")


def test_tracking_that_would_lose_the_config_is_refused():
    with pytest.raises(ValueError, match=r"output_dir must be an expression .* as \"\$'out'\", got out\."):
        run(["train.json"], "--tracking", "mlflow", "--output_dir", "out")


@pytest.mark.parametrize(
    "options", [["--lerning_rate", "1"], ["--lerning_rate=1"], ["--seed", "1", "--lerning_rate", "1"]]
)
def test_misspelt_options_are_refused(options):
    with pytest.raises(ValueError, match=r"must be used somewhere, but these are not: \['lerning_rate'\]\."):
        run(["train.json"], *options)
    with pytest.raises(ValueError, match=r"but these are not: \['experiment_name'\]\."):
        run(["train.json"], "--experiment_name", "mine")  # of no use without --tracking
    with pytest.raises(ValueError, match=r"but these are not: \['num_train_scans'\]\."):
        run(["train.json", "synthetic.yaml"], "--num_train_scans", "1")
    with pytest.raises(ValueError, match=r"but these are not: \['smoothness_weight'\]\."):
        run(["train.json", "probabilistic.yaml"], "--smoothness_weight", "0.1")


@pytest.mark.parametrize("word", ["--lerning-rate", "-lerning_rate"])  # Fire takes both
def test_misspelt_options_are_refused_however_they_are_written(word):
    with pytest.raises(ValueError, match=r"but these are not: \['lerning_rate'\]\."):
        run(["train.json"], word, "1")
    run(["train.json"], word.replace("lerning", "learning"), "1", "--seed", "-1")  # a number is no option


def test_options_of_an_args_file_are_checked_too(tmp_path):
    config = [str(CONFIGS / "train.json")]
    args = tmp_path / "args.json"
    words = [str(Path("monai", "bundle", "__main__.py")), "run", "training", "--args_file", str(args)]
    args.write_text(json.dumps({"config_file": config, "lerning_rate": 1}))
    with pytest.raises(ValueError, match=r"but these are not: \['lerning_rate'\]\."):
        check_config(words)
    args.write_text(json.dumps({"config_file": config, "learning_rate": 1}))
    check_config([*words, "--max_epochs", "3"])  # an entry of the file that args.json names


def test_misspelt_entries_of_overlays_are_refused(tmp_path):
    overlay = tmp_path / "mine.yaml"
    overlay.write_text("smothness_weight: 0.5\nbatch_size: 2\n")
    with pytest.raises(ValueError, match=r"but these are not: \['smothness_weight'\]\."):
        run(["train.json", str(overlay)])


def test_other_programs_are_not_looked_at(monkeypatch):
    check_config(["pytest", "run", "--lerning_rate", "1"])
    check_config([str(Path("monai", "bundle", "__main__.py")), "verify_metadata", "--lerning_rate", "1"])
    monkeypatch.setattr("sys.argv", [str(Path("monai", "bundle", "__main__.py")), "run", "--lerning_rate", "1"])
    with pytest.raises(ValueError, match="lerning_rate"):
        check_config()


def test_a_fingerprint_tells_options_and_not_what_each_process_has_of_its_own():
    def transform(angle=0.1, device="cpu", function=lambda x: 2 * x):
        affine = RandAffined(["moving"], rotate_range=[angle], device=torch.device(device))
        return Compose([affine, RandLambda(function, prob=0.5)])

    drawn = transform(device="meta")
    drawn.set_random_state(3)
    found = [fingerprint(each) for each in (transform(), transform(0.2), transform(function=lambda x: 3 * x))]
    assert fingerprint(drawn) == fingerprint(transform(function=lambda y: 2 * y)) == found[0]
    assert len(set(found)) == 3
    assert found[0].startswith("Compose, sha256 ")
    assert fingerprint({"b", "a"}) == fingerprint({"a", "b"})
    assert fingerprint(None) is None
