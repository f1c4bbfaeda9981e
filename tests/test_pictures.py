"""Picture files: whatever kind one is, it is the same levels from a folder and alone; what cannot be read is found
before a run begins, all of it at once, and a run goes on with what it left out at its beginning."""

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from scoresde import VPSDE, EpsDenoiser
from scoresde.cli import main
from scoresde.cli.models import open_run
from scoresde.data import ImageFolder, Order, loader, read_data, read_image, training_data
from scoresde.data import folder as module
from scoresde.guidance.operators.words import operator_of
from scoresde.nn import MLP
from scoresde.training import TrainConfig, Trainer

Image = pytest.importorskip("PIL.Image")
H, W = 5, 7
RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (H, W), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (H, W, 3), dtype=np.uint8)
ALPHA = np.array([0, 1, 100, 254, 255], np.uint8)[RNG.integers(0, 5, (H, W))]
DEEP = RNG.integers(0, 65536, (H, W)).astype(np.uint16)


def luma(rgb):
    return rgb @ np.array([0.299, 0.587, 0.114])


def kinds():
    """By name: (image, how it is saved, its colours as numbers (H, W, 1 or 3), its opacity or None)."""
    bits = GREY > 127
    palette = Image.fromarray(COLOUR).quantize(8)
    indices, entries = np.array(palette), np.array(palette.getpalette(), float).reshape(-1, 3)
    opacity = np.array([0, 255, 30, 255, 200, 255, 255, 255])
    key = int(GREY[2, 3])
    return {
        "1": (Image.fromarray(bits), {}, 255.0 * bits[..., None], None),
        "1 with a transparent level": (Image.fromarray(bits), {"transparency": 1}, 255.0 * bits[..., None], ~bits),
        "L": (Image.fromarray(GREY), {}, GREY[..., None], None),
        "L with a transparent level": (Image.fromarray(GREY), {"transparency": key}, GREY[..., None], key != GREY),
        "LA": (Image.fromarray(np.dstack([GREY, ALPHA]), "LA"), {}, GREY[..., None], ALPHA / 255),
        "P": (palette, {}, entries[indices], None),
        "P with opacities": (
            palette,
            {"transparency": bytes(opacity.tolist())},
            entries[indices],
            opacity[indices] / 255,
        ),
        "RGB": (Image.fromarray(COLOUR), {}, COLOUR, None),
        "RGB with a transparent colour": (
            Image.fromarray(COLOUR),
            {"transparency": tuple(COLOUR[1, 1].tolist())},
            COLOUR,
            (COLOUR[1, 1] != COLOUR).any(-1),
        ),
        "RGBA": (Image.fromarray(np.dstack([COLOUR, ALPHA])), {}, COLOUR, ALPHA / 255),
        "I;16": (Image.fromarray(DEEP), {}, np.round(DEEP / 257)[..., None], None),
        "I;16 with a transparent level": (
            Image.fromarray(DEEP),
            {"transparency": int(DEEP[0, 0])},
            np.round(DEEP / 257)[..., None],
            DEEP[0, 0] != DEEP,
        ),
    }


KINDS = kinds()


@pytest.mark.filterwarnings("ignore:'mode' parameter:DeprecationWarning")
@pytest.mark.parametrize("background", [None, "black", "#3366cc"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_its_colours_before_the_background(kind, background, tmp_path):
    """a c + (1 - a) b, grey or in colour, and the same alone, in a folder, and where its own mode is asked for."""
    image, how, c, a = KINDS[kind]
    image.save(tmp_path / "a.png", **how)
    b = {None: (255, 255, 255), "black": (0, 0, 0), "#3366cc": (0x33, 0x66, 0xCC)}[background]
    rgb = np.broadcast_to(c, (H, W, 3)).astype(float)
    if a is not None:
        rgb = rgb * a[..., None] + (1 - a[..., None]) * np.array(b, float)
    for mode, channels in (("RGB", 3), ("L", 1)):
        expected = rgb.transpose(2, 0, 1) if mode == "RGB" else luma(rgb)[None]
        folder = ImageFolder(tmp_path, mode=mode, background=background)
        found = folder.batch([0])[0]
        assert found.dtype == torch.uint8
        assert tuple(found.shape) == folder.shape == (channels, H, W)
        assert np.abs(found.numpy() - expected).max() <= (1 if mode == "RGB" else 1.5)  # of rounding, once or twice
        if a is None or set(np.unique(a)) <= {0, 1}:
            assert mode == "L" or np.array_equal(found.numpy(), expected)
        assert torch.equal(read_image(tmp_path / "a.png", (channels, H, W), background), found)
        if c.shape[-1] == channels:  # its own mode
            own = ImageFolder(tmp_path, background=background)
            assert (own.shape, torch.equal(own.batch([0])[0], found)) == (folder.shape, True)


def test_sixteen_bits_are_rounded_to_eight(tmp_path):
    """Every level of them, and the lowest and highest stay so."""
    k = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(k).save(tmp_path / "a.png")
    found = ImageFolder(tmp_path).batch([0])[0, 0].numpy()
    assert np.array_equal(found, np.round(k.astype(float) / 257))
    assert (found.min(), found.max()) == (0, 255)


def test_cmyk_is_pillows_and_frames_are_the_first(tmp_path):
    first, second = Image.fromarray(COLOUR), Image.fromarray(255 - COLOUR)
    first.convert("CMYK").save(tmp_path / "a.jpg")
    first.save(tmp_path / "b.png", save_all=True, append_images=[second])
    first.save(tmp_path / "c.webp", save_all=True, append_images=[second], lossless=True)
    found = ImageFolder(tmp_path).batch(range(3))
    assert np.array_equal(found[0], np.array(Image.open(tmp_path / "a.jpg").convert("RGB")).transpose(2, 0, 1))
    for one in found[1:]:
        assert np.array_equal(one, COLOUR.transpose(2, 0, 1))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_upright_before_it_is_cropped(orientation, tmp_path):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.dstack([COLOUR, ALPHA])).save(tmp_path / "a.png", exif=exif)
    folder = ImageFolder(tmp_path)
    with Image.open(tmp_path / "a.png") as image:
        upright = ImageOps.exif_transpose(image)
    upright.save(tmp_path / "a.png", exif=Image.Exif())
    there = ImageFolder(tmp_path)
    assert folder.shape == there.shape == (3, *((W, H) if orientation > 4 else (H, W)))
    image.save(tmp_path / "a.png", exif=exif)
    assert torch.equal(folder.batch([0])[0], torch.from_numpy(_plain(upright)))


def _plain(image):
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(image, mask=image)
    return np.array(canvas).transpose(2, 0, 1).copy()


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp"])
def test_a_damaged_file_is_read_or_named(suffix, tmp_path):
    """Cut anywhere, or with bytes changed, it is no other error."""
    path, file = tmp_path / f"a.{suffix}", io.BytesIO()
    Image.fromarray(COLOUR).save(file, {"jpg": "jpeg"}.get(suffix, suffix))
    whole = file.getvalue()
    contents = [whole[: len(whole) * k // 20] for k in range(20)]
    for _ in range(60):
        changed = bytearray(whole)
        for i in RNG.integers(0, min(len(whole), 120), 3):
            changed[i] = RNG.integers(0, 256)
        contents.append(bytes(changed))
    refused = 0
    for content in contents:
        path.write_bytes(content)
        try:
            found = read_image(path, (3, H, W))
        except ValueError as error:
            refused += str(error).startswith(f"{path} cannot be read as an image: ")
        else:
            refused += tuple(found.shape) == (3, H, W) and found.dtype == torch.uint8
    assert refused == len(contents)


def claims(height, width):
    """A PNG file of a few bytes whose head says so many pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [13_000, 50_000])
def test_what_is_larger_than_memory_may_be_is_not_decoded(side, tmp_path):
    path = tmp_path / "pictures" / "a.png"
    path.parent.mkdir()
    path.write_bytes(claims(side, side))
    words = r"a\.png cannot be read as an image: it has more than 89,478,485 pixels"
    for read in (
        lambda: ImageFolder(path.parent),
        lambda: ImageFolder(path.parent, skip=True),
        lambda: training_data(path.parent, size=8, mode="L").look(),
        lambda: training_data(path.parent, size=8, mode="L").batch(torch.tensor([0])),
        lambda: read_image(path, (3, 8, 8)),
        lambda: operator_of(f"mask:{path}", (1, 8, 8)),
    ):
        with pytest.raises(ValueError, match=words):
            read()


# --- a folder --------------------------------------------------------------------------------------------------------

BAD = (17, 61, 93)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """100 images, of which three cannot be read."""
    folder = tmp_path_factory.mktemp("damaged") / "pictures"
    for k in range(100):
        path = folder / f"{k % 2}" / f"{k:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4), k % 256, np.uint8)).save(path)
    names = [f"{k % 2}/{k:03d}.png" for k in BAD]
    (folder / names[0]).write_bytes(b"no image")
    (folder / names[1]).write_bytes(b"")
    whole = (folder / names[2]).read_bytes()
    (folder / names[2]).write_bytes(whole[:-32])  # it opens, and ends too soon
    return folder, names


def listed(error, names):
    """Whether each of them, and no other file, has its line and reason."""
    lines = [line for line in str(error.value).splitlines() if " cannot be read as an image: " in line]
    return len(lines) == len(names) and all(sum(name in line for line in lines) == 1 for name in names)


def test_all_files_that_cannot_be_read_are_named_before_a_run(damaged):
    folder, names = damaged
    data = training_data(folder, size=4, mode="L")
    for look in (
        data.look,
        lambda: ImageFolder(folder),  # without size= and mode=, all are opened; where one does not, all are decoded
        lambda: Trainer(EpsDenoiser(MLP(1), VPSDE()), data, TrainConfig(steps=1)),
        lambda: training_data(folder, size=4, mode="L", lazy=False),
        lambda: read_data(folder, size=4, mode="L"),
    ):
        with pytest.raises(ValueError, match=r"^3 files cannot be read; skip= leaves them out:\n") as error:
            look()
        assert listed(error, names)


def test_what_is_many_pixels_is_looked_at_in_part(damaged, monkeypatch):
    """Every file is opened, and of those that open as many are decoded as is quick, evenly chosen."""
    folder, names = damaged
    decoded = []
    whole = module.Decoder.array
    monkeypatch.setattr(module.Decoder, "array", lambda self, path: decoded.append(path) or whole(self, path))
    monkeypatch.setattr(module, "_QUICK", 16 * 20)
    wrong = ImageFolder(folder, size=4, mode="L").look()
    assert 18 <= len(decoded) <= 20
    assert [name for name in names if any(name in line for line in wrong)] == names[:2]


def test_files_that_cannot_be_read_are_left_out_on_request(damaged):
    folder, names = damaged
    data = training_data(folder, size=4, mode="L", labels=True, skip=True)
    assert sorted(data.skipped) == sorted(names)
    assert len(data) == 97
    data.look()
    x, cond = data.batch(torch.arange(97))
    k = torch.tensor([int(Path(name).stem) for name in data.x.names])
    assert torch.equal(x[:, 0, 0, 0], (2.0 * (k % 256) - 255) / 255)
    assert torch.equal(cond["label"], k % 2)
    again = training_data(folder, size=4, mode="L", labels=True, skip=tuple(data.skipped))
    assert (again.x.names, again.fingerprint) == (data.x.names, data.fingerprint)
    assert torch.equal(training_data(folder, size=4, mode="L", skip=True, lazy=False).batch(torch.arange(97)).x, x)
    assert read_data(folder, skip=True).names == data.x.names
    for batch in loader(data, Order(97, 20), 0, 5, workers=0):
        assert len(batch.x) == 20
    assert training_data(folder / "..", size=4, mode="L", skip=True).skipped  # whatever the folder is called
    with pytest.raises(ValueError, match=r"skip= are for a folder of images"):
        read_data("digits", skip=True)


def test_a_pair_is_left_out_where_one_of_them_cannot_be_read(damaged, tmp_path):
    folder, names = damaged
    given = tmp_path / "given"
    for k in range(100):
        path = given / f"{k % 2}" / f"{k:03d}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4), 255 - k % 256, np.uint8)).save(path)
    whole = (given / "0" / "042.bmp").read_bytes()
    (given / "0" / "042.bmp").write_bytes(whole[:-8])
    for lazy in (True, False):
        data = training_data(folder, mode="L", skip=True, conditions=[f"given:{given}"], lazy=lazy)
        assert sorted(data.skipped) == sorted([*names, "0/042.png"])
        x, cond = data.batch(torch.arange(len(data)))
        assert torch.equal(x, -cond["image"])
    data = training_data(folder, mode="L", skip=list(data.skipped), conditions=[f"given:{given}"])
    assert torch.equal(data.batch(torch.arange(len(data))).x, x)
    data = training_data(given, conditions=[f"given:{given}"], size=4, mode="L")
    with pytest.raises(ValueError, match=r"042\.bmp cannot be read"):
        data.look()


def test_nothing_is_left(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"all of its images are left out\n.*a\.png cannot be read as an image"):
        ImageFolder(tmp_path, skip=True)


@pytest.mark.parametrize(
    "wrong",
    [
        {"background": "mauvish"},
        {"background": "#ffffff80"},
        {"size": 0},
        {"size": (3, 4, 5)},
        {"size": 2.5},
        {"size": True},
        {"mode": "CMYK"},
    ],
)
def test_what_cannot_be_made_of_them(wrong, damaged):
    (name,) = wrong
    with pytest.raises(ValueError, match=rf"{name}=.*expected"):
        ImageFolder(damaged[0], **wrong)


def test_a_run_goes_on_with_what_it_left_out(damaged, tmp_path, capsys, monkeypatch):
    """Refused with its list, and nothing written; then with the flag, which the run keeps to, even where a file has
    been mended meanwhile."""
    pytest.importorskip("msgspec")
    folder, names = damaged
    monkeypatch.chdir(tmp_path)
    small = ["--set", "model.network=mlp", "--set", "model.options.width=8", "--set", "model.options.depth=1",
             "--set", "evaluate.grid=0", "--batch-size", "4", "--device", "cpu", "--quiet"]  # fmt: skip
    begin = ["train", "--data", str(folder), "--size", "4", "--mode", "L", *small, "--steps", "2", "--out", "run"]
    assert main(begin) == 2
    assert "3 files cannot be read; --skip-unreadable leaves them out:\n" in (said := capsys.readouterr().err)
    assert all(f"{name} cannot be read as an image: " in said for name in names)
    assert not Path("run/config.toml").exists()
    assert main([*begin, "--skip-unreadable", "--set", "train.schedule=constant", "--background", "#808080"]) == 0
    assert json.loads(Path("run/data.json").read_text())["skipped"] == sorted(names)
    damaged_file = (folder / names[2]).read_bytes()
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(folder / names[2])
    try:
        assert main(["train", "--out", "run", "--set", "train.steps=4", "--device", "cpu", "--quiet"]) == 0
        assert "run: 4 steps" in capsys.readouterr().out
        own = open_run(Path("run")).data()
        assert (sorted(own.skip), own.background, len(own.open())) == (sorted(names), "#808080", 97)
        assert own.beside(str(folder)).skip is False
    finally:
        (folder / names[2]).write_bytes(damaged_file)
