"""The trainer: what it averages, what it resumes, what it refuses, and that it learns."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from common import generator, normal

from scoresde import SDE, VESDE, VPSDE, EpsDenoiser, VDenoiser, sample
from scoresde.nn import MLP, UNet
from scoresde.solvers import DDIM
from scoresde.training import (
    CheckpointError,
    ImportanceTimes,
    NonFiniteLossError,
    TrainConfig,
    Trainer,
    likelihood,
    load_ema,
    read_checkpoint,
    write_checkpoint,
)


class Net(torch.nn.Module):
    """A network with dropout, whose masks must be part of what resumes."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = torch.nn.Sequential(
                torch.nn.Linear(3, 16), torch.nn.SiLU(), torch.nn.Dropout(0.1), torch.nn.Linear(16, 3)
            )

    def forward(self, x, time, shift=None):
        return self.body(x + time[:, None]) + (0 if shift is None else shift[:, None])


DATA = normal(50, 3, dtype=torch.float32)


def make(folder=None, steps=40, net=None, data=DATA, sde=None, adapter=EpsDenoiser, time=None, **options):
    run = {key: options.pop(key) for key in ("cond", "weighting", "times") if key in options}
    settings = {"batch_size": 16, "warmup": 5, "checkpoint_every": 10, "log_every": 3, **options}
    denoiser = adapter(net or Net(), sde or VPSDE(), time=time)
    return Trainer(denoiser, data, TrainConfig(steps=steps, **settings), folder=folder, **run)


def state(trainer):
    """Everything that training changes, as one comparable list."""
    found = {**trainer.net.state_dict(), **{f"average.{k}": v for k, v in trainer._average.state_dict().items()}}
    for i, slots in trainer._optimiser.state_dict()["state"].items():
        found |= {f"optimiser.{i}.{k}": v for k, v in slots.items()}
    return found


def assert_same(a, b):
    left, right = state(a), state(b)
    assert left.keys() == right.keys()
    assert [k for k in left if not torch.equal(left[k], right[k])] == []
    assert a.step == b.step


class Stop(Exception):
    pass


@pytest.mark.parametrize("at", [1, 10, 17, 39])
def test_a_run_that_was_interrupted_ends_with_the_same_bits(at, tmp_path):
    whole = make(tmp_path / "whole").fit(progress=False)

    def interrupt(batch, g):
        if broken.step == at:
            raise Stop
        return batch

    broken = make(tmp_path / "broken")
    broken.augment = interrupt
    with pytest.raises(Stop):
        broken.fit(progress=False)
    # Weights of another seed, which the checkpoint must replace; before the first one there is nothing to replace them.
    resumed = make(tmp_path / "broken", net=Net(seed=99 if at >= 10 else 0))
    assert resumed.step == at // 10 * 10
    resumed.fit(progress=False)
    assert_same(resumed, whole)
    assert resumed.losses[-1] == whole.losses[-1]


def test_a_killed_process_resumes(tmp_path):
    """SIGKILL, at whatever moment it hits, costs at most the steps since the last checkpoint."""
    script = tmp_path / "run.py"
    here = str(Path(__file__).parent)
    script.write_text(
        f"import sys; sys.path.insert(0, {here!r})\n"
        "from test_trainer import make\n"
        f"make({str(tmp_path / 'killed')!r}, steps=2000, schedule='constant', checkpoint_every=5).fit(progress=False)\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    process = subprocess.Popen([sys.executable, str(script)], env=environment)
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = make(tmp_path / "killed", steps=2000, schedule="constant", checkpoint_every=5)
    assert resumed.step >= 5
    until = resumed.step + 12
    resumed = make(tmp_path / "killed", steps=until, schedule="constant").fit(progress=False)
    assert_same(resumed, make(steps=until, schedule="constant").fit(progress=False))


def test_a_run_on_an_own_sde_resumes_in_another_process(tmp_path):
    """What identifies an SDE is its scales, not an address."""

    class Own(SDE):
        t_min, t_max = 1e-3, 1.0

        def alpha(self, t):
            return VPSDE().alpha(t)

        def sigma(self, t):
            return VPSDE().sigma(t)

    make(tmp_path, sde=Own()).fit(progress=False)
    assert make(tmp_path, sde=Own()).step == 40


def test_the_averaged_weights_are_read_without_the_data(tmp_path):
    trainer = make(tmp_path).fit(progress=False)
    loaded = load_ema(tmp_path / "checkpoint.pt", EpsDenoiser(Net(seed=7), VPSDE()))
    assert not loaded.net.training
    expected = trainer.ema.net.state_dict()
    assert all(torch.equal(expected[k], v) for k, v in loaded.net.state_dict().items())
    for wrong in (EpsDenoiser(Net(), VESDE()), VDenoiser(Net(), VPSDE()), EpsDenoiser(MLP(3), VPSDE())):
        with pytest.raises(CheckpointError, match="made for something else"):
            load_ema(tmp_path / "checkpoint.pt", wrong)
    with pytest.raises(FileNotFoundError):
        load_ema(tmp_path / "nothing.pt", EpsDenoiser(Net(), VPSDE()))


def test_a_finished_run_is_not_trained_again(tmp_path):
    first = make(tmp_path).fit(progress=False)
    second = make(tmp_path, net=Net(seed=5)).fit(progress=False)
    assert_same(first, second)


def test_ema_is_its_formula():
    """average <- d_n average + (1 - d_n) weights, d_n = min(decay, (1 + n) / (10 + n)), from the first on."""
    trainer = make(steps=12, ema_decay=0.5)
    seen = []
    original = trainer._average.update_parameters

    def spy(net):
        original(net)
        seen.append(copy.deepcopy(net.state_dict()))

    trainer._average.update_parameters = spy
    trainer.fit(progress=False)
    average = seen[0]
    for n, weights in enumerate(seen[1:], start=1):
        d = min(0.5, (1 + n) / (10 + n))
        average = {k: d * v + (1 - d) * weights[k] for k, v in average.items()}
    ema = trainer.ema.net
    for name, value in ema.state_dict().items():
        torch.testing.assert_close(value, average[name])
    assert not ema.training
    assert all(not torch.equal(a, b) for a, b in zip(ema.parameters(), trainer.net.parameters(), strict=True))


def test_ema_is_a_copy():
    trainer = make(steps=5).fit(progress=False)
    ema = trainer.ema
    before = copy.deepcopy(ema.net.state_dict())
    with torch.no_grad():
        for p in trainer.net.parameters():
            p.zero_()
        for p in trainer._average.parameters():
            p.zero_()
    assert all(torch.equal(before[k], v) for k, v in ema.net.state_dict().items())
    assert type(ema) is EpsDenoiser


@pytest.mark.parametrize(("size", "batch"), [(50, 16), (5, 16), (16, 16), (1, 4), (7, 50)])
def test_every_epoch_shows_every_item_once(size, batch):
    """Batches run on across epochs, and a data set smaller than a batch is repeated within it."""
    trainer = make(data=DATA[:size], batch_size=batch)
    steps = 3 * size
    order = torch.cat([trainer._batch(step) for step in range(steps)])
    assert len(order) == steps * batch
    epochs = order[: len(order) // size * size].reshape(-1, size)
    assert torch.equal(epochs.sort(1).values, torch.arange(size).expand(len(epochs), size))
    if size == 50:
        assert not torch.equal(epochs[0], epochs[1])
        other = make(data=DATA[:size], batch_size=batch, seed=1)
        assert not torch.equal(other._batch(0), trainer._batch(0))


def test_conditions_stay_with_their_items():
    seen = []

    class Watch(Net):
        def forward(self, x, time, shift):
            seen.append(shift)
            return super().forward(x, time, shift)

    denoiser = EpsDenoiser(Watch(), VPSDE())
    trainer = Trainer(denoiser, DATA, TrainConfig(steps=3, batch_size=8), cond={"shift": torch.arange(50).float()})
    trainer.fit(progress=False)
    for step in range(3):
        assert torch.equal(seen[step], trainer._batch(step).float())


def test_training_leaves_the_global_generator():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    make(steps=5).fit(progress=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_nan_stops_the_run_by_name_and_spares_the_checkpoint(tmp_path):
    trainer = make(tmp_path, steps=40)
    trainer.augment = lambda batch, g: batch * (float("nan") if trainer.step == 13 else 1.0)
    with pytest.raises(NonFiniteLossError, match="at step 13") as caught:
        trainer.fit(progress=False)
    assert caught.value.step == 13
    resumed = make(tmp_path, steps=40)
    assert resumed.step == 10
    assert all(bool(p.isfinite().all()) for p in resumed.net.parameters())
    assert_same(resumed.fit(progress=False), make(steps=40).fit(progress=False))


def test_it_learns_a_two_dimensional_distribution():
    """An MLP on two far points: after 400 steps nine of ten samples end near one of them, about half at each."""
    data = torch.tensor([[-2.0, 0.0], [2.0, 0.0]]) + 0.1 * torch.randn(500, 1, 2, generator=generator())
    net = MLP(2, width=64, depth=2)
    denoiser = EpsDenoiser(net, VPSDE(), time=lambda t: 999 * t)
    trainer = Trainer(denoiser, data.reshape(-1, 2), TrainConfig(steps=400, lr=3e-3, ema_decay=0.99))
    x = sample(trainer.fit(progress=False).ema, (400, 2), DDIM(), steps=20, seed=0).x
    near = (x.abs() - torch.tensor([2.0, 0.0])).norm(dim=1) < 0.6
    assert float(near.double().mean()) > 0.9
    assert 0.3 < float((x[:, 0] > 0).double().mean()) < 0.7


def test_a_unet_with_classes_trains(tmp_path):
    images, labels = normal(12, 1, 8, 8, dtype=torch.float32), torch.arange(12) % 3
    denoiser = VDenoiser(UNet(channels=8, multipliers=(1, 2), blocks=1, num_classes=3), VPSDE(), time=lambda t: 999 * t)
    config = TrainConfig(steps=3, batch_size=4)
    ema = Trainer(denoiser, images, config, cond={"label": labels}, folder=tmp_path).fit(progress=False).ema
    solution = sample(ema, (2, 1, 8, 8), DDIM(), steps=2, seed=0, cond={"label": torch.tensor([0, 2])})
    assert bool(solution.x.isfinite().all())


# Checkpoints.


def test_a_truncated_checkpoint_is_refused_with_its_name(tmp_path):
    make(tmp_path, steps=10).fit(progress=False)
    path = tmp_path / "checkpoint.pt"
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"checkpoint\.pt cannot be read"):
            make(tmp_path, steps=10)


class Payload:
    def __repr__(self):
        return "payload"

    def __reduce__(self):
        return os.system, ("touch /tmp/scoresde-was-here",)


@pytest.mark.parametrize(
    "content", [Payload(), {"format": "other"}, [1, 2], {"a": Payload()}], ids=lambda c: type(c).__name__
)
def test_foreign_files_are_refused_and_not_executed(content, tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save(content, path)
    with pytest.raises(CheckpointError):
        make(tmp_path)
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError):
        make(tmp_path)
    assert not Path("/tmp/scoresde-was-here").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sde": VESDE()}, "sde: VPSDE"),
        ({"adapter": VDenoiser}, "parameterisation: EpsDenoiser in the file, VDenoiser here"),
        ({"net": MLP(3)}, "network: Net"),
        ({"data": DATA[:20]}, "data: "),
        ({"data": DATA + 100}, "data: "),
        ({"data": DATA.flip(0)}, "data: "),
        ({"time": lambda t: 999 * t}, "time label: "),
        ({"weighting": likelihood}, "weighting: "),
        ({"times": ImportanceTimes()}, "times: UniformTimes"),
        ({"cond": {"shift": torch.zeros(50)}}, "cond: none in the file"),
        ({"lr": 0.5}, "config.lr"),
        ({"seed": 3}, "config.seed"),
        ({"steps": 20}, "config.steps"),  # the cosine schedule depends on it
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_checkpoint_of_another_run_is_refused(change, named, tmp_path):
    make(tmp_path, steps=10).fit(progress=False)
    with pytest.raises(CheckpointError, match=named):
        make(tmp_path, **{"steps": 10, **change})


def test_unknown_keys_are_refused(tmp_path):
    make(tmp_path, steps=10).fit(progress=False)
    path = tmp_path / "checkpoint.pt"
    raw = torch.load(path, weights_only=True)
    torch.save({**raw, "extra": 1}, path)
    with pytest.raises(CheckpointError, match="unknown keys"):
        make(tmp_path, steps=10)
    raw["content"]["surplus"] = 1
    torch.save(raw, path)
    with pytest.raises(CheckpointError, match="surplus"):
        make(tmp_path, steps=10)


def test_a_save_that_fails_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "c.pt"
    write_checkpoint(path, {"a": torch.ones(3)}, {"sde": "x"})
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        write_checkpoint(path, {"a": lambda: None}, {"sde": "x"})
    assert torch.equal(read_checkpoint(path, {"sde": "x"})["a"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


# What it refuses.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make(data=DATA.to(torch.uint8)), "uint8"),
        (lambda: make(data=DATA[:0]), "N >= 1"),
        (lambda: make(data=torch.cat([DATA, DATA[:1] * float("nan")])), r"items \[50\] are not finite"),
        (lambda: Trainer(EpsDenoiser(torch.sin, VPSDE()), DATA, TrainConfig(steps=1)), "nn.Module"),
        (lambda: Trainer(EpsDenoiser(Net(), VPSDE()), DATA, TrainConfig(steps=1), cond={"y": DATA[:3]}), "3 entries"),
        (lambda: TrainConfig(steps=0), "steps=0"),
        (lambda: TrainConfig(steps=10, batch_size=0), "batch_size=0"),
        (lambda: TrainConfig(steps=10, lr=-1.0), "lr"),
        (lambda: TrainConfig(steps=10, ema_decay=1.0), "ema_decay"),
        (lambda: TrainConfig(steps=10, schedule="linear"), "schedule"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_learning_rate():
    config = TrainConfig(steps=100, warmup=10)
    rates = [config.lr_factor(n) for n in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 0.01
    assert TrainConfig(steps=100, warmup=10, schedule="constant").lr_factor(99) == 1.0


def test_another_version_is_warned_of(tmp_path):
    make(tmp_path, steps=10).fit(progress=False)
    raw = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    raw["content"]["versions"] = "scoresde 0.0.0, torch 1.0"
    torch.save(raw, tmp_path / "checkpoint.pt")
    with pytest.warns(UserWarning, match=r"written with scoresde 0\.0\.0"):
        assert make(tmp_path, steps=10).step == 10
