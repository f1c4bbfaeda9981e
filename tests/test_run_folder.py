"""Run folders: what is kept, what a kill costs, what is refused, and that nothing in a file is executed."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from common import normal, read_manifest, write_manifest
from test_trainer import DATA, Net, assert_same, make

from scoresde import VESDE, VPSDE, EpsDenoiser, VDenoiser
from scoresde.cli import info, main
from scoresde.cli.models import About, open_run
from scoresde.nn import MLP
from scoresde.training import (
    CheckpointError,
    ImportanceTimes,
    ModelConfig,
    TrainConfig,
    Trainer,
    likelihood,
    load,
    load_ema,
    saver,
)
from scoresde.training import folder as run_folder
from scoresde.training.folder import Checkpoint, checkpoints, newest
from scoresde.training.log import Log
from scoresde.training.model import opened
from scoresde.training.saver import Saver

# Forks, one after the other, a process for each line that it reads: `folder event`. The process trains there, and kills
# itself at that event: a file or folder opened, made, renamed or removed, or a training step. Its status is printed,
# with the number of events, or the step that it had come to.
SERVER = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from test_trainer import make, torch
torch.set_num_threads(1)
import safetensors.torch, torch._dynamo  # what is imported late
EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "step"}

def train(folder, at):
    count = 0

    def hook(event, args):
        nonlocal count
        if event in EVENTS:
            count += 1
            if count == at:
                if trainer is not None:
                    os.write(answer[1], str(trainer.step).encode())
                os.kill(os.getpid(), signal.SIGTERM if folder.endswith("terminated") else signal.SIGKILL)

    trainer = None
    sys.addaudithook(hook)
    trainer = make(folder, keep=2, steps=12, checkpoint_every=3, async_save="background" in folder)
    trainer.augment = lambda batch, generator: sys.audit("step") or batch
    trainer.fit(progress=False)
    os.write(answer[1], str(count).encode())

for line in sys.stdin:
    folder, at = line.split()
    answer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            train(folder, int(at))
            status = 0
        except SystemExit as error:
            status = error.code
        finally:
            os._exit(status)
    os.close(answer[1])
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(status, os.read(answer[0], 99).decode() or -1, flush=True)
"""


class Server:
    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(Path(__file__).parent)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def __call__(self, folder, at=0):
        print(folder, at, file=self.process.stdin, flush=True)
        return tuple(map(int, self.process.stdout.readline().split()))


def test_killed_at_random_moments_a_run_loses_an_interval_at_most(tmp_path):
    """SIGKILL at 14 random moments, most of them in a save: the bits at the end are those of the whole run. With saves
    in the background, every other time, the steps that were done during one are lost, too."""
    server = Server()
    try:
        status, events = server(tmp_path / "whole")
        assert status == 0
        assert events > 90
        whole = make(tmp_path / "whole", steps=12)
        for seed in range(14):
            background = seed % 2 == 1
            folder = tmp_path / ("background" if background else "waiting") / str(seed)
            status, reached = server(folder, random.Random(seed).randint(1, events))
            assert status == -signal.SIGKILL
            resumed = make(folder, steps=12, checkpoint_every=3)
            before = resumed.step
            assert reached - (6 if background else 3) <= before <= max(reached, 0)
            assert_same(resumed.fit(progress=False), whole)
            assert [p.name for p in checkpoints(folder)][:2] == ["00000012", "00000009"]
            assert before == 12 or not list(folder.glob("checkpoints/.*"))
            assert rows(folder) == rows(tmp_path / "whole")
        status, reached = server(tmp_path / "terminated", events // 2)
        assert status == 143
        assert make(tmp_path / "terminated", steps=12).step in (reached, reached + 1)
    finally:
        server.process.communicate()


@contextmanager
def disk_of(size):
    """No file of this process may be larger: to who writes, as if the disk were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("size", "name"),
    [(100, r"log\.csv"), (600, r"network\.safetensors"), (2000, r"optimiser\.pt"), (4500, r"optimiser\.pt")],
)
@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_is_named_and_costs_no_checkpoint(size, name, background, tmp_path):
    """Whichever file it is that does not fit, and whatever torch and safetensors make of that."""
    make(tmp_path, steps=10, schedule="constant").fit(progress=False)
    before = {path: path.read_bytes() for path in checkpoints(tmp_path)[0].iterdir()}
    longer = make(tmp_path, steps=20, schedule="constant", async_save=background, checkpoint_every=5)
    with disk_of(size), pytest.raises(OSError, match=name) as caught:
        longer.fit(progress=False)
    assert "large" in str(caught.value)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000010"]
    assert {path: path.read_bytes() for path in before} == before
    resumed = make(tmp_path, steps=20, schedule="constant").fit(progress=False)
    assert_same(resumed, make(steps=20, schedule="constant").fit(progress=False))


@pytest.mark.parametrize("during", [0, 1, 2, 3])
def test_saves_in_the_background_cost_an_interval_and_the_steps_of_one(during, tmp_path, monkeypatch):
    """Of an interval of 3, a save takes so many steps (a longer one is waited for): after no step is more lost."""
    gates = defaultdict(threading.Event)
    gates[12].set()  # the last one is not in the background
    finish, wait = saver.finish, Saver.wait

    def slow(partial, files, manifest, keep):
        assert gates[manifest["step"]].wait(60)
        return finish(partial, files, manifest, keep)

    def waited(found):
        gates[trainer.step - 3].set()
        return wait(found)

    def look(batch, generator):
        begun = trainer.step // 3 * 3
        if trainer.step >= begun + during and trainer._saver._pending is not None:
            gates[begun].set()
            trainer._saver._pending()
        lost.append(trainer.step - max((int(path.name) for path in checkpoints(tmp_path)), default=0))
        return batch

    lost = []
    monkeypatch.setattr(saver, "finish", slow)
    monkeypatch.setattr(Saver, "wait", waited)
    trainer = make(tmp_path, steps=12, checkpoint_every=3, async_save=True)
    trainer.augment = look
    trainer.fit(progress=False)
    assert max(lost) + 1 == 3 + during  # the step that follows is lost, too


def rows(folder):
    """The log, but for what it says of time."""
    lines = (folder / "log.csv").read_text().splitlines()
    return [line.split(",")[:5] for line in lines]


def seal(path):
    """Make the manifest agree with the files, as somebody could who means harm."""
    manifest = read_manifest(path)
    for name in manifest["files"]:
        manifest["files"][name] = hashlib.sha256((path / name).read_bytes()).hexdigest()
    write_manifest(path, manifest)


FILES = ["network.safetensors", "average.safetensors", "optimiser.pt", "manifest.json"]


def test_a_run_folder_has_its_last_checkpoints(tmp_path):
    trainer = make(tmp_path, steps=45, keep=2).fit(progress=False)
    assert [p.name for p in checkpoints(tmp_path)] == ["00000045", "00000040"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints", "log.csv"]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["00000040", "00000045"]
    assert trainer.path == tmp_path / "checkpoints" / "00000045"
    assert sorted(p.name for p in trainer.path.iterdir()) == sorted(FILES)
    manifest = read_manifest(trainer.path)
    assert TrainConfig.of(manifest["config"]) == trainer.config
    assert manifest["versions"].startswith("scoresde ")


def test_saved_loaded_and_saved_again_is_the_same(tmp_path):
    first = make(tmp_path / "a", steps=10, ema_decay=(0.9, 0.99)).fit(progress=False)
    second = make(steps=10, net=Net(seed=9), ema_decay=(0.9, 0.99))
    second.load(first.path)
    again = second.save(tmp_path / "b")
    for name in ("network.safetensors", "average.safetensors", "average-1.safetensors"):
        assert (first.path / name).read_bytes() == (again / name).read_bytes()
    one, two = (torch.load(p / "optimiser.pt", weights_only=True) for p in (first.path, again))
    assert one["param_groups"] == two["param_groups"]
    for i, slots in one["state"].items():
        assert all(torch.equal(value, two["state"][i][k]) for k, value in slots.items())
    manifests = [read_manifest(p) for p in (first.path, again)]
    for manifest in manifests:
        del manifest["files"]["optimiser.pt"], manifest["progress"]["seconds"]
    assert manifests[0] == manifests[1]


def test_tied_weights_and_other_layouts_are_saved(tmp_path):
    net = Net()
    net.body[0].weight = torch.nn.Parameter(normal(16, 3, dtype=torch.float32).T.contiguous().T)
    net.twin = net.body[0]
    trainer = make(tmp_path, net=net, steps=2, weight_decay=0.1).fit(progress=False)
    loaded = load_ema(tmp_path, EpsDenoiser(copy.deepcopy(net), VPSDE())).net
    expected = trainer.ema.net
    assert torch.equal(loaded.body[0].weight, expected.body[0].weight)
    assert loaded.twin is loaded.body[0]


@pytest.fixture(scope="module")
def thirty(tmp_path_factory):
    """A run of 30 steps."""
    return make(tmp_path_factory.mktemp("thirty"), steps=30).fit(progress=False)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["truncated", "empty", "missing", "flipped"])
def test_a_damaged_checkpoint_is_passed_over_by_name(name, harm, thirty, tmp_path):
    tmp_path = shutil.copytree(thirty.folder, tmp_path / "run")
    last = checkpoints(tmp_path)[0]
    path = last / name
    content = path.read_bytes()
    middle = len(content) // 2
    if harm == "missing":
        path.unlink()
    else:
        changed = content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]
        path.write_bytes({"truncated": content[:middle], "empty": b"", "flipped": changed}[harm])
    with pytest.warns(UserWarning, match=rf"30/{name} .*older checkpoint .*00000020 is used"):
        resumed = make(tmp_path, steps=30, net=Net(seed=3))
    assert resumed.step == 20
    assert_same(resumed.fit(progress=False), thirty)
    assert [p.name for p in checkpoints(tmp_path)] == ["00000030", "00000020", "00000010"]
    assert make(tmp_path, steps=30).step == 30  # the damaged one has been replaced
    (last / "manifest.json").write_text("{")  # which sampling needs, too
    with pytest.warns(UserWarning, match="older checkpoint"):
        load_ema(tmp_path, EpsDenoiser(Net(), VPSDE()))
    with pytest.raises(CheckpointError, match="00000030"):
        load_ema(last, EpsDenoiser(Net(), VPSDE()))
    for other in checkpoints(tmp_path):
        (other / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be used: .*30.*20.*10"):
        make(tmp_path, steps=30)


@pytest.fixture
def hashed(monkeypatch):
    """The names of the files that were hashed, one after the other."""
    names, original = [], run_folder._sha256
    monkeypatch.setattr(run_folder, "_sha256", lambda path: names.append(path.name) or original(path))
    return names


WORDS = ModelConfig(network="mlp", options={"event_shape": 3, "width": 4, "depth": 1})
WEIGHTS = {None: "network.safetensors", 0: "average.safetensors", 1: "average-1.safetensors"}


def described(folder):
    """A run with two averages and two checkpoints, which can be built from its manifest."""
    config = TrainConfig(steps=10, batch_size=8, checkpoint_every=5, ema_decay=(0.5, 0.9))
    return Trainer(WORDS.build(seed=0), DATA.float(), config, folder=folder, model=WORDS).fit(progress=False)


def test_a_file_is_hashed_once_and_only_if_it_is_read(tmp_path, hashed):
    trainer = described(tmp_path)
    About((3,)).write(tmp_path)
    for average, name in WEIGHTS.items():
        for read in (load, open_run):
            hashed.clear()
            read(tmp_path, average)
            assert hashed == [name]
    hashed.clear()
    load_ema(tmp_path, WORDS.build(), 1)
    assert hashed == [WEIGHTS[1]]
    hashed.clear()
    load(opened(tmp_path, WEIGHTS[0]), 1)
    assert hashed == [WEIGHTS[0], WEIGHTS[1]]  # it was opened for another
    hashed.clear()
    assert str(checkpoints(tmp_path)[0]) in info.described(tmp_path)
    assert hashed == [WEIGHTS[0]]
    hashed.clear()
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "out"), "--average", "1"]) == 0
    assert hashed == [WEIGHTS[1], WEIGHTS[0]]  # what is read, and what is written
    hashed.clear()
    trainer.load(tmp_path)
    assert sorted(hashed) == sorted([*WEIGHTS.values(), "optimiser.pt"])


@pytest.mark.parametrize("average", WEIGHTS)
@pytest.mark.parametrize("harm", ["missing", "changed"])
def test_to_sample_only_the_weights_asked_for_need_be_whole(average, harm, tmp_path):
    """Whatever else is damaged, they are sampled from; training goes back. If they are, sampling goes back too."""
    trainer, name = described(tmp_path), WEIGHTS[average]
    last, before = checkpoints(tmp_path)
    expected = [load(path, average).net.state_dict() for path in (last, before)]

    def damage(path):
        if harm == "missing":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:-1] + b"\x01")

    def same(found, expected):
        return all(torch.equal(value, expected[key]) for key, value in found.net.state_dict().items())

    for other in {*WEIGHTS.values(), "optimiser.pt"} - {name}:
        damage(last / other)
    assert same(load(tmp_path, average), expected[0])  # a warning is an error here
    with pytest.raises(CheckpointError, match=rf"{last.name}/optimiser\.pt"):
        opened(tmp_path, name).optimiser(trainer._optimiser, trainer.net)
    with pytest.warns(UserWarning, match=f"the older checkpoint .*{before.name} is used instead"):
        assert opened(tmp_path).path == before
    damage(last / name)
    with pytest.warns(UserWarning, match=f"{last.name}/{name} .*the older checkpoint .*{before.name} is used instead"):
        assert same(load(tmp_path, average), expected[1])
    with pytest.raises(CheckpointError, match=f"{last.name}/{name}"):
        load(last, average)


def flipped(content, k):
    """With bit k the other way round."""
    return content[: k // 8] + bytes([content[k // 8] ^ 1 << k % 8]) + content[k // 8 + 1 :]


def sample_of_bits(content, n):
    """Numbers of bits, one of each n that follow one another."""
    return [random.Random(k).randrange(k, min(k + n, len(content) * 8)) for k in range(0, len(content) * 8, n)]


def test_of_a_manifest_no_bit_may_change(tmp_path):
    """Whichever it is, the checkpoint before is used, and the warning names the file; alone, it is refused by name."""
    described(tmp_path)
    last, before = checkpoints(tmp_path)
    content = (last / "manifest.json").read_bytes()
    for k in [*sample_of_bits(content, 80), *range(len(content) * 8 - 200, len(content) * 8)]:  # its hash, too
        (last / "manifest.json").write_bytes(flipped(content, k))
        with pytest.raises(CheckpointError, match=rf"{last.name}/manifest\.json"):
            Checkpoint.open(last, WEIGHTS[0])
    with pytest.warns(UserWarning, match=rf"{last.name}/manifest\.json .*{before.name} is used instead"):
        assert opened(tmp_path, WEIGHTS[0]).path == before


def test_a_manifest_without_a_hash_is_told_of_and_held_against_its_own_words(tmp_path):
    """As earlier versions wrote it. What it says of the model must be what the weights were made for."""
    path = described(tmp_path).path
    manifest = read_manifest(path)
    expected = load(tmp_path).net.state_dict()

    def written(**model):
        text = json.dumps({**manifest, "model": {**manifest["model"], **model}}, indent=1)
        (path / "manifest.json").write_text(text)

    written()
    with pytest.warns(UserWarning, match=rf"{path.name}/manifest\.json has no hash of itself"):
        found = load(tmp_path).net.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())
    for change, words in [
        ({"sde": "ve"}, "sde: VPSDE"),
        ({"time_scale": 919.0}, "time label: "),
        ({"predicts": "x0"}, "parameterisation: EpsDenoiser in the file, X0Denoiser here"),
        ({"options": {**manifest["model"]["options"], "depth": 2}}, "network: MLP, "),
    ]:
        written(**change)
        with pytest.warns(UserWarning, match="no hash"), pytest.raises(CheckpointError, match=words):
            load(tmp_path)


def test_of_what_is_said_of_the_data_no_bit_may_change(tmp_path):
    About((1, 8, 8), 256, 2, ["a", "b"]).write(tmp_path)
    content = (tmp_path / "data.json").read_bytes()
    for k in sample_of_bits(content, 7):
        (tmp_path / "data.json").write_bytes(flipped(content, k))
        with pytest.raises(CheckpointError, match=r"data\.json is damaged"):
            About.read(tmp_path)
    (tmp_path / "data.json").write_text(
        json.dumps({"shape": [3], "levels": None, "num_classes": None, "classes": None})
    )
    with pytest.warns(UserWarning, match=r"data\.json has no hash"):
        assert About.read(tmp_path) == About((3,))


def test_a_damaged_log_costs_the_lines_that_are_damaged(tmp_path):
    """Whatever the byte, the run goes on, and a warning names the file and its lines; numbers have no hash."""
    make(tmp_path, steps=20, log_every=2).fit(progress=False)
    path = tmp_path / "log.csv"
    content = path.read_bytes()
    names, *lines = content.decode().splitlines()
    for k in sample_of_bits(content, 60):
        path.write_bytes(flipped(content, k))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            Log(path, 20)
        head, *left = path.read_text().splitlines()
        assert head == names
        assert len({*lines} & {*left}) >= len(lines) - 2  # an end of line that is none joins two
        assert {*left} <= {*lines} or not told
        if len(left) < len(lines) - 1:  # of one, the step may have become a later one
            assert "log.csv is damaged in line" in str(told[0].message)
    path.write_bytes(content.replace(b"loss", b",oss", 1))  # a bit of the names, which is a name more
    with pytest.warns(UserWarning, match=r"log\.csv is damaged in line 1, the names, which were restored: it goes on"):
        Log(path, 20)
    assert path.read_bytes() == content
    path.write_bytes(content.replace(b"\n4,", b"\n4\xff,"))
    with pytest.warns(UserWarning, match=r"log\.csv is damaged in line 3: it goes on without"):
        Log(path, 20)
    assert path.read_text().splitlines() == [names, *(line for line in lines if not line.startswith("4,"))]


def test_what_a_killed_save_leaves_is_no_checkpoint_and_is_cleared(tmp_path):
    make(tmp_path, steps=10).fit(progress=False)
    left = tmp_path / "checkpoints" / ".00000020.123.partial"
    left.mkdir()
    (left / "network.safetensors").write_bytes(b"half")
    trainer = make(tmp_path, steps=10)
    assert trainer.step == 10
    trainer.save(tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["00000010"]


class Payload:
    def __repr__(self):
        return "payload"

    def __reduce__(self):
        return os.system, ("touch /tmp/scoresde-was-here",)


@pytest.mark.parametrize(
    "content", [Payload(), {"format": "other"}, [1, 2], {"a": Payload()}], ids=lambda c: type(c).__name__
)
@pytest.mark.parametrize("name", FILES)
def test_foreign_files_are_refused_and_not_executed(name, content, tmp_path):
    """Even if the manifest vouches for them."""
    path = make(tmp_path, steps=10).fit(progress=False).path
    for write in (lambda: torch.save(content, path / name), lambda: (path / name).write_bytes(pickle.dumps(content))):
        write()
        if name != "manifest.json":
            seal(path)
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            make(tmp_path, steps=10)
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
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_checkpoint_of_another_run_is_refused(change, named, tmp_path):
    make(tmp_path, steps=10).fit(progress=False)
    with pytest.raises(CheckpointError, match=named):
        make(tmp_path, **{"steps": 10, **change})


@pytest.mark.parametrize(
    "change",
    [{"checkpoint_every": 7, "log_every": 9, "keep": 1}, {"accumulate": 2}, {"evaluate_every": 4}],
    ids=lambda change: next(iter(change)),
)
def test_what_may_change_between_sessions(change, tmp_path):
    make(tmp_path, steps=10).fit(progress=False)
    assert make(tmp_path, steps=10, **change).step == 10


def test_a_run_may_be_given_more_steps_or_fewer(tmp_path):
    """With a constant learning rate it is then the longer run, to the last bit; the cosine is that of the steps it has
    now, which a warning says."""
    make(tmp_path / "constant", steps=10, schedule="constant").fit(progress=False)
    longer = make(tmp_path / "constant", steps=20, schedule="constant").fit(progress=False)
    assert_same(longer, make(steps=20, schedule="constant").fit(progress=False))
    make(tmp_path / "cosine", steps=20).fit(progress=False)
    with pytest.warns(UserWarning, match="00000020 is of a run of 20 steps, this is one of 30: .*learning rate"):
        longer = make(tmp_path / "cosine", steps=30)
    longer.fit(progress=False)
    assert longer.step == 30
    rates = [float(row.split(",")[3]) for row in (tmp_path / "cosine" / "log.csv").read_text().splitlines()[1:]]
    assert rates[-1] == longer.config.lr * longer.config.lr_factor(29)
    assert max(rates[7:]) < longer.config.lr * longer.config.lr_factor(19)
    with pytest.warns(UserWarning, match="a run of 30 steps, this is one of 15"):
        shorter = make(tmp_path / "cosine", steps=15)
    assert shorter.fit(progress=False).step == 30


def test_unknown_keys_are_refused(tmp_path):
    path = make(tmp_path, steps=10).fit(progress=False).path
    manifest = read_manifest(path)
    write_manifest(path, {**manifest, "extra": 1})
    with pytest.raises(CheckpointError, match=r"unknown keys \['extra'\]"):
        make(tmp_path, steps=10)
    manifest["progress"]["surplus"] = 1
    write_manifest(path, manifest)
    with pytest.raises(CheckpointError, match="surplus"):
        make(tmp_path, steps=10)
    with pytest.raises(ValueError, match=r"TrainConfig has no 'stesp', 'momentum': it knows steps, batch_size"):
        TrainConfig.of({"stesp": 3, "momentum": 0.9})
    with pytest.raises(ValueError, match="needs steps"):
        TrainConfig.of({})


@pytest.mark.parametrize(
    "files", [[], None, "average.safetensors", {"average.safetensors": None}, {"a\0b": "0"}], ids=str
)
def test_a_manifest_whose_files_are_none_is_damaged(files, tmp_path):
    """The older checkpoint is used; alone, it is refused as what it is."""
    make(tmp_path, keep=2, steps=10, checkpoint_every=5).fit(progress=False)
    last, before = checkpoints(tmp_path)
    write_manifest(last, {**read_manifest(last), "files": files})
    with pytest.raises(CheckpointError, match=f"{last.name}.*(damaged|cannot be read)"):
        Checkpoint.open(last)
    with pytest.warns(UserWarning, match=f"the older checkpoint .*{before.name} is used instead"):
        found = newest(tmp_path)
    assert found is not None
    assert found.path == before


def test_a_file_outside_the_checkpoint_is_not_read(tmp_path):
    path = make(tmp_path, steps=10).fit(progress=False).path
    manifest = read_manifest(path)
    manifest["files"]["../../log.csv"] = "0"
    write_manifest(path, manifest)
    with pytest.raises(CheckpointError, match="outside its folder"):
        make(tmp_path, steps=10)


def test_a_save_that_fails_leaves_the_old_checkpoint(tmp_path):
    trainer = make(tmp_path, steps=10).fit(progress=False)
    before = {path.name: path.read_bytes() for path in trainer.path.iterdir()}
    trainer._optimiser.param_groups[0]["extra"] = lambda: None  # after the weights, which are written by then
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        trainer.save(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000010"]
    assert {path.name: path.read_bytes() for path in trainer.path.iterdir()} == before


def test_another_version_is_warned_of(tmp_path):
    path = make(tmp_path, steps=10).fit(progress=False).path
    write_manifest(path, {**read_manifest(path), "versions": "scoresde 0.0.0, torch 1.0"})
    with pytest.warns(UserWarning, match=r"written with scoresde 0\.0\.0"):
        assert make(tmp_path, steps=10).step == 10
