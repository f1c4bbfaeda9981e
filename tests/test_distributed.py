"""Several processes are one: losses, weights, checkpoints and signals, on gloo."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from common import normal
from test_trainer import Plain, make

from scoresde.nn import MLP, DiT, Encoding, padded
from scoresde.training import parallel, start
from scoresde.training.folder import checkpoints
from scoresde.variance import SplitOutput, ocm_loss, training_loss

DATA = normal(50, 3)


def build(folder=None, steps=12, **options):
    """A run whose network, data and seed are those of every process."""
    settings = {"log_every": 1, "checkpoint_every": 4, "schedule": "constant", **options}
    if settings.get("loss"):  # a head beside the prediction, whose network is not called by forward
        settings["net"] = SplitOutput(Plain(outputs=6))
    if "context" in settings:  # one token, two or none for each item; in some parts of a batch there may be none at all
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            settings["net"] = DiT(1, 1, 8, 1, 2, dims=1, context=settings.pop("context")).double()
        settings["cond"] = padded([DATA[:k, :2] for k in torch.arange(50).remainder(3).tolist()])
        return make(folder, steps=steps, data=DATA[:, None], **settings)
    if settings.pop("encoder", None):  # trained along; a third of the items are told nothing
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            settings["net"] = Encoding(MLP(3, 8, 1, vector=2).double(), {"source": torch.nn.Linear(3, 2).double()})
        settings["cond"] = {"source": DATA * (torch.arange(50).remainder(3) > 0)[:, None]}
    return make(folder, steps=steps, data=DATA, **{"net": Plain(), **settings})


def worker(rank, port, folder):
    """Everything that two processes are asked, in one start of them: it is torch's import that takes the time."""
    torch.set_num_threads(1)
    folder = Path(folder)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    with start("cpu") as device:
        assert device == torch.device("cpu")
        assert (parallel.rank(), parallel.world()) == (rank, 2)
        for name, options in RUNS.items():
            trainer = build(folder / name, **options)
            if name == "augmented":
                trainer.augment = augment
            if name == "evaluated":
                trainer.evaluate = evaluate
            trainer.fit(progress=False)
            torch.save([trainer.losses, trainer.net.state_dict(), trainer.evaluations], folder / f"{name}-{rank}.pt")
        # A run that one process had begun, and one that both leave to one.
        resumed = build(folder / "begun by one")
        assert resumed.step == 8
        resumed.fit(progress=False)
        build(folder / "begun by two", steps=8).fit(progress=False)
        refusals(rank, folder)
        stop(rank, folder)


def refusals(rank, folder):
    with pytest.raises(ValueError, match=r"different runs: config\.seed"):
        build(seed=rank).fit(progress=False)
    with pytest.raises(ValueError, match="2 processes and accumulate=1 make 2 parts"):
        build(batch_size=1)
    damaged = folder / "damaged"
    if rank == 0:
        (damaged / "checkpoints" / "00000004").mkdir(parents=True)
    dist.barrier()
    with pytest.raises(RuntimeError, match="00000004"):  # CheckpointError is one
        build(damaged)


def stop(rank, folder):
    """SIGTERM to one of them stops both, after the same step, and saves."""
    trainer = build(folder / "stopped")
    trainer.augment = lambda x, g: signal.raise_signal(signal.SIGTERM) or x if rank == 1 and trainer.step == 5 else x
    with pytest.raises(SystemExit) as caught:
        trainer.fit(progress=False)
    assert caught.value.code == 143
    assert trainer.step == 6
    assert trainer.path.name == "00000006"


def evaluate(denoiser, step):
    return {"rank": parallel.rank()}


def augment(x, g):
    return x * torch.rand(len(x), 1, generator=g, dtype=x.dtype)


RUNS = {
    "plain": {},
    "uneven": {"batch_size": 15},
    "in parts": {"accumulate": 4},
    "augmented": {},
    "evaluated": {"evaluate_every": 6},
    "a context": {"context": 2},
    "an encoder": {"encoder": True},
    "a head": {"loss": training_loss(ocm_loss)},
}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder in which two processes worked."""
    folder = tmp_path_factory.mktemp("two")
    build(folder / "begun by one", steps=8).fit(progress=False)
    # As torchrun does, the parent holds the store at which they meet: its port cannot be taken by another.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torch.multiprocessing.start_processes(worker, (store.port, str(folder)), nprocs=2, start_method="spawn")
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_are_one(name, two):
    """Losses and, after 12 steps, weights of one process with the whole batch, to rounding in float64; both processes
    have the same bits."""
    one = build(**RUNS[name])
    if name == "augmented":
        one.augment = augment
    one.fit(progress=False)
    found = [torch.load(two / f"{name}-{rank}.pt") for rank in range(2)]
    losses = [[loss for _, loss in each] for each in (one.losses, found[0][0], found[1][0])]
    assert losses[1] == losses[2]
    assert len(losses[0]) == 12
    assert max(abs(a - b) for a, b in zip(losses[0], losses[1], strict=True)) < 1e-10
    for key, value in one.net.state_dict().items():
        torch.testing.assert_close(found[0][1][key], value, rtol=0, atol=1e-10)
        assert torch.equal(found[0][1][key], found[1][1][key])
    assert found[0][2] == found[1][2] == ([(6, {"rank": 0.0}), (12, {"rank": 0.0})] if name == "evaluated" else [])
    assert [p.name for p in checkpoints(two / name)] == ["00000012", "00000008", "00000004"]
    assert len((two / name / "log.csv").read_text().splitlines()) == 13


@pytest.mark.parametrize("name", ["begun by one", "begun by two", "stopped"])
def test_a_run_goes_on_with_another_number_of_processes(name, two):
    trainer = build(two / name)
    assert trainer.step == {"begun by one": 12, "begun by two": 8, "stopped": 6}[name]
    trainer.fit(progress=False)
    one = build().fit(progress=False)
    difference = max(abs(a - b) for (_, a), (_, b) in zip(trainer.losses, one.losses, strict=True))
    assert difference < 1e-10
    for value, expected in zip(trainer.net.parameters(), one.net.parameters(), strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-10)


def test_alone_there_is_nothing_to_join(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with start("cpu") as device:
        assert device.type == "cpu"
        assert not dist.is_initialized()
        assert (parallel.rank(), parallel.world()) == (0, 1)
        assert parallel.by_first(lambda: 3) == 3
        assert parallel.Voice().largest(7) == 7
        x = torch.ones(2)
        assert parallel.total(x) is x
