"""Files of elsewhere that are hostile, damaged or not what they are taken for: nothing in them runs, hangs or unfolds,
and the message says what it is.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import struct
import warnings
import zipfile
from collections import OrderedDict

import pytest
import torch
from adm_reference import Adm
from standins import module, snapshot
from test_guided_diffusion import FLAGS, Small
from test_interop_diffusers import SD, Net
from test_interop_edm import NETWORKS, Evil, drawn, written  # noqa: F401 - the last is a fixture
from test_interop_score_sde import options_of, sections

from scoresde.checks import ArgumentError
from scoresde.errors import CheckpointError
from scoresde.interop import (
    from_consistency_edm,
    from_diffusers,
    from_edm,
    from_flow,
    from_guided_diffusion,
    from_lucidrains,
    from_score_sde,
    from_source,
    recognise,
)
from scoresde.interop.diffusers_files import names_of, weights_of
from scoresde.interop.pickles import read_pickle
from scoresde.interop.reading import read_torch
from scoresde.nn import MagnitudeUNet, SongUNet

CONFIG = sections(options_of("vp/cifar10_ddpmpp_continuous"))
READERS = {
    "guided": lambda path, **more: from_guided_diffusion(path, FLAGS, **more),
    "consistency": lambda path, **more: from_consistency_edm(path, {**FLAGS, "learn_sigma": False}, **more),
    "score_sde": lambda path, **more: from_score_sde(path, CONFIG, **more),
    "lucidrains": lambda path, **more: from_lucidrains(path, Small(), **more),
    "edm": from_edm,
}
OF_TORCH = [name for name in READERS if name != "edm"]
RUN = (os.system, ("touch ran",))


@pytest.fixture(scope="module")
def state():
    return Adm().state


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty one, in which nothing may have run at the end."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not (tmp_path / "ran").exists()


# ---- pickles ----


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("form", ["a pickle", "an archive", "before 1.6"])
def test_what_would_run_is_named_by_every_reader(folder, form, protocol):
    path, held = folder / "evil.pt", {"model": {"a": torch.ones(1)}, "hook": Evil(*RUN)}
    if form == "a pickle":
        path.write_bytes(pickle.dumps(Evil(*RUN), protocol=protocol))
    else:
        torch.save(held, path, pickle_protocol=protocol, _use_new_zipfile_serialization=form == "an archive")
    for name in READERS if form == "a pickle" else OF_TORCH:
        with pytest.raises(CheckpointError, match=r"holds (posix|nt)\.system") as found:
            READERS[name](path)
        assert "weights_only" not in str(found.value)  # torch's message tells how to run it
    assert recognise(path) is None


def test_a_program_of_torchscript_is_not_run(folder):
    torch.jit.script(Small().mix).save("program.pt")
    with pytest.raises(CheckpointError, match="a program of TorchScript, which is not run") as found:
        READERS["guided"](folder / "program.pt")
    assert "weights_only" not in str(found.value)


def test_an_archive_that_unfolds_is_not_unfolded(folder):
    with zipfile.ZipFile("bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02\x8d" + struct.pack("<Q", 1 << 22) + bytes(1 << 22) + b".")
    for name in OF_TORCH:
        with pytest.raises(CheckpointError, match=r"compressed entries, archive/data\.pkl"):
            READERS[name](folder / "bomb.pt")
    assert recognise("bomb.pt") is None


def test_a_pickle_takes_no_longer_than_it_is(tmp_path, written):  # noqa: F811
    """A hash of 2^60 tuples, 2^60 modules, many marks, and numbers that are named often: none of them is worked out."""
    path = tmp_path / "long.pkl"
    path.write_bytes(b"\x80\x04}K\x01\x85" + b"2\x86" * 60 + b"K\x01s.")
    with pytest.raises(CheckpointError, match="a key is a tuple of tuples"):
        read_pickle(path)
    path.write_bytes(b"\x80\x04" + b"N" * 20_000 + b"(t0" * 20_000 + b".")
    assert read_pickle(path) is None
    twice = Evil(torch.storage._load_from_bytes, (pickle.dumps(1) + bytes(5000),))
    with pytest.raises(CheckpointError, match="damaged"):
        read_pickle(written(twice))
    inner = module("Inner", {"weight": torch.ones(1)})
    for _ in range(60):
        outer = module("Inner", {})
        outer.state["_modules"] = OrderedDict(a=inner, b=inner)
        inner = outer
    options = NETWORKS["DDPM++"]
    held = snapshot("EDMPrecond", options, drawn(options)[0], sigma_data=0.5)
    held["ema"].state["_modules"]["model"].state["_modules"]["more"] = inner
    with pytest.raises(CheckpointError, match=r"holds a module twice, as more\.a"):
        from_edm(written(held))


def test_numbers_that_a_file_names_twice_are_read_once(tmp_path):
    inner = io.BytesIO()
    numbers = torch.storage.TypedStorage(
        wrap_storage=torch.zeros(5000).untyped_storage(), dtype=torch.float32, _internal=True
    )
    torch.save(numbers, inner, _use_new_zipfile_serialization=False)
    data = inner.getvalue()
    head = b"\x80\x04\x8c\x0dtorch.storage\x8c\x10_load_from_bytes\x93\x94B" + struct.pack("<I", len(data)) + data
    (tmp_path / "often.pkl").write_bytes(head + b"\x85\x940](" + b"h\x00h\x01R" * 50 + b"e.")
    found = read_pickle(tmp_path / "often.pkl")
    assert len(found) == 50
    assert len({tensor.data_ptr() for tensor in found}) == 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_blocks": 10**9}, "says that its network has 2000000000 blocks or more, and holds"),
        ({"channel_mult": [1] * 10**5}, "blocks or more"),
        ({"model_channels": 10**8}, "has shape"),
        ({"dropout": torch.ones(2)}, r"dropout=tensor\(\[1., 1.\]\): expected a number"),
        ({"embedding_type": "other"}, "embedding_type='other': expected one of 'positional', 'fourier'"),
        ({"img_resolution": "8"}, "not laid out as EDM's files are"),
    ],
)
def test_arguments_of_no_network_are_told(written, change, told):  # noqa: F811
    options = NETWORKS["DDPM++"]
    held = snapshot("EDMPrecond", {**options, **change}, drawn(options)[0], sigma_data=0.5)
    with pytest.raises(CheckpointError, match=told):
        from_edm(written(held))


# ---- what is no state dict ----


@pytest.mark.parametrize(
    ("held", "told"),
    [
        ([1, 2], "holds list where a state dict was expected"),
        (torch.ones(2), "holds Tensor where a state dict"),
        ({"a": 3}, "a of a state dict is int, expected a tensor"),
        ({1: torch.ones(1)}, "an entry named 1"),
        ({"a": torch.zeros(2, device="meta")}, "on the meta device"),
        ({"a": torch.eye(2).to_sparse()}, "sparse"),
        ({"a": torch.zeros(1, dtype=torch.half).expand(10**9)}, "repeats fewer numbers"),
    ],
)
def test_what_is_no_state_dict_is_told(tmp_path, held, told):
    torch.save(held, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match=told):
        READERS["guided"](tmp_path / "file.pt")


@pytest.mark.parametrize(
    ("held", "told"),
    [
        ({"model": [1]}, "holds list where 'model' was expected"),
        ({"model": {3: torch.ones(1)}}, "an entry named 3"),
        ({"model": {}, "ema": "x"}, "an 'ema' without shadow_params"),
        ({"model": {}, "ema": {"decay": 1}}, "an 'ema' without shadow_params"),
        ({"model": {}, "ema": {"shadow_params": ["x"]}}, "0 of shadow_params is str"),
    ],
)
def test_what_is_no_checkpoint_of_score_sde_is_told(tmp_path, held, told):
    torch.save(held, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=told):
        READERS["score_sde"](tmp_path / "file.pth")


def test_weights_are_floating_point(tmp_path, state):
    torch.save({**state, "out.0.bias": torch.zeros(32, dtype=torch.complex64)}, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match=r"out\.0\.bias of torch\.complex64: expected numbers in floating point"):
        READERS["guided"](tmp_path / "file.pt")


@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_file_of_its_kind_is_told(tmp_path, reader):
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        READERS[reader](tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="is a folder: expected a file"):
        READERS[reader](tmp_path)
    for content in (b"", b"hello", b"PK\x03\x04"):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(
            CheckpointError, match=r"(no file of torch\.save|no pickle), or damaged: \w+|it is not read"
        ):
            READERS[reader](tmp_path / "file")


def test_the_reader_of_another_format_is_named(tmp_path, state, written):  # noqa: F811
    torch.save(state, tmp_path / "adm.pt")
    for reader in ("edm", "score_sde", "lucidrains"):
        with pytest.raises(CheckpointError, match="read it by from_guided_diffusion"):
            READERS[reader](tmp_path / "adm.pt")
    path = written(snapshot("EDMPrecond", NETWORKS["DDPM++"], drawn(NETWORKS["DDPM++"])[0], sigma_data=0.5))
    for reader in OF_TORCH:
        with pytest.raises(CheckpointError, match="read it by from_edm"):
            READERS[reader](path)


# ---- careless arguments ----


def test_digests_are_whole_digits(tmp_path, state):
    path = tmp_path / "file.pt"
    torch.save(state, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert READERS["guided"](path, sha256=digest.upper()).about["files"] == {"file.pt": digest}
    for wrong in (digest[:7], f"sha256:{digest}", digest + "0", "", 5):
        with pytest.raises(ArgumentError, match="64 hexadecimal digits, or the first 8 or more"):
            READERS["guided"](path, sha256=wrong)


def test_devices_that_are_not_there_are_named(tmp_path):
    readers = [*READERS.values(), lambda _, device: from_flow(Net(), device=device)]
    for read in [*readers, lambda _, device: from_diffusers((Net(), SD), device=device)]:
        for device in ("meta", "gpu", "mps" if not torch.backends.mps.is_available() else "gpu"):
            with pytest.raises(ArgumentError, match=f"device='{device}'"):
                read(tmp_path / "file", device=device)


def test_data_of_another_shape_is_told(tmp_path, state):
    torch.save(state, tmp_path / "file.pt")
    for shape in ((4, 1, 8, 8), (3, 8, 8)):
        with pytest.raises(ArgumentError, match=r"data has shape .*: expected \(B, ...\), items like \(3, 8, 8\)"):
            READERS["guided"](tmp_path / "file.pt", data=torch.zeros(shape))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"image_size": 0}, "image_size=0: expected a whole number >= 1"),
        ({"channel_mult": "1,,2"}, "channel_mult='1,,2': expected numbers above 0 with commas"),
        ({"channel_mult": "0,1"}, "channel_mult='0,1'"),
        ({"attention_resolutions": "0"}, "attention_resolutions='0'"),
        ({"attention_resolutions": "all"}, "attention_resolutions='all'"),
        ({"timestep_respacing": "ddimx"}, "steps='ddimx': expected their number"),
        ({"diffusion_steps": 0}, "diffusion_steps=0"),
    ],
)
def test_flags_of_no_network_are_told(tmp_path, state, change, told):
    torch.save(state, tmp_path / "file.pt")
    with pytest.raises(ValueError, match=told):
        from_guided_diffusion(tmp_path / "file.pt", {**FLAGS, **change})


def test_descriptions_of_another_kind_are_told(tmp_path, state):
    path = tmp_path / "file.pt"
    torch.save(state, path)
    with pytest.raises(TypeError, match="flags is int: expected a dict, a command line or a published name"):
        from_guided_diffusion(path, 5)
    with pytest.raises(ValueError, match=r"flags .*: No closing quotation"):
        from_guided_diffusion(path, "--image_size '8")
    with pytest.raises(TypeError, match="config is int"):
        from_score_sde(path, 5)
    with pytest.raises(TypeError, match="a model that is int"):
        from_score_sde(path, {"model": 3})


@pytest.mark.parametrize(
    "net", [SongUNet(1, 8, (1,), 1, (), num_classes=3), MagnitudeUNet(1, 8, (1,), 1, (), num_classes=3)]
)
def test_a_class_that_is_none_is_told(net):
    x, t = torch.zeros(2, 1, 4, 4), torch.zeros(2)
    for wrong in (-1, 4, torch.tensor([0, 4])):
        with pytest.raises(ValueError, match="expected classes 0 to 2, or 3 for none"):
            net(x, t, wrong)
    with pytest.raises(ValueError, match=r"label is torch.float32 of shape \(2, 3\): expected integers"):
        net(x, t, torch.eye(3)[:2])


# ---- by one word ----


def test_a_network_by_one_word(tmp_path, state, written):  # noqa: F811
    path = tmp_path / "file.pt"
    torch.save(state, path)
    flags = tmp_path / "flags.json"
    flags.write_text(json.dumps(FLAGS))
    for text in (f"guided_diffusion:{path}", path):
        assert from_source(text, str(flags)).shape == (3, 8, 8)
        with pytest.raises(ValueError, match="holds no flags"):
            from_source(text)
    with pytest.raises(ArgumentError, match="does not say what network it is of: give name="):
        from_source(f"score_sde:{path}")
    edm = written(snapshot("EDMPrecond", NETWORKS["DDPM++"], drawn(NETWORKS["DDPM++"])[0], sigma_data=0.5))
    assert from_source(edm).about["format"] == from_source(f"edm:{edm}").about["format"] == "EDM"
    with pytest.raises(ArgumentError, match="says itself what network it is of"):
        from_source(edm, "anything")
    for text, told in (("[" * 100_000, "nested too deeply"), ("[1]", "no JSON object"), ("{", "no JSON")):
        flags.write_text(text)
        with pytest.raises(ValueError, match=told):
            from_source(path, str(flags))
    with pytest.raises(ValueError, match="is no file or folder, nor FORMAT:PATH, with FORMAT one of diffusers"):
        from_source(f"edn:{edm}")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="is of no format that is known by its names"):
        from_source(tmp_path / "text")
    torch.save({"state_dict": {"model.diffusion_model.out.2.weight": torch.zeros(1)}}, path)
    with pytest.raises(CheckpointError, match="from_single_file"):
        from_source(path)


# ---- folders of diffusers, without it ----


def diffusers_folder(folder, config=None, **unet):
    """A folder as it writes one, of a configuration and no network."""
    for name in ("unet", "scheduler"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SD | (config or {})))
    (folder / "unet" / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel", **unet}))
    return folder


@pytest.mark.parametrize("kind", ["DiffusionPipeline", "AutoModel", "DDPMScheduler", "utils", ["a", "b"], 3, ""])
def test_no_class_is_looked_up_by_a_name_that_is_not_known(folder, kind):
    """A pipeline's loader would import what its model_index.json names."""
    diffusers_folder(folder, _class_name=kind)
    (folder / "unet" / "model_index.json").write_text(json.dumps({"_class_name": "X", "unet": ["evil", "Evil"]}))
    (folder / "evil.py").write_text("open('ran', 'w')")
    with pytest.raises(ArgumentError, match=r"the network is .*: expected"):
        from_diffusers(folder)
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text(json.dumps({"_class_name": kind}))
    from_diffusers_of_net = {"unet": Net(), "scheduler": SD, "vae": folder / "vae"}
    with pytest.raises(ArgumentError, match="the autoencoder is"):
        from_diffusers(type("Pipe", (), {"components": from_diffusers_of_net})())


def test_a_quantized_network_is_refused(folder):
    diffusers_folder(folder, quantization_config={"quant_method": "torchao"})
    with pytest.raises(CheckpointError, match="is quantized, as quantization_config says"):
        from_diffusers(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "", "[]", "\ufeff{}"])
def test_a_json_that_is_none_is_told(folder, text):
    diffusers_folder(folder)
    for name in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json"):
        before = (folder / name).read_text() if (folder / name).exists() else None
        (folder / name).write_text(text)
        with pytest.raises(CheckpointError, match=f"{name.split('/')[-1]} is no JSON"):
            from_diffusers(folder)
        (folder / name).unlink() if before is None else (folder / name).write_text(before)


HEADER = json.dumps({"a": {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]}}).encode()
TENSORS = len(HEADER).to_bytes(8, "little") + HEADER


@pytest.mark.parametrize(
    "index",
    [{"a": "../secret.safetensors"}, {"a": "/etc/passwd"}, {"a": "other.safetensors"}, {"a": "evil.bin"}, {"a": 5}, 3],
)
def test_an_index_names_files_of_its_folder(tmp_path, index):
    """Those whose sha256 is told, and no other."""
    for name in ("diffusion_pytorch_model.safetensors", "other.safetensors", "evil.bin"):
        (tmp_path / name).write_bytes(TENSORS)
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(
        CheckpointError, match=r"index\.json (names .*: expected files of its folder|has no weight_map)"
    ):
        weights_of(tmp_path, None)


def test_shards_are_those_of_the_index(tmp_path):
    shards = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name in shards:
        (tmp_path / name).write_bytes(TENSORS)
    with pytest.raises(CheckpointError, match="and no index"):
        weights_of(tmp_path, None)
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(TENSORS)  # which theirs does not read then
    index = {"weight_map": dict(zip("ab", shards, strict=True))}
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert weights_of(tmp_path, None) == (None, [tmp_path / name for name in shards])
    assert names_of([tmp_path / shards[0]]) == (["a"], torch.float16)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"abc",
        struct.pack("<Q", 1 << 62) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 7) + b'{"a":1}',
        struct.pack("<Q", 200_000) + b"[" * 200_000,
    ],
)
def test_a_header_that_is_none_is_told(tmp_path, content):
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="no file of safetensors, or damaged"):
        names_of([path])
    assert recognise(path) is None


def test_adapters_and_code_are_seen_in_a_bin(folder):
    path = folder / "diffusion_pytorch_model.bin"
    torch.save({"a.lora_A": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match=r"LoRA weights, a\.lora_A"):
        names_of([path])
    torch.save({"a": Evil(*RUN)}, path)
    with pytest.raises(CheckpointError, match="system"):
        names_of([path])
    with pytest.raises(CheckpointError, match="system"):
        read_torch(path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_train_timesteps": 10**12},
        {"num_train_timesteps": "1000"},
        {"num_train_timesteps": -5},
        {"beta_start": "a"},
        {"beta_end": float("nan")},
        {"steps_offset": "1"},
    ],
)
def test_a_scheduler_has_numbers(wrong):
    ((key, _),) = wrong.items()
    with pytest.raises(ArgumentError, match=f"PNDMScheduler has {key}=.* in its configuration: expected a"):
        from_diffusers((Net(), SD | wrong))
    with pytest.raises(ArgumentError, match="clip_sample='yes' in its configuration: expected a bool"):
        from_diffusers((Net(), SD | {"_class_name": "DDIMScheduler", "clip_sample": "yes"}))


# ---- and with it ----


def test_weights_are_all_there_and_no_other(tmp_path):
    """Theirs draws what is missing at random, and says so in a log."""
    pytest.importorskip("diffusers", reason="diffusers is an optional extra: make test-interop")
    from safetensors.torch import load_file, save_file
    from test_interop_diffusers import small_unet

    from scoresde.interop.diffusers import library

    small_unet(library()).save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    left = {name: tensor for name, tensor in tensors.items() if name != "conv_in.bias"}
    for held, told in (
        (left, "missing conv_in.bias"),
        ({**tensors, "extra": torch.ones(1)}, "unexpected extra"),
        ({**tensors, "conv_in.bias": torch.ones(3)}, r"makes no UNet2DModel of it|another shape"),
    ):
        save_file(held, path)
        with pytest.raises(CheckpointError, match=told):
            from_diffusers((tmp_path, SD))
    save_file(tensors, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="makes no UNet2DModel of it"):
        from_diffusers((tmp_path, SD))
    save_file(tensors, path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"layers_per_block": 10**7}))
    with pytest.raises(CheckpointError, match="says layers_per_block=10000000"):
        from_diffusers((tmp_path, SD))
    (tmp_path / "config.json").write_text(json.dumps(config | {"novel": 1}))
    with pytest.warns(UserWarning, match="has novel in its config.json, which UNet2DModel does not know"):
        from_diffusers((tmp_path, SD))
    (tmp_path / "config.json").write_text(json.dumps(config))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_diffusers((tmp_path, SD))
