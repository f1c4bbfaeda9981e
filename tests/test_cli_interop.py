"""Commands on a network of another toolkit: FORMAT:PATH in a run folder's place."""

import json
import re

import numpy as np
import pytest
import torch
from adm_reference import Adm
from standins import snapshot, write_edm, write_score_sde
from textbook_song import Made, edm, score_sde

from scoresde import sample
from scoresde.cli import main
from scoresde.guidance import ClassifierFree
from scoresde.interop import from_edm, from_source, source_of
from scoresde.interop.score_sde import CIFAR10, SCORE_SDE
from scoresde.levels import to_levels
from scoresde.noise import seeds_of
from scoresde.solvers import DDIM
from scoresde.wrappers import Clip, SameMean, below_limit

pytest.importorskip("PIL.Image")

EDM = {"img_resolution": 8, "in_channels": 1, "out_channels": 1, "label_dim": 3, "augment_dim": 0, "num_blocks": 1}
EDM |= {"model_channels": 8, "channel_mult": [1, 2], "channel_mult_emb": 4, "attn_resolutions": [4], "dropout": 0.1}
EDM |= {"embedding_type": "positional", "channel_mult_noise": 1, "encoder_type": "standard"}
EDM |= {"decoder_type": "standard", "resample_filter": [1, 1]}
SCORE = {**CIFAR10, **SCORE_SDE["vp/cifar10_ddpmpp_continuous"], "nf": 8, "num_res_blocks": 1, "image_size": 8}
SCORE |= {"attn_resolutions": [4], "ch_mult": [1, 2]}


def run(*arguments):
    return main([str(argument) for argument in (*arguments, "--device", "cpu", "--quiet")])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs")
    made = Made(0)
    edm(made, EDM, torch.zeros(1, 1, 8, 8).double(), torch.zeros(1).double(), torch.zeros(1, 3).double())
    write_edm(folder / "net.pkl", snapshot("EDMPrecond", EDM, made, sigma_data=0.5, sigma_min=0, sigma_max=80.0))
    made = Made(1)
    score_sde(made, SCORE, torch.zeros(1, 3, 8, 8).double(), torch.zeros(1).double())
    write_score_sde(folder / "checkpoint.pth", made)
    (folder / "config.json").write_text(json.dumps(SCORE))
    torch.save(Adm(classes=5).state, folder / "model.pt")
    return folder


@pytest.mark.parametrize("prefix", ["edm:", ""])  # the file's names tell the format
def test_samples_are_the_networks(folder, tmp_path, prefix):
    out = tmp_path / "s.npz"
    words = ("--n", 3, "--solver", "ddim", "--steps", 4, "--float", "--out", out)
    assert run("sample", f"{prefix}{folder / 'net.pkl'}", *words) == 0
    model, found = from_edm(folder / "net.pkl"), np.load(out)
    cond = {"label": torch.arange(3)}  # the classes in turn
    x = sample(model, (3, *model.shape), DDIM(), steps=4, seed=seeds_of(0, 3), cond=cond).x
    np.testing.assert_allclose(found["x"], x.numpy(), atol=1e-5)
    assert np.abs(found["images"].astype(int) - to_levels(x).numpy()).max() <= 1
    assert found["labels"].tolist() == [0, 1, 2]


def test_likelihoods_and_races(folder, tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, (16, 3, 8, 8), dtype=np.uint8))
    source = (f"score_sde:{folder / 'checkpoint.pth'}", "--name", folder / "config.json", "--data", tmp_path / "x.npy")
    assert run("likelihood", *source, "--steps", 3, "--out", tmp_path / "bits.json") == 0
    assert np.isfinite(json.loads((tmp_path / "bits.json").read_text())["value"])
    words = ("--n", 8, "--solvers", "ddim", "--nfe", 2, "--features", "random", "--out", tmp_path / "race")
    assert run("compare", *source, *words) == 0


def test_flags_of_a_file_that_says_nothing(folder, tmp_path):
    flags = {"image_size": 8, "channel_mult": "1,2", "num_channels": 32, "num_res_blocks": 1, "num_heads": 2}
    flags |= {"attention_resolutions": "4", "learn_sigma": True, "class_cond": True}
    (tmp_path / "flags.json").write_text(json.dumps(flags))
    model = from_source(f"guided_diffusion:{folder / 'model.pt'}", str(tmp_path / "flags.json"))
    assert model.shape == (3, 8, 8)
    assert model.about["classes"] == 5


def test_info_says_what_was_read(folder, capsys):
    assert main(["info", f"edm:{folder / 'net.pkl'}"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^format +EDM$", out, re.MULTILINE)
    assert re.search(r"^classes +3$", out, re.MULTILINE)


def test_what_it_is_asked_for(folder, tmp_path, capsys):
    def said(*words):
        assert run("sample", *words, "--out", tmp_path / "s.png") == 2
        return capsys.readouterr().err

    assert "does not say what network it is of" in said(f"score_sde:{folder / 'checkpoint.pth'}")
    assert "says itself what network it is of" in said(f"edm:{folder / 'net.pkl'}", "--name", "cifar10")
    assert "--name" in said(f"edm:{folder / 'net.pkl'}", "--name", "cifar10")
    assert "is for FORMAT:PATH" in said(tmp_path, "--name", "cifar10")
    assert "there is no such file" in said(f"edm:{folder / 'none.pkl'}")
    assert "from_score_sde" in said(f"edm:{folder / 'checkpoint.pth'}")
    assert source_of(tmp_path) is None
    (tmp_path / "bad.json").write_text("{")
    assert "is no JSON" in said(f"score_sde:{folder / 'checkpoint.pth'}", "--name", tmp_path / "bad.json")


def test_guidance_stands_below_the_limit(folder):
    """Of the network's own means; what comes of it is clipped."""
    model = from_edm(folder / "net.pkl")
    x, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(5.0)
    cond = {"label": torch.tensor([0, 2])}

    def guide(inner):
        return ClassifierFree(inner, 9.0, null={"label": 3})

    free = guide(model)(x, t, **cond).mean
    assert free.abs().max() > 0.5
    clipped = Clip(model, -0.2, 0.2)
    for limited in (clipped, SameMean(clipped)):
        torch.testing.assert_close(below_limit(limited, guide)(x, t, **cond).mean, free.clamp(-0.2, 0.2))
        assert (guide(limited)(x, t, **cond).mean - free.clamp(-0.2, 0.2)).abs().max() > 0.01
    torch.testing.assert_close(below_limit(model, guide)(x, t, **cond).mean, free)
    assert clipped.denoiser is model  # the one that was given is as it was


def test_scores_of_samples(folder, tmp_path):
    """A network of elsewhere is one, and no file of samples."""
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, (16, 1, 8, 8), dtype=np.uint8))
    words = ("--data", tmp_path / "x.npy", "--n", 8, "--steps", 1, "--features", "random", "--metrics", "frechet")
    for source in (f"edm:{folder / 'net.pkl'}", folder / "net.pkl"):
        assert run("evaluate", source, *words, "--out", tmp_path / "scores.json") == 0
        assert "frechet" in (tmp_path / "scores.json").read_text()
