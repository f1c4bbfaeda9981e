"""EDM's files: networks that compute what theirs do, the traps of their format, and that nothing in a file is run."""

import io
import json
import os
import pickle
import struct
from collections import OrderedDict

import numpy as np
import pytest
import torch
from standins import Persistent, module, snapshot, write_edm
from textbook_song import Made, edm, edm2

from scoresde import Grid, log_prob, sample
from scoresde.errors import CheckpointError
from scoresde.interop import from_edm
from scoresde.interop.pickles import Record, read_pickle
from scoresde.nn import MagnitudeUNet, SongUNet
from scoresde.solvers import DDIM, Heun

SHARED = {"img_resolution": 8, "in_channels": 3, "out_channels": 3, "label_dim": 0, "augment_dim": 0, "num_blocks": 1}
SHARED |= {"model_channels": 8, "channel_mult": [1, 2], "channel_mult_emb": 4, "attn_resolutions": [4], "dropout": 0.1}
SONG = {**SHARED, "embedding_type": "positional", "channel_mult_noise": 1, "encoder_type": "standard"}
SONG |= {"decoder_type": "standard", "resample_filter": [1, 1]}
FOURIER = {"embedding_type": "fourier", "channel_mult_noise": 2, "resample_filter": [1, 3, 3, 1]}
ADM = {**SHARED, "model_channels": 64}
NETWORKS = {
    "DDPM++": SONG,
    "classes and augmentation": {**SONG, "label_dim": 5, "augment_dim": 9},
    "NCSN++": {**SONG, **FOURIER, "encoder_type": "residual"},
    "skips": {**SONG, **FOURIER, "encoder_type": "skip", "decoder_type": "skip", "channel_mult": [1, 1, 2]},
    "ADM": {**ADM, "label_dim": 5},
}


@pytest.fixture
def written(tmp_path):
    """A function that writes objects as EDM's training does; the names that they have can be pickled in the test."""

    def write(held, name="network.pkl", protocol=4):
        return write_edm(tmp_path / name, held, protocol)

    return write


def drawn(options, seed=0, n=2):
    """Tensors of a network, with x, c and onehots to call it on."""
    p, g = Made(seed), torch.Generator().manual_seed(seed + 1)
    size, K = options["img_resolution"], options["label_dim"]
    x = torch.randn(n, options["in_channels"], size, size, generator=g).double()
    c = torch.tensor([-1.3, 0.8, 0.1, 2.0][:n]).double()
    label = torch.arange(1, n + 1)
    onehot = torch.eye(K)[label].double() if K else None
    edm(p, options, x, c, onehot)
    return p, x, c, label, onehot


# ---- networks ----


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_compute_what_theirs_do(written, name):
    options = NETWORKS[name]
    p, x, c, label, onehot = drawn(options)
    path = written(snapshot("EDMPrecond", options, p, sigma_data=0.5, sigma_min=0, sigma_max=float("inf")))
    model = from_edm(path)
    assert model.shape == (3, 8, 8)
    assert model.about["options"]["num_blocks"] == 1
    assert model.about["parameters"] == sum(t.numel() for n, t in p.items() if "freqs" not in n and "resample" not in n)
    net = model.denoiser.net.double()
    cond = {} if onehot is None else {"label": label}
    torch.testing.assert_close(net(x, c, **cond), edm(p, options, x, c, onehot), rtol=1e-11, atol=1e-12)
    if onehot is not None:  # no class, and the null class
        expected = edm(p, options, x, c)
        torch.testing.assert_close(net(x, c), expected, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(net(x, c, options["label_dim"]), expected, rtol=1e-11, atol=1e-12)
    if options["augment_dim"]:
        a = torch.randn(2, 9, generator=torch.Generator().manual_seed(7)).double()
        expected = edm(p, options, x, c, onehot, a)
        torch.testing.assert_close(net(x, c, **cond, augment=a), expected, rtol=1e-11, atol=1e-12)
        assert (expected - edm(p, options, x, c, onehot)).abs().max() > 0.01


def test_a_network_of_our_own_has_the_same_form():
    """It starts at zero, takes odd sizes and other ranks, and its null class is its last."""
    for options in ({"entrance": "residual", "fourier": 16.0}, {"entrance": "skip", "exit": "skip"}, {"kind": "adm"}):
        for fir in (None, (1, 3, 3, 1)):
            for shape in ((7, 5), (6,), (3, 4, 5)):
                net = SongUNet(2, 8, (1, 2), 1, num_classes=3, dims=len(shape), fir=fir, **options).eval()
                assert net.condition_sizes == {"label": 3}
                out = net(torch.ones(2, 2, *shape), torch.tensor([0.1, 0.2]), torch.tensor([0, 3]))
                assert out.shape == (2, 2, *shape)
                assert not out.any()
    net = SongUNet(1, 8, (1, 1), 1, fourier=16.0).to(torch.bfloat16)
    assert net.embedding.frequencies.dtype == torch.float32
    for wrong in ({"attention": (2,)}, {"entrance": "both"}, {"dropout": 1.0}, {"fir": (1, 2)}, {"fourier": 0.0}):
        with pytest.raises(ValueError, match="expected"):
            SongUNet(1, 8, (1, 2), 1, **wrong)
    with pytest.raises(ValueError, match="augment has shape"):
        net(torch.ones(1, 1, 4, 4), torch.ones(1), augment=torch.ones(1, 3))
    with pytest.raises(ValueError, match="no classes"):
        net(torch.ones(1, 1, 4, 4), torch.ones(1), label=2)


EDM2 = {"img_resolution": 8, "img_channels": 4, "label_dim": 5, "model_channels": 8, "channel_mult": [1, 2]}
EDM2 |= {"num_blocks": 2, "attn_resolutions": [4], "channels_per_head": 4, "clip_act": 2.0, "resample_filter": [1, 1]}


@pytest.mark.parametrize("change", [{}, {"label_dim": 0, "resample_filter": [1, 3, 3, 1], "channel_mult": [1, 1, 2]}])
def test_edm2_computes_what_theirs_does(written, change):
    """Saved in half precision, read in float32."""
    options, p, g = {**EDM2, **change}, Made(5), torch.Generator().manual_seed(6)
    x, c = torch.randn(2, 4, 8, 8, generator=g).double(), torch.tensor([-0.9, 0.4]).double()
    cond, onehot = (
        ({"label": torch.tensor([1, 3])}, torch.eye(5)[[1, 3]].double()) if options["label_dim"] else ({}, None)
    )
    edm2(p, options, x, c, onehot)
    p.update({name: tensor.half() for name, tensor in p.items()})
    held = snapshot("Precond", options, p, network="UNet", sigma_data=0.5)
    held["ema"].state["_modules"]["unet"] = held["ema"].state["_modules"].pop("model")
    held["ema"].state["_modules"]["logvar_linear"] = module("MPConv", {"weight": torch.ones(1, 4)})
    model = from_edm(written({**held, "encoder": Persistent("StabilityVAEEncoder", {"vae_name": "some/vae"})}))
    assert model.about["autoencoder"] == "some/vae"
    assert model.about["range"] is None
    assert model.shape == (4, 8, 8)
    assert next(model.denoiser.net.parameters()).dtype == torch.float32
    net = model.denoiser.net.double()
    torch.testing.assert_close(net(x, c, **cond), edm2(p, options, x, c, onehot), rtol=1e-6, atol=1e-6)
    if onehot is not None:
        torch.testing.assert_close(net(x, c), edm2(p, options, x, c), rtol=1e-6, atol=1e-6)


def test_edm2s_layers_preserve_magnitudes():
    """Its weights' scale is of no account, its features are of size one at the start, and its output starts at zero."""
    torch.manual_seed(0)
    net = MagnitudeUNet(1, 32, (1, 2), 1, (1,), num_classes=3, dims=1, head_channels=8).eval()
    x, c = torch.randn(64, 1, 15), torch.linspace(-1, 1, 64)
    found = []
    hook = net.outward.register_forward_hook(lambda _, given, __: found.append(given[0]))
    assert not net(x, c, 1).any()
    hook.remove()
    assert 0.7 < found[0].square().mean().sqrt() < 1.4
    with torch.no_grad():
        net.gain += 1
        before = net(x, c, 1)
        for name, q in net.named_parameters():
            q.mul_(1.0 if name.endswith("gain") else 5.0)
        torch.testing.assert_close(net(x, c, 1), before, rtol=0.01, atol=0.01)  # but for the 1e-4 in the norm
    assert net.condition_sizes == {"label": 3}
    assert net.to(torch.bfloat16).features.phases.dtype == torch.float32
    for wrong in ((x[0], c), (x, c, torch.ones(2, dtype=torch.long))):
        with pytest.raises(ValueError, match="expected"):
            net(*wrong)
    with pytest.raises(ValueError, match="attention at levels"):
        MagnitudeUNet(multipliers=(1,))


# ---- denoisers ----


def test_edm_is_a_denoiser_of_ours(written):
    """Its mean, its grid, a sample and a likelihood in three lines."""
    p, x, _, label, onehot = drawn(options := NETWORKS["classes and augmentation"])
    path = written(snapshot("EDMPrecond", options, p, sigma_data=0.4, sigma_min=0, sigma_max=float("inf")))
    model = from_edm(path, sha256=None)
    sigma, x = 3.0, x.float() * 3
    mean = model(x, sigma, label=label).mean
    total = (sigma**2 + 0.4**2) ** 0.5
    F = edm(p, options, (x / total).double(), torch.full((2,), sigma).double().log() / 4, onehot)
    torch.testing.assert_close(mean.double(), 0.4**2 / total**2 * x + sigma * 0.4 / total * F, rtol=1e-5, atol=1e-5)
    i = torch.arange(5).double() / 4
    sigmas = (80 ** (1 / 7) + i * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(model.grid(5).times, torch.cat([sigmas, torch.zeros(1)]), rtol=1e-12, atol=0)
    images = sample(model, (2, *model.shape), Heun(), grid=model.grid(2), seed=0, cond={"label": label}).x
    assert images.isfinite().all()
    found = log_prob(model, images.clamp(-1, 1), steps=2, seed=0, cond={"label": label})
    assert found.value.isfinite().all()


def test_vp_is_eps_on_vp(written):
    """D = x - sigma F(x / sqrt(1 + sigma^2), (M - 1) t(sigma)), x = x_0 + sigma eps."""
    p, x, _, _, _ = drawn(options := NETWORKS["DDPM++"])
    own = {"beta_d": 19.9, "beta_min": 0.1, "M": 1000, "epsilon_t": 1e-5, "sigma_min": 0.001, "sigma_max": 152.0}
    model = from_edm(written(snapshot("VPPrecond", options, p, **own)))
    sigma = 0.7
    t = ((0.1**2 + 2 * 19.9 * np.log1p(sigma**2)) ** 0.5 - 0.1) / 19.9
    alpha = (1 + sigma**2) ** -0.5
    expected = x - sigma * edm(p, options, alpha * x, torch.full((2,), 999 * t).double())
    torch.testing.assert_close(model((alpha * x).float(), t).mean.double(), expected, rtol=1e-4, atol=1e-4)
    grid = model.grid(4)
    levels = (-model.sde.half_log_snr(grid.times[:-1])).exp()
    torch.testing.assert_close(levels[[0, -1]], torch.tensor([80.0, 0.002]).double(), rtol=1e-6, atol=0)


def test_ve_changes_its_sign(written):
    """D = x + sigma F(x, ln(sigma / 2))."""
    p, x, _, _, _ = drawn(options := NETWORKS["NCSN++"])
    model = from_edm(written(snapshot("VEPrecond", options, p, sigma_min=0.02, sigma_max=100)))
    sigma = 0.7
    expected = x + sigma * edm(p, options, x, torch.full((2,), sigma / 2).double().log())
    t = float(model.sde.time_at(-np.log(sigma)))
    torch.testing.assert_close(model(x.float(), t).mean.double(), expected, rtol=1e-4, atol=1e-4)


def test_iddpm_has_a_learned_range_on_the_levels_of_its_file(written):
    p, x, _, label, onehot = drawn(options := {**NETWORKS["ADM"], "out_channels": 6})
    M = 50
    abar = torch.sin(0.5 * np.pi * torch.arange(M + 1).double() / M / 1.008) ** 2
    u = torch.zeros(M + 1).double()
    for j in range(M, 0, -1):
        u[j - 1] = ((u[j] ** 2 + 1) / (abar[j - 1] / abar[j]).clip(min=1e-3) - 1).sqrt()
    model = from_edm(written(snapshot("iDDPMPrecond", options, p, u=u.float(), M=M, C_1=1e-3, C_2=8e-3)))
    assert model.sde.steps == M
    assert "learned range" in model.about["predicts"]
    j = 20
    alpha = (1 + u[j] ** 2) ** -0.5
    F = edm(p, options, alpha * x, torch.full((2,), M - 1.0 - j).double(), onehot)[:, :3]
    found = model((alpha * x).float(), float(M - j), label=label)
    torch.testing.assert_close(found.mean.double(), x - u[j] * F, rtol=1e-4, atol=1e-4)
    assert (found.var >= 0).all()
    assert model.grid(7).steps == 6  # two of theirs fall on one level
    assert (model.grid(7).times == model.grid(7).times.round()).all()


def test_what_does_not_fit_is_said(written):
    p, x, _, _, _ = drawn(options := NETWORKS["DDPM++"])
    own = {"sigma_data": 0.5}
    path = written(snapshot("EDMPrecond", options, p, **own))
    with pytest.raises(CheckpointError, match="another file"):
        from_edm(path, sha256="0" * 64)
    with pytest.warns(UserWarning, match="does not fit its data"):
        model = from_edm(path, data=x.float().clamp(-1, 1).repeat(2, 1, 1, 1))
    assert "diagnosis" in model.about
    assert json.loads(json.dumps(model.about))["options"] == {**options, "label_dropout": 0}
    for change, words in (
        ({"model_channels": 16}, "of another network"),
        ({"novel": 3}, "with novel, which is not known"),
        ({"channel_mult_emb": 2}, "channel_mult_emb=2"),
    ):
        with pytest.raises(CheckpointError, match=words):
            from_edm(written(snapshot("EDMPrecond", {**options, **change}, p, **own)))
    with pytest.raises(CheckpointError, match="holds a Other"):
        from_edm(written(snapshot("Other", options, p, **own)))
    with pytest.raises(CheckpointError, match="Odd makes of images"):
        from_edm(written({**snapshot("EDMPrecond", options, p, **own), "encoder": Persistent("Odd", {})}))
    with pytest.raises(CheckpointError, match="not laid out as EDM's files are: KeyError"):
        from_edm(written({"ema": Persistent("EDMPrecond", {})}))
    with pytest.raises(CheckpointError, match="where a network"):
        from_edm(written({"ema": torch.zeros(2)}))
    frequencies = {n: t for n, t in (p | {}).items() if n != "map_layer0.bias"}
    with pytest.raises(CheckpointError, match=r"without .*embedding\.inward\.bias"):
        from_edm(written(snapshot("EDMPrecond", options, frequencies, **own)))


# ---- nothing is run ----


def test_tensors_are_those_of_the_file(written):
    """To the bit, of every dtype, shared storages and strides too, small ones and large, in every protocol."""
    big = torch.arange(3000.0).reshape(50, 60)
    held = {
        "big": big,
        "transposed": big.t()[3:7],
        "half": torch.randn(5, dtype=torch.float64).half(),
        "bfloat16": torch.ones(3, dtype=torch.bfloat16),
        "integers": torch.arange(4),
        "flags": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "number": torch.tensor(2.5),
    }
    for protocol in (2, 3, 4, 5):
        found = read_pickle(written({**held, "scalar": np.float32(0.5), "set": {1, 2}}, protocol=protocol))
        assert found.pop("scalar") == 0.5
        assert found.pop("set") == {1, 2}
        for name, tensor in held.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor.detach()), name
        assert not any(tensor.is_set_to(big) for tensor in found.values())
        found["big"].add_(1)  # it is memory of our own


def test_a_large_tensor_is_read_where_it_lies(written, monkeypatch):
    """Not first as bytes: the weights are in memory once."""
    path, sizes = written({"w": torch.zeros(1 << 20)}), []
    file, opened = path.open("rb"), type(path).open

    class Counted(io.BufferedReader):
        def read(self, n=-1):
            sizes.append(n)
            return super().read(n)

    monkeypatch.setattr(type(path), "open", lambda self, mode: Counted(io.FileIO(path)))
    assert read_pickle(path)["w"].numel() == 1 << 20
    assert max(sizes) < 1 << 16
    monkeypatch.setattr(type(path), "open", opened)
    file.close()


class Evil:
    """Whatever reduce is asked to return."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


def _text(text):
    return b"\x8c" + bytes([len(text)]) + text.encode()


def _storage_of(inner):
    """torch.storage._load_from_bytes(inner)."""
    return (
        b"\x80\x04"
        + _text("torch.storage")
        + _text("_load_from_bytes")
        + b"\x93B"
        + struct.pack("<I", len(inner))
        + inner
        + b"\x85R."
    )


RUN = "touch ran"
SYSTEM = b"c" + os.system.__module__.encode() + b"\nsystem\n"
REFUSED = {
    "reduce": (pickle.dumps(Evil(os.system, (RUN,))), r"holds (posix|nt)\.system"),
    "global": (SYSTEM + b"(S'touch ran'\ntR.", r"holds (posix|nt)\.system"),
    "os": (b"cos\nsystem\n(S'touch ran'\ntR.", r"holds os\.system"),
    "eval": (pickle.dumps(Evil(eval, ("open('ran', 'w')",))), r"holds builtins\.eval"),
    "exec": (b'c__builtin__\nexec\n(S\'open("ran", "w")\'\ntR.', r"holds __builtin__\.exec"),
    "getattr": (pickle.dumps(Evil(getattr, (torch.Size, "load"))), r"holds builtins\.getattr"),
    "dotted": (b"\x80\x04" + _text("torch") + _text("hub.load") + b"\x93.", r"names 'torch\.hub\.load'"),
    "dotted global": (
        b"ctorch\nserialization.os.system\n(S'touch ran'\ntR.",
        r"names 'torch\.serialization\.os\.system'",
    ),
    "inst": (b"(S'touch ran'\nios\nsystem\n.", r"holds os\.system"),
    "obj": (b"(cos\nsystem\nS'touch ran'\no.", r"holds os\.system"),
    "newobj": (b"\x80\x02csubprocess\nPopen\nS'touch ran'\n\x85\x81.", r"holds subprocess\.Popen"),
    "newobj_ex": (
        b"\x80\x04" + _text("subprocess") + _text("Popen") + b"\x93S'touch ran'\n\x85}\x92.",
        r"subprocess\.Popen",
    ),
    "extension": (b"\x80\x02\x82\x01.", "EXT1"),
    "persistent id": (b"Pmodule\n.", "PERSID"),
    "buffer": (b"\x80\x05\x97.", "NEXT_BUFFER"),
    "a call's result": (b"ctorch\nload\n(S'ran'\ntR(S'x'\ntR.", r"calls Record\(torch\.load\)"),
    "a list": (b"](S'x'\ntR.", "calls"),
    "in a storage": (_storage_of(pickle.dumps(Evil(os.system, (RUN,)))), r"holds (posix|nt)\.system"),
    "in a large storage": (
        _storage_of(pickle.dumps(Evil(os.system, (RUN + " " * 9000,)))),
        r"holds (posix|nt)\.system",
    ),
    "a length beyond the file": (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 50) + b"x.", "damaged"),
    "a storage of another kind": (_storage_of(pickle.dumps(3)), "damaged"),
}


@pytest.mark.parametrize("attack", REFUSED)
def test_what_would_run_is_refused_by_its_name(tmp_path, monkeypatch, attack):
    monkeypatch.chdir(tmp_path)
    program, words = REFUSED[attack]
    path = tmp_path / "evil.pkl"
    path.write_bytes(program)
    with pytest.raises(CheckpointError, match=words):
        read_pickle(path)
    with pytest.raises(CheckpointError, match=words):
        from_edm(path)
    assert not (tmp_path / "ran").exists()


def test_what_is_not_refused_does_nothing(tmp_path, monkeypatch):
    """Records hold what they were given: a torch function is not called, a state not set."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "inert.pkl"
    torch.save({"x": 1}, tmp_path / "other.pt")
    path.write_bytes(
        pickle.dumps({"a": Evil(torch.load, ("other.pt",)), "b": torch.nn.Linear(2, 1), "c": torch.nn.Linear})
    )
    found = read_pickle(path)
    assert isinstance(found["a"], Record)
    assert found["a"].args == ("other.pt",)
    assert isinstance(found["b"], Record)
    assert set(found["b"].state["_parameters"]) == {"weight", "bias"}
    assert found["c"].args is None
    assert repr(found["c"]) == "Record(torch.nn.modules.linear.Linear)"


def test_a_damaged_file_is_said_to_be(written):
    path = written({"w": torch.ones(3), "n": {"a": [1, (2, 3)], "text": "x" * 300}, "large": torch.ones(2000)})
    whole = path.read_bytes()
    for end in [*range(0, 600, 7), *range(600, len(whole), 501), len(whole) - 1]:
        path.write_bytes(whole[:end])
        with pytest.raises(CheckpointError, match="damaged"):
            read_pickle(path)
    path.write_bytes(b"PK\x03\x04 not a pickle")
    with pytest.raises(CheckpointError, match="damaged"):
        from_edm(path)
    stored = torch.storage.TypedStorage(
        wrap_storage=torch.ones(3).untyped_storage(), dtype=torch.float32, _internal=True
    )
    outside = Evil(torch._utils._rebuild_tensor_v2, (stored, 0, (10,), (1,), False, OrderedDict()))
    with pytest.raises(CheckpointError, match="damaged"):
        read_pickle(written(outside))


def test_grids_of_ddim_end_at_the_data(written):
    p, _, _, _, _ = drawn(options := NETWORKS["NCSN++"])
    model = from_edm(written(snapshot("VEPrecond", options, p, sigma_min=0.02, sigma_max=100)))
    assert isinstance(model.grid(3), Grid)
    assert model.grid(3).times[-1] == 0
    assert sample(model, (1, *model.shape), DDIM(), grid=model.grid(2), seed=0).x.isfinite().all()
