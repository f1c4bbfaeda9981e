"""Sharded runs (FSDP2) and saves in the background: the same numbers, checkpoints for any number of processes, and what
a kill or a hostile file can do.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from common import normal
from test_run_folder import Payload, seal
from test_trainer import make

from scoresde import VPSDE, EpsDenoiser, sample
from scoresde.nn import DiT, Encoding, UNet
from scoresde.solvers import DDIM
from scoresde.training import (
    CheckpointError,
    ModelConfig,
    NonFiniteLossError,
    TrainConfig,
    Trainer,
    load,
    load_ema,
    parallel,
    saver,
    start,
)
from scoresde.training.folder import checkpoints
from scoresde.training.lock import InUseError, held
from scoresde.variance import SplitOutput, ocm_loss, training_loss

DATA = normal(50, 3)


class Block(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.first = torch.nn.LayerNorm(width), torch.nn.Linear(width, width)

    def forward(self, h):
        return h + torch.tanh(self.first(self.norm(h)))


class Blocks(torch.nn.Module):
    """float64, with units, rows that two or four do not divide, a weight with one row, one that is tied, buffers."""

    def __init__(self, outputs=3, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.inward, self.outward = torch.nn.Linear(3, 7), torch.nn.Linear(7, outputs)
            self.blocks = torch.nn.ModuleList(Block(7) for _ in range(2))
            self.scale = torch.nn.Parameter(torch.ones(1))
            self.twin = self.outward
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("shift", torch.full((3,), 0.1), persistent=False)
        self.double()

    def forward(self, x, time):
        h = self.inward(x + time[:, None] + self.shift)
        for block in self.blocks:
            h = block(h)
        return self.twin(h) * self.scale


class Told(torch.nn.Module):
    """A network that is told two vectors."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, time, vector, other):
        return self.net(x + vector, time) + other


def encoding(net):
    """Of two encoders one is trained along, and one is frozen."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trained = torch.nn.Sequential(torch.nn.Linear(3, 3), *torch.nn.ModuleList(Block(3) for _ in range(2)))
        both = {"a": trained.double(), "b": torch.nn.Linear(3, 3).double()}
    return Encoding(Told(net), both, keys={"b": "other"}, frozen=["b"])


def build(folder=None, steps=12, **options):
    """A run whose network, data and seed are those of every process."""
    settings = {"log_every": 1, "checkpoint_every": 4, "schedule": "constant", "weight_decay": 0.1, **options}
    settings.setdefault("ema_decay", (0.9, 0.5))
    if settings.get("loss"):
        settings["net"] = SplitOutput(Blocks(outputs=6))
    if settings.pop("encoders", None):
        settings["net"], settings["cond"] = encoding(settings.get("net", Blocks())), {"a": DATA, "b": DATA.flip(0)}
    return make(folder, steps=steps, data=DATA, **{"net": Blocks(), **settings})


def whole_of(trainer):
    """Everything that training changes, whole, by name; every process calls it."""
    nets = {"net": trainer.net, **{f"average {i}": a.module for i, a in enumerate(trainer.averages)}}
    found = {f"{k}.{n}": parallel.gathered(p.detach()) for k, net in nets.items() for n, p in net.named_parameters()}
    for name, p in trainer.net.named_parameters():
        for slot, value in trainer._optimiser.state[p].items():
            found[f"{slot}.{name}"] = parallel.gathered(value)
    return {name: value.clone() for name, value in found.items()}


def assert_near(found, expected, atol=1e-10):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=atol, check_dtype=True)


# ---- what several processes are asked: a function each, called in all of them ----


def evaluate(denoiser, step):
    """By rank 0 alone, with a network that it has alone."""
    assert not denoiser.net.training
    x = denoiser(DATA[:4], 0.5).mean.detach()
    return {"rank": parallel.rank(), "value": float(x.sum())}


RUNS = {
    "plain": {},
    "in uneven parts": {"batch_size": 15, "accumulate": 4},
    "evaluated": {"evaluate_every": 6},
    "a head": {"loss": training_loss(ocm_loss)},
    "encoders": {"encoders": True},
    "compiled": {"compile": "aot_eager", "steps": 4},
    "in the background": {"async_save": True},
}


def prepared(name, folder=None, **options):
    trainer = build(folder, **{**RUNS[name], **options})
    trainer.evaluate = evaluate if name == "evaluated" else None
    return trainer


def runs(rank, folder):
    for name in RUNS:
        trainer = prepared(name, folder / name, shard=True, net=Blocks(seed=5 * rank))  # rank 0's is everyone's
        trainer.fit(progress=False)
        torch.save([trainer.losses, whole_of(trainer), trainer.evaluations], folder / f"{name}-{rank}.pt")
        if name == "encoders":  # which a run calls by themselves
            run = {"steps": 2, "cond": {"a": DATA[:4], "b": DATA[:4]}}
            with trainer.averaged() as denoiser:
                together = sample(denoiser, DATA[:4], DDIM(), **run).x
            torch.testing.assert_close(together, sample(trainer.ema, DATA[:4], DDIM(), **run).x, rtol=0, atol=1e-12)


def shards(rank, folder):
    """Each holds its part of everything, and nothing is sent before the last part of a batch."""
    trainer = build(shard=True, accumulate=6, log_every=100)
    sent, name = [], "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
    original = getattr(dist, name)
    setattr(dist, name, lambda *args, **options: sent.append(trainer.step) or original(*args, **options))
    trainer.fit(progress=False)
    setattr(dist, name, original)
    assert sent == [step for step in range(12) for _ in range(3)]  # two blocks, and the rest
    nets = [trainer.net, *(a.module for a in trainer.averages)]
    for net in nets:
        for p in net.parameters():
            rows = [len(part) for part in p.full_tensor().chunk(2)] + [0]
            assert len(p.to_local()) == rows[rank]
            assert p.grad is None or p.grad.to_local().shape == p.to_local().shape
    for p, slots in trainer._optimiser.state.items():
        assert slots["exp_avg"].to_local().shape == slots["exp_avg_sq"].to_local().shape == p.to_local().shape
    # The averages, swapped in, used by all, and out again.
    before = [p.to_local().clone() for p in trainer.net.parameters()]
    alone = trainer.ema
    x = DATA[:4]
    with trainer.averaged() as denoiser:
        torch.testing.assert_close(denoiser(x, 0.5).mean.detach(), alone(x, 0.5).mean, rtol=0, atol=1e-14)
    assert all(torch.equal(a, p.to_local()) for a, p in zip(before, trainer.net.parameters(), strict=True))
    assert type(alone.net) is Blocks
    assert alone.net.twin is alone.net.outward
    with pytest.raises(ValueError, match=r"different runs: config\.shard"):
        build(shard=rank == 0)
    broken = build(folder / "broken", shard=True)
    broken.augment = lambda batch, g: batch * (float("nan") if broken.step == 6 else 1.0)
    with pytest.raises(NonFiniteLossError, match="at step 6"):
        broken.fit(progress=False)
    assert [p.name for p in checkpoints(folder / "broken")] == ["00000004"]


def go(rank, folder, steps, options):
    """Go on, as far as that."""
    trainer = build(folder, steps=steps, **options)
    trainer.fit(progress=False)
    if rank == 0:
        assert trainer.path.name == f"{steps:08d}"


def copy(rank, source, target, options):
    trainer = build(**options)
    trainer.load(source)
    trainer.save(target)


def stopped(rank, folder):
    """SIGTERM while a checkpoint is written in the background: that one and the last are whole."""
    original = saver.finish
    begun = threading.Event()

    def slow(*args):
        begun.set()
        threading.Event().wait(0.2)
        return original(*args)

    saver.finish = slow
    trainer = build(folder, shard=True, async_save=True)

    def strike(x, g):
        if trainer.step == 5:
            assert rank != 0 or begun.wait(60)
            assert rank != 0 or not (folder / "checkpoints" / "00000004").exists()
            assert trainer.path is None
            if rank == 1:
                signal.raise_signal(signal.SIGTERM)
        return x

    trainer.augment = strike
    with pytest.raises(SystemExit) as caught:
        trainer.fit(progress=False)
    assert caught.value.code == 143
    assert trainer.path.name == "00000006"
    assert [p.name for p in checkpoints(folder)] == ["00000006", "00000004"]


def killed(rank, folder, event, ending):
    """Rank 0 dies when a file or folder is opened or renamed whose path ends so."""

    def hook(found, args):
        if found == event and str(args[0]).endswith(ending.format(os.getpid())):
            os.kill(os.getpid(), signal.SIGKILL)

    if rank == 0:
        sys.addaudithook(hook)
    build(folder, shard=True, async_save=True, keep=1).fit(progress=False)


def intruders(rank, folder):
    """Rank 0 writes there, until it is killed; rank 1 wants to."""
    pid = parallel.by_first(os.getpid)
    if rank == 0:
        with held(folder):
            dist.barrier()
            dist.barrier()
            os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
    with pytest.raises(InUseError, match=rf"{folder.name}, process {pid} on "), held(folder):
        pass
    dist.barrier()
    while True:
        try:
            with held(folder):
                assert [p.name for p in folder.iterdir()] == [".lock"]
            return
        except InUseError:
            time.sleep(0.01)


def networks(rank, folder):
    """The library's own, in float32 and bfloat16."""
    for name, config in MODELS.items():
        for precision in ("float32", "bfloat16"):
            trainer = picture_run(config, precision, folder / f"{name} {precision}", shard=True)
            trainer.fit(progress=False)
            assert {p.dtype for p in trainer.net.parameters()} == {torch.float32}
            torch.save(trainer.losses, folder / f"{name} {precision}-{rank}.pt")


MODELS = {
    "unet": ModelConfig(
        options={"channels": 8, "multipliers": [1, 2], "blocks": 1, "num_classes": 3}, predicts="v", time_scale=999
    ),
    "dit": ModelConfig(network="dit", options={"width": 32, "depth": 2, "heads": 2, "patch": 2}, time_scale=999),
}


def picture_run(config, precision, folder=None, shard=False):
    images, labels = normal(12, 1, 8, 8, dtype=torch.float32), torch.arange(12) % 3
    denoiser = config.build(seed=0)
    denoiser.net.to(memory_format=torch.channels_last)
    settings = TrainConfig(steps=6, batch_size=4, precision=precision, shard=shard, log_every=1)
    cond = {"label": labels} if "num_classes" in config.options else None
    return Trainer(denoiser, images, settings, cond=cond, folder=folder, model=config)


# ---- a process that forks groups of them, so that torch is imported once ----

SERVER = """
import sys
sys.path.insert(0, sys.argv[1])
import test_sharded
import torch.distributed.fsdp, torch.distributed.checkpoint, safetensors.torch, torch._dynamo
import scoresde.training.sharded
test_sharded.serve()
"""


def serve():
    torch.set_num_threads(1)
    for line in sys.stdin:
        name, world, args = json.loads(line)
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        children = []
        for rank in range(world):
            if (pid := os.fork()) == 0:
                child(name, rank, world, store.port, args)
            children.append(pid)
        status = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
        print(json.dumps(status), flush=True)


def child(name, rank, world, port, args):
    status = 1
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    try:
        with start("cpu") if world > 1 else parallel.start("cpu"):
            globals()[name](rank, *[Path(x) if str(x).startswith("/") else x for x in args])
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


class Group:
    def __init__(self, log):
        self.log = log
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SERVER, str(Path(__file__).parent)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def __call__(self, name, *args, world=2, expected=0):
        where = self.log.stat().st_size
        line = json.dumps([name, world, [str(x) if isinstance(x, Path) else x for x in args]])
        print(line, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        text = self.log.read_text()[where:]
        assert answer, text
        status = json.loads(answer)
        assert status[0] == expected, text
        assert not any(status[1:]) or name == "killed", text  # the others' work then fails too


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    found = Group(tmp_path_factory.mktemp("group") / "log")
    yield found
    found.process.communicate()


# ---- the laws ----


@pytest.fixture(scope="module")
def two(group, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    group("runs", folder)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_sharded_it_is_one_process(name, two):
    """Losses, weights, averages and the optimiser's state, to rounding in float64; both processes know the same."""
    one = prepared(name).fit(progress=False)
    found = [torch.load(two / f"{name}-{rank}.pt") for rank in range(2)]
    assert found[0][0] == found[1][0]
    assert len(found[0][0]) == one.step
    assert max(abs(a - b) for (_, a), (_, b) in zip(one.losses, found[0][0], strict=True)) < 1e-10
    for each in found:
        assert_near(each[1], whole_of(one))
    assert found[0][2] == found[1][2]
    for (_, there), (_, here) in zip(found[0][2], one.evaluations, strict=True):
        assert there == pytest.approx(here, abs=1e-10)
    assert len(found[0][2]) == (2 if name == "evaluated" else 0)
    expected = [f"{step:08d}" for step in range(one.step, 0, -4)]
    assert [p.name for p in checkpoints(two / name)] == expected
    # What one process reads of it, without a group.
    loaded = load_ema(two / name, one.denoiser, average=1).net
    for key, value in one.averages[1].module.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[key], value, rtol=0, atol=1e-10)


def test_every_process_has_its_part_and_sends_once_a_step(group, tmp_path):
    group("shards", tmp_path)


@pytest.fixture(scope="module")
def once():
    """A run in one process, uninterrupted."""
    return build().fit(progress=False)


DDP, FSDP = {}, {"shard": True}
CHAIN = [(1, FSDP), (2, FSDP), (4, FSDP), (2, DDP), (2, FSDP)]  # one process has nothing to shard


def test_a_run_goes_on_with_another_number_of_processes(group, once, tmp_path):
    """One, two and four sharded, two with copies, two sharded, one: the numbers at the end are those of one."""
    for steps, (world, options) in zip((2, 4, 6, 8, 10), CHAIN, strict=True):
        if world == 1:
            build(tmp_path, steps=steps, **options).fit(progress=False)
        else:
            group("go", tmp_path, steps, options, world=world)
        names = {p.name.split("-")[0] for p in (tmp_path / "checkpoints" / f"{steps:08d}").iterdir()}
        assert ("shard" in names) == (world > 1 and "shard" in options)
    end = build(tmp_path)
    assert end.step == 10
    end.fit(progress=False)
    assert max(abs(a - b) for (_, a), (_, b) in zip(end.losses, once.losses, strict=True)) < 1e-10
    assert_near(whole_of(end), whole_of(once))


def test_shards_that_are_loaded_and_saved_are_the_same(group, tmp_path):
    """Bit for bit, along the same way."""
    first = build(tmp_path / "0", steps=5).fit(progress=False)
    path = tmp_path / "0"
    for i, (world, options) in enumerate(CHAIN[1:], 1):
        group("copy", path, tmp_path / str(i), options, world=world)
        path = tmp_path / str(i)
    last = build()
    last.load(path)
    expected, found = whole_of(first), whole_of(last)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert last.net.count == 3
    again = last.save(tmp_path / "last")
    for name in ("network", "average", "average-1"):
        file = f"{name}.safetensors"
        assert (again / file).read_bytes() == (first.path / file).read_bytes()
    with pytest.raises(CheckpointError, match=r"no average-2\.safetensors, but .*average-1\.safetensors"):
        load_ema(path, first.denoiser, average=2)
    with pytest.raises(CheckpointError, match=r"network: Blocks, \d+ parameters in the file"):
        load_ema(path, EpsDenoiser(Blocks(outputs=6), VPSDE()))


@pytest.fixture(scope="module")
def pictures(group, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    group("networks", folder)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_the_networks_are_sharded_in_float32_and_in_bfloat16(name, pictures):
    for precision, tolerance in (("float32", 1e-4), ("bfloat16", 0.03)):
        one = picture_run(MODELS[name], precision).fit(progress=False)
        found = [torch.load(pictures / f"{name} {precision}-{rank}.pt") for rank in range(2)]
        assert found[0] == found[1]
        assert max(abs(a - b) for (_, a), (_, b) in zip(one.losses, found[0], strict=True)) < tolerance
        loaded = load(pictures / f"{name} {precision}")
        assert type(loaded.net) in (UNet, DiT)
        for key, value in one.ema.net.state_dict().items():
            torch.testing.assert_close(loaded.net.state_dict()[key], value, rtol=0, atol=5e-3)


# ---- in the background ----


def test_a_save_in_the_background_is_of_its_step(tmp_path):
    """Each checkpoint has the bits of one that was waited for, however late it is written; there is one at a time."""
    release, active, most = threading.Event(), 0, 0
    original = saver.finish

    def slow(*args):
        nonlocal active, most
        active += 1
        most = max(most, active)
        release.wait(0.05)
        found = original(*args)
        active -= 1
        return found

    build(tmp_path / "a", keep=9, checkpoint_every=2).fit(progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saver, "finish", slow)
        trainer = build(tmp_path / "b", keep=9, checkpoint_every=2, async_save=True).fit(progress=False)
    assert most == 1
    assert trainer.path.name == "00000012"
    assert [p.name for p in checkpoints(tmp_path / "b")] == [f"{step:08d}" for step in range(12, 0, -2)]
    for a, b in zip(checkpoints(tmp_path / "a"), checkpoints(tmp_path / "b"), strict=True):
        for name in ("network.safetensors", "average.safetensors"):
            assert (a / name).read_bytes() == (b / name).read_bytes()
        states = [torch.load(p / "optimiser.pt", weights_only=True)["state"] for p in (a, b)]
        for i, slots in states[0].items():
            assert all(torch.equal(value, states[1][i][slot]) for slot, value in slots.items())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saver, "finish", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build(tmp_path / "c", async_save=True).fit(progress=False)
    assert list((tmp_path / "c" / "checkpoints").iterdir()) == []


def test_a_signal_waits_for_the_save_in_the_background(group, tmp_path, once):
    group("stopped", tmp_path)
    end = build(tmp_path).fit(progress=False)
    assert_near(whole_of(end), whole_of(once))


@pytest.mark.parametrize(
    ("event", "ending", "left"),
    [
        ("open", "0004.{}.partial/shard-00001-model-00002-of-00004.safetensors", 0),
        ("open", "0008.{}.partial/shard-00001-model-00004-of-00004.safetensors", 4),
        ("open", "0008.{}.partial/manifest.json", 4),
        ("os.rename", "0008.{}.partial", 4),
        ("os.rename", "checkpoints/00000004", 8),
    ],
    ids=["first", "shard", "manifest", "name", "old"],
)
def test_killed_while_saving_shards_the_one_before_is_used(event, ending, left, group, tmp_path, once):
    """In the background, keep being 1: the numbers at the end are those of the whole run."""
    group("killed", tmp_path, event, ending, expected=-signal.SIGKILL)
    resumed = build(tmp_path)
    assert resumed.step == left
    assert_near(whole_of(resumed.fit(progress=False)), whole_of(once))


# ---- files that mean harm ----


@pytest.fixture
def sharded(group, tmp_path):
    group("go", tmp_path, 8, FSDP)
    return tmp_path


def test_nothing_in_a_sharded_checkpoint_is_executed(sharded):
    path = checkpoints(sharded)[0]
    (path / ".metadata").write_bytes(pickle.dumps(Payload()))  # what torch's own storage would read
    assert build(sharded).step == 8
    shard = next(path.glob("shard-00001-model-00002-*"))  # of the average, which sampling needs as well
    content = shard.read_bytes()
    for harm in (pickle.dumps(Payload()), b"", content[: len(content) // 2], b"\xff" * 64):
        shard.write_bytes(harm)
        seal(path)  # even if the manifest vouches for it
        for call in (lambda: build(sharded), lambda: load_ema(path, EpsDenoiser(Blocks(), VPSDE()))):
            with pytest.raises(CheckpointError, match=r"cannot be read|does not fit"):
                call()
    shard.write_bytes(content)
    seal(path)
    (path / "shard-00003-model-00001-of-00004.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"shard-00003-model-00001-of-00004\.safetensors besides its files"):
        build(sharded)
    assert not Path("/tmp/scoresde-was-here").exists()


def test_a_damaged_shard_is_passed_over_by_name(sharded, once):
    path = checkpoints(sharded)[0]
    shard = max(path.glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=rf"{shard.name} is truncated .*older checkpoint .*00000004 is used"):
        resumed = build(sharded)
    assert_near(whole_of(resumed.fit(progress=False)), whole_of(once))


def test_of_a_sharded_checkpoint_only_the_shards_that_are_asked_for_are_read(sharded):
    """The others may be anything."""
    path = checkpoints(sharded)[0]
    asked = {p.name: p.read_bytes() for p in path.glob("shard-*-model-00003-of-00004.safetensors")}
    assert len(asked) == 2
    for other in set(path.glob("shard-*")) - {path / name for name in asked}:
        other.write_bytes(pickle.dumps(Payload()))
    found = load_ema(sharded, EpsDenoiser(Blocks(), VPSDE()), average=1).net.state_dict()
    for key, value in build(steps=8).fit(progress=False).averages[1].module.state_dict().items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-10)
    (path / next(iter(asked))).write_bytes(b"")
    with pytest.warns(UserWarning, match=r"model-00003-of-00004\.safetensors is truncated .*00000004 is used"):
        load_ema(sharded, EpsDenoiser(Blocks(), VPSDE()), average=1)
    assert not Path("/tmp/scoresde-was-here").exists()


# ---- one run in a folder ----


def test_two_runs_do_not_write_into_one_folder(group, tmp_path):
    group("intruders", tmp_path, expected=-signal.SIGKILL)
    assert list(tmp_path.iterdir()) == []
    trainer, other = build(tmp_path, steps=2), build(tmp_path)

    def intrude(x, g):
        for call in (lambda: other.fit(progress=False), lambda: other.save(tmp_path)):
            with pytest.raises(InUseError, match=f"process {os.getpid()}"):
                call()
        return x

    trainer.augment = intrude
    trainer.fit(progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints", "log.csv"]
