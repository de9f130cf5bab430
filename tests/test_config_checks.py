"""Every option takes effect or ends the run before it starts, with a reason that names it."""

import json
import subprocess
import sys
from pathlib import Path

import fire
import monai.bundle
import pytest
import torch
from monai.bundle import ConfigWorkflow, create_workflow
from monai.transforms import Compose, RandAffined, RandLambda

from voxelmorph_monai.config_checks import check_config, checksum, fingerprint, written

CONFIGS = Path(__file__).parents[1] / "bundles" / "brain_t1_registration" / "configs"
ATLAS = Path(__file__).parents[1] / "bundles" / "brain_t1_atlas_segmentation" / "configs"

pytestmark = pytest.mark.filterwarnings("ignore:parsing config_file.*")  # MONAI prints it for every config


def paths(*files):
    return [str(CONFIGS / file) for file in files]


def command(files, *words, run_id="training"):
    """The workflow that MONAI's command line makes of ``words``, after ``initialize``."""
    made = []

    def create(**options):
        made.append(create_workflow(**options))

    fire.Fire(create, command=["--config_file", str(paths(*files)), "--run_id", run_id, *words])
    return made[0]


def in_python(files, **options):
    """The same workflow, made in Python."""
    workflow = ConfigWorkflow(paths(*files), logging_file=False, **options)
    workflow.initialize()
    return workflow


def refused(match, files, *words, run_id="training"):
    with pytest.raises(RuntimeError, match="check_config") as failure:  # MONAI's, which names the expression
        command(files, *words, run_id=run_id)
    reason = failure.value.__cause__
    assert type(reason) is ValueError
    assert match in str(reason), reason


def refused_in_python(match, files, **options):
    with pytest.raises(RuntimeError, match="check_config") as failure:
        in_python(files, **options)
    assert match in str(failure.value.__cause__)


# Options that are used


OVERLAYS = sorted({path.name for path in CONFIGS.glob("*.yaml")} - {"lpba40_56.yaml", "learn2reg.yaml"})  # see below


@pytest.mark.parametrize("files", [*([name] for name in OVERLAYS), ["lpba40.yaml", "lpba40_56.yaml"]], ids=str)
def test_what_our_configs_hold_is_used(files):
    command(["train.json", *files], "--dataset_dir", "data", "--max_epochs=3", "--train#dataset#cache_rate", "0")
    evaluated = ["train.json", *files, "evaluate.json"]
    command(evaluated, "--dataset_dir", "data", "--section", "validation", "--num_workers", "1", run_id="evaluating")
    in_python(["train.json", *files], max_epochs=3)
    in_python(evaluated, overwrite=True)


def test_other_configs_hold_nothing_without_use():
    command(["train.json", "oasis.yaml", "evaluate.json", "learn2reg.yaml"], run_id="evaluating")
    command(["train.json"], "--tracking", "mlflow", "--output_dir", "$'nowhere'", "--save_execute_config", "False")
    words = ["--moving", "a.nii.gz", "--fixed", "b.nii.gz", "--bundle_root", "x", "--output_dir", "out"]
    for overlays in ([], ["refine.yaml"], ["amortised.yaml"], ["vm2.yaml"]):
        command(["inference.json", *overlays], *words, run_id="run")
    segmentation = create_workflow(config_file=str(ATLAS / "inference.json"), image="a.nii.gz", budget=30)
    assert segmentation.parser["budget"] == 30


def test_outside_of_a_workflow_nothing_is_checked(monkeypatch):
    monkeypatch.setattr("sys.argv", ["monai", "run", "--lerning_rate", "1"])
    check_config()


# Options without a use


@pytest.mark.parametrize(
    "words",
    [
        ["--lerning_rate", "1"],
        ["--lerning_rate=1"],
        ["--lerning-rate", "1"],  # Fire, the command line of MONAI, takes both
        ["-lerning_rate", "1"],
        ["--lerning_rate", "None"],
        ["--seed", "1", "--lerning_rate", "1"],
        ["--lerning_rate", "$1e-4"],
    ],
)
def test_misspelt_options_are_refused(words):
    refused("use lerning_rate.", ["train.json"], *words)
    command(["train.json"], *(word.replace("lerning", "learning") for word in words[:2] if "None" not in words))


@pytest.mark.parametrize("option", ["train#max_epochs", "validate#batch_size", "train#dataloadr"])
def test_misspelt_parts_of_sections_are_refused(option):
    refused(f"use {option}.", ["train.json"], f"--{option}", "3")
    refused_in_python(f"use {option}.", ["train.json"], **{option: 3})


def test_options_of_an_args_file_are_checked_too(tmp_path):
    args = tmp_path / "args.json"
    args.write_text(json.dumps({"config_file": paths("train.json"), "run_id": "training", "lerning_rate": 1}))
    with pytest.raises(RuntimeError) as failure:
        create_workflow(args_file=str(args))
    assert "use lerning_rate." in str(failure.value.__cause__)
    args.write_text(json.dumps({"config_file": paths("train.json", "flip.yaml"), "augmentation": None}))
    assert create_workflow(args_file=str(args)).parser["augmentation"] is None


@pytest.mark.parametrize("options", [{"lerning_rate": 1}, {"train_key": ["image"]}, {"learning-rate": 1}])
def test_in_python_misspelt_options_are_refused_as_well(options):
    (name,) = options
    refused_in_python(f"use {name}.", ["train.json"], **options)
    with pytest.raises(RuntimeError, match="check_config"):
        monai.bundle.run(config_file=paths("train.json"), **options)


def test_misspelt_entries_of_overlays_are_refused(tmp_path):
    overlay = tmp_path / "mine.yaml"
    overlay.write_text("smothness_weight: 0.5\nbatch_size: 2\n")
    refused("use smothness_weight.", ["train.json", str(overlay)])
    refused_in_python("use smothness_weight.", ["train.json", str(overlay)])


def test_an_overlay_may_leave_an_entry_without_use(tmp_path):
    overlay = tmp_path / "mine.yaml"
    overlay.write_text("loss: {_target_: voxelmorph_monai.losses.RegistrationLoss, similarity: '$torch.nn.MSELoss()'}")
    command(["train.json", str(overlay)])
    in_python(["train.json", str(overlay)])
    refused("use smoothness_weight.", ["train.json", str(overlay)], "--smoothness_weight", "0.5")
    refused_in_python("use smoothness_weight.", ["train.json", str(overlay)], smoothness_weight=0.5)


@pytest.mark.parametrize(
    ("files", "run_id", "option", "value"),
    [
        (["train.json", "probabilistic.yaml"], "training", "smoothness_weight", "0.1"),
        (["train.json", "synthetic.yaml"], "training", "num_train_scans", "1"),
        (["train.json"], "training", "experiment_name", "mine"),  # of use with --tracking
        (["train.json"], "training", "groups", "{}"),
        (["train.json", "evaluate.json"], "evaluating", "learning_rate", "0.1"),
        (["train.json", "evaluate.json"], "evaluating", "batch_size", "2"),
        (["train.json", "evaluate.json"], "evaluating", "train#dataset#cache_rate", "0"),
        (["inference.json"], "run", "budget", "30"),  # of use with refine.yaml
        (["inference.json"], "run", "moving", "a.nii.gz --dataset#data [{'moving':'a','fixed':'b'}]"),
    ],
)
def test_options_that_change_nothing_are_refused(files, run_id, option, value):
    refused(f"'{run_id}' does not use {option}.", files, f"--{option}", *value.split(), run_id=run_id)


# Options that MONAI drops or changes


@pytest.mark.parametrize(
    ("overlay", "option"),
    [
        ("augmentation.yaml", "augmentation"),
        ("flip.yaml", "augmentation"),
        ("ncc.yaml", "tensorboard"),
        ("ncc.yaml", "seed"),
        ("ncc.yaml", "device"),
        ("oasis.yaml", "structures"),
        ("ncc.yaml", "loss#smoothness"),
        ("lpba40_atlas.yaml", "atlas"),
    ],
)
def test_an_option_that_is_none_does_not_vanish(overlay, option):
    refused(f"--{option} '$None'", ["train.json", overlay], f"--{option}", "None")
    with pytest.raises(RuntimeError, match="check_config"):
        monai.bundle.run(config_file=paths("train.json", overlay), **{option: None})


@pytest.mark.parametrize("option", ["augmentation", "tensorboard", "loss#smoothness"])
def test_none_as_an_expression_takes_effect(option):
    for workflow in (
        command(["train.json", "flip.yaml"], f"--{option}", "$None"),
        in_python(["train.json", "flip.yaml"], **{option: None}),
    ):
        assert workflow.parser.get_parsed_content(option) is None
    command(["train.json"], "--pretrained", "None", "--atlas=None")  # as they are anyway


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[("output_dir", value) for value in ("/data/subject#1", "out#a,b", "./a#b#c", "sub#", "a::b")],
        *[(option, "/data/subject#1") for option in ("dataset_dir", "maps_dir", "pretrained", "bundle_root")],
    ],
)
def test_a_number_sign_in_a_path_is_refused(option, value):
    if "/" in value:  # Fire cuts the others, see below
        refused(f"{option} is {value.replace('#', '::')!r}", ["train.json", "synthetic.yaml"], f"--{option}", value)
    refused_in_python(f"{option} is {value.replace('#', '::')!r}", ["train.json", "synthetic.yaml"], **{option: value})


def test_a_number_sign_within_a_list_is_refused():
    data = [{"moving": "/a/1.nii", "fixed": "/a#b/2.nii"}]
    refused("dataset#data#0#fixed is '/a::b/2.nii'", ["inference.json"], "--dataset#data", str(data), run_id="run")
    refused_in_python("dataset#data#0#fixed is ", ["inference.json"], **{"dataset#data": data})


def test_what_is_said_of_a_number_sign_helps():
    with pytest.raises(RuntimeError) as failure:
        in_python(["train.json"], output_dir="/it's/subject#1")
    advice = str(failure.value.__cause__)
    expression = advice[advice.index("$") : advice.rindex('".')]
    assert in_python(["train.json"], output_dir=expression).parser.get_parsed_content("output_dir") == "/it's/subject#1"


# Values of another kind


@pytest.mark.parametrize(
    ("option", "word", "match"),
    [
        ("output_dir", "20241130", "is 20241130, not a path"),
        ("output_dir", "0.01", "is 0.01, not a path"),
        ("dataset_dir", "1e3", "is 1000.0, not a path"),
        ("pretrained", "0x10", "is 16, not a path"),
        ("output_dir", "a,b", "is ('a', 'b'), not a path"),
        ("dataset_dir", "[a]", "is ['a'], not a path"),
        ("output_dir", "False", "is False, not a path"),
        ("output_dir", "True", "has no value"),
        ("output_dir", "", "is empty"),
        ("output_dir", "~/x", "is '~/x'"),
        ("pretrained", "~me/model.pt", "is '~me/model.pt'"),
    ],
)
def test_what_is_no_path_is_refused(option, word, match):
    refused(f"{option} {match}", ["train.json"], f"--{option}={word}")


def test_an_option_without_its_path_is_refused():
    refused("output_dir has no value", ["train.json"], "--output_dir", "--max_epochs", "3")
    refused("moving is 5", ["inference.json"], "--moving", "5", "--fixed", "f.nii", run_id="run")
    with pytest.raises(RuntimeError) as failure:
        create_workflow(config_file=str(ATLAS / "inference.json"), image=5)
    assert "image is 5" in str(failure.value.__cause__)


def test_folders_may_be_called_as_numbers_are():
    for folder in ("./20241130", "./0.01", "./~", "2024-11-30", "007", "/data/1"):
        workflow = command(["train.json"], "--output_dir", folder)
        assert workflow.parser.get_parsed_content("output_dir") == folder


def test_paths_in_python_are_text():
    refused_in_python("output_dir is PosixPath('out')", ["train.json"], output_dir=Path("out"))
    refused_in_python("output_dir is None", ["train.json"], output_dir=None)
    refused_in_python("dataset_dir is 20241130", ["train.json"], dataset_dir=20241130)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--amp", "false"], "amp is 'false'. It takes True or False."),
        (["--bidirectional", "no"], "bidirectional is 'no'. It takes True or False."),
        (["--amp", "0"], "amp is 0. It takes True or False."),
        (["--max_epochs", "3.5"], "max_epochs is 3.5. It takes a whole number."),
        (["--max_epochs", "many"], "max_epochs is 'many'. It takes a whole number."),
        (["--patience", "--max_epochs", "3"], "patience is True. It takes a whole number."),
        (["--learning_rate", "fast"], "learning_rate is 'fast'. It takes a number."),
        (["--cache_rate", "True"], "cache_rate is True. It takes a number."),
    ],
)
def test_values_of_another_kind_are_refused(words, match):
    refused(match, ["train.json"], *words)


def test_overwriting_is_not_switched_on_by_the_word_false():
    refused("overwrite is 'false'", ["inference.json"], "--overwrite", "false", run_id="run")
    refused("overwrite is 'no'", ["train.json", "evaluate.json"], "--overwrite", "no", run_id="evaluating")
    assert command(["inference.json"], "--overwrite", "False", run_id="run").parser["overwrite"] is False


def test_a_number_that_yaml_reads_as_text_is_refused(tmp_path):
    overlay = tmp_path / "mine.yaml"
    overlay.write_text("learning_rate: 1e-4\n")
    refused("learning_rate is '1e-4'", ["train.json", str(overlay)])
    overlay.write_text("learning_rate: 1.0e-4\n")
    command(["train.json", str(overlay)])
    assert command(["train.json"], "--learning_rate", "1").parser["learning_rate"] == 1
    assert command(["train.json"], "--seed", "$3 + 4").parser.get_parsed_content("seed") == 7


@pytest.mark.filterwarnings("ignore:Can't merge entry")
def test_lists_are_added_to_in_files_only(tmp_path):
    refused("+train#handlers cannot be an option", ["train.json"], "--+train#handlers", "[{_target_: ProgressBar}]")
    refused_in_python("+run cannot be an option", ["train.json"], **{"+run": ["$print()"]})
    overlay = tmp_path / "mine.yaml"
    overlay.write_text("+train#handlers: [{_target_: monai.handlers.GarbageCollector}]\n")
    assert len(command(["train.json", str(overlay)]).parser["train#handlers"]) > 2


def test_tracking_that_would_lose_the_config_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused("\"$'out'\"", ["train.json"], "--tracking", "mlflow", "--output_dir", "out")


# Ids


@pytest.mark.parametrize("run_id", ["train", "trainning", "imports", "initialize", "finalize", "seed"])
def test_unknown_ids_are_refused_with_the_known_ones(run_id):
    refused(f"'{run_id}' is not an id to run. Choose one of run, training.", ["train.json"], run_id=run_id)
    refused("Choose one of evaluating, run, training.", ["train.json", "evaluate.json"], run_id=run_id)
    refused_in_python(f"'{run_id}' is not an id", ["train.json"], run_id=run_id)
    refused_in_python(f"'{run_id}#0' is not an id", ["train.json"], run_id=f"{run_id}#0")


def test_a_list_of_ones_own_can_be_run(tmp_path):
    overlay = tmp_path / "mine.yaml"
    overlay.write_text("count: [$print(len(@train_scans))]\n")
    command(["train.json", str(overlay)], "--num_train_scans", "3", run_id="count")
    refused("Choose one of count, run, training.", ["train.json", str(overlay)], run_id="cuont")


def test_ids_of_what_comes_before_and_after_are_checked():
    refused("'finish' is not in the config", ["train.json"], "--final_id", "finish")
    workflow = in_python(["train.json"], init_id="begin")  # nothing of ours is called
    with pytest.raises(RuntimeError) as failure:
        workflow.run()
    assert "'begin' is not in the config" in str(failure.value.__cause__)


# The command line itself


def monai_bundle(*words):
    done = subprocess.run(
        [sys.executable, "-m", "monai.bundle", "run", *words], capture_output=True, text=True, timeout=120, check=False
    )
    return done.returncode, done.stderr.rstrip().splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["train"], "ValueError: 'train' is not an id to run. Choose one of run, training."),
        (["training", "--output_dir", "out#1"], "ValueError: MONAI's command line cuts 'out#1' at the #."),
        (["training", "--dataset_dir", "nowhere"], "FileNotFoundError: dataset_dir nowhere "),
    ],
)
def test_the_reason_stands_in_the_last_line(tmp_path, monkeypatch, words, reason):
    monkeypatch.chdir(tmp_path)
    code, last = monai_bundle(*words, "--config_file", *paths("train.json"))
    assert code == 1
    assert last.startswith(reason)
    assert list(tmp_path.iterdir()) == []


# Fingerprints


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


def test_a_checksum_is_of_what_a_file_holds(tmp_path):
    for name, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).write_bytes(content)
    found = [checksum(str(tmp_path / name)) for name in "abc"]
    assert found[0] == found[1] != found[2]
    assert checksum(None) is None


def test_the_text_of_an_entry_is_what_was_written():
    def text(**options):
        (found,) = in_python(["train.json"], run=["$config_checks.written('optimizer')"], **options).run()
        return found

    assert text() == text(learning_rate=1.0)
    assert "'weight_decay': 0.5" in text(**{"optimizer#weight_decay": 0.5})
    with pytest.raises(RuntimeError, match="no workflow"):
        written("optimizer")
