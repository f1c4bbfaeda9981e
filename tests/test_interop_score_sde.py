"""score_sde's checkpoints: networks that compute what theirs do, and the traps of their format."""

import math

import pytest
import torch
from standins import write_score_sde
from textbook_song import Made, score_sde

from scoresde import VESDE, VPSDE, DDPMChain, SubVPSDE, log_prob, sample
from scoresde.errors import CheckpointError
from scoresde.interop import SCORE_SDE, from_score_sde
from scoresde.interop.score_sde import CIFAR10, network_of, process_of
from scoresde.solvers import Heun

SMALL = {"nf": 8, "num_res_blocks": 1, "image_size": 8, "attn_resolutions": (4,), "ch_mult": (1, 2)}
NAMES = {
    "ve/cifar10_ncsnpp_continuous": {},
    "ve/cifar10_ncsnpp": {},
    "ve/ffhq_256_ncsnpp_continuous": {},
    "vp/cifar10_ddpmpp_continuous": {},
    "vp/cifar10_ddpmpp": {},
    "subvp/cifar10_ncsnpp_continuous": {},
    "vp/cifar10_ddpm_continuous": {"nf": 128, "ch_mult": (1, 1), "image_size": 4, "attn_resolutions": (2,)},
}


def options_of(name):
    return {**CIFAR10, **SCORE_SDE[name], **SMALL, **NAMES[name]}


def sections(o):
    """As their configurations have them."""
    training, data = ("sde", "continuous"), ("image_size", "num_channels", "centered")
    rest = {k: v for k, v in o.items() if k not in training + data}
    return {
        "training": {k: o[k] for k in training} | {"n_iters": 1},
        "data": {k: o[k] for k in data} | {"dataset": "CIFAR10"},
        "model": rest | {"ema_rate": 0.999, "init_scale": 0.0},
    }


def drawn(o, n=2):
    p, g = Made(3), torch.Generator().manual_seed(4)
    y = torch.randn(n, 3, o["image_size"], o["image_size"], generator=g).double()
    score_sde(p, o, y, torch.linspace(-1, 1, n).double())
    return p, y


def expected(o, p, y, t):
    """(alpha, sigma, eps) of y at t by their score function; y = 2 x - 1 where their data x is in [0, 1]."""
    N = o["num_scales"]
    if o["sde"] == "vesde":
        sigma = o["sigma_min"] * (o["sigma_max"] / o["sigma_min"]) ** t
        label = math.log(sigma) if o["continuous"] else (1 - t) * (N - 1)
        # score of x is F / sigma, and eps = -sigma score
        return 1.0, 2 * sigma, -score_sde(p, o, y, torch.full((len(y),), label).double())
    B = 0.5 * t**2 * (o["beta_max"] - o["beta_min"]) + t * o["beta_min"]
    label = 999 * t
    alpha = math.exp(-B / 2)
    if not o["continuous"]:
        n = round(t * (N - 1))
        betas = torch.linspace(o["beta_min"] / N, o["beta_max"] / N, N, dtype=torch.float64)
        alpha, label = float((1 - betas[: n + 1]).prod().sqrt()), n
    sigma = 1 - alpha**2 if o["sde"] == "subvpsde" else math.sqrt(1 - alpha**2)
    return alpha, sigma, score_sde(p, o, y, torch.full((len(y),), label).double())


@pytest.mark.parametrize("name", NAMES)
def test_networks_compute_what_theirs_do(tmp_path, name):
    o = options_of(name)
    p, y = drawn(o)
    model = from_score_sde(write_score_sde(tmp_path / "checkpoint_8.pth", p), sections(o))
    assert model.shape == (3, o["image_size"], o["image_size"])
    assert model.about["weights"] == "ema"
    t = 0.3 if o["continuous"] else 300 / 999
    alpha, sigma, eps = expected(o, p, y, t)
    ours = t if model.sde.nodes is None else 301.0
    assert float(model.sde.alpha(ours)) == pytest.approx(alpha, rel=1e-9)
    assert float(model.sde.sigma(ours)) == pytest.approx(sigma, rel=1e-9)
    torch.testing.assert_close(model.eps(y.float(), ours).double(), eps, rtol=1e-4, atol=1e-4)
    label = model.denoiser.label(torch.tensor([ours]).double())
    sign = -1 if o["sde"] == "vesde" else 1
    net = model.denoiser.net.double()
    torch.testing.assert_close(
        sign * net(y, label.expand(2)), score_sde(p, o, y, label.expand(2)), rtol=1e-10, atol=1e-11
    )


def test_three_lines_sample_and_give_a_likelihood(tmp_path):
    o = options_of("ve/cifar10_ncsnpp_continuous")
    p, _ = drawn(o)
    model = from_score_sde(write_score_sde(tmp_path / "c.pth", p), sections(o))
    assert model.sde == VESDE(0.02, 100)
    assert model.about["their range"] == [0.0, 1.0]
    times = torch.tensor([1.0, 0.500005, 1e-5, 0.0], dtype=torch.float64)
    torch.testing.assert_close(model.grid(3).times, times, rtol=1e-12, atol=0)
    x = sample(model, (2, *model.shape), Heun(), grid=model.grid(2), seed=0).x
    assert log_prob(model, x.clamp(-1, 1), steps=2, seed=0).value.isfinite().all()


def test_published_names_have_their_processes_and_sizes():
    """And as many parameters as the published ones have, in millions."""
    with torch.device("meta"):
        for name in SCORE_SDE:
            o = {**CIFAR10, **SCORE_SDE[name]}
            sde, label = process_of(o)
            kind = {"ve": VESDE, "vp": VPSDE if o["continuous"] else DDPMChain, "subvp": SubVPSDE}[name.split("/")[0]]
            assert isinstance(sde, kind)
            with torch.device("cpu"):
                assert float(label(torch.tensor([sde.t_max]))) == pytest.approx(
                    math.log(o["sigma_max"]) if kind is VESDE and o["continuous"] else 0 if kind is VESDE else 999
                )
        millions = {
            name: sum(q.numel() for q in network_of({**CIFAR10, **SCORE_SDE[name]}).parameters()) / 1e6
            for name in ("ve/cifar10_ncsnpp_continuous", "vp/cifar10_ddpmpp_deep_continuous", "vp/cifar10_ddpm")
        }
    assert millions == pytest.approx(
        {"ve/cifar10_ncsnpp_continuous": 62.8, "vp/cifar10_ddpmpp_deep_continuous": 106.6, "vp/cifar10_ddpm": 35.7},
        abs=1.0,
    )


def test_without_averages_the_parameters_are_read(tmp_path):
    o = options_of("vp/cifar10_ddpmpp_continuous")
    p, y = drawn(o)
    model = from_score_sde(write_score_sde(tmp_path / "c.pth", p, ema=False), sections(o))
    assert model.about["weights"] == "model"
    torch.testing.assert_close(model.eps(y.float(), 0.3).double(), expected(o, p, y, 0.3)[2], rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_said(tmp_path):
    o = options_of("vp/cifar10_ddpmpp_continuous")
    p, _ = drawn(o)
    path = write_score_sde(tmp_path / "c.pth", p)
    with pytest.raises(CheckpointError, match="another file"):
        from_score_sde(path, sections(o), sha256="12345678")
    with pytest.raises(CheckpointError, match="averages, and the network of this configuration"):
        from_score_sde(path, sections({**o, "num_res_blocks": 2}))
    held = torch.load(path, weights_only=True)
    held["ema"]["shadow_params"].reverse()
    torch.save(held, tmp_path / "reversed.pth")
    with pytest.raises(CheckpointError, match="the average of"):
        from_score_sde(tmp_path / "reversed.pth", sections(o))
    with pytest.raises(ValueError, match="config="):
        from_score_sde(path, "vp/cifar10")
    for change, words in (
        ({"sde": "other"}, "sde="),
        ({"resblock_type": "ddpm"}, "resblock_type"),
        ({"progressive": "residual"}, "progressive"),
        ({"progressive_input": "residual"}, "fir and skip_rescale"),
        ({"scale_by_sigma": True}, "scaled by sigma"),
        ({"centered": False}, "on centred data"),
        ({"embedding_type": "fourier"}, "Fourier"),
        ({"nonlinearity": "elu"}, "nonlinearity"),
    ):
        with pytest.raises(ValueError, match=words):
            from_score_sde(path, sections({**o, **change}))
    config = sections(o)
    del config["model"]["nf"], config["training"]["sde"]
    with pytest.raises(ValueError, match="lacks sde, nf"):
        from_score_sde(path, config)
    torch.save({"state": 3}, path)
    with pytest.raises(CheckpointError, match="holds no 'model'"):
        from_score_sde(path, sections(o))
    torch.save({"model": {"module.all_modules.0.weight": torch.ones(2)}}, path)
    with pytest.raises(CheckpointError, match="of another network than the configuration says: without"):
        from_score_sde(path, sections(o))
    p["all_modules.99.weight"] = torch.ones(3)
    with pytest.raises(CheckpointError, match=r"with all_modules\.99\.weight"):
        from_score_sde(write_score_sde(path, p, ema=False), sections(o))


def test_averages_are_not_taken_in_another_order(tmp_path):
    """The names say where each belongs, whatever the order of the file's own."""
    o = options_of("ve/cifar10_ncsnpp_continuous")
    p, y = drawn(o)
    path = write_score_sde(tmp_path / "c.pth", p)
    held = torch.load(path, weights_only=True)
    held["model"] = dict(sorted(held["model"].items(), reverse=True))
    torch.save(held, path)
    model = from_score_sde(path, sections(o))
    torch.testing.assert_close(model.eps(y.float(), 0.3).double(), expected(o, p, y, 0.3)[2], rtol=1e-4, atol=1e-4)
