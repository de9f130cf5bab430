"""A training that is stopped at any moment goes on as if nothing had happened: bit by bit."""

import json
import random
from copy import deepcopy
from math import isnan, nan

import numpy as np
import pytest
import torch
from fields import read_submission
from ignite.engine import Engine, Events
from ignite.handlers import EarlyStopping
from monai.data import MetaTensor
from monai.engines import SupervisedTrainer
from scipy.ndimage import gaussian_filter
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, Dataset

from voxelmorph_monai.data import PairDataset, PairSampler
from voxelmorph_monai.engines import prepare_pair
from voxelmorph_monai.handlers import (
    EpochSeed,
    KeepBest,
    Ramp,
    Resume,
    SaveEvaluation,
    SaveSubmission,
    ValidationSeed,
)
from voxelmorph_monai.losses import GradientLoss, RegistrationLoss
from voxelmorph_monai.model_card import ModelCard, read_card
from voxelmorph_monai.networks import Registration, VoxelMorph

pytestmark = pytest.mark.usefixtures("one_thread")


class Killed(BaseException):
    """What a signal would raise."""


# EpochSeed


def draws(epochs, seed=0, start=0, disturb=False):
    """What each epoch of an engine draws from each generator, and the epoch its sampler is told."""
    found = []
    sampler = PairSampler(PairDataset([{"image": 1}, {"image": 2}], cache_rate=0))

    def step(engine, item):
        found.append((torch.rand(()).item(), np.random.rand(), random.random(), sampler.epoch))

    engine = Engine(step)
    EpochSeed(seed, sampler).attach(engine)
    if disturb:
        engine.add_event_handler(Events.EPOCH_COMPLETED, lambda _: (torch.rand(7), np.random.rand(7), random.random()))
    if start:
        engine.add_event_handler(Events.STARTED, lambda e: setattr(e.state, "epoch", start))
    engine.run([0, 1], max_epochs=epochs)
    return found


def test_an_epoch_draws_the_same_whatever_came_before():
    whole = draws(3)
    assert draws(3, disturb=True) == whole
    assert draws(3, start=2) == whole[4:]
    assert [epoch for *_, epoch in whole] == [1, 1, 2, 2, 3, 3]
    for generator in range(3):
        assert len({draw[generator] for draw in whole}) == 6  # no epoch and no step repeats another


def test_seeds_and_processes_draw_apart(monkeypatch):
    first = draws(1)
    other = draws(1, seed=1)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    assert draws(1) == first
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    second = draws(1)
    monkeypatch.undo()
    for generator in range(3):
        assert len({run[0][generator] for run in (first, other, second)}) == 3


@pytest.mark.parametrize("seed", [-1, 2**32, 0.5, None])
def test_a_wrong_seed_is_met_before_the_training(seed):
    with pytest.raises(ValueError, match=rf"seed is {seed}\."):
        EpochSeed(seed)


def test_every_validation_draws_the_same():
    found = []
    engine = Engine(lambda *_: found.append(torch.rand(()).item()))
    ValidationSeed(3).attach(engine)
    for _ in range(2):
        engine.run([0, 1])
        torch.rand(5)  # what is drawn between two validations
    assert found[:2] == found[2:]
    assert found[0] != found[1]


# Ramp


@pytest.mark.parametrize(("num_epochs", "shares"), [(0, [1, 1, 1]), (1, [0, 1, 1]), (4, [0, 0.25, 0.5, 0.75, 1, 1])])
@pytest.mark.parametrize("start", [0, 2])
def test_a_weight_grows_with_the_epoch_and_nothing_else(num_epochs, shares, start):
    loss = RegistrationLoss(nn.MSELoss(), dice_weight=0.8)
    seen = []
    trainer = Engine(lambda engine, item: seen.append(loss.dice_weight))
    Ramp(loss, "dice_weight", num_epochs).attach(trainer)
    trainer.add_event_handler(Events.STARTED, lambda e: setattr(e.state, "epoch", start))  # resumed
    trainer.run([0], max_epochs=len(shares))
    assert seen == pytest.approx([0.8 * share for share in shares[start:]])


def test_a_ramp_is_not_negative():
    with pytest.raises(ValueError, match=r"^num_epochs .*smoothness_weight is -1\b"):
        Ramp(RegistrationLoss(nn.MSELoss()), "smoothness_weight", -1)


# KeepBest


def evaluate(values, keep, network):
    """Run an evaluator once for each value of its metric, each time after the network has learned something."""
    evaluator = Engine(lambda engine, item: None)
    evaluator.add_event_handler(Events.EPOCH_COMPLETED, lambda e: e.state.metrics.update(dice=values[e.number]))
    keep.attach(evaluator)
    for evaluator.number in range(len(values)):
        nn.init.constant_(network.weight, evaluator.number)
        evaluator.run([0])


def test_keep_best_keeps_the_best(tmp_path):
    network, path = nn.Linear(1, 1), tmp_path / "new" / "model.pt"
    keep = KeepBest(network, str(path), "dice")
    evaluate([0.5, 0.4, 0.7, 0.7, 0.6], keep, network)
    assert torch.load(path, weights_only=True)["weight"].item() == 2
    again = KeepBest(network, str(path), "dice")
    again.load_state_dict(deepcopy(keep.state_dict()))
    evaluate([0.69], again, network)
    assert torch.load(path, weights_only=True)["weight"].item() == 2
    evaluate([0.71], again, network)
    assert torch.load(path, weights_only=True)["weight"].item() == 0
    assert [entry.name for entry in path.parent.iterdir()] == ["model.pt"]


def test_keep_best_says_what_it_keeps(tmp_path):
    network = VoxelMorph("vm1", spatial_dims=2, input_level=1)
    evaluate([0.5], KeepBest(network, str(tmp_path / "model.pt"), "dice"), network.flow)
    assert read_card(tmp_path / "model.pt") == ModelCard.of(network)
    assert read_card(tmp_path / "model.pt").changes == {"input_level": 1}


def test_keep_best_wants_a_number(tmp_path):
    network = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"\bdice = NaN"):
        evaluate([float("nan")], KeepBest(network, str(tmp_path / "model.pt"), "dice"), network)


def test_keep_best_wants_finite_weights(tmp_path):
    network = nn.Linear(1, 1)
    network.bias.data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"\b1 parameters .* the first is bias\."):
        evaluate([0.0], KeepBest(network, str(tmp_path / "model.pt"), "dice"), network)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_the_best_of_what_cannot_be_measured(tmp_path):
    network = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"\bdice = NaN"):
        evaluate([float("nan")], KeepBest(network, str(tmp_path / "model.pt"), "dice"), network)
    assert list(tmp_path.iterdir()) == []


def test_one_process_writes(tmp_path, monkeypatch):
    network, trainer = nn.Linear(1, 1), Engine(lambda engine, item: None)
    keep = KeepBest(network, str(tmp_path / "model.pt"), "dice")
    Resume(str(tmp_path / "checkpoint.pt"), {"network": network}).attach(trainer)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    evaluate([0.5], keep, network)
    trainer.run([0])
    assert keep.best == 0.5
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    trainer.run([0], max_epochs=1)
    assert (tmp_path / "checkpoint.pt").exists()


# Resume


class Images(Dataset):
    """Pairs as MONAI's loader gives them."""

    def __init__(self, num_pairs=6):
        self.images = torch.rand(num_pairs, 2, 1, 8, 17, 9, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"moving": self.images[index, 0], "fixed": self.images[index, 1]}


class Training:
    """A whole training in small: network that samples, Adam, scheduler, early stop, an order drawn anew each epoch."""

    def __init__(self, folder, max_epochs, num_samples=3, width=2, patience=100, settings=None, handlers=()):
        torch.manual_seed(0)
        self.network = VoxelMorph(encoder=(width, 2), decoder=((2,), (2,)), num_steps=2)
        registration = Registration(self.network)
        dataset = Images()
        self.seen = []
        self.sampler = PairSampler(dataset, num_samples)
        self.optimizer = torch.optim.Adam(self.network.parameters(), 1e-2)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=1, gamma=0.7)
        self.trainer = SupervisedTrainer(
            device=torch.device("cpu"),
            max_epochs=max_epochs,
            train_data_loader=DataLoader(dataset, sampler=self.sampler),
            network=registration,
            optimizer=self.optimizer,
            loss_function=RegistrationLoss(nn.MSELoss(), GradientLoss(), smoothness_weight=0.1),
            prepare_batch=prepare_pair,
            train_handlers=[EpochSeed(0, self.sampler)],
            decollate=False,
        )
        self.early_stop = EarlyStopping(patience, lambda trainer: -trainer.state.epoch, self.trainer)
        epoch = Events.EPOCH_COMPLETED
        self.trainer.add_event_handler(epoch, lambda _: self.scheduler.step())
        self.trainer.add_event_handler(epoch, self.early_stop)
        self.trainer.add_event_handler(Events.ITERATION_COMPLETED, self.watch)
        self.objects = {
            "network": self.network,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "early_stop": self.early_stop,
        }
        self.resume = Resume(str(folder / "checkpoint.pt"), self.objects, settings)
        self.resume.attach(self.trainer)
        for event, handler in handlers:
            self.trainer.add_event_handler(event, handler)

    def watch(self, trainer):
        self.seen.append((trainer.state.epoch, trainer.state.iteration, trainer.state.output["loss"].item()))

    def run(self):
        self.trainer.run()
        return self


def kill(trainer):
    raise Killed


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return Training(tmp_path_factory.mktemp("whole"), 4).run()


def assert_same_end(training, whole):
    ours, theirs = ({name: each.state_dict() for name, each in t.objects.items()} for t in (training, whole))
    assert_close(ours.pop("network"), theirs.pop("network"), rtol=0, atol=0)
    assert_close(ours["optimizer"].pop("state"), theirs["optimizer"].pop("state"), rtol=0, atol=0)
    assert ours == theirs  # numbers and names
    assert training.trainer.state.epoch == whole.trainer.state.epoch
    assert training.trainer.state.iteration == whole.trainer.state.iteration


@pytest.mark.parametrize(
    ("event", "epochs_kept"),
    [
        (Events.ITERATION_COMPLETED(once=2), 0),  # in the first epoch, before anything was saved
        (Events.ITERATION_COMPLETED(once=8), 2),  # in the middle of the third
        (Events.EPOCH_COMPLETED(once=3), 3),  # right after it was saved
        (Events.EPOCH_STARTED(once=3), 2),
    ],
)
def test_killed_and_started_again_ends_the_same(tmp_path, uninterrupted, event, epochs_kept):
    with pytest.raises(Killed):
        Training(tmp_path, 4, handlers=[(event, kill)]).run()
    torch.manual_seed(99)  # another process
    second = Training(tmp_path, 4).run()
    assert second.seen == uninterrupted.seen[3 * epochs_kept :]
    assert_same_end(second, uninterrupted)
    assert uninterrupted.early_stop.counter == 3
    assert len({loss for *_, loss in uninterrupted.seen}) == 12


def test_killed_while_saving_keeps_the_last_checkpoint(tmp_path, uninterrupted, monkeypatch):
    save = torch.save

    def half(state, path):
        save(state, path)
        if state["epoch"] == 3:
            path.write_bytes(path.read_bytes()[:1000])
            raise Killed

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(Killed):
        Training(tmp_path, 4).run()
    monkeypatch.undo()
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint.pt"]
    second = Training(tmp_path, 4).run()
    assert second.seen == uninterrupted.seen[6:]
    assert_same_end(second, uninterrupted)


def test_more_epochs_go_on_and_none_do_nothing(tmp_path, uninterrupted):
    Training(tmp_path, 2).run()
    longer = Training(tmp_path, 4).run()
    assert longer.seen == uninterrupted.seen[6:]
    assert_same_end(longer, uninterrupted)
    finished = Training(tmp_path, 4).run()
    assert finished.seen == []
    assert_same_end(finished, uninterrupted)
    assert Training(tmp_path, 3).run().seen == []


def test_early_stop_stays_stopped_until_it_has_more_patience(tmp_path, uninterrupted):
    first = Training(tmp_path, 4, patience=2).run()
    assert first.seen == uninterrupted.seen[:9]
    assert Training(tmp_path, 4, patience=2).run().seen == []
    assert Training(tmp_path, 4, patience=3).run().seen == uninterrupted.seen[9:]


def test_epochs_may_become_longer_or_shorter(tmp_path):
    Training(tmp_path, 2, num_samples=5).run()
    shorter = Training(tmp_path, 4, num_samples=2).run()
    assert [(epoch, iteration) for epoch, iteration, _ in shorter.seen] == [(3, 5), (3, 6), (4, 7), (4, 8)]


def test_checkpoint_that_does_not_fit(tmp_path):
    Training(tmp_path, 1).run()
    message = rf"checkpoint {tmp_path / 'checkpoint.pt'}: "
    with pytest.raises(ValueError, match=message + r"[\s\S]*size mismatch"):
        Training(tmp_path, 2, width=3).run()
    with pytest.raises(ValueError, match=message + r"different settings \{\}, now \{'preset': 'vm2'\}"):
        Training(tmp_path, 2, settings={"preset": "vm2"}).run()
    training = Training(tmp_path, 2)
    training.objects["other"] = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=message + r"it has no \['other'\]"):
        training.run()
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    for content, reason in (
        ([1, 2], "it holds a list, not a dict"),
        ({name: value for name, value in state.items() if name != "epoch"}, r"it has no \['epoch'\]"),
        (state["network"], r"it has no \['early_stop', 'epoch', 'network', "),
        ({**state, "settings": [1, 2]}, ""),
        ({**state, "optimizer": 3}, ""),
        ({**state, "scheduler": [3]}, ""),
    ):
        torch.save(content, tmp_path / "checkpoint.pt")
        with pytest.raises(ValueError, match=message + reason):
            Training(tmp_path, 2).run()
    (tmp_path / "checkpoint.pt").write_bytes(whole)
    for content in (b"", b"half a file", (tmp_path / "checkpoint.pt").read_bytes()[:1000]):
        (tmp_path / "checkpoint.pt").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            Training(tmp_path, 2).run()


# SaveEvaluation


@pytest.mark.filterwarnings("ignore:Degrees of freedom:RuntimeWarning")  # the spread over one pair
@pytest.mark.parametrize(("before", "warns"), [(0.38, False), (0.392, False), (0.37, True), (0.5, True), (nan, True)])
def test_an_alignment_that_is_not_the_published_one_is_told(tmp_path, caplog, before, warns):
    def measure(engine, batch):
        engine.state.metric_details = {"dice_before": torch.tensor([[before, before]])}

    engine = Engine(measure)
    SaveEvaluation(str(tmp_path / "e"), 2, affine_dice={"structures": 0.386}).attach(engine)
    scan = {role: MetaTensor(torch.zeros(1), meta={"filename_or_obj": f"{role}.nii"}) for role in ("moving", "fixed")}
    with caplog.at_level("WARNING"):
        engine.run([[scan]])
    noted = json.loads((tmp_path / "e" / "summary.json").read_text())["settings"]["affine_dice"]
    assert noted["structures"] == {"published": 0.386, "measured": None if isnan(before) else pytest.approx(before)}
    assert ("mean Dice over structures before the registration is" in caplog.text) == warns
    assert ("but 0.386 was published" in caplog.text) == warns


# Learn2Reg


def submit(folder, ddf, fixed, moving, **options):
    """Save a batch of one pair as an evaluator of MONAI would."""

    def step(engine, item):
        images = zip(("fixed", "moving"), (fixed, moving), strict=True)
        engine.state.batch = [{k: MetaTensor(torch.zeros(1), meta={"filename_or_obj": str(p)}) for k, p in images}]
        return [{"ddf": torch.from_numpy(ddf)}]

    engine = Engine(step)
    SaveSubmission(str(folder), **options).attach(engine)
    engine.run([0])


def smooth_field(size=(32, 24, 40), seed=0):
    noise = np.random.default_rng(seed).standard_normal((3, *size))
    field = np.stack([gaussian_filter(component, 6) for component in noise])
    return (4 * field / np.abs(field).max()).astype(np.float32)


def test_submitted_fields_come_back(tmp_path):
    ddf = smooth_field()
    images = [f"data/imagesTr/OASIS_{n:04d}_0000.nii.gz" for n in (395, 396)]
    submit(tmp_path / "task_03", ddf, *images)
    (path,) = (tmp_path / "task_03").iterdir()
    assert path.name == "disp_0395_0396.npz"
    half = np.load(path)["arr_0"]
    assert (half.shape, half.dtype) == ((3, 16, 12, 20), np.float16)
    np.testing.assert_allclose(half[:, 0, 0, 0], ddf[:, 0, 0, 0], rtol=1e-3)  # corners coincide; units are not halved
    back = read_submission(path)
    assert back.shape == ddf.shape
    # quadratic splines on every other voxel of a field that changes over 6 voxels; float16 of up to 4 voxels
    assert np.abs(back - ddf).max() < 0.03
    assert np.abs(ddf).max() == 4


def test_submitted_fields_are_not_replaced_silently(tmp_path):
    images = [f"OASIS_{n:04d}_0000.nii.gz" for n in (395, 396)]
    submit(tmp_path, smooth_field((8, 6, 10)), *images)
    with pytest.raises(FileExistsError, match=r"disp_0395_0396.* exists.*overwrite"):
        submit(tmp_path, smooth_field((8, 6, 10), seed=1), *images[::-1])
    (path,) = tmp_path.iterdir()
    before = path.read_bytes()
    submit(tmp_path, smooth_field((8, 6, 10), seed=1), *images, overwrite=True)
    assert path.read_bytes() != before


def test_submitted_fields_of_neurite_oasis_are_named_by_their_folders(tmp_path):
    images = [f"data/OASIS_OAS1_{n:04d}_MR1/aligned_norm.nii.gz" for n in (438, 439)]
    submit(tmp_path, smooth_field((8, 6, 10)), *images)
    assert [path.name for path in tmp_path.iterdir()] == ["disp_0438_0439.npz"]


def test_fields_that_cannot_be_submitted(tmp_path):
    images = [f"OASIS_{n:04d}_0000.nii.gz" for n in (395, 396)]
    with pytest.raises(ValueError, match=r"field of \[8, 7, 10\] voxels"):
        submit(tmp_path, np.zeros((3, 8, 7, 10), np.float32), *images)
    with pytest.raises(ValueError, match=r"mine\.nii\.gz .*OASIS_0438_0000"):
        submit(tmp_path, np.zeros((3, 8, 6, 10), np.float32), "mine.nii.gz", images[0])
    assert list(tmp_path.iterdir()) == []
