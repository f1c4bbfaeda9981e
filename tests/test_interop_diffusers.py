"""diffusers: configurations as its files hold them, by the formulas; its own schedulers, networks and files beside it,
where it is installed (`make test-interop`); flow matching's two conventions.
"""

from __future__ import annotations

import copy
import json
import math
import sys
import warnings
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from common import normal

from scoresde import (
    EDMSDE,
    VESDE,
    VPSDE,
    Clip,
    CosineVPSDE,
    DDPMChain,
    DynamicThreshold,
    EDMDenoiser,
    EpsDenoiser,
    FlowSDE,
    ScoreDenoiser,
    SubVPSDE,
    VDenoiser,
    VelocityDenoiser,
    X0Denoiser,
    elbo,
    log_prob,
    sample,
)
from scoresde.checks import ArgumentError
from scoresde.errors import CheckpointError
from scoresde.exact import Gaussian
from scoresde.guidance import ClassifierFree
from scoresde.interop import from_diffusers, from_flow, scheduler_config, to_diffusers
from scoresde.interop.diffusers_kinds import completed
from scoresde.interop.diffusers_networks import Called, latent_scales, pack, unpack
from scoresde.interop.diffusers_schedulers import betas_of, schedule_of
from scoresde.interop.reading import hashed
from scoresde.solvers import DDIM, DDPM, Heun

SD = {  # stable-diffusion-v1-5, scheduler/scheduler_config.json
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}


def config(name: str, **options: object) -> dict[str, object]:
    return {"_class_name": f"{name}Scheduler", **options}


def times(name: str, steps: int, **options: object) -> list[float]:
    return schedule_of(config(name, **options)).grid(steps).times.tolist()


class Net(torch.nn.Module):
    """A network of x and the time that is no symmetric function of either."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.7))

    def forward(self, x, time):
        return self.weight * torch.tanh(x + 0.01 * time.reshape(-1, *[1] * (x.ndim - 1)))


# ---- configurations, without diffusers ----


def test_stable_diffusion():
    schedule = schedule_of(SD)
    root = np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000)
    assert torch.allclose(schedule.sde.betas, torch.from_numpy(root**2), rtol=1e-12)
    assert (schedule.predicts, schedule.clips, schedule.ignored) == ("eps", False, {"clip_sample": False})
    # leading, offset 1: timesteps 981, 961, ..., 1, our nodes one more; and the end is timestep 0, node 1
    assert schedule.grid(50).times.tolist() == [*(20.0 * k + 2 for k in range(49, -1, -1)), 1.0]
    denoiser = schedule.adapter(Net())
    x = normal(2, 3)
    assert torch.allclose(denoiser.eps(x, 982.0), Net()(x, torch.tensor([981.0, 981.0]).double()), atol=1e-7)


def test_others_as_published():
    xl = {  # stable-diffusion-xl-base-1.0: keys of three other classes are left from conversions
        **SD, "_class_name": "EulerDiscreteScheduler", "interpolation_type": "linear", "prediction_type": "epsilon",
        "sample_max_value": 1.0, "timestep_spacing": "leading", "use_karras_sigmas": False,
    }  # fmt: skip
    schedule = schedule_of(xl)
    assert sorted(schedule.ignored) == ["clip_sample", "sample_max_value", "set_alpha_to_one"]
    assert schedule.grid(50).times.tolist() == [*(20.0 * k + 2 for k in range(49, -1, -1)), 0.0]
    deepfloyd = config(
        "DDPM", beta_schedule="squaredcos_cap_v2", clip_sample=True, thresholding=True, variance_type="learned_range",
        dynamic_thresholding_ratio=0.95, sample_max_value=1.5,
    )  # fmt: skip
    model = from_diffusers((lambda x, t: torch.cat([x, x], 1), deepfloyd))
    assert isinstance(model.denoiser, DynamicThreshold)
    assert model(normal(2, 3), 500.0).var is not None
    first = config("DDPM", tensor_format="pt", timestep_values=None, variance_type="fixed_large", clip_sample=True)
    assert schedule_of(first).sde == DDPMChain.linear(1000)


def test_betas():
    linear = betas_of(completed(config("DDPM"))[0])
    assert torch.allclose(linear, DDPMChain.linear(1000).betas, atol=1e-15, rtol=0)
    assert torch.equal(
        betas_of(completed(config("DDIM", beta_schedule="squaredcos_cap_v2"))[0]), DDPMChain.cosine().betas
    )
    sigmoid = betas_of(completed(config("DDPM", beta_schedule="sigmoid", num_train_timesteps=3))[0])
    assert torch.allclose(sigmoid[1], torch.tensor(0.01005, dtype=torch.float64))  # the middle
    assert betas_of(completed(config("DDPM", trained_betas=[0.1, 0.2]))[0]).tolist() == [0.1, 0.2]
    # defaults differ by class
    assert completed(config("HeunDiscrete"))[0]["beta_start"] == 0.00085
    assert completed(config("EulerDiscrete"))[0]["beta_start"] == 0.0001


def test_zero_terminal_snr():
    ddim = betas_of(completed(config("DDIM", rescale_betas_zero_snr=True))[0])
    root, kept = (1 - ddim).cumprod(0).sqrt(), (1 - DDPMChain.linear(1000).betas).cumprod(0).sqrt()
    assert root[-1] == 0
    assert torch.allclose(root, (kept - kept[-1]) * kept[0] / (kept[0] - kept[-1]), atol=1e-12)
    assert (
        schedule_of(config("DDIM", rescale_betas_zero_snr=True, prediction_type="v_prediction")).sde.alpha(1000.0) == 0
    )
    # Euler's last abar is 2^-24, which is below the one before for latent schedules, and above it for DDPM's
    latent = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    euler = schedule_of(config("EulerDiscrete", rescale_betas_zero_snr=True, **latent)).sde
    assert math.isclose(float(euler.alpha(1000.0)) ** 2, 2**-24, rel_tol=1e-6)
    with pytest.warns(UserWarning, match="sets the last abar to 6e-08, above the one before, 4.2e-09"):
        assert schedule_of(config("EulerDiscrete", rescale_betas_zero_snr=True)).sde.alpha(1000.0) == 0
    with pytest.warns(UserWarning, match="ignores rescale_betas_zero_snr"):
        schedule_of(SD | {"rescale_betas_zero_snr": True})


def test_what_is_predicted():
    made = {word: schedule_of(config("DDIM", prediction_type=word)).adapter(Net()) for word in
            ("epsilon", "v_prediction", "sample")}  # fmt: skip
    assert [type(d) for d in made.values()] == [EpsDenoiser, VDenoiser, X0Denoiser]
    edm = schedule_of(config("EDMEuler", sigma_data=0.7, sigma_max=50.0))
    denoiser = edm.adapter(Called(Net(), edm.sign))
    assert isinstance(denoiser, EDMDenoiser)
    assert (denoiser.sigma_data, denoiser.sde, edm.sign) == (0.7, EDMSDE(0.002, 50.0), 1)
    # its "v_prediction" is -F
    v = schedule_of(config("EDMEuler", prediction_type="v_prediction"))
    x, s = normal(2, 3), 3.0
    D = v.adapter(Called(Net(), v.sign))(x, s).mean
    F = Net()(x / math.hypot(s, 0.5), torch.full((2,), math.log(s) / 4).double())
    assert torch.allclose(D, 0.25 / (s**2 + 0.25) * x - s * 0.5 / math.hypot(s, 0.5) * F, atol=1e-6)
    # Euler's continuous timesteps (stable video diffusion): sigma_data = 1
    svd = schedule_of(
        config("EulerDiscrete", prediction_type="v_prediction", timestep_type="continuous", sigma_min=0.002,
               sigma_max=700.0, use_karras_sigmas=True)
    )  # fmt: skip
    assert svd.sign == -1
    D = svd.adapter(Called(Net(), svd.sign))(x, s).mean
    F = Net()(x / math.hypot(s, 1), torch.full((2,), math.log(s) / 4).double())
    assert torch.allclose(D, x / (s**2 + 1) - s / math.hypot(s, 1) * F, atol=1e-6)
    ve = schedule_of(config("ScoreSdeVe")).adapter(Net())
    assert isinstance(ve, ScoreDenoiser)
    assert ve.sde == VESDE(0.01, 1348.0)


def test_spacings():
    assert times("DDIM", 4, clip_sample=False) == [751, 501, 251, 1, 0]
    assert times("DDIM", 4, timestep_spacing="trailing") == [1000, 750, 500, 250, 0]
    assert times("DDPM", 4, timestep_spacing="linspace") == [1000, 667, 334, 1, 0]
    assert times("DPMSolverMultistep", 4) == [1000, 750, 501, 251, 0]
    assert times("DPMSolverMultistep", 4, timestep_spacing="leading", steps_offset=1) == [802, 602, 402, 202, 0]
    assert times("UniPCMultistep", 4, final_sigmas_type="sigma_min") == [1000, 750, 501, 251, 1]
    assert times("DEISMultistep", 4) == [1000, 750, 501, 251, 1]
    # set_alpha_to_one=False with offset 0 evaluates at timestep 0 and stays there: a step less
    with pytest.warns(UserWarning, match="from a node to itself"):
        assert times("DDIM", 4, set_alpha_to_one=False) == [751, 501, 251, 1]
    assert times("EulerDiscrete", 5, timestep_spacing="trailing")[:3] == [1000, 800, 600]
    # Euler's linspace stands between timesteps, sigma being linear between them
    schedule = schedule_of(config("EulerDiscrete"))
    found = (-schedule.sde.half_log_snr(schedule.grid(4).times)).exp()
    table = (-schedule.sde.half_log_snr(torch.arange(1.0, 1001.0).double())).exp().numpy()
    assert np.allclose(found[:-1], np.interp([999, 666, 333, 0], np.arange(1000), table), rtol=1e-9)
    with pytest.raises(ArgumentError, match="1000 nodes"):
        times("DDIM", 1001)


def test_levels_by_a_rule():
    schedule = schedule_of(config("DPMSolverMultistep", use_karras_sigmas=True))
    low, high = ((-schedule.sde.half_log_snr(t)).exp() for t in (1.0, 1000.0))
    u = torch.linspace(0, 1, 6, dtype=torch.float64)
    karras = (high ** (1 / 7) + u * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    assert torch.allclose((-schedule.sde.half_log_snr(schedule.grid(6).times)).exp()[:-1], karras, rtol=1e-12)
    grid = schedule_of(config("EDMEuler")).grid(3)
    assert grid.times.tolist() == pytest.approx([80.0, ((80 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7, 0.002, 0.0])
    assert times("EDMEuler", 3, final_sigmas_type="sigma_min")[-1] == pytest.approx(0.002)
    with pytest.raises(ArgumentError, match="use_karras_sigmas and use_beta_sigmas"):
        times("EulerDiscrete", 3, use_karras_sigmas=True, use_beta_sigmas=True)


def test_flows():
    schedule = schedule_of(config("FlowMatchEulerDiscrete", shift=3.0))
    assert (schedule.sde, schedule.predicts, schedule.sign) == (FlowSDE(), "velocity", 1)

    def shifted(t: float) -> float:
        return 3 * t / (1 + 2 * t)

    low = shifted(0.001)  # the least is shifted twice
    assert schedule.grid(3).times.tolist() == pytest.approx([1.0, shifted((1 + low) / 2), shifted(low), 0.0])
    x = normal(2, 3)
    velocity = schedule.adapter(Net()).velocity(x, 0.6)
    assert torch.allclose(velocity, Net()(x, torch.full((2,), 600.0).double()), atol=1e-6)
    # counted from noise to data (Mochi): the label is T (1 - t), the output the other way
    inverted = schedule_of(config("FlowMatchEulerDiscrete", invert_sigmas=True))
    found = inverted.adapter(Called(Net(), inverted.sign)).velocity(x, 0.6)
    assert torch.allclose(found, -Net()(x, torch.full((2,), 400.0).double()), atol=1e-6)
    dynamic = config("FlowMatchEulerDiscrete", use_dynamic_shifting=True)
    with pytest.raises(ArgumentError, match="use_dynamic_shifting on, and its times need mu="):
        schedule_of(dynamic).grid(4)
    e = math.exp(1.15)
    assert schedule_of(dynamic, mu=1.15, own_sigmas=True).grid(2).times.tolist() == pytest.approx([1, e / (e + 1), 0])
    unipc = config("UniPCMultistep", use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    assert schedule_of(unipc).grid(2).times.tolist() == pytest.approx([1 - 1e-6, shifted(0.5005), 0.0], abs=1e-12)


def test_clipping():
    for name, options, expected in (
        ("DDPM", {}, (-1, 1)),
        ("DDPM", {"clip_sample_range": 2.5}, (-2.5, 2.5)),
        ("DDIM", {"thresholding": True}, (-1, 1)),  # with sample_max_value 1 a threshold is a clip
    ):
        schedule = schedule_of(config(name, **options))
        clipped = schedule.clipped(schedule.adapter(Net()))
        assert isinstance(clipped, Clip)
        assert (clipped.low, clipped.high) == expected
    schedule = schedule_of(config("DDIM", thresholding=True, sample_max_value=4.0, dynamic_thresholding_ratio=0.9))
    limited = schedule.clipped(schedule.adapter(Net()))
    assert isinstance(limited, DynamicThreshold)
    assert (limited.quantile, limited.cap, limited.interpolate) == (0.9, 4.0, True)
    for name in ("PNDM", "EulerDiscrete", "DPMSolverMultistep"):
        assert not schedule_of(config(name)).clips
    assert isinstance(from_diffusers((Net(), config("DDPM")), clip=False).denoiser, EpsDenoiser)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"_class_name": "LCMScheduler"}, "LCMScheduler is not read: its network is distilled"),
        ({"_class_name": "MyScheduler"}, "_class_name='MyScheduler'"),
        (config("DDIM", use_new_noise=True), "use_new_noise=True in its configuration, which is not known here"),
        (config("DDIM", beta_schedule="laplace"), "beta_schedule='laplace'"),
        (config("DDIM", prediction_type="flow_prediction"), "prediction_type='flow_prediction'"),
        (config("EulerDiscrete", interpolation_type="log_linear"), "interpolation_type='log_linear'"),
        (
            config("DPMSolverMultistep", use_flow_sigmas=True, use_karras_sigmas=True),
            "use_flow_sigmas and other sigmas",
        ),
        (config("DDIM", thresholding=True, sample_max_value=0.5), "sample_max_value=0.5"),
    ],
)
def test_what_is_not_known_is_refused_by_name(given, told):
    with pytest.raises(ArgumentError, match=told):
        from_diffusers((Net(), given))
    off = config("DDIM", use_new_noise=False)  # what is off changes nothing
    assert schedule_of(off).ignored == {"use_new_noise": False}


# ---- where theirs is inconsistent ----


@pytest.mark.parametrize(
    ("options", "steps", "told"),
    [
        ({"timestep_spacing": "linspace"}, 50, "goes 20 at a step"),
        ({"timestep_spacing": "trailing"}, 30, "goes 33 at a step"),
        (
            {"timestep_spacing": "trailing"},
            7,
            "goes 142 at a step",
        ),  # and ends at timestep 0, not at the data
        ({"timestep_spacing": "trailing"}, 61, "label -1"),
    ],
)
def test_steps_that_miss_their_timesteps_are_told(options, steps, told):
    schedule = schedule_of(config("DDIM", **options))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        grid = schedule.grid(steps)
    assert any(told in str(warning.message) for warning in found)
    assert grid.steps == steps
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert schedule_of(config("DDIM", timestep_spacing="trailing")).grid(50).steps == 50


# ---- a pair, without diffusers ----


def test_a_pair_and_what_it_says_of_itself():
    net = Net()
    model = from_diffusers((net, SD), shape=(1, 4, 4))
    assert model.shape == (1, 4, 4)
    assert json.loads(json.dumps(model.about))["predicts"] == "eps"
    assert model.about["parameters"] == 1
    found = sample(model, (2, *model.shape), DDIM(), grid=model.grid(50), seed=0)
    assert found.nfe == 50
    half = from_diffusers((Net().half(), SD))
    assert half(normal(2, 3, dtype=torch.float32), 500.0).mean.dtype == torch.float32  # parameters are seen through


def test_three_lines_give_a_likelihood():
    """A network whose eps is that of Gaussian data has that density, to the noise of the first node."""
    target, chain = Gaussian(mean=[0.3, -0.5], std=0.4), DDPMChain.linear(1000)
    exact = target.denoiser(chain)
    model = from_diffusers((lambda x, k: exact.eps(x, k.double() + 1), config("DDPM", clip_sample=False)), shape=(2,))
    x = target.sample(4, torch.Generator().manual_seed(1)).double()
    found = log_prob(model, x, divergence="exact", steps=60, seed=0)
    assert (found.value - target.log_prob(x, sde=chain, t=1.0)).abs().max() < 0.005
    assert torch.isfinite(elbo(model, x, DDPM(), model.grid(100), seed=0).value).all()


def test_output_objects_tuples_and_learned_channels():
    class Out:
        def __init__(self, sample):
            self.sample = sample

    x = normal(2, 3, 4)
    expected = torch.tanh(x)
    for net in (
        lambda x, t: Out(torch.tanh(x)),
        lambda x, t: (torch.tanh(x),),
        lambda x, t: torch.cat([torch.tanh(x), x], 1),
    ):
        assert torch.allclose(from_diffusers((net, SD)).eps(x, 500.0), expected, rtol=1e-13)


def test_a_learned_range_is_a_variance():
    """Its h = 1 is DDPM's larger step, sigma_t^2 w, and h = -1 its smaller one, whose Var[x_0 | x_t] is zero."""
    chain, x, t = DDPMChain.linear(1000), normal(2, 3), 500.0
    alpha, sigma, alpha_s, sigma_s = (float(f(u)) for u in (t, t - 1) for f in (chain.alpha, chain.sigma))
    w = 1 - (alpha * sigma_s / (alpha_s * sigma)) ** 2
    larger = ((sigma**2 - sigma_s**2) * w) / (alpha_s * w) ** 2
    for h, expected in ((1.0, larger), (-1.0, 0.0)):
        net = lambda x, t, h=h: torch.cat([torch.tanh(x), torch.full_like(x, h)], 1)  # noqa: E731
        model = from_diffusers((net, config("DDPM", variance_type="learned_range", clip_sample=False)))
        assert torch.allclose(model(x, t).var, torch.full_like(x, expected), rtol=1e-6, atol=1e-12)
        assert torch.allclose(model.eps(x, t), torch.tanh(x))
        assert scheduler_config(model)["variance_type"] == "learned_range"
        dropped = from_diffusers((net, config("DDPM", variance_type="learned")))
        assert dropped(x, t).var is None
        assert "left out" in dropped.about["variance"]
    model = from_diffusers((lambda x, t: x, config("DDPM", variance_type="learned_range")))
    with pytest.raises(ValueError, match="variance_type is learned_range, and the network returned"):
        model(x, t)


def test_nested_conditions_are_guided():
    def net(x, t, encoder_hidden_states, added_cond_kwargs):
        return x * encoder_hidden_states[:, :1] + added_cond_kwargs["time_ids"]

    model = from_diffusers((net, SD))
    cond = {"encoder_hidden_states": torch.ones(2, 3).double(), "added_cond_kwargs": {"time_ids": torch.ones(2, 1)}}
    null = {"encoder_hidden_states": torch.zeros(1, 3), "added_cond_kwargs": {"time_ids": torch.zeros(1, 1)}}
    x = normal(2, 1)
    assert torch.allclose(ClassifierFree(model, 3.0, null=null).eps(x, 500.0, **cond), 3 * (x + 1))


def test_data_is_diagnosed():
    target = Gaussian(mean=[0.2, -0.1], std=0.5)
    chain, x = DDPMChain.linear(1000), target.sample(1000, torch.Generator().manual_seed(0))
    right = target.denoiser(chain)
    model = from_diffusers((lambda x, t: right.eps(x, t + 1), config("DDPM")), data=x)
    assert "plausible" in model.about["diagnosis"]
    with pytest.warns(UserWarning, match="does not fit its data"):
        from_diffusers((lambda x, t: -right.eps(x, t + 1), config("DDPM")), data=x)


def test_a_pipeline_with_a_text_encoder_embeds():
    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(300, 3)

        def forward(self, tokens):
            return (self.table(tokens),)

    class Tokenizer:
        model_max_length = 5

        def __call__(self, texts, padding, max_length, truncation, return_tensors):
            assert (padding, max_length, truncation, return_tensors) == ("max_length", 5, True, "pt")
            tokens = torch.tensor([[ord(letter) for letter in text.ljust(5)[:5]] for text in texts])
            return type("Tokens", (), {"input_ids": tokens})

    class Scheduler:
        config: ClassVar = {key: value for key, value in SD.items() if key != "_class_name"}

    Scheduler.__name__ = "PNDMScheduler"
    encoder = Encoder()

    class Pipe:
        components: ClassVar = {
            "unet": lambda x, t, encoder_hidden_states: x * encoder_hidden_states.mean((1, 2))[:, None],
            "scheduler": Scheduler(),
            "tokenizer": Tokenizer(),
            "text_encoder": encoder,
        }

    model = from_diffusers(Pipe())
    cond = model.embed(["a cat", "a dog eats"])
    assert torch.equal(cond["encoder_hidden_states"][0, 2], encoder.table.weight[ord("c")])
    x = torch.ones(2, 1)
    assert torch.allclose(model.eps(x, 500.0, **cond)[:, 0], cond["encoder_hidden_states"].mean((1, 2)))
    assert from_diffusers((Net(), SD)).embed is None


def test_dynamic_shift_follows_the_shape():
    dynamic = config("FlowMatchEulerDiscrete", use_dynamic_shifting=True)
    model = from_diffusers((lambda x, t: x, dynamic), shape=(4, 128, 128))  # 4096 tokens of 2 x 2: max_shift
    e = math.exp(1.15)
    assert float(model.grid(2).times[1]) == pytest.approx(e / (e + 1 / 0.001 - 1))


def test_pack_is_undone_and_is_two_by_two():
    x = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    tokens = pack(x)
    assert tokens.shape == (2, 6, 12)
    assert tokens[1, 4].tolist() == x[1, :, 2:4, 2:4].flatten().tolist()  # token 4 of 2 x 3: row 1, column 1
    assert torch.equal(unpack(tokens, 2, 3), x)


def test_latent_scales():
    scale, shift = latent_scales({"scaling_factor": 0.5, "latents_mean": [1.0, 2.0], "latents_std": [2.0, 4.0]})
    assert scale.flatten().tolist() == [0.25, 0.125]
    assert shift.flatten().tolist() == [1.0, 2.0]
    for broken, told in (({}, "scaling_factor"), ({"scaling_factor": 1.0, "latents_mean": [0.0]}, "both")):
        with pytest.raises(ArgumentError, match=told):
            latent_scales(broken)


def test_folders_that_are_not_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        from_diffusers(tmp_path / "none")
    with pytest.raises(TypeError, match="expected a folder, a pipeline"):
        from_diffusers(Net())
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps({"_class_name": ["pipeline", "Mine"], "unet": ["diffusers", "UNet2DModel"]}))
    with pytest.raises(ArgumentError, match="its code is not run here"):
        from_diffusers(tmp_path)
    index.write_text(json.dumps({"_class_name": "DDPMPipeline", "unet": ["my_unet", "UNet"]}))
    with pytest.raises(ArgumentError, match="unet is of my_unet, code of its own"):
        from_diffusers(tmp_path)
    index.write_text(json.dumps({"_class_name": "LDMPipeline", "vqvae": ["diffusers", "VQModel"]}))
    with pytest.raises(ArgumentError, match="there is no network"):
        from_diffusers(tmp_path)
    (tmp_path / "unet").mkdir()
    (tmp_path / "scheduler").mkdir()
    with pytest.raises(ArgumentError, match="vqvae, VQModel"):
        from_diffusers(tmp_path)
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="LoRA weights, pytorch_lora_weights"):
        from_diffusers(tmp_path)


# ---- the way back ----


def FROM_0(t):
    return t - 1


@pytest.mark.parametrize(
    ("denoiser", "name"),
    [
        (EpsDenoiser(Net(), DDPMChain.linear(1000), time=FROM_0), "DDIM"),
        (VDenoiser(Net(), DDPMChain.cosine(1000), time=FROM_0), "DDIM"),
        (X0Denoiser(Net(), DDPMChain([0.1, 0.2, 0.3]), time=FROM_0), "DDIM"),
        (VDenoiser(Net(), DDPMChain.cosine(100, max_beta=1.0), time=FROM_0), "DDIM"),
        (Clip(EpsDenoiser(Net(), DDPMChain.linear(10), time=FROM_0), -2, 2), "DDPM"),
        (DynamicThreshold(EpsDenoiser(Net(), DDPMChain.linear(10), time=FROM_0), 0.9, cap=3, interpolate=True), "DDPM"),
        (EDMDenoiser(Net(), EDMSDE(0.01, 50.0), sigma_data=0.7), "EDMEuler"),
        (EDMDenoiser(Called(Net(), -1), EDMSDE()), "EDMEuler"),
        (VelocityDenoiser(Net(), FlowSDE(), time=lambda t: 1000 * t), "FlowMatchEulerDiscrete"),
        (VelocityDenoiser(Called(Net(), -1), FlowSDE(), time=lambda t: 1000 * (1 - t)), "FlowMatchEulerDiscrete"),
    ],
)
def test_there_and_back_is_the_same_denoiser(denoiser, name):
    made = scheduler_config(denoiser)
    assert made["_class_name"] == f"{name}Scheduler"
    back = from_diffusers((Net(), json.loads(json.dumps(made))))
    assert back.sde == denoiser.sde
    x, t = normal(2, 3), 0.7 * denoiser.sde.t_max
    assert torch.equal(back(x, t).mean, denoiser(x, t).mean)
    again = scheduler_config(back)
    assert again == made


def test_another_label_is_told():
    with pytest.warns(UserWarning, match=r"told \[200.0, 500.0, 1000.0\] here where DDIMScheduler tells it \[199"):
        scheduler_config(EpsDenoiser(Net(), DDPMChain.linear(1000)))
    with pytest.warns(UserWarning, match=r"told \[0.2, 0.5, 1.0\] here"):
        scheduler_config(EpsDenoiser(Net(), VPSDE()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler_config(EpsDenoiser(Net(), VPSDE(), time=lambda t: 1000 * t - 1))


def test_continuous_processes_become_chains():
    made = scheduler_config(VPSDE())
    chain = schedule_of(made).sde
    n = torch.tensor([1.0, 300.0, 1000.0]).double()
    assert torch.allclose(chain.alpha(n), VPSDE().alpha(n / 1000), rtol=1e-9)
    assert len(scheduler_config(CosineVPSDE(), steps=50)["trained_betas"]) == 50
    assert scheduler_config(DDPMChain.linear(1000))["beta_schedule"] == "linear"
    assert scheduler_config(schedule_of(SD).sde)["beta_schedule"] == "scaled_linear"


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (SubVPSDE(), "no scheduler for SubVPSDE"),
        (VESDE(), "no scheduler for VESDE"),
        (EpsDenoiser(Net(), EDMSDE()), "predicts eps: EDMEulerScheduler's is preconditioned"),
        (EpsDenoiser(Net(), FlowSDE()), "takes a velocity"),
        (ScoreDenoiser(Net(), VPSDE()), "predicts score"),
        (ClassifierFree(EpsDenoiser(Net(), VPSDE())), "ClassifierFree has nothing in diffusers"),
        (Gaussian(mean=[0.0], std=1.0).denoiser(VPSDE()), "expected a network's denoiser"),
        (Clip(EpsDenoiser(Net(), VPSDE()), 0, 1), "theirs clip to"),
        (Clip(EDMDenoiser(Net(), EDMSDE())), "would clip or have a learned variance, as Clip does"),
    ],
)
def test_what_has_no_scheduler_is_refused_by_name(model, told):
    with pytest.raises(ArgumentError, match=told):
        scheduler_config(model)


# ---- flow matching ----


@pytest.mark.parametrize("data_at", [0, 1])
def test_a_flow_by_one_word(data_at):
    target = Gaussian(mean=[1.0, -2.0], std=0.67)
    exact = target.denoiser(FlowSDE())

    def net(x, u):
        t = 1 - u if data_at else u
        v = exact.velocity(x, t.double())
        return -v if data_at else v

    model = from_flow(net, data_at, shape=(2,), data=target.sample(200, torch.Generator().manual_seed(0)))
    x = normal(5, 2)
    assert torch.allclose(model.velocity(x, 0.3), exact.velocity(x, 0.3), atol=1e-12)
    found = sample(model, (1000, *model.shape), Heun("t"), steps=10, seed=0).x
    # 1000 samples: the standard error of a mean is 0.021, of a standard deviation 0.015; four of them
    assert (found.mean(0) - torch.tensor([1.0, -2.0])).abs().max() < 0.085
    assert (found.std(0) - 0.67).abs().max() < 0.06
    x = target.sample(4, torch.Generator().manual_seed(1)).double()
    value = log_prob(model, x, divergence="exact", steps=40, seed=0).value
    assert (value - target.log_prob(x)).abs().max() < 0.01
    with pytest.warns(UserWarning, match="does not fit its data"):
        from_flow(net, 1 - data_at, data=target.sample(200, torch.Generator().manual_seed(0)))


def test_a_flow_is_told_its_time():
    seen = []

    def net(x, u):
        seen.append(u)
        return (torch.zeros(2, 6),)  # 2 C channels, in a tuple

    from_flow(net, 1, scale=1000.0).velocity(torch.zeros(2, 3), 0.25)
    assert seen[0].tolist() == [750.0, 750.0]
    for wrong in ({"data_at": 2}, {"scale": 0.0}):
        with pytest.raises(ArgumentError, match=next(iter(wrong))):
            from_flow(net, **wrong)
    with pytest.raises(TypeError, match="expected a callable"):
        from_flow(3)


# ---- beside diffusers ----


@pytest.fixture(scope="module")
def theirs():
    pytest.importorskip("diffusers", reason="diffusers is an optional extra: make test-interop")
    from scoresde.interop.diffusers import library

    return library()


def test_without_diffusers_it_is_said_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"pip install 'scoresde\[interop\]'"):
        from_diffusers((tmp_path, SD))
    with pytest.raises(ImportError, match="interop"):
        to_diffusers(VPSDE())


LEVELS = [
    ("DDPM", {}),
    ("DDIM", {"steps_offset": 1, "set_alpha_to_one": False}),
    ("DPMSolverMultistep", {"timestep_spacing": "leading", "steps_offset": 1}),
    ("DPMSolverMultistep", {"use_karras_sigmas": True, "beta_schedule": "scaled_linear"}),
    ("DPMSolverMultistep", {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}),
    ("DPMSolverSinglestep", {"use_exponential_sigmas": True}),
    ("UniPCMultistep", {"final_sigmas_type": "sigma_min"}),
    ("UniPCMultistep", {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}),
    ("DEISMultistep", {}),
    ("SASolver", {}),
    ("EulerDiscrete", {}),
    ("EulerDiscrete", {"use_beta_sigmas": True, "timestep_spacing": "leading"}),
    ("EulerAncestralDiscrete", {"timestep_spacing": "trailing"}),
    ("HeunDiscrete", {}),
    ("LMSDiscrete", {"use_karras_sigmas": True}),
    ("KDPM2Discrete", {}),
    ("EDMEuler", {"sigma_schedule": "exponential"}),
    ("EDMDPMSolverMultistep", {"rho": 5.0}),
    ("FlowMatchEulerDiscrete", {"shift": 3.0}),
    ("FlowMatchEulerDiscrete", {"shift": 3.0, "shift_terminal": 0.1}),
    ("FlowMatchEulerDiscrete", {"use_karras_sigmas": True}),
    ("FlowMatchHeunDiscrete", {"shift": 3.0}),
]


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize(("name", "options"), LEVELS)
def test_levels_are_theirs(theirs, name, options):
    scheduler = getattr(theirs, f"{name}Scheduler")(**options)
    scheduler.set_timesteps(10)
    model = from_diffusers((Net(), scheduler))
    grid = model.grid(10)
    flow = isinstance(model.sde, FlowSDE)
    if hasattr(scheduler, "sigmas"):
        expected = scheduler.sigmas.double()
        found = grid.times if flow else (-model.sde.half_log_snr(grid.times)).exp()
    else:
        last = getattr(scheduler, "final_alpha_cumprod", torch.tensor(1.0))
        expected = torch.cat([scheduler.alphas_cumprod[scheduler.timesteps], last[None]]).double()
        found = model.sde.alpha(grid.times) ** 2
    expected = expected.unique_consecutive()
    # their tables are float32, in which 1 - abar at the first node has three digits
    assert torch.allclose(found, expected, rtol=3e-4 if float(expected[-1]) > 0 else 1e-4, atol=1e-7)


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning", "ignore:invalid value:RuntimeWarning")
def test_steps_are_theirs(theirs):
    """Of the benchmark's cases: to rounding with their tables in float64; EDM's and the flows' cast to float32."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
    try:
        import interop_agreement as agreement
    finally:
        sys.path.pop(0)
    for case in agreement.CASES:
        if case.name in ("DDIM", "DEISMultistep", "HeunDiscrete", "UniPCMultistep"):
            assert agreement.disagreement(case, torch.float64, exact=True) < 1e-12, case
        elif case.name in ("EDMEuler", "FlowMatchEulerDiscrete"):
            assert agreement.disagreement(case, torch.float32) < 1e-6, case


def small_unet(theirs, **options):
    torch.manual_seed(0)
    return theirs.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), **options,
    )  # fmt: skip


def test_folders_pipelines_shards_and_halves_are_the_same_network(theirs, tmp_path):
    net = small_unet(theirs)
    pipeline = theirs.DDPMPipeline(unet=net, scheduler=theirs.DDPMScheduler())
    pipeline.save_pretrained(tmp_path / "pipe")
    x, time = torch.randn(2, 1, 8, 8), torch.tensor([99, 99])
    model = from_diffusers(tmp_path / "pipe")
    assert model.shape == (1, 8, 8)
    for solver in (DDIM(), DDPM()):
        assert sample(model, (2, *model.shape), solver, grid=model.grid(5), seed=0).x.isfinite().all()
    raw = from_diffusers(tmp_path / "pipe", clip=False)  # what is clipped has no density of the network's
    assert log_prob(raw, torch.rand(2, *raw.shape) * 2 - 1, steps=4, seed=0).value.isfinite().all()
    assert torch.equal(from_diffusers(pipeline, clip=False).eps(x, 100.0), net(x, time).sample)
    assert torch.equal(from_diffusers(pipeline)(x, 100.0).mean, model(x, 100.0).mean)
    weights = tmp_path / "pipe" / "unet" / "diffusion_pytorch_model.safetensors"
    assert model.about["files"] == {"unet/diffusion_pytorch_model.safetensors": hashed(weights)}
    from_diffusers(tmp_path / "pipe", sha256=hashed(weights))
    with pytest.raises(CheckpointError, match="another file"):
        from_diffusers(tmp_path / "pipe", sha256="0" * 64)
    for name, options in (("shards", {"max_shard_size": "5KB"}), ("bin", {"safe_serialization": False}),
                          ("fp16", {"variant": "fp16"})):  # fmt: skip
        net.save_pretrained(tmp_path / name, **options)
        again = from_diffusers((tmp_path / name, theirs.DDPMScheduler()))
        assert torch.equal(again(x, 100.0).mean, model(x, 100.0).mean)
    assert len(from_diffusers((tmp_path / "shards", SD)).about["files"]) > 1
    small_unet(theirs).half().save_pretrained(tmp_path / "half")
    half = from_diffusers((tmp_path / "half", SD))
    assert next(half.denoiser.net.parameters()).dtype == torch.float16
    assert from_diffusers((tmp_path / "half", SD), dtype=torch.float32).denoiser.net.net.dtype == torch.float32
    back = to_diffusers(model)
    assert type(back).__name__ == "DDPMPipeline"
    assert torch.equal(from_diffusers(back)(x, 100.0).mean, model(x, 100.0).mean)
    with pytest.raises(ArgumentError, match="pipeline=True"):
        to_diffusers(from_diffusers((Net(), SD)), pipeline=True)


def test_a_bin_that_would_run_code_is_refused(theirs, tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("run",)

    small_unet(theirs).save_config(tmp_path)
    torch.save({"a": Evil()}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="print"):
        from_diffusers((tmp_path, SD))


def test_latent_diffusion_with_text(theirs, tmp_path):
    torch.manual_seed(0)
    unet = theirs.UNet2DConditionModel(
        sample_size=4, in_channels=4, out_channels=4, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), mid_block_type=None,
        cross_attention_dim=6, attention_head_dim=4, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=2 * 4 + 5,
    )  # fmt: skip
    vae = theirs.AutoencoderKL(
        block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, scaling_factor=0.2, shift_factor=0.1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    unet.save_pretrained(tmp_path / "unet")
    vae.save_pretrained(tmp_path / "vae")
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(SD))
    model = from_diffusers(tmp_path)
    cond = {"encoder_hidden_states": torch.randn(1, 3, 6)}
    cond["added_cond_kwargs"] = {"text_embeds": torch.randn(1, 5), "time_ids": torch.ones(1, 2)}
    null = {"encoder_hidden_states": torch.zeros(1, 3, 6)}
    null["added_cond_kwargs"] = {"text_embeds": torch.zeros(1, 5), "time_ids": torch.ones(1, 2)}
    guided, z = ClassifierFree(model, 3.0, null=null), torch.randn(1, 4, 4, 4)
    with torch.no_grad():
        good, poor = (unet(z, torch.tensor([500]), **each).sample for each in (cond, null))
        assert torch.allclose(guided.eps(z, 501.0, **cond), poor + 3 * (good - poor), atol=1e-5)
        found = sample(guided, z, DDIM(), grid=model.grid(50), cond=cond, seed=0)
        assert found.x.shape == (1, 3, 8, 8)
        assert torch.allclose(found.x, vae.decode(found.latent / 0.2 + 0.1).sample, atol=1e-5)
        image = torch.randn(1, 3, 8, 8)
        for upcast, dtype in ((True, torch.float32), (False, torch.float16)):  # which overflows in half precision
            vae.register_to_config(force_upcast=upcast)
            copy.deepcopy(vae).half().save_pretrained(tmp_path / "vae")
            halves = from_diffusers(tmp_path)
            assert next(halves.codec.decoder.parameters()).dtype == dtype
            assert halves.about["autoencoder"]["scaling_factor"] == 0.2
        assert torch.allclose(model.encode(image), 0.2 * (vae.encode(image).latent_dist.mean - 0.1), atol=1e-6)


def test_transformers_by_their_common_call(theirs):
    torch.manual_seed(0)
    dit = theirs.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=2, out_channels=4, num_layers=1, sample_size=4,
        patch_size=2, num_embeds_ada_norm=10, norm_num_groups=2,
    ).eval()  # fmt: skip
    x, y = torch.randn(2, 2, 4, 4), torch.tensor([1, 2])
    model = from_diffusers((dit, config("DDIM", clip_sample=False)))
    with torch.no_grad():
        good, poor = (dit(x, timestep=torch.tensor([99, 99]), class_labels=c).sample[:, :2] for c in (y, y * 0 + 10))
        assert torch.equal(model.eps(x, 100.0, class_labels=y), good)
        assert torch.allclose(ClassifierFree(model, 4.0).eps(x, 100.0, label=y), poor + 4 * (good - poor), atol=1e-5)
        sd3 = theirs.SD3Transformer2DModel(
            sample_size=4, patch_size=2, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=4,
            num_attention_heads=2, joint_attention_dim=6, caption_projection_dim=8, pooled_projection_dim=5,
            pos_embed_max_size=4,
        ).eval()  # fmt: skip
        cond = {"encoder_hidden_states": torch.randn(2, 3, 6), "pooled_projections": torch.randn(2, 5)}
        x = torch.randn(2, 4, 4, 4)
        flow = config("FlowMatchEulerDiscrete", shift=3.0)
        expected = sd3(x, timestep=torch.tensor([700.0, 700.0]), **cond).sample
        assert torch.allclose(from_diffusers((sd3, flow)).velocity(x, 0.7, **cond), expected, atol=1e-6)
        flux = theirs.FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=6, pooled_projection_dim=5, guidance_embeds=True,
            axes_dims_rope=(2, 2, 4),
        ).eval()  # fmt: skip
        places = torch.tensor([[0.0, i, j] for i in range(2) for j in range(2)])
        tokens = flux(
            pack(x), timestep=torch.tensor([0.7, 0.7]), guidance=torch.tensor([3.5, 3.5]), img_ids=places,
            txt_ids=torch.zeros(3, 3), **cond,
        ).sample  # fmt: skip
        model = from_diffusers((flux, flow), shape=(4, 4, 4))
        assert torch.allclose(model.velocity(x, 0.7, guidance=3.5, **cond), unpack(tokens, 2, 2), atol=1e-6)
        with pytest.raises(ArgumentError, match="distilled with guidance"):
            model.velocity(x, 0.7, **cond)


def test_networks_that_are_not_read(theirs):
    inpainting = theirs.UNet2DModel(
        sample_size=8, in_channels=9, out_channels=4, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    with pytest.raises(ArgumentError, match="takes 9 channels and returns 4"):
        from_diffusers((inpainting, SD))
    lora = small_unet(theirs)
    lora.lora_A = torch.nn.Linear(1, 1)
    with pytest.raises(ArgumentError, match=r"LoRA is not supported, and the network has lora_A"):
        from_diffusers((lora, SD))
    with pytest.raises(ArgumentError, match="the network is AutoencoderKL"):
        from_diffusers((theirs.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4), SD))
