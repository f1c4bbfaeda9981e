"""The trainer: what it averages, what it resumes, what it refuses, and that it learns."""

from __future__ import annotations

import copy
import csv
import json
import math
import signal
import sys
from pathlib import Path

import pytest
import torch
from common import generator, normal, read_manifest, write_manifest

from scoresde import (
    SDE,
    VESDE,
    VPSDE,
    CosineVPSDE,
    DDPMChain,
    EDMDenoiser,
    EpsDenoiser,
    FlowSDE,
    ScoreDenoiser,
    VDenoiser,
    sample,
)
from scoresde.data import Order, TrainingData
from scoresde.nn import MLP, UNet
from scoresde.processes import SDES
from scoresde.solvers import DDIM
from scoresde.training import (
    CheckpointError,
    ModelConfig,
    NonFiniteLossError,
    TrainConfig,
    Trainer,
    dsm_loss,
    load,
    load_ema,
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
    run = {key: options.pop(key) for key in ("cond", "weighting", "times", "loss") if key in options}
    settings = {"batch_size": 16, "warmup": 5, "checkpoint_every": 10, "log_every": 3, **options}
    denoiser = adapter(net or Net(), sde or VPSDE(), time=time)
    return Trainer(denoiser, data, TrainConfig(steps=steps, **settings), folder=folder, **run)


def state(trainer):
    """Everything that training changes, as one comparable list."""
    found = dict(trainer.net.state_dict())
    for i, average in enumerate(trainer.averages):
        found |= {f"average {i}.{k}": v for k, v in average.module.state_dict().items()}
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
    loaded = load_ema(tmp_path, EpsDenoiser(Net(seed=7), VPSDE()))
    assert not loaded.net.training
    expected = trainer.ema.net.state_dict()
    assert all(torch.equal(expected[k], v) for k, v in loaded.net.state_dict().items())
    for wrong in (EpsDenoiser(Net(), VESDE()), VDenoiser(Net(), VPSDE()), EpsDenoiser(MLP(3), VPSDE())):
        with pytest.raises(CheckpointError, match="made for something else"):
            load_ema(tmp_path, wrong)
    with pytest.raises(FileNotFoundError):
        load_ema(tmp_path / "nothing", EpsDenoiser(Net(), VPSDE()))


def test_a_finished_run_is_not_trained_again(tmp_path):
    first = make(tmp_path).fit(progress=False)
    second = make(tmp_path, net=Net(seed=5)).fit(progress=False)
    assert_same(first, second)


def test_ema_is_its_formula():
    """average <- d_n average + (1 - d_n) weights, d_n = min(decay, (1 + n) / (10 + n)), from the first on."""
    decays = (0.5, 0.15, 0.0)
    trainer = make(steps=12, ema_decay=decays)
    seen = []
    original = trainer._train_step

    def spy(*args):
        result = original(*args)
        seen.append(copy.deepcopy(trainer.net.state_dict()))
        return result

    trainer._train_step = spy
    trainer.fit(progress=False)
    for decay, found in zip(decays, trainer.averages, strict=True):
        average = seen[0]
        for n, weights in enumerate(seen[1:], start=1):
            d = min(decay, (1 + n) / (10 + n))
            average = {k: d * v + (1 - d) * weights[k] for k, v in average.items()}
        for name, value in found.module.state_dict().items():
            torch.testing.assert_close(value, average[name])
    ema = trainer.ema.net
    assert all(torch.equal(ema.state_dict()[k], v) for k, v in trainer.averages[0].module.state_dict().items())
    assert not ema.training
    assert all(not torch.equal(a, b) for a, b in zip(ema.parameters(), trainer.net.parameters(), strict=True))


def test_ema_is_a_copy():
    trainer = make(steps=5).fit(progress=False)
    ema = trainer.ema
    before = copy.deepcopy(ema.net.state_dict())
    with torch.no_grad():
        for p in trainer.net.parameters():
            p.zero_()
        for p in trainer.averages[0].module.parameters():
            p.zero_()
    assert all(torch.equal(before[k], v) for k, v in ema.net.state_dict().items())
    assert type(ema) is EpsDenoiser


@pytest.mark.parametrize(("size", "batch"), [(50, 16), (5, 16), (16, 16), (1, 4), (7, 50)])
def test_every_epoch_shows_every_item_once(size, batch):
    """Batches run on across epochs, and a data set smaller than a batch is repeated within it."""
    trainer = make(data=DATA[:size], batch_size=batch)
    steps = 3 * size
    order = torch.cat([trainer._order.items(step) for step in range(steps)])
    assert len(order) == steps * batch
    epochs = order[: len(order) // size * size].reshape(-1, size)
    assert torch.equal(epochs.sort(1).values, torch.arange(size).expand(len(epochs), size))
    if size == 50:
        assert not torch.equal(epochs[0], epochs[1])
        other = make(data=DATA[:size], batch_size=batch, seed=1)
        assert not torch.equal(other._order.items(0), trainer._order.items(0))


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
        assert torch.equal(seen[step], trainer._order.items(step).float())


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


# What it refuses.


ONE, TO_NOISE = TrainConfig(steps=1), DDPMChain.cosine(8, max_beta=1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make(data=DATA.to(torch.uint8)), "uint8"),
        (lambda: make(data=DATA[:0]), "N >= 1"),
        (lambda: make(data=torch.cat([DATA, DATA[:1] * float("nan")])), r"items 50 are not finite"),
        (lambda: Trainer(EpsDenoiser(torch.sin, VPSDE()), DATA, TrainConfig(steps=1)), "nn.Module"),
        (lambda: Trainer(EpsDenoiser(Net(), VPSDE()), DATA, TrainConfig(steps=1), cond={"y": DATA[:3]}), "3 entries"),
        (lambda: TrainConfig(steps=0), "steps=0"),
        (lambda: TrainConfig(steps=10, batch_size=0), "batch_size=0"),
        *(
            (lambda name=name, value=value: TrainConfig(**{"steps": 10, name: value}), f"{name}={value}")
            for name, values in {
                "lr": (-1.0, 0.0, math.inf, math.nan),
                "weight_decay": (-1.0, math.inf, math.nan),
                "grad_clip": (-1.0, 0.0, math.nan),
                "ema_decay": (-1.0, math.inf, math.nan),
                "warmup": (-1, 1.5, math.inf),
                "seed": (-1, 1.5, math.nan),
                "workers": (-1, math.inf),
                "steps": (math.inf, 1.5),
                "batch_size": (math.nan,),
                "evaluate_every": (0, math.inf),
            }.items()
            for value in values
        ),
        (
            lambda: Trainer(EpsDenoiser(Net().requires_grad_(False), VPSDE()), DATA, ONE),
            "no parameter of Net takes a grad",
        ),
        (lambda: Trainer(EpsDenoiser(torch.nn.Identity(), VPSDE()), DATA, ONE), "no parameter of Identity"),
        (lambda: Trainer(EpsDenoiser(Net(), FlowSDE()), DATA, ONE), "predicts eps says nothing of x0 at t = 1.0"),
        (lambda: Trainer(EpsDenoiser(Net(), TO_NOISE), DATA, ONE), "predicts eps says nothing of x0 at t = 8.0"),
        (lambda: Trainer(ScoreDenoiser(Net(), CosineVPSDE(t_max=1.0)), DATA, ONE), "predicts score says nothing"),
        (
            lambda: Trainer(EpsDenoiser(Net(), VPSDE(beta_max=400)), DATA, ONE),
            "alpha is 3.63e-44, none in torch.float32",
        ),
        (lambda: Trainer(EDMDenoiser(Net(), FlowSDE()), DATA, ONE), "time label is not finite"),
        (lambda: TrainConfig(steps=10, ema_decay=1.0), "ema_decay"),
        (lambda: TrainConfig(steps=10, ema_decay=(0.9, 1.0)), "ema_decay"),
        (lambda: TrainConfig(steps=10, ema_decay=()), "ema_decay"),
        (lambda: TrainConfig(steps=10, schedule="linear"), "schedule"),
        (lambda: TrainConfig(steps=10, precision="float16"), "precision"),
        (lambda: TrainConfig(steps=10, keep=0), "keep=0"),
        (lambda: TrainConfig(steps=10, batch_size=4, accumulate=5), "accumulate=5"),
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


# Averages in place.


def test_averaged_weights_are_swapped_in_and_back():
    trainer = make(steps=10, ema_decay=(0.5, 0.0)).fit(progress=False)
    own = copy.deepcopy(trainer.net.state_dict())
    trainer.net.train()
    trainer.net.body[1].eval()
    for i in range(2):
        with trainer.averaged(i) as denoiser:
            assert denoiser is trainer.denoiser
            assert not any(module.training for module in trainer.net.modules())
            expected = trainer.averages[i].module.state_dict()
            assert all(torch.equal(expected[k], v) for k, v in trainer.net.state_dict().items())
            assert not torch.equal(trainer.ema.net.body[0].weight, own["body.0.weight"])
        with pytest.raises(Stop), trainer.averaged(i):
            raise Stop
        assert all(torch.equal(own[k], v) for k, v in trainer.net.state_dict().items())
        assert [m.training for m in trainer.net.body] == [True, False, True, True]
    with pytest.raises(IndexError), trainer.averaged(2):
        pass


# Parts of a batch, precision, compilation.


class Plain(torch.nn.Module):
    """float64, without dropout: whose masks do depend on how a batch is split."""

    def __init__(self, outputs=3):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = torch.nn.Linear(3, 16), torch.nn.SiLU(), torch.nn.Linear(16, outputs)
            self.body = torch.nn.Sequential(*layers).double()

    def forward(self, x, time):
        return self.body(x + time[:, None])


@pytest.mark.parametrize("augment", [None, lambda x, g: x * torch.rand(len(x), 1, generator=g, dtype=x.dtype)])
@pytest.mark.parametrize("accumulate", [2, 3, 16])
def test_a_batch_in_parts_is_the_whole_batch(accumulate, augment):
    """Up to rounding: in losses, gradient norms and, after 40 steps, weights."""
    runs = []
    for parts in (1, accumulate):
        trainer = make(net=Plain(), data=DATA.double(), accumulate=parts, log_every=1, steps=12)
        trainer.augment = augment
        runs.append(trainer.fit(progress=False))
    losses = [torch.tensor([loss for _, loss in run.losses], dtype=torch.float64) for run in runs]
    torch.testing.assert_close(*losses, rtol=0, atol=1e-12)
    left, right = (list(run.net.parameters()) for run in runs)
    torch.testing.assert_close(left, right, rtol=0, atol=1e-12)


def test_bfloat16_is_the_networks_alone():
    """Under autocast it sees bfloat16; loss, weights and optimiser stay in float32, and it learns as well."""
    seen = []

    class Watch(Net):
        def forward(self, x, time):
            out = super().forward(x, time)
            seen.append(out.dtype)
            return out

    def loss(denoiser, x0, draws, cond):
        found = dsm_loss(denoiser, x0, generator=draws)
        seen.append(found.dtype)
        return found

    config = TrainConfig(steps=30, batch_size=16, precision="bfloat16", log_every=1)
    trainer = Trainer(EpsDenoiser(Watch(), VPSDE()), DATA, config, loss=loss).fit(progress=False)
    assert set(seen[0::2]) == {torch.bfloat16}
    assert set(seen[1::2]) == {torch.float32}
    assert {p.dtype for p in trainer.net.parameters()} == {torch.float32}
    exact = make(steps=30, warmup=100, log_every=1).fit(progress=False)
    # bfloat16 has 8 bits: each loss to about a hundredth.
    assert all(abs(a - b) < 0.05 for (_, a), (_, b) in zip(trainer.losses, exact.losses, strict=True))


def test_a_compiled_network_trains_to_the_same_weights():
    plain, compiled = (make(net=Plain(), data=DATA.double(), steps=3, compile=c) for c in (False, "aot_eager"))
    for trainer in (plain, compiled):
        trainer.fit(progress=False)
    left, right = (list(run.net.parameters()) for run in (plain, compiled))
    torch.testing.assert_close(left, right, rtol=0, atol=1e-12)
    assert plain.net.state_dict().keys() == compiled.net.state_dict().keys()


def test_the_page_of_the_benchmark(tmp_path, monkeypatch):
    """A ratio of what was measured in turns, of both clocks."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    benchmark = pytest.importorskip("training")
    tiny = {"channels": 8, "multipliers": (1, 2), "blocks": 1}
    monkeypatch.setattr(benchmark, "PROBLEMS", [benchmark.Problem("tiny", 8, 4, tiny)])
    benchmark.main(["--turns", "3", "--steps", "1", "--process-steps", "0", "--out", str(tmp_path), "--device", "cpu"])
    (row,) = json.loads((tmp_path / "results.json").read_text())["throughput"]
    for clock in ("wall", "processor"):
        low, middle, high = row[clock]["ratio"]
        assert 0 < low <= middle <= high
        assert f"{middle:.3f} ({low:.3f} to {high:.3f})" in (tmp_path / "README.md").read_text()
    with pytest.raises(SystemExit):
        benchmark.main(["--turns", "1"])


# Signals.


@pytest.mark.parametrize(
    ("number", "expected"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)], ids=["term", "int"]
)
def test_a_signal_lets_the_step_end_and_saves(number, expected, tmp_path):
    whole = make(tmp_path / "whole", log_every=4).fit(progress=False)
    trainer = make(tmp_path / "a", log_every=4)

    def strike(batch, g):
        if trainer.step == 13:
            signal.raise_signal(number)
        return batch

    trainer.augment = strike
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(expected) as caught:
        trainer.fit(progress=False)
    assert caught.type is not SystemExit or caught.value.code == 143
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    resumed = make(tmp_path / "a", net=Net(seed=8), log_every=4)
    assert resumed.step == 14
    assert_same(resumed.fit(progress=False), whole)
    assert resumed.losses == whole.losses  # the interval that was cut, too


def test_a_second_interrupt_does_not_wait(tmp_path):
    trainer = make(tmp_path)

    def strike(batch, g):
        if trainer.step == 13:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return batch

    trainer.augment = strike
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(progress=False)
    assert make(tmp_path).step == 10


def test_an_infinite_gradient_is_not_saved(tmp_path):
    """The loss is finite, the weights would be NaN from then on."""

    def loss(denoiser, x0, draws, cond):
        return dsm_loss(denoiser, x0, generator=draws) + (denoiser.net.body[0].bias * 0).abs().sum().sqrt()

    trainer = Trainer(EpsDenoiser(Net(), VPSDE()), DATA, TrainConfig(steps=3), loss=loss, folder=tmp_path)
    with pytest.raises(NonFiniteLossError, match="gradient's norm is nan at step 0"):
        trainer.fit(progress=False)
    assert not (tmp_path / "checkpoints").exists()


# Logs and evaluations.


def test_the_log_goes_on_without_duplicates(tmp_path):
    """Steps that a killed session logged and did not save are logged anew, a torn line is dropped, and metrics have
    columns of their own."""

    def evaluate(denoiser, step):
        assert not denoiser.net.training
        return {"distance": step / 4, **({"late": torch.tensor(1.0)} if step == 40 else {})}

    def run(folder, **options):
        trainer = make(folder, evaluate_every=8, log_every=4, **options)
        trainer.evaluate = evaluate
        return trainer

    whole = run(tmp_path / "whole").fit(progress=False)
    broken = run(tmp_path / "a")
    broken.augment = lambda batch, g: batch if broken.step < 17 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        broken.fit(progress=False)
    log = tmp_path / "a" / "log.csv"
    log.write_text(log.read_text() + "20,6.4,0.1")
    resumed = run(tmp_path / "a")
    assert resumed.step == 10
    resumed.fit(progress=False)
    tables = []
    for folder in ("a", "whole"):
        with (tmp_path / folder / "log.csv").open(newline="") as file:
            tables.append(list(csv.DictReader(file)))
    times = {"seconds", "items_per_second"}
    left, right = ([{k: v for k, v in row.items() if k not in times} for row in table] for table in tables)
    assert left == right
    assert [int(row["step"]) for row in left] == list(range(4, 41, 4))
    assert [(int(r["step"]), float(r["loss"])) for r in left] == whole.losses == resumed.losses
    assert {r["step"]: r["distance"] for r in left if r["distance"]} == {str(n): str(n / 4) for n in range(8, 41, 8)}
    assert [r["late"] for r in left] == [""] * 9 + ["1.0"]
    assert resumed.evaluations == whole.evaluations
    assert float(left[-1]["epoch"]) == 40 * 16 / 50
    assert float(left[0]["lr"]) == whole.config.lr * whole.config.lr_factor(3)
    assert all(float(row["items_per_second"]) > 0 for row in tables[0])
    seconds = [float(row["seconds"]) for row in tables[0]]
    assert seconds == sorted(seconds)


def test_evaluation_sees_the_average_and_changes_nothing():
    found = {}

    def evaluate(denoiser, step):
        found[step] = copy.deepcopy(denoiser.net.state_dict())
        torch.rand(3)
        return {}

    trainer = make(steps=12, evaluate_every=5)
    trainer.evaluate = evaluate
    trainer.fit(progress=False)
    assert_same(trainer, make(steps=12).fit(progress=False))
    assert list(found) == [5, 10, 12]
    assert all(torch.equal(found[12][k], v) for k, v in trainer.ema.net.state_dict().items())


def test_tensorboard_is_asked_for_before_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        make(tmp_path, tensorboard=True)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"pip install scoresde\[train\]"):
        make(tmp_path)


# Data that is fetched by index.


class Fetched:
    """uint8 levels, scaled when they are fetched."""

    fingerprint = "version 1"

    def __init__(self):
        self.levels, self.seen = torch.arange(150, dtype=torch.uint8).reshape(50, 3), []

    def __len__(self):
        return 50

    def batch(self, items, epochs):
        self.seen.append(items)
        assert len(epochs) == len(items)
        return self.levels[items] / 75.0 - 1, {"shift": items.float()}


def test_data_that_is_fetched_is_data_in_memory(tmp_path):
    fetched, levels = Fetched(), torch.arange(150).reshape(50, 3)
    one = make(tmp_path, data=fetched).fit(progress=False)
    two = make(data=levels / 75.0 - 1, cond={"shift": torch.arange(50).float()}).fit(progress=False)
    assert_same(one, two)
    assert torch.equal(torch.cat(fetched.seen), torch.cat([two._order.items(step) for step in range(40)]))
    fetched.fingerprint = "version 2"
    with pytest.raises(CheckpointError, match=r"data: Fetched of 50 items, version 1 in the file"):
        make(tmp_path, data=fetched)
    with pytest.raises(TypeError, match="an object with len and batch"):
        make(data=[1, 2])
    with pytest.raises(ValueError, match="returns its own"):
        make(data=fetched, cond={"shift": torch.zeros(50)})


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_data_is_taken_as_it_is(accumulate):
    """Flips follow the epoch, labels go with their images, and images that are read when wanted are the same."""

    class Watch(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.seen = torch.nn.Parameter(torch.zeros(())), []

        def forward(self, x, time, label):
            self.seen.append(label)
            return x * self.w

    class Lazy(TrainingData):
        lazy = True

    class Shown:
        """The same batches, one after the other."""

        def __len__(self):
            return 28

        def batch(self, items, epochs):
            step = len(seen)
            seen.append(step)
            return data.batch(order.items(step), order.epochs(step))

    levels = torch.randint(256, (10, 1, 4, 4), dtype=torch.uint8, generator=generator())
    config = TrainConfig(steps=7, batch_size=4, workers=0, accumulate=accumulate, log_every=1)
    found, seen, order = [], [], Order(10, 4, 0)
    for kind in (TrainingData, Lazy, None):
        if kind is not None:
            data = kind(levels, torch.arange(10), levels=256, flip=True, seed=3)
        net = Watch()
        trainer = Trainer(EpsDenoiser(net, VPSDE()), Shown() if kind is None else data, config).fit(progress=False)
        assert torch.equal(torch.cat(net.seen), torch.cat([order.items(step) for step in range(7)]))
        found.append(trainer.losses)
    assert found[0] == found[1] == found[2]


# Models in words.


WORDS = {"network": "mlp", "options": {"event_shape": [3], "width": 16, "depth": 1}, "time_scale": 999}


@pytest.mark.parametrize("predicts", ["eps", "v", "x0", "score", "velocity", "edm"])
@pytest.mark.parametrize("sde", SDES)
def test_a_model_in_words_is_rebuilt_from_its_run(predicts, sde, tmp_path):
    ends = {"t_max": 0.99} if sde == "flow" else {}  # short of alpha = 0, for eps and score
    config = ModelConfig.of({**WORDS, "predicts": predicts, "sde": sde, "sde_options": ends})
    assert ModelConfig.of(json.loads(json.dumps(config.to_dict()))) == config
    torch.manual_seed(0)
    before = torch.get_rng_state()
    denoiser = config.build(seed=1)
    settings = TrainConfig(steps=2, batch_size=4, ema_decay=(0.9, 0.5))
    trainer = Trainer(denoiser, DATA, settings, model=config, folder=tmp_path).fit(progress=False)
    found = load(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert type(found) is type(denoiser)
    assert found.sde == denoiser.sde
    x, t = DATA[:2], 0.5 * denoiser.sde.t_max
    assert torch.equal(found(x, t).mean, trainer.ema(x, t).mean)
    assert not found.net.training
    assert not any(p.requires_grad for p in found.net.parameters())
    for average, expected in ((1, trainer.averages[1].module), (None, trainer.net)):
        net = load(trainer.path, average=average).net.state_dict()
        assert all(torch.equal(v, net[k]) for k, v in expected.state_dict().items())
    with pytest.raises(CheckpointError, match=r"has no average-2\.safetensors, but network\.safetensors, average"):
        load(tmp_path, average=2)


def test_a_run_without_words_says_how_to_load_it(tmp_path):
    trainer = make(tmp_path, steps=2).fit(progress=False)
    with pytest.raises(CheckpointError, match="load_ema"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nothing")
    words = {**WORDS, "options": {"event_shape": 3, "magic": 1}}
    write_manifest(trainer.path, {**read_manifest(trainer.path), "model": words})
    with pytest.raises(CheckpointError, match="this version cannot build: network 'mlp' has no 'magic'"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"netwrok": "mlp"}, "ModelConfig has no 'netwrok'"),
        ({"options": {"chanels": 8}}, "network 'unet' has no 'chanels': it knows image_channels"),
        ({"sde_options": {"beta": 1}}, "sde 'vp' has no 'beta': it knows beta_min"),
        ({"sde": "vpp"}, "sde='vpp': expected 'vp', or one of 'subvp'"),
        ({"network": "vit"}, "network='vit'"),
        ({"predicts": "noise"}, "predicts='noise'"),
        ({"network": "mlp", "preset": 32}, "has no presets"),
        ({"sigma_data": 0.5}, "of predicts='edm'"),
        ({"options": {"channels": torch.tensor(1)}}, "JSON cannot hold"),
    ],
)
def test_words_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.of(settings)


def test_words_must_be_those_of_the_model():
    config = ModelConfig.of(WORDS)
    with pytest.raises(ValueError, match=r"another denoiser .*parameterisation: EpsDenoiser in words, VDenoiser given"):
        Trainer(VDenoiser(config.build().net, VPSDE()), DATA, TrainConfig(steps=1), model=config)
