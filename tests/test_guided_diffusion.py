"""Files of guided-diffusion, improved-diffusion, consistency models and denoising-diffusion-pytorch: read, they are the
network that wrote them, its chain and its learned variance; and what raises no error there does here.
"""

from __future__ import annotations

import json
import pickle
import shutil

import pytest
import torch
from adm_reference import Adm
from common import generator, normal

from scoresde import DDPMChain, Grid, VDenoiser, sample
from scoresde.errors import CheckpointError
from scoresde.interop import (
    from_consistency_edm,
    from_guided_diffusion,
    from_lucidrains,
    recognise,
    respaced,
)
from scoresde.interop.adm import MODELS, Flags, architecture
from scoresde.likelihood import log_prob
from scoresde.nn import UNet
from scoresde.solvers import DDIM, DDPM, Heun
from scoresde.variance import OptimalVariance
from scoresde.wrappers import Clip

FLAGS = {
    "image_size": 8,
    "channel_mult": "1,2",
    "num_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": "4",
    "num_heads": 2,
    "learn_sigma": True,
}
# What of the reference a flag is.
CASES = {
    "legacy": ({}, {}),
    "new": ({"use_new_attention_order": True}, {"new_order": True}),
    "head_channels": ({"num_head_channels": 16, "num_heads": 4}, {"head_channels": 16}),
    "updown": ({"resblock_updown": True}, {"updown": True}),
    "additive": ({"use_scale_shift_norm": False}, {"scale_shift": False}),
    "classes": ({"class_cond": "True"}, {"classes": 5}),
    "fine": ({"attention_resolutions": "8,4"}, {"attend": (0, 1)}),
    "blocks": ({"num_res_blocks": "2", "attention_resolutions": "2"}, {"blocks": 2, "attend": ()}),
    "x0": ({"predict_xstart": True, "learn_sigma": False}, {"outputs": 3}),
    "upsampler": ({"large_size": 8}, {"given": 3}),
}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The file of a reference network, and the network."""
    folder, written = tmp_path_factory.mktemp("adm"), {}

    def write(name="model.pt", **options):
        key = repr((name, options))
        if key not in written:
            net, path = Adm(**options), folder / f"{len(written)}" / name
            path.parent.mkdir()
            torch.save(net.state, path)
            written[key] = path, net
        return written[key]

    return write


def inner(model):
    """The network's own denoiser, without its learned variance."""
    return getattr(model.denoiser, "denoiser", model.denoiser)


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_network_that_wrote_the_file(file, case):
    flags, options = CASES[case]
    path, net = file(**options)
    model = from_guided_diffusion(path, {**FLAGS, **flags})
    assert model.shape == (3, 8, 8)
    x, t = normal(2, 3, 8, 8), torch.tensor([1.0, 700.0], dtype=torch.float64)
    cond, y, seen = {}, None, x
    if "classes" in options:
        y = torch.tensor([4, 0])
        cond["label"] = y
    if "given" in options:
        cond["image"] = normal(2, 3, 8, 8, seed=1)
        seen = torch.cat([x, cond["image"]], 1)
    out = net(seen, t - 1, y)
    predicted = inner(model).output(x, t, **cond)
    assert (predicted - out[:, :3]).abs().max() < 1e-12 * out.abs().max()
    mean = model(x, t, **cond).mean
    alpha, sigma = (f(t)[:, None, None, None] for f in (model.sde.alpha, model.sde.sigma))
    expected = out[:, :3] if case == "x0" else (x - sigma * out[:, :3]) / alpha
    assert (mean - expected).abs().max() < 1e-12 * expected.abs().max()


def test_half_as_many_features_at_the_finest_level(file):
    """The 512 x 512 model's: time features and embedding are those of num_channels all the same."""
    path, net = file(channels=64, mult=(0.5, 1), heads=1)
    flags = {**FLAGS, "num_channels": 64, "channel_mult": "0.5,1", "num_heads": 1}
    x, t = normal(1, 3, 8, 8), torch.tensor([30.0], dtype=torch.float64)
    out = net(x, t - 1)[:, :3]
    assert (inner(from_guided_diffusion(path, flags)).output(x, t) - out).abs().max() < 1e-12 * out.abs().max()


@pytest.mark.parametrize("respacing", ["", "10", "ddim20"])
def test_the_learned_variance_is_that_of_the_steps_it_is_of(file, respacing):
    """Their p_mean_variance, on the steps' own betas: log var between those of beta~ and of beta."""
    path, net = file()
    model = from_guided_diffusion(path, {**FLAGS, "timestep_respacing": respacing, "diffusion_steps": 1000})
    grid = model.grid(respacing or 1000)
    kept = grid.times[:-1].flip(0)
    bar = torch.cumprod(1 - DDPMChain().betas, 0)[kept.long() - 1]
    before = torch.cat([torch.ones(1), bar[:-1]])
    betas = 1 - bar / before
    posterior = betas * (1 - before) / (1 - bar)
    posterior[0] = posterior[1]
    x = normal(1, 3, 8, 8)
    for k in (0, 1, len(kept) - 1):
        out = net(x, kept[k : k + 1] - 1)[:, 3:]
        v = (out + 1) / 2
        theirs = (v * betas[k].log() + (1 - v) * posterior[k].log()).exp()
        t, s = kept[k], grid.times.flip(0)[k]
        w = 1 - bar[k] / before[k]  # beta of the step
        b = model.sde.alpha(s) * w / (1 - bar[k])
        c2 = (1 - before[k]) * w / (1 - bar[k])
        ours = c2 + b**2 * model(x, t).var
        above = theirs >= c2
        assert above.any()
        assert ((ours - theirs).abs()[above] < 1e-9 * theirs[above]).all()
        assert (ours[~above] == c2).all()


def test_one_evaluation_gives_mean_and_variance(file):
    path, _ = file()
    model = from_guided_diffusion(path, FLAGS)
    calls = []
    unet = next(m for m in inner(model).net.modules() if isinstance(m, UNet))
    unet.register_forward_hook(lambda *_: calls.append(1))
    assert model(normal(1, 3, 8, 8), 500.0).var is not None
    assert len(calls) == 1


def test_it_samples_and_has_a_likelihood(file):
    path, _ = file()
    model = from_guided_diffusion(path, FLAGS, respacing=4)
    assert sample(Clip(model), (1, *model.shape), DDIM(), grid=model.grid("ddim5"), seed=0).x.abs().max() <= 1
    x = sample(Clip(model), (1, *model.shape), OptimalVariance(DDPM()), grid=model.grid(4), seed=0).x
    assert x.isfinite().all()
    assert log_prob(model, x.double(), steps=1, seed=0).value.isfinite().all()


# ---- time, schedule, grid ----


@pytest.mark.parametrize("rescaled", [True, False])
def test_label_and_schedule(file, rescaled):
    path, net = file()
    flags = {**FLAGS, "diffusion_steps": 4000, "noise_schedule": "cosine", "rescale_timesteps": rescaled}
    model = from_guided_diffusion(path, flags)
    assert model.sde == DDPMChain.cosine(4000)
    x, t = normal(1, 3, 8, 8), torch.tensor([3210.0], dtype=torch.float64)
    out = net(x, (t - 1) / (4 if rescaled else 1))[:, :3]
    assert (inner(model).output(x, t) - out).abs().max() < 1e-12 * out.abs().max()


def test_linear_betas_are_scaled(file):
    path, _ = file()
    model = from_guided_diffusion(path, {**FLAGS, "diffusion_steps": 250, "rescale_timesteps": False})
    expected = torch.linspace(4e-4, 0.08, 250, dtype=torch.float64)
    assert (model.sde.betas - expected).abs().max() < 1e-15


def test_which_nodes_a_respacing_keeps():
    chain = DDPMChain()

    def kept(steps, chain=chain):
        return [int(t) - 1 for t in respaced(chain, steps).times.flip(0)[1:]]

    assert kept(1000) == list(range(1000))
    assert kept("ddim25") == list(range(0, 1000, 40))
    assert kept(5) == [0, 250, 500, 749, 999]  # 249.75 k, 499.5 to even
    # 10, 15 and 20 of 300, in thirds: first and last of each are there.
    thirds = kept("10,15,20", DDPMChain.linear(300))
    assert len(thirds) == 45
    assert {0, 99, 100, 199, 200, 299} <= set(thirds)
    assert [n for n in thirds if n < 100] == list(range(0, 100, 11))
    assert kept("1,2", DDPMChain.linear(7)) == [0, 4, 6]
    for wrong in ("ddim60", "1001", "0", "500,501", 1):
        with pytest.raises(ValueError, match=r"no whole stride|steps of a part|no noise"):
            respaced(chain, wrong)


# ---- what raises no error elsewhere ----


def test_flags_that_no_file_tells():
    path_free = {"diffusion_steps": 4000}
    told = Flags.of(path_free)
    assert told.rescale_timesteps is None
    with pytest.raises(ValueError, match="no flag of the network or its chain: num_chanels"):
        Flags.of({"num_chanels": 64})
    with pytest.raises(ValueError, match="class_cond='maybe': expected True or False"):
        Flags.of("--class_cond maybe")
    with pytest.raises(ValueError, match="num_heads='four'"):
        Flags.of({"num_heads": "four"})
    with pytest.raises(ValueError, match="expected pairs"):
        Flags.of("--class_cond --image_size 64")
    with pytest.raises(ValueError, match="is no published model"):
        Flags.of("imagenet")
    assert Flags.of("--class_cond=True --dropout 0.1").class_cond is True


def test_rescaled_labels_must_be_said(file):
    path, _ = file()
    with pytest.raises(ValueError, match=r"improved-diffusion's default is True, guided-diffusion's False"):
        from_guided_diffusion(path, {**FLAGS, "diffusion_steps": 4000})
    with pytest.raises(ValueError, match=r"model.pt holds no flags"):
        from_guided_diffusion(path)
    with pytest.raises(ValueError, match="noise_schedule='sigmoid'"):
        from_guided_diffusion(path, {**FLAGS, "noise_schedule": "sigmoid"})
    with pytest.raises(ValueError, match="another number of heads on the way up"):
        from_guided_diffusion(path, {**FLAGS, "num_heads_upsample": 1})


WRONG = {
    "num_channels": 64,
    "class_cond": True,
    "learn_sigma": False,
    "use_scale_shift_norm": False,
    "resblock_updown": True,
    "num_res_blocks": 2,
    "channel_mult": "1,3",
    "attention_resolutions": "8",
    "large_size": 8,
}


@pytest.mark.parametrize("flag", WRONG)
def test_a_flag_against_the_file_is_refused(file, flag):
    path, _ = file()
    with pytest.raises(CheckpointError, match=rf"{flag}=|learn_sigma="):
        from_guided_diffusion(path, {**FLAGS, flag: WRONG[flag]})


def test_a_class_is_needed(file):
    path, _ = file(classes=5)
    model = from_guided_diffusion(path, {**FLAGS, "class_cond": True})
    x = normal(2, 3, 8, 8)
    for label in (None, 5, torch.tensor([0, 5])):
        with pytest.raises(ValueError, match=r"never trained without a class: pass label= of 0 to 4"):
            model(x, 500.0, **({} if label is None else {"label": label}))
    assert model(x, 500.0, label=4).mean.isfinite().all()
    assert inner(model).net.net.condition_sizes == {"label": 5}


def test_what_is_told_of_it(file):
    path, net = file()
    data = normal(2, 3, 8, 8)
    with pytest.warns(UserWarning, match="the network does not fit its data"):
        model = from_guided_diffusion(path, FLAGS, data=data)
    about = json.loads(json.dumps(model.about))
    assert about["flags"]["num_heads"] == 2
    assert about["assumed"] == ["use_new_attention_order", "noise_schedule", "diffusion_steps", "predict_xstart"]
    assert about["parameters"] == sum(t.numel() for t in net.state.values())
    assert len(about["files"]["model.pt"]) == 64
    assert "diagnosis" in about
    told = {name: value for name, value in FLAGS.items() if name != "num_heads"}
    assert from_guided_diffusion(path, told).about["assumed"][0] == "num_heads"
    assert "num_heads" not in from_guided_diffusion(path, {**told, "num_head_channels": 32}).about["assumed"]
    from_guided_diffusion(path, FLAGS, sha256=about["files"]["model.pt"][:8])
    with pytest.raises(CheckpointError, match="another file, or a damaged one"):
        from_guided_diffusion(path, FLAGS, sha256="0" * 64)


def test_published_models_by_their_files_names(file):
    for name in MODELS:
        flags = Flags.of(name)
        assert flags.multipliers
        assert flags.diffusion_steps == 1000 or flags.rescale_timesteps is not None
    # In millions, as the papers and model cards have them.
    for name, millions in {"64x64_diffusion": 296, "512x512_diffusion": 559, "imagenet64_cond_270M_250K": 273}.items():
        net = architecture(Flags.of(name), classes=1000)
        assert round(sum(p.numel() for p in net.parameters()) / 1e6) == millions
    assert Flags.of("512x512_diffusion").levels == [4, 5, 6]
    assert Flags.of("128_512_upsampler").levels == [4, 5]
    path, _ = file("64x64_diffusion.pt")
    with pytest.raises(CheckpointError, match=r"num_channels=32.*and the flags say num_channels=192"):
        from_guided_diffusion(path)


def test_a_file_of_two_precisions(file, tmp_path):
    """Half precision but for the norms, as convert_to_fp16 leaves a network."""
    mixed = tmp_path / "model.pt"
    torch.save({k: t.float() if t.ndim == 1 else t.half() for k, t in file()[1].state.items()}, mixed)
    model = from_guided_diffusion(mixed, FLAGS)
    assert {p.dtype for p in inner(model).net.parameters()} == {torch.float32}


# ---- consistency models' EDM ----

EDM = {**FLAGS, "learn_sigma": False}


def test_edm_of_consistency_models(file):
    path, net = file("edm.pt", outputs=3, new_order=True, conv2d_attention=True)
    model = from_consistency_edm(path, EDM)
    x, sigma = normal(2, 3, 8, 8), torch.tensor([0.02, 3.0], dtype=torch.float64)
    total = (sigma**2 + 0.25).sqrt()[:, None, None, None]
    s = sigma[:, None, None, None]
    F = net(x / total, 250 * sigma.log())
    expected = 0.25 / total**2 * x + s * 0.5 / total * F
    assert (model(x, sigma).mean - expected).abs().max() < 1e-12 * expected.abs().max()
    ramp = torch.linspace(0, 1, 5, dtype=torch.float64)
    sigmas = (80 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert torch.allclose(model.grid(5).times[:-1], sigmas, rtol=1e-12)
    assert sample(Clip(model), (1, *model.shape), Heun(), grid=model.grid(2), seed=0).x.isfinite().all()


def test_each_of_the_two_names_the_other(file):
    edm, _ = file("edm.pt", outputs=3, new_order=True, conv2d_attention=True)
    with pytest.raises(CheckpointError, match="read it by from_consistency_edm"):
        from_guided_diffusion(edm, EDM)
    eps, _ = file(outputs=3)
    with pytest.raises(CheckpointError, match="read it by from_guided_diffusion"):
        from_consistency_edm(eps, EDM)


def test_a_consistency_model_is_no_denoiser(file):
    path, _ = file("cd_imagenet64_l2.pt", outputs=3, new_order=True, conv2d_attention=True)
    with pytest.raises(CheckpointError, match="consistency model by its name"):
        from_consistency_edm(path, EDM)
    renamed = shutil.copy(path, path.with_name("model.pt"))
    with pytest.raises(CheckpointError, match="consistency model by training_mode=consistency_distillation"):
        from_consistency_edm(renamed, {**EDM, "training_mode": "consistency_distillation"})


# ---- denoising-diffusion-pytorch ----


class Small(torch.nn.Module):
    """Stands for their Unet."""

    def __init__(self):
        super().__init__()
        self.mix = torch.nn.Conv2d(1, 1, 1)

    def forward(self, x, time, x_self_cond=None):
        return self.mix(x) * (1 + time[:, None, None, None] / 1000)


def trainers_file(path, objective="pred_v", steps=100, weight=True, gamma=5.0):
    """A file of their Trainer: its buffers are float32."""
    net, average = Small(), Small()
    betas = torch.linspace(1e-3, 0.2, steps, dtype=torch.float64)
    bar = torch.cumprod(1 - betas, 0)
    snr = bar / (1 - bar)
    most = snr.clamp(max=gamma)
    buffers = {"betas": betas.float(), "alphas_cumprod": bar.float()}
    if weight:
        divisor = {"pred_noise": snr, "pred_x0": torch.ones_like(snr), "pred_v": snr + 1}[objective]
        buffers["loss_weight"] = (most / divisor).float()

    def state(net):
        return {**buffers, **{f"model.{k}": v for k, v in net.state_dict().items()}}

    ema = {"initted": torch.tensor(True), "step": torch.tensor(7)}
    ema |= {f"ema_model.{k}": v for k, v in state(average).items()}
    torch.save({"step": 7, "model": state(net), "opt": {}, "ema": ema, "scaler": None, "version": "2.2.5"}, path)
    return net, average


@pytest.mark.parametrize("gamma", [5.0, float("inf")])
@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0", "pred_v"])
def test_the_trainers_file_tells_schedule_and_objective(tmp_path, objective, gamma):
    path = tmp_path / "model-1.pt"
    net, average = trainers_file(path, objective, gamma=gamma)
    model = from_lucidrains(path, Small(), shape=(1, 4, 4))
    assert model.about["predicts"] == objective
    x, t = normal(2, 1, 4, 4, dtype=torch.float32), torch.tensor([3.0, 80.0])
    assert torch.equal(model.output(x, t), average(x, t - 1))
    assert torch.equal(from_lucidrains(path, Small(), weights="model").output(x, t), net(x, t - 1))
    kept = torch.linspace(-1, 99, 8).int() + 1
    assert model.grid(7).times.tolist() == kept.flip(0).tolist()
    assert model.grid(7).times[0] == 100
    with pytest.raises(CheckpointError, match=f"with the loss of {objective}"):
        from_lucidrains(path, Small(), objective="pred_v" if objective == "pred_noise" else "pred_noise")


def test_an_older_trainers_file_must_be_told_its_objective(tmp_path):
    path = tmp_path / "model-1.pt"
    trainers_file(path, weight=False)
    with pytest.raises(CheckpointError, match="does not tell what its network predicts"):
        from_lucidrains(path, Small())
    model = from_lucidrains(path, Small(), objective="pred_v")
    assert isinstance(model.denoiser, VDenoiser)
    assert model.about["assumed"] == ["objective", "images in [-1, 1]"]


# ---- what a file is ----


class Runs:
    def __reduce__(self):
        return print, ("run",)


def test_what_a_file_is(file, tmp_path):
    def of(content, name="file.pt", **options):
        path = tmp_path / name
        torch.save(content, path, **options)
        found = recognise(path)
        return None if found is None else found.name

    weight = torch.zeros(1)
    assert recognise(file()[0]).name == "guided_diffusion"
    assert of(Adm().state, _use_new_zipfile_serialization=False) == "guided_diffusion"
    assert of({k: v for k, v in Adm().state.items() if "output" not in k}) == "guided_classifier"
    assert of({"state_dict": {"model.diffusion_model.out.2.weight": weight}, "global_step": 1}) == "compvis"
    assert of({"model": {}, "ema": {"decay": 0.9, "shadow_params": [weight]}, "step": 1}) == "score_sde"
    assert of({"model": {"inner_model.a.weight": weight}}) == "k_diffusion"
    assert of({"conv_in.weight": weight, "conv_out.weight": weight, "down_blocks.0.a": weight}) == "diffusers"
    assert of({"weight": weight}) is None
    assert of({"weight": Runs()}) is None  # it is not run: there is no word on the screen
    trainers_file(tmp_path / "model-1.pt")
    assert recognise(tmp_path / "model-1.pt").name == "lucidrains"
    persistent = tmp_path / "network.pkl"
    persistent.write_bytes(pickle.dumps(["torch_utils.persistence", "_reconstruct_persistent_obj"]))
    assert recognise(persistent).name == "edm"
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    assert recognise(tmp_path).name == recognise(tmp_path / "config.json").name == "diffusers"
    header = json.dumps({"inner_model.a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}).encode()
    tensors = tmp_path / "k.safetensors"
    tensors.write_bytes(len(header).to_bytes(8, "little") + header)
    assert recognise(tensors).name == "k_diffusion"
    (tmp_path / "broken.pt").write_bytes(b"PK\x03\x04 and no more")
    assert recognise(tmp_path / "broken.pt") is None
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        recognise(tmp_path / "nothing")


def test_an_error_says_what_the_file_is(tmp_path, file, capsys):
    path = tmp_path / "file.ckpt"
    torch.save({"state_dict": {"model.diffusion_model.out.2.weight": torch.zeros(1)}, "hook": Runs()}, path)
    with pytest.raises(CheckpointError, match=r"CompVis.*from_single_file"):
        from_guided_diffusion(path, FLAGS)
    with pytest.raises(CheckpointError, match="read it by from_guided_diffusion with its flags"):
        from_lucidrains(file()[0], Small())
    torch.save(Adm().state | {"hook": Runs()}, path)
    with pytest.raises(CheckpointError, match=r"holds .*print, which is no tensor"):
        from_guided_diffusion(path, FLAGS)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="read it by from_diffusers"):
        from_guided_diffusion(tmp_path, FLAGS)
    torch.save({"weight": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="no state dict of an ADM network"):
        from_guided_diffusion(path, FLAGS)
    assert capsys.readouterr().out == ""


# ---- the network's options ----


def test_options_of_the_network():
    net = UNet(
        3, 32, (1, 2), 1, attention=(1,), head_channels=16, groups=32, additive=True, time_features=10, embedding=20
    )
    assert net.down[1].attention.heads == 4
    assert net.time.inward.weight.shape == (20, 10)
    assert net.middle[0].attention.norm.num_groups == 32
    assert net.up[0].block.modulate.out_features == 64
    for wrong in ({"head_channels": 48}, {"groups": 24}, {"time_features": 9}, {"embedding": 0}):
        with pytest.raises(ValueError, match=r"head_channels=48|groups=24|features=9|embedding=0"):
            UNet(3, 32, (1, 2), 1, attention=(1,), **wrong)


def test_an_additive_embedding_is_a_shift_before_the_norm():
    """A bias of the convolution before the norm does the same."""
    net = UNet(1, 8, (1,), 1, additive=True).double()
    block = net.down[0].block
    torch.nn.init.normal_(block.conv2.weight, generator=generator(0))
    x, e = normal(2, 8, 4, 4), normal(1, 32)
    out = block(x, e.expand(2, -1))
    with torch.no_grad():
        shift = block.modulate(torch.nn.functional.silu(e))[0]
        block.modulate.weight.zero_()
        block.modulate.bias.zero_()
        block.conv1.bias += shift
    assert (block(x, e.expand(2, -1)) - out).abs().max() < 1e-13
    assert Grid
