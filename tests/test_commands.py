"""The commands from train to compare, in small: what they leave, that they go on, and what they refuse."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from common import read_manifest, write_manifest

import scoresde
from scoresde import VPSDE, Clip, cli, sample, sample_seeds
from scoresde.cli import compare, main, parser, train
from scoresde.cli.config import SECTIONS, DataConfig, EvaluateConfig, RunConfig, override, read_toml, write_toml
from scoresde.cli.defaults import chosen, completed
from scoresde.cli.drawing import Recipe
from scoresde.cli.kept import settings_of
from scoresde.cli.models import open_run, run_config
from scoresde.data import TrainingData, digit_levels, digits, scaled
from scoresde.levels import to_levels
from scoresde.likelihood import bits_per_dim, outer_edges
from scoresde.pictures import grid
from scoresde.processes import SDES
from scoresde.report import Cells, log_ticks
from scoresde.solvers import DDIM, DDPM, Parallel, UniPC
from scoresde.solvers.catalogue import SOLVERS, solver_of
from scoresde.training import ModelConfig, TrainConfig, Trainer
from scoresde.training.folder import checkpoints
from scoresde.variance import AnalyticDenoiser, OptimalVariance, VarianceTable

Image = pytest.importorskip("PIL.Image")

SMALL = ["--set", "model.options.channels=16", "--set", "model.options.attention=[]", "--set", "data.limit=64"]
DIGITS = ["train", "--data", "digits", "--classes", "--batch-size", "8", "--device", "cpu", *SMALL,
          "--set", "evaluate.nfe=2", "--set", "evaluate.grid=5", "--set", "train.checkpoint_every=2"]  # fmt: skip
MOONS = ["train", "--data", "two-moons:200", "--batch-size", "8", "--device", "cpu", "--quiet",
         "--set", "model.options={width = 16, depth = 1}"]  # fmt: skip


def run(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """The run folder of a small network on digits, conditional on their classes."""
    out = tmp_path_factory.mktemp("runs") / "digits"
    measured = ['evaluate.metrics=["frechet", "energy"]', "evaluate.data=digits", "evaluate.n=12"]
    more = [word for change in measured for word in ("--set", change)]
    assert run(*DIGITS, "--steps", 3, "--quiet", "--out", out, *more) == 0
    return out


@pytest.fixture(scope="module")
def moons_run(tmp_path_factory):
    """Of a small network in the plane."""
    out = tmp_path_factory.mktemp("runs") / "moons"
    assert run(*MOONS, "--steps", 3, "--out", out) == 0
    return out


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- help ------------------------------------------------------------------------------------------------------------

COMMANDS = (
    *(
        "train",
        "train-autoencoder",
        "train-categorical",
        "sample",
        "edit",
        "restore",
        "evaluate",
        "likelihood",
        "variance",
        "compare",
        "export",
    ),
    *("info", "solvers", "tableau"),
)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_ends_in_examples_that_parse(command, capsys):
    """Every command line in the help is one that the parser takes."""
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    lines = text.partition("examples:\n")[2].partition("\n\n")[0].splitlines()
    assert lines
    for line in lines:
        words = shlex.split(re.split(r" {3,}", line.strip())[0])
        assert words[0] in ("scoresde", "torchrun")
        words = words[words.index("scoresde") + 1 :]
        if "COMMAND" in words:
            continue
        args = parser().parse_args(words)
        assert args.command == words[0]
        # torchrun would take an option that is short for one of its own.
        assert "torchrun" not in line or "--n" not in words
    assert not command or f"scoresde {command}" in text.partition("examples:")[2]


# --- configuration ---------------------------------------------------------------------------------------------------


def images(*shape, labels=None, n=20):
    x = torch.randint(0, 256, (n, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return TrainingData(x, labels, 256)


def test_what_is_not_said_fits_the_data():
    config = completed({"data": {"source": "a"}}, images(3, 32, 32))
    assert (config.model.network, config.model.preset, config.model.options) == ("unet", 32, {"image_channels": 3})
    assert (config.model.predicts, config.model.time_scale, config.loss.weighting) == ("v", 999.0, "min-snr")
    labels = torch.arange(20) % 4
    config = completed({"data": {"source": "a"}, "model": {"sde": "edm"}}, images(1, 10, 9, labels=labels))
    assert (config.model.preset, config.model.options["num_classes"]) == (8, 4)
    assert config.model.sigma_data == pytest.approx(2 / math.sqrt(12), rel=0.05)  # of uniform numbers in [-1, 1]
    assert (config.loss.weighting, config.loss.times) == ("edm", "log-normal")
    assert config.loss.mean == -1.2
    raw = {"sde": "edm", "sde_options": {"t_min": 0.2, "t_max": 8000.0}}  # pictures in [0, 255], about
    config = completed({"data": {"source": "a"}, "model": raw}, images(1, 10, 9, labels=labels))
    assert config.loss.mean == pytest.approx(-1.2 + math.log(100))
    points = TrainingData(torch.randn(9, 2, generator=torch.Generator().manual_seed(0)))
    config = completed({"data": {"source": "a"}, "model": {"sde": "flow"}, "train": {"steps": 7}}, points)
    assert (config.model.network, config.model.preset, config.model.options) == ("mlp", None, {"event_shape": [2]})
    assert (config.model.predicts, config.loss.weighting, config.train.steps) == ("velocity", "velocity", 7)
    for sde in SDES:
        for data in (points, images(1, 8, 8), TrainingData(torch.linspace(0, 1, 36).reshape(3, 1, 12))):
            model = completed({"data": {"source": "a"}, "model": {"sde": sde}}, data).model
            net = model.build(0)
            assert net.eps(data.batch(torch.tensor([0])).x, 0.5 * net.sde.t_max).isfinite().all()
    with pytest.raises(ValueError, match=r"model.options.image_channels = 1, but the data's is 3"):
        completed({"data": {"source": "a"}, "model": {"options": {"image_channels": 1}}}, images(3, 8, 8))
    for wrong, said in {
        "options.multipliers=3": "network 'unet' with multipliers=3, image_channels=1: ",
        "options.attention=1": "network 'unet' with attention=1, image_channels=1: ",
        "options=3": "model.options = 3: expected ",
        "sde_options=3": "model.sde_options = 3: expected ",
        "sde_options.beta_max=foo": "sde 'vp' with beta_max='foo': ",
    }.items():  # what Python itself refuses says where it was
        settings = {"data": {"source": "a"}}
        override(settings, [f"model.{wrong}"])
        with pytest.raises(ValueError, match=re.escape(said)):
            completed(settings, images(1, 8, 8)).model.net()


def test_what_is_not_said_fits_the_device_and_the_number_of_items():
    """On a CPU a run of images is one of minutes or an hour: the work of a step, and their number, are bounded."""

    def cost(config):
        with torch.device("meta"):
            net = config.model.net()
        return sum(p.numel() for p in net.parameters()), config.train.steps

    settings = {"data": {"source": "a"}}
    for shape in [(1, 8, 8), (3, 10, 9), (1, 28, 28), (3, 32, 32), (3, 30, 45), (3, 31, 31), (3, 49, 49), (1, 1000)]:
        data = images(*shape)
        large, small = completed(settings, data), completed(settings, data, cpu=True)
        assert cost(small) <= cost(large)
        assert cost(small)[0] < 5e6
        net = small.model.build(0)
        assert net.eps(data.batch(torch.tensor([0])).x, 0.5).isfinite().all()
        if len(shape) == 3 and shape[1] == shape[2] != 31:
            assert shape[1] / small.model.options.get("patch", 1) <= 16
        assert completed(small.to_dict(), data) == small  # kept, it is the same on another device
    x = images(3, 32, 32).x
    counts = [20, 500, 1000, 2000, 60000]
    steps = {n: [completed(settings, TrainingData(x[:1].expand(n, -1, -1, -1), None, 256), cpu).train.steps
                 for cpu in (True, False)] for n in counts}  # fmt: skip
    assert steps == {20: [1000, 2000], 500: [1600, 3900], 1000: [3100, 7800], 2000: [5000, 15600], 60000: [5000, 20000]}
    points = TrainingData(torch.zeros(5000, 2))
    assert completed(settings, points, True) == completed(settings, points)
    given = {**settings, "model": {"preset": 32}, "train": {"steps": 3}}
    found = completed(given, images(3, 32, 32), cpu=True)
    assert (found.model.preset, found.model.options, found.train.steps) == (32, {"image_channels": 3}, 3)
    assert chosen(given, found) == ["model.network=unet", "train.batch_size=128", "train.lr=0.0002"]
    assert chosen(found.to_dict(), found) == []


def read_back(table):
    write_toml(Path("table.toml"), table)
    return read_toml(Path("table.toml"))


def test_a_configuration_reads_back_the_same(here):
    odd = 'a "name"\\ with\ttabs, = [brackets] # and é \x7f \U0001f600\n'
    config = RunConfig.of(
        {
            "data": {"source": odd, "size": [30, 40], "mode": "RGB", "classes": True},
            "model": {"sde": "vp", "sde_options": {"beta_max": 15}, "options": {"multipliers": [1, 2], "dropout": 0.1}},
            "loss": {"weighting": "min-snr", "gamma": 3},
            "train": {"steps": 10, "lr": 1, "ema_decay": [0.9, 0.99], "compile": "eager", "weight_decay": 1e-7},
            "evaluate": {"data": "digits", "metrics": ["frechet", "kid"], "features": "pca:3"},
        }
    )
    assert config.data.size == (30, 40)
    assert config.evaluate.metrics == ("frechet", "kid")
    again = RunConfig.of(read_back(config.to_dict()))
    assert again == config
    assert again.train == TrainConfig(steps=10, lr=1.0, ema_decay=(0.9, 0.99), compile="eager", weight_decay=1e-7)
    minimal = RunConfig(DataConfig("x"), ModelConfig(), TrainConfig(1))
    assert RunConfig.of(read_back(minimal.to_dict())) == minimal


WRITTEN = """[data]
source = "digits"
size = [8, 8]
condition = ["super-resolution:2", "inpainting"]
drop = 0.0

[model]
sde = "vp"
preset = 8
time_scale = 999.0

[model.sde_options]

[model.options]
channels = 16
attention = []

[train]
steps = 3
grad_clip = +inf
ema_decay = [0.9, 0.99]

[evaluate]
metrics = ["frechet", "energy"]
"""


@pytest.mark.parametrize("checked", [True, False])
def test_what_earlier_versions_wrote_reads_the_same(checked, here, monkeypatch):
    """With msgspec and without."""
    Path("config.toml").write_text(WRITTEN)
    if not checked:
        monkeypatch.setitem(sys.modules, "msgspec", None)
    assert run_config(here) == RunConfig(
        DataConfig("digits", size=(8, 8), condition=("super-resolution:2", "inpainting")),
        ModelConfig(preset=8, time_scale=999.0, options={"channels": 16, "attention": []}),
        TrainConfig(3, grad_clip=math.inf, ema_decay=(0.9, 0.99)),
        evaluate=EvaluateConfig(metrics=("frechet", "energy")),
    )


def test_what_is_missing_is_named():
    for settings, words in [
        ({"train": {"steps": 1}}, "section 'data': Object missing required field `source`"),
        ({"data": {"source": "x"}}, "section 'train': Object missing required field `steps`"),
        ({"data": {"source": "x"}, "train": 3}, "train = 3: expected a section, train.KEY = VALUE"),
    ]:
        with pytest.raises(ValueError, match=re.escape(words)):
            RunConfig.of(settings)


def test_toml_is_read_back(here):
    table = {
        "n": -3, "x": 1e-30, "inf": math.inf, "minus": -math.inf, "yes": True, "text": "\x00\b'\"\\ü\u2028",
        "list": [1, 2.5, "a", [False], {"in line": 1}], "empty": {}, "a b": {"c.d": {"": 1}, "e": 2}, "x.y": [],
    }  # fmt: skip
    assert read_back(table) == table
    for wrong in (None, object(), torch.zeros(2)):
        with pytest.raises(TypeError, match=rf"{type(wrong).__name__}.* is not TOML serializable"):
            write_toml(Path("table.toml"), {"a": [wrong]})
        assert read_toml(Path("table.toml")) == table


def test_set_takes_toml_and_bare_words():
    settings = {"train": {"steps": 1}}
    changes = {
        "train.steps=30": 30, "train.lr=1e-4": 1e-4, "model.sde=ve": "ve", 'model.sde="ve"': "ve",
        "data.flip=true": True, "data.source=../a b/c:d": "../a b/c:d", "data.source=2020-01-01": "2020-01-01",
        "model.options.multipliers=[1, 2]": [1, 2], "model.options={a = 1}": {"a": 1}, "data.source=a=b": "a=b",
    }  # fmt: skip
    for change, value in changes.items():
        override(settings, [change])
        found = settings
        for key in change.partition("=")[0].split("."):
            found = found[key]
        assert found == value
    for wrong in ("steps=3", "train.steps", "train.=3", "train.steps=", "train.lr=[1", "train.steps.x=1"):
        with pytest.raises(ValueError, match=re.escape(f"--set {wrong!r}: ")):
            override({"train": {"steps": 1}}, [wrong])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("trian.steps=3", ["'trian'", "data, model, loss, train, evaluate"]),
        ("train.step=3", ["section 'train' has no 'step'", "steps, batch_size, lr"]),
        ("data.sauce=digits", ["section 'data' has no 'sauce'", "source, classes"]),
        ("evaluate.every=3", ["section 'evaluate' has no 'every'"]),
        ("model.options.chanels=3", ["'chanels'", "channels"]),
        ("model.sde_options.beta=3", ["'beta'", "beta_min"]),
        ("model.sde=vpp", ["--sde 'vpp'", "'vp'"]),
        ("model.preset=9", ["--preset 9", "28"]),
        ("train.lr=fast", ["train.lr = 'fast'", "expected `float`, got `str`"]),
        ("train.steps=2.5", ["train.steps = 2.5", "expected `int`, got `float`"]),
        ("train.steps=true", ["train.steps = True", "expected `int`, got `bool`"]),
        ("train.steps=0", ["section 'train'", "--steps 0", "a whole number >= 1"]),
        ("data.mode=CMYK", ["data.mode = 'CMYK'", "one of 'L', 'RGB'"]),
        ("data.mode=3", ["data.mode = 3", "one of 'L', 'RGB'"]),
        ("data.size=[1, 2, 3]", ["data.size = [1, 2, 3]", "expected `array` of length 2"]),
        ("data.size=[1, 2.5]", ["data.size[1] = 2.5", "expected `int`, got `float`"]),
        ("data.size=big", ["data.size = 'big'", "expected `int | array | null`, got `str`"]),
        ("model.sde_options=3", ["model.sde_options = 3", "expected `object`, got `int`"]),
        ("loss.weighting=snr", ["loss.weighting = 'snr'", "'min-snr', or one of 'simple', 'edm'"]),
        ("loss.gamma=-1", ["section 'loss'", "gamma=-1"]),
        ("evaluate.solver=dimm", ["dimm", "ddim"]),
        ("evaluate.data=nothing", ["nothing: no such file"]),
        ("evaluate.features=nothing", ["nothing", "pixels"]),
        ("evaluate.metrics=frechet", ["evaluate.metrics = 'frechet'", "expected `array`, got `str`"]),
        ("train=3", ["expected SECTION.KEY=VALUE"]),
        ("data.limit=0", ["limit=0"]),
    ],
)
def test_a_wrong_entry_is_named_before_anything_is_written(change, words, here, capsys):
    more = ["--set", "evaluate.data=digits"] if change.startswith("evaluate.features") else []
    assert run(*DIGITS, "--out", "run", "--set", "train.steps=3", *more, "--set", change) == 2
    out, err = capsys.readouterr()
    assert err.startswith("scoresde: ")
    assert not out
    assert all(word in err for word in words), err
    assert not (here / "run").exists()


def test_every_key_is_in_the_help(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out.partition("keys of --set")[2]
    for kind in SECTIONS.values():
        assert all(re.search(rf"\b{key.name}\b", text) for key in fields(kind))


def test_train_without_data_or_with_a_wrong_file(here, capsys):
    assert run("train", "--out", "run") == 2
    assert "give --data" in capsys.readouterr().err
    Path("a.toml").write_text("[train\n")
    assert run("train", "--config", "a.toml", "--out", "run") == 2
    assert "a.toml is no TOML" in capsys.readouterr().err
    assert run("train", "--config", "b.toml", "--out", "run") == 2
    assert run("train", "--data", "digits", "--out", "a.toml") == 2
    assert "is a file" in capsys.readouterr().err
    assert run("train", "--data", "digits", "--out", "run", "--device", "toaster") == 2
    assert "--device toaster" in capsys.readouterr().err


# --- train -----------------------------------------------------------------------------------------------------------


def test_a_run_keeps_all_that_it_needs(digits_run):
    config = run_config(digits_run)
    data = config.data.open()
    assert config == completed(config.to_dict(), data)
    assert (config.train.steps, config.train.batch_size, config.model.options["num_classes"]) == (3, 8, 10)
    head, last = (digits_run / "log.csv").read_text().splitlines()
    assert {"loss", "frechet", "energy"} <= set(head.split(","))
    assert last.startswith("3,")
    with Image.open(digits_run / "samples" / "00000003.png") as picture:
        assert (picture.mode, picture.size) == ("L", (3 * 34 + 2, 2 * 34 + 2))  # 5 digits of 8 pixels, 4 times as large
    denoiser = scoresde.load(digits_run)
    assert denoiser.sde == VPSDE()
    model = open_run(digits_run)
    assert (model.about.shape, model.about.levels, model.about.num_classes) == ((1, 8, 8), 17, 10)


def test_sampling_needs_nothing_that_only_training_does(digits_run, here):
    """Neither is loaded by a command that reads a run folder; `train` says what to install, before it writes."""
    code = f"""if True:
        import sys
        sys.modules["msgspec"] = sys.modules["tomli_w"] = None  # whose import then fails
        import scoresde
        from scoresde.cli import main
        folder = {str(digits_run)!r}
        scoresde.load(folder)
        assert main(["info", folder]) == 0
        assert main(["sample", folder, "--n", "2", "--nfe", "1", "--out", "a.npz", "--device", "cpu"]) == 0
        assert main(["train", "--out", "run", "--data", "digits"]) == 2
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "digits" in done.stdout
    assert done.stderr.endswith("msgspec, written by tomli-w: pip install scoresde[train]\n")
    assert [path.name for path in here.iterdir()] == ["a.npz"]


def weights(folder):
    denoiser = scoresde.load(folder)
    return list(denoiser.net.state_dict().values())


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_is_stopped_goes_on_to_the_same_weights(number, status, here, capsys, monkeypatch):
    whole = [*MOONS, "--steps", 6, "--out"]
    assert run(*whole, "whole") == 0
    step = Trainer._train_step

    def interrupted(trainer, *batch):
        if trainer.step == 2:
            os.kill(os.getpid(), number)
        return step(trainer, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", interrupted)
        before = signal.getsignal(signal.SIGTERM)
        assert run(*whole, "run") == status
        assert signal.getsignal(signal.SIGTERM) is before
    assert "scoresde train --out run goes on" in capsys.readouterr().err
    assert [path.name for path in checkpoints(here / "run")] == ["00000003"]
    assert run("train", "--out", "run", "--device", "cpu") == 0
    assert "run is at step 3 of 6: going on" in capsys.readouterr().err
    assert all(torch.equal(a, b) for a, b in zip(weights("run"), weights("whole"), strict=True))
    again = (here / "run" / "config.toml").read_bytes()
    assert run(*whole, "run") == 0
    assert again == (here / "run" / "config.toml").read_bytes()


def test_a_run_of_other_settings_is_refused_and_kept(here, capsys):
    assert run(*MOONS, "--steps", 2, "--out", "run") == 0
    kept = (here / "run" / "config.toml").read_bytes()
    assert run("train", "--out", "run", "--lr", "0.5") == 2
    told = capsys.readouterr().err
    assert "run holds a run of another configuration. train.lr: 0.001 in the run, 0.5 here (`scoresde train" in told
    assert run(*MOONS, "--steps", 2, "--data", "rings:200", "--out", "run") == 2
    assert "data.source: two-moons:200 in the run, rings:200 here" in capsys.readouterr().err
    assert (here / "run" / "config.toml").read_bytes() == kept


def test_what_could_not_be_sampled_from_is_not_trained(here, capsys):
    """By the sampler's own rule; nothing is written."""
    for words in (
        ("flow", "eps"),
        ("flow", "score"),
        ("cosine-chain", "eps", "--set", "model.sde_options.max_beta=1.0"),
    ):
        assert run(*MOONS, "--steps", 2, "--sde", words[0], "--predicts", *words[1:], "--out", "run") == 2
        found = capsys.readouterr().err
        assert f"--sde {words[0]} --predicts {words[1]}: a network that predicts {words[1]} says nothing of x0" in found
        assert "a smaller --set model.sde_options.t_max" in found
        assert not (here / "run").exists()
    ends = ("--set", "model.sde_options.t_max=0.99")
    assert run(*MOONS, "--steps", 2, "--sde", "flow", "--predicts", "eps", *ends, "--out", "run") == 0


def test_a_run_whose_end_is_not_noise_says_so(here, capsys):
    """Before its first step, and afterwards."""
    small = ["--data", "two-moons:50", "--steps", "1", "--batch-size", "4", "--device", "cpu",
             "--set", "model.options.width=8", "--set", "model.options.depth=1"]  # fmt: skip
    for out, options, times in [("whole", [], 0), ("short", ["--set", "model.sde_options.beta_max=1.0"], 1)]:
        assert main(["train", *small, *options, "--out", out]) == 0
        assert capsys.readouterr().err.count("at t_max = 1 data are") == times
        assert main(["info", out]) == 0
        assert capsys.readouterr().out.count("remark    at t_max = 1 data are ") == times


def test_a_second_run_changes_nothing_of_the_first(here, capsys, monkeypatch):
    """While one runs, and has no checkpoint yet, another is refused before it writes; the first can be stopped and goes
    on."""
    step, files = Trainer._train_step, [here / "run" / name for name in ("config.toml", "data.json")]

    def disturbed(trainer, *batch):
        if trainer.step == 1 and trainer.config.steps == 4:
            before = [path.read_bytes() for path in files]
            assert run(*MOONS, "--data", "rings:500", "--out", "run", "--steps", 2) == 2
            assert "another run is writing into run, process" in capsys.readouterr().err
            assert [path.read_bytes() for path in files] == before
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", disturbed)
        assert run(*MOONS, "--steps", 4, "--out", "run") == 143
    assert run("train", "--out", "run", "--device", "cpu") == 0
    assert run(*MOONS, "--steps", 4, "--out", "whole") == 0
    assert all(torch.equal(a, b) for a, b in zip(weights("run"), weights("whole"), strict=True))


def test_a_refused_run_leaves_no_folder(here, capsys):
    assert run(*MOONS, "--steps", 2, "--set", "train.accumulate=9", "--out", "run") == 2
    assert run("train", "--data", "nothing.npy", "--out", "run") == 2
    assert list(here.iterdir()) == []


def commands_in(text):
    """The command lines in a message."""
    return [shlex.split(line)[1:] for line in re.findall("`(scoresde [^`]+)`", text)]


def test_what_a_refused_run_is_advised_works(here, capsys):
    """Whether it was an option that was refused or config.toml that was edited: each entry is named with both values,
    and the advice leads on."""
    assert run(*MOONS, "--steps", 2, "--out", "run") == 0
    path = here / "run" / "config.toml"
    kept = path.read_text()
    path.write_text(kept.replace("lr = 0.001", "lr = 0.003").replace('sde = "vp"', 'sde = "flow"'))
    assert path.read_text() != kept
    assert run("train", "--out", "run", "--device", "cpu") == 2
    told = capsys.readouterr().err
    assert "model.sde: vp in the run, flow here; train.lr: 0.001 in the run, 0.003 here" in told
    assert "with run/config.toml removed, `scoresde train --out run` goes on" in told
    path.unlink()
    (words,) = commands_in(told)
    with pytest.warns(UserWarning, match="config.toml is missing: the configuration is that of .*00000002"):
        assert run(*words) == 0
    assert path.read_text() == kept
    assert run("train", "--out", "run", "--sde", "ve") == 2
    (words,) = commands_in(capsys.readouterr().err)
    assert run(*words) == 0


def test_a_run_goes_on_with_what_may_change_and_without_saying_the_rest(here, capsys):
    assert run(*MOONS, "--steps", 3, "--lr", 0.002, "--set", "train.schedule=constant", "--out", "run") == 0
    assert run("train", "--data", "two-moons:200", "--steps", 5, "--out", "run", "--quiet", "--device", "cpu") == 0
    path = here / "run" / "config.toml"
    path.write_text(path.read_text().replace("steps = 5", "steps = 6").replace("log_every = 20", "log_every = 2"))
    assert run("train", "--out", "run", "--set", "evaluate.nfe=3", "--quiet", "--device", "cpu") == 0
    config = run_config(here / "run")
    assert (config.train.steps, config.train.log_every, config.train.lr, config.evaluate.nfe) == (6, 2, 0.002, 3)
    longer = [*MOONS, "--steps", 6, "--lr", 0.002, "--set", "train.schedule=constant", "--out", "whole"]
    assert run(*longer) == 0
    assert all(torch.equal(a, b) for a, b in zip(weights("run"), weights("whole"), strict=True))


@pytest.mark.parametrize("content", ["", "[data", "\xff"], ids=["empty", "torn", "no text"])
def test_a_run_goes_on_without_its_config(content, here, capsys):
    """Its last checkpoint says what it was trained with; a run of an earlier version wants its data named."""
    assert run(*MOONS, "--steps", 2, "--out", "run") == 0
    path = here / "run" / "config.toml"
    kept = path.read_text()
    path.write_bytes(content.encode("latin1"))
    with pytest.warns(UserWarning, match=r"config\.toml is .*: the configuration is that of .*00000002"):
        assert run("train", "--out", "run", "--device", "cpu") == 0
    assert path.read_text() == kept
    (last,) = checkpoints(here / "run")
    manifest = read_manifest(last)
    del manifest["settings"]
    write_manifest(last, manifest)
    path.write_bytes(content.encode("latin1"))
    with pytest.warns(UserWarning, match="the configuration is that of"):
        assert run("train", "--out", "run", "--device", "cpu") == 2
    assert "give --data" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="the configuration is that of"):
        assert run("train", "--out", "run", "--data", "two-moons:200", "--device", "cpu") == 0
    assert path.read_text() == kept


def test_flags_win_over_set_and_set_over_the_file(here):
    Path("run.toml").write_text('[data]\nsource = "two-moons:50"\n[train]\nsteps = 9\nlr = 0.5\nwarmup = 1\n')
    words = (
        "train --config run.toml --out x --set train.lr=0.25 --set train.steps=8 --steps 7 --preset 28 --data rings:3"
    )
    args = parser().parse_args(words.split())
    found = settings_of(train.TrainOptions.of(args), SECTIONS)
    assert found == {
        "data": {"source": "rings:3"},
        "train": {"steps": 7, "lr": 0.25, "warmup": 1},
        "model": {"preset": 28},
    }


def test_a_folder_of_images_of_any_size(here):
    rng = np.random.default_rng(0)
    for i in range(9):
        (here / "photos" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        array = rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)
        Image.fromarray(array).save(here / "photos" / "ab"[i % 2] / f"{i}.png")
    assert run(
        "train", "--data", "photos", "--size", 8, "--classes", "--steps", 1, "--batch-size", 4, "--device", "cpu",
        "--out", "run", "--quiet", "--set", "train.workers=0", "--set", "model.options.channels=16",
        "--set", "evaluate.nfe=1", "--set", "evaluate.grid=2",
    ) == 0  # fmt: skip
    model = open_run(here / "run")
    assert (model.about.shape, model.about.classes) == ((3, 8, 8), ["a", "b"])
    assert run("sample", "run", "--class", "b", "--n", 2, "--nfe", 1, "--out", "b.npz", "--device", "cpu") == 0
    assert np.load("b.npz")["labels"].tolist() == [1, 1]
    # Another folder is made alike.
    assert (
        run("evaluate", "photos", "--data", "photos", "--size", 8, "--metrics", "energy", "--features", "pixels") == 0
    )
    assert run("evaluate", "run", "--data", "photos", "--n", 9, "--nfe", 1, "--metrics", "energy") == 0
    # A part of it, in memory; what the run was trained on is what it is measured against.
    assert run(
        "train", "--data", "photos", "--size", 8, "--steps", 1, "--batch-size", 4, "--device", "cpu", "--out", "part",
        "--quiet", "--set", "data.in_memory=true", "--set", "data.limit=8", "--set", "data.flip=true",
        "--set", "model.options.channels=16", "--set", "evaluate.grid=0",
    ) == 0  # fmt: skip
    assert run_config(here / "part").data.limit == 8
    assert run("evaluate", "part", "--n", 9, "--nfe", 1, "--metrics", "energy", "--out", "scores.json") == 0
    assert json.loads(Path("scores.json").read_text())["reference"] == 8


# --- sample ----------------------------------------------------------------------------------------------------------


def test_samples_are_those_of_the_library_in_any_batch(digits_run, here, capsys):
    denoiser = scoresde.load(digits_run)
    labels = torch.arange(7) % 10
    expected = sample(denoiser, (7, 1, 8, 8), DDIM(0.5), nfe=3, seed=5, cond={"label": labels}).x
    for i, batch in enumerate((7, 3, 1)):
        assert run("sample", digits_run, "--n", 7, "--solver", "ddim-0.5", "--nfe", 3, "--seed", 5, "--out", f"{i}.npz",
                   "--batch-size", batch, "--float", "--quiet", "--device", "cpu") == 0  # fmt: skip
        found = np.load(f"{i}.npz")
        assert np.abs(found["x"] - expected.numpy()).max() < 1e-5
        assert found["labels"].tolist() == labels.tolist()
        assert np.array_equal(found["images"], np.rint((found["x"].clip(-1, 1) + 1) * 127.5).astype(np.uint8))
    assert "7 samples of DDIM(eta=0.5), nfe=3, seed 5" in capsys.readouterr().out
    # One sample alone, of its own class.
    seed = sample_seeds(5, 7)[4]
    one = sample(denoiser, (1, 1, 8, 8), DDIM(0.5), nfe=3, seed=[seed], cond={"label": labels[4:5]}).x
    assert torch.allclose(one[0], expected[4], atol=1e-5)


def test_two_processes_draw_what_one_does(digits_run, here):
    options = [digits_run, "--number", "5", "--batch-size", "2", "--nfe", "2", "--device", "cpu", "--float", "--out"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "scoresde"]
    run_of_two = subprocess.run(
        [*torchrun, "sample", *map(str, options), "two.npz"],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120,
    )  # fmt: skip
    assert run_of_two.returncode == 0, run_of_two.stderr
    assert run_of_two.stdout.startswith("two.npz: 5 samples")
    assert run("sample", *options, "one.npz", "--quiet") == 0
    one, two = np.load("one.npz"), np.load("two.npz")
    assert np.abs(one["x"] - two["x"]).max() < 1e-5
    assert one["labels"].tolist() == two["labels"].tolist()


def test_a_class_a_grid_and_clipping(digits_run, here):
    assert run("sample", digits_run, "--n", 3, "--class", 8, "--clip", "--solver", "DDIM(eta=1)", "--steps", 4,
               "--grid", "quadratic", "--out", "a.npz", "--float", "--quiet", "--device", "cpu") == 0  # fmt: skip
    denoiser = Clip(scoresde.load(digits_run))
    times = scoresde.Grid.quadratic(denoiser.sde, 4)
    expected = sample(denoiser, (3, 1, 8, 8), DDIM(1.0), grid=times, seed=0, cond={"label": torch.full((3,), 8)}).x
    found = np.load("a.npz")
    assert np.abs(found["x"] - expected.numpy()).max() < 1e-5
    assert found["labels"].tolist() == [8, 8, 8]


def test_pictures_show_the_samples(digits_run, here):
    options = ["--n", 5, "--nfe", 2, "--quiet", "--device", "cpu"]
    for out in ("a.npz", "a.png", "folder"):
        assert run("sample", digits_run, *options, "--out", out) == 0
    images = np.load("a.npz")["images"]
    assert sorted(np.load("a.npz").files) == ["images", "labels"]
    with Image.open("a.png") as picture:
        page = np.array(picture)
    for i in range(5):
        top, left = 2 + (i // 3) * 34, 2 + (i % 3) * 34
        assert np.array_equal(page[top : top + 32 : 4, left : left + 32 : 4], images[i, 0])
    assert (page[0] == 255).all()
    assert [path.name for path in sorted((here / "folder").iterdir())] == [f"{i:06d}.png" for i in range(5)]
    with Image.open("folder/000003.png") as picture:
        assert np.array_equal(np.array(picture), images[3, 0])
    assert np.array_equal(scoresde.data.read_data("folder").x.numpy(), images)


def test_a_grid_has_white_between_its_images():
    x = torch.zeros(2, 3, 40, 50, dtype=torch.uint8)
    page = grid(x, columns=2)
    assert page.shape == (3, 44, 106)
    assert int((page == 0).sum()) == x.numel()
    assert to_levels(torch.tensor([-3.0, -1.0, 0.0, 1.0, 2.0])).tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--solver", "dimm"], "--solver 'dimm': expected 'ddim', or one of 78 others"),
        (["--solver", "DDIM(eta=-1)"], "--solver 'DDIM(eta=-1)': eta=-1: expected a finite number >= 0"),
        (["--solver", "DDIM(etaa=1)"], "DDIM has no 'etaa': it knows eta"),
        (["--solver", "UniPC(order=9)"], "order=9: expected a whole number from 1 to 4"),
        (["--solver", "DDIM(eta=x)"], "expected numbers, texts, lists and solvers"),
        (["--solver", "DDIM(1, 2)"], "too many positional arguments"),
        (["--solver", "DDIN(1)"], "expected 'DDIM', or one of 29 others to call"),
        (["--solver", "(" * 3000], "expected one of"),
        (["--solver", "~" * 99999 + "1"], "expected one of"),
        (["--solver", "__import__('os')"], "expected one of 30 to call"),
        (["--n", "0"], "--n 0"),
        (["--nfe", "3", "--steps", "3"], "one of --nfe and --steps"),
        (["--solver", "heun", "--grid", "karras", "--nfe", "0"], "--nfe 0"),
        (["--solver", "rk4", "--nfe", "1", "--grid", "uniform", "--class", "10"], "there are 10, 0 to 9"),
        (["--solver", "ode-dopri5", "--grid", "uniform"], "its own times"),
        (["--class", "10"], "there are 10, 0 to 9"),
        (["--seed", "-1"], "--seed -1"),
        (["--variance", "none.npz"], "none.npz"),
        (["--out", "b.png", "--float"], "--float is for"),
        (["--out", "a.jpg"], "expected a file .png or .npz"),
        (["--denoiser", "a:b"], "one model"),
        (["--average", "3"], "average-3"),
        (["--device", "toaster"], "--device toaster"),
    ],
)
def test_wrong_arguments_of_sample_are_status_2(arguments, words, digits_run, here, capsys):
    assert run("sample", digits_run, "--nfe" if "--steps" not in arguments else "--n", 2, "--out", "a.npz",
               *arguments) == 2  # fmt: skip
    out, err = capsys.readouterr()
    assert (out, words in err, "Traceback" in err) == ("", True, False), err
    assert list(here.iterdir()) == []


def test_no_run_folder(here, capsys):
    for command in (["sample", "--out", "a.npz"], ["variance", "--out", "a.npz"], ["compare", "--out", "a"]):
        assert run(*command, "nothing") == 2
        assert "nothing: there is no such run folder" in capsys.readouterr().err
        assert run(*command) == 2
        assert "name one model" in capsys.readouterr().err
    assert run("evaluate", "nothing", "--data", "digits") == 2
    assert "nothing: there is no such file, run folder or data set" in capsys.readouterr().err


def test_what_was_finished_is_kept(digits_run, here, capsys, monkeypatch):
    draw = Recipe.__call__

    def interrupted(recipe, items):
        if items.start == 4:
            os.kill(os.getpid(), numbers.pop())
        return draw(recipe, items)

    options = ["sample", digits_run, "--n", 6, "--batch-size", 2, "--nfe", 2, "--device", "cpu", "--out"]
    assert run(*options, "whole.npz") == 0
    monkeypatch.setattr(Recipe, "__call__", interrupted)
    numbers = [signal.SIGTERM, signal.SIGINT]
    for status in (130, 143):
        assert run(*options, f"{status}.npz") == status
        assert "4 of 6 samples are in" in capsys.readouterr().err
        assert np.array_equal(np.load(f"{status}.npz")["images"], np.load("whole.npz")["images"][:4])


def test_samples_that_are_not_finite_are_status_1(here, capsys, monkeypatch):
    Path("a_broken_model.py").write_text(
        "import torch\nfrom scoresde import VPSDE, EpsDenoiser\n"
        "net = EpsDenoiser(lambda x, t: torch.where(x > 2.5, torch.nan, 0 * x), VPSDE())\n"
    )
    monkeypatch.syspath_prepend(here)
    options = ["--denoiser", "a_broken_model:net", "--shape", 1, 4, 4, "--n", 40, "--batch-size", 8, "--quiet"]
    assert run("sample", *options, "--solver", "ddim", "--nfe", 2, "--out", "a.npz") == 1
    assert "became non-finite in step 0" in capsys.readouterr().err
    assert run("sample", *options[:2], "--out", "a.npz") == 2
    assert "--shape" in capsys.readouterr().err


def test_solvers_by_name_and_by_call():
    assert all(solver_of(name) == entry.solver for name, entry in SOLVERS.items())
    assert all(solver_of(entry.call) == entry.solver for entry in SOLVERS.values())
    assert solver_of("unipc") == SOLVERS["unipc3"].solver
    assert solver_of("Parallel(UniPC(order=2), tol=0.01)") == Parallel(UniPC(order=2), tol=0.01)


# --- evaluate --------------------------------------------------------------------------------------------------------


def test_a_file_scores_as_the_run_that_it_is_from(digits_run, here, capsys):
    how = ["--n", 30, "--nfe", 2, "--quiet", "--device", "cpu"]
    measure = ["--data", "digits", "--limit", 80, "--metrics", "frechet", "precision_recall", "--quiet"]
    assert run("sample", digits_run, *how, "--out", "a.npz") == 0
    assert run("evaluate", "a.npz", *measure, "--out", "file.json") == 0
    assert run("evaluate", digits_run, *how, *measure, "--out", "run.json") == 0
    table = capsys.readouterr().out
    first, second = (json.loads(Path(name).read_text()) for name in ("file.json", "run.json"))
    assert first["scores"] == second["scores"]
    assert set(first["scores"]) == {"frechet", "precision", "recall", "density", "coverage"}
    assert {"environment", "arguments", "features", "samples", "reference", "seed"} <= set(second)
    assert "digits" in second["features"]
    assert f"{second['scores']['frechet']['value']:.4g}" in table
    assert second["samples from"]["solver"].startswith("Adams")


def test_data_against_themselves_are_at_no_distance(here):
    assert run("evaluate", "digits", "--data", "digits", "--metrics", "frechet", "--features", "pixels", "--floor",
               "digits", "--out", "a.json", "--quiet") == 0  # fmt: skip
    found = json.loads(Path("a.json").read_text())["scores"]["frechet"]
    assert abs(found["value"]) < 1e-6
    assert abs(found["floor"]) < 1e-6


def test_what_does_not_fit_is_refused(digits_run, moons_run, here, capsys):
    for arguments, words in (
        ([digits_run, "--data", "two-moons:50"], "has items (2,), the model's are (1, 8, 8)"),
        (["digits"], "give --data"),
        ([digits_run, "--metrics", "fid"], "'frechet'"),
        ([digits_run, "--metrics", "recall"], "samples: 8 of them, and recall needs 12"),
        ([digits_run, "--limit", 5, "--metrics", "kid"], "data: 5 of them, and kid needs 8"),
        ([digits_run, "--features", "no"], "expected digits or fashion-mnist"),
        ([digits_run, "--features", "fashion-mnist"], "8"),
        ([digits_run, "--out", "."], "is a folder"),
    ):
        assert run("evaluate", *arguments, "--n", 8, "--nfe", 1) == 2
        assert words in capsys.readouterr().err
    assert run("sample", moons_run, "--out", "a.png") == 2
    assert "are no pictures; give a file .npz" in capsys.readouterr().err


# --- variance and likelihood -----------------------------------------------------------------------------------------


def test_the_table_of_variances_is_sampled_with(digits_run, moons_run, here, capsys):
    assert run("variance", digits_run, "--samples", 3, "--times", 4, "--out", "t.npz", "--device", "cpu") == 0
    out = capsys.readouterr().out
    denoiser, table = scoresde.load(digits_run), VarianceTable.load("t.npz")
    assert (len(table.t), table.samples) == (4, 3)
    assert f"{float(table.eps_square[-1]):.4g}" in out
    x, labels = digits()
    expected = scoresde.variance.estimate(denoiser, x[:64], table.t, samples=3, cond={"label": labels[:64]})
    assert torch.allclose(table.eps_square, expected.eps_square)
    assert run("sample", digits_run, "--n", 4, "--solver", "ddpm", "--nfe", 3, "--variance", "t.npz", "--out", "a.npz",
               "--float", "--quiet", "--device", "cpu") == 0  # fmt: skip
    analytic = AnalyticDenoiser(denoiser, table, (-1.0, 1.0))
    cond = {"label": torch.arange(4)}
    found = sample(analytic, (4, 1, 8, 8), OptimalVariance(DDPM()), nfe=3, seed=0, cond=cond).x
    assert np.abs(np.load("a.npz")["x"] - found.numpy()).max() < 1e-5
    assert run("sample", moons_run, "--solver", "ddpm", "--variance", "t.npz", "--out", "b.npz") == 2
    assert "made for another model" in capsys.readouterr().err
    assert run("sample", digits_run, "--solver", "heun", "--variance", "t.npz", "--out", "b.npz") == 2


def test_the_likelihood_of_a_run(digits_run, moons_run, here, capsys):
    assert run("likelihood", digits_run, "--limit", 3, "--steps", 3, "--out", "a.json", "--quiet", "--bound", "--draws",
               4, "--batch", 2, "--device", "cpu") == 0  # fmt: skip
    found = json.loads(Path("a.json").read_text())
    images, labels = digit_levels()
    expected = bits_per_dim(scoresde.load(digits_run), images[:3], 17, data_range=outer_edges(-1.0, 1.0, 17), steps=3,
                            seed=0, cond={"label": labels[:3]})  # fmt: skip
    assert found["each"] == pytest.approx(expected.per_image.tolist(), rel=1e-4)
    assert run("likelihood", moons_run, "--data", "two-moons:7", "--steps", 3, "--out", "b.json", "--quiet") == 0
    assert json.loads(Path("b.json").read_text())["unit"] == "nats"
    assert run("likelihood", moons_run, "--data", "digits", "--out", "c.json") == 2
    assert "has items (1, 8, 8)" in capsys.readouterr().err
    # 8-bit files are taken as training takes them: the lowest level at -1 itself.
    np.savez("levels.npz", images=images[:3].numpy() * 15, labels=labels[:3].numpy())
    assert run("likelihood", digits_run, "--data", "levels.npz", "--levels", 256, "--steps", 2, "--out", "d.json") == 0
    assert json.loads(Path("d.json").read_text())["offset"] == pytest.approx(math.log2(255 / 2))


# --- compare ---------------------------------------------------------------------------------------------------------


def test_a_race_goes_on_where_it_was_killed_and_grows(digits_run, here, capsys, monkeypatch):
    options = ["compare", digits_run, "--data", "digits", "--limit", 60, "--n", 12, "--metrics", "frechet", "energy",
               "--device", "cpu", "--nfe", 1, 3]  # fmt: skip
    assert run(*options, "--solvers", "ddim", "heun", "rk4", "--out", "whole", "--quiet") == 0
    printed = capsys.readouterr().out
    measured = []
    measure = compare.Race.measure

    def dies(race, cell, floor):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(cell)
        return measure(race, cell, floor)

    with monkeypatch.context() as patch:
        patch.setattr(compare.Race, "measure", dies)
        assert run(*options, "--solvers", "ddim", "heun", "--out", "race") == 130
    assert "finished cells are kept" in capsys.readouterr().err
    cells = (here / "race" / "cells.jsonl").read_bytes()
    assert run(*options, "--solvers", "ddim", "heun", "rk4", "--out", "race", "--quiet") == 0
    assert (here / "race" / "cells.jsonl").read_bytes().startswith(cells)
    assert capsys.readouterr().out == printed
    whole, race = (json.loads((here / name / "results.json").read_text()) for name in ("whole", "race"))
    assert [cell["scores"] for cell in whole["cells"]] == [cell["scores"] for cell in race["cells"]]
    assert whole["real data"]["scores"]["frechet"]["value"] > 0
    assert [(c["solver"], c["nfe"], c.get("used")) for c in race["cells"]] == [
        ("ddim", 1, 1), ("ddim", 3, 3), ("heun", 1, 1), ("heun", 3, 3), ("rk4", 1, 1), ("rk4", 3, 1),
    ]  # fmt: skip
    page = (here / "race" / "README.md").read_text()
    assert f"| ddim | {race['cells'][0]['scores']['frechet']['value']:.4g} +- " in page
    if (here / "race" / "frechet.png").exists():
        assert "![frechet](frechet.png)" in page
    # What a cell is: the samples of that solver, measured.
    solution = sample(scoresde.load(digits_run), (12, 1, 8, 8), DDIM(), nfe=3, seed=0,
                      cond={"label": torch.arange(12) % 10})  # fmt: skip
    features = scoresde.metrics.classifier_features("digits")
    real = scaled(digit_levels()[0][:60], 17)
    x = scaled(to_levels(solution.x), 256)
    expected = scoresde.metrics.frechet_distance(features(x), features(real))
    assert race["cells"][1]["scores"]["frechet"]["value"] == pytest.approx(expected, rel=1e-3)
    assert run(*options, "--seed", 1, "--solvers", "ddim", "--out", "race") == 2
    assert "holds cells of another run: samples:" in capsys.readouterr().err


def test_a_solver_that_cannot_run_is_said_and_the_rest_goes_on(moons_run, here, capsys):
    options = ["--nfe", 2, "--n", 20, "--out", "race", "--quiet", "--device", "cpu"]
    assert run("compare", moons_run, "--solvers", "ddim", "ode-dopri5", *options) == 0
    assert "- ode-dopri5 on default at 2: the budget of" in capsys.readouterr().out
    assert run("compare", moons_run, "--solvers", "dimm", "--out", "race") == 2


def test_a_comparison_without_matplotlib_says_that_it_draws_nothing(moons_run, here, capsys, monkeypatch):
    options = ["compare", moons_run, "--solvers", "ddim", "--nfe", 1, "--n", 20, "--device", "cpu", "--out", "race"]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # whose import then fails
    assert run(*options) == 0
    assert "no plot, as matplotlib is not installed: pip install scoresde[plots]" in capsys.readouterr().err
    assert not list(here.glob("race/*.png"))
    assert ".png" not in Path("race/README.md").read_text()
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    assert run(*[here / word if word == "race" else word for word in options]) == 0
    assert "race/README.md, results.json, frechet.png" in capsys.readouterr().err


@pytest.mark.parametrize("low", [1e-3, 0.97, 2.2, 9.5])
@pytest.mark.parametrize("ratio", [1.02, 1.3, 2.0, 3.3, 9.0, 50.0, 1e6])
def test_a_logarithmic_axis_has_three_labels_however_short_it_is(low, ratio):
    found = log_ticks(low, low * ratio)
    assert 3 <= len(found) <= 12
    assert found == sorted(set(found))
    assert low <= found[0]
    assert found[-1] <= low * ratio
    gaps = [b / a for a, b in itertools.pairwise([low, *found, low * ratio])]
    assert max(gaps) <= ratio**0.5 * 1.0001  # nor is more than half of it without one
    assert len({f"{tick:.3g}" for tick in found}) == len(found) or ratio < 1.1


def test_cells_of_anything_go_on(tmp_path):
    path = tmp_path / "cells.jsonl"
    cells = Cells(path, "scoresde compare", "cells", {"a": 1}, lambda record: record["key"])
    cells.write({"key": 1, "value": math.nan})
    cells.write({"key": 2, "value": 3.0})
    path.write_bytes(path.read_bytes()[:-3])
    again = Cells(path, "scoresde compare", "cells", {"a": 1}, lambda record: record["key"])
    assert again.done == {1: {"key": 1, "value": None}}
    with pytest.raises(ValueError, match="holds cells of another run: a: 1 in the file, 2 now"):
        Cells(path, "scoresde compare", "cells", {"a": 2}, lambda record: record["key"])


def test_of_a_cell_no_bit_may_change(tmp_path):
    """It is refused by name, or, if it was the last line's end, made anew; lines without a hash are read."""
    path = tmp_path / "cells.jsonl"

    def read():
        return Cells(path, "scoresde compare", "cells", {"a": 1}, lambda record: record["key"])

    cells = read()
    for key in (1, 2):
        cells.write({"key": key, "value": 0.25 * key})
    content = path.read_bytes()
    for k in range(0, len(content) * 8 - 8, 7):
        path.write_bytes(content[: k // 8] + bytes([content[k // 8] ^ 1 << k % 8]) + content[k // 8 + 1 :])
        with pytest.raises(ValueError, match=r"cells\.jsonl(: line \d is damaged| is not a file of)"):
            read()
    path.write_bytes(content[:-1] + b"\x08")
    assert read().done == {1: {"key": 1, "value": 0.25}}
    path.write_text('{"format": "scoresde-compare-1", "made_for": {"a": 1}}\n{"key": 3, "value": 1.0}\n')
    assert read().done == {3: {"key": 3, "value": 1.0}}


# --- info ------------------------------------------------------------------------------------------------------------


def test_info_of_a_run(digits_run, capsys):
    assert run("info", digits_run) == 0
    out = capsys.readouterr().out
    for word in ("VDenoiser(UNet", "digits: items (1, 8, 8)", "3 of 3", "frechet"):
        assert word in out


def test_every_command_is_a_module_of_one_form():
    for module, options in cli.COMMANDS:
        assert vars(module).keys() >= {"EXAMPLES", "TEXT", options.__name__, "run"}
