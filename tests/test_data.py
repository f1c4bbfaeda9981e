"""Data: what is written is read back and nothing else is; every epoch shows every item once, in an order that a seed
decides, whatever the number of processes and workers, and wherever a run was resumed."""

import collections
import gzip
import hashlib
import io
import itertools
import math
import multiprocessing
import os
import pickle
import struct
import subprocess
import tarfile
import warnings
import zipfile

import numpy as np
import pytest
import torch

from scoresde.cli import main
from scoresde.data import (
    BUILT_IN,
    FASHION_MNIST,
    TOYS,
    Given,
    ImageFolder,
    Order,
    TrainingData,
    cifar,
    cifar10,
    cifar10_levels,
    digit_levels,
    digits,
    fashion_mnist,
    fashion_mnist_levels,
    fetch,
    idx,
    loader,
    mnist,
    mnist_levels,
    read_data,
    scaled,
    training_data,
)
from scoresde.levels import outer_edges
from scoresde.likelihood.bits import dequantized
from scoresde.noise import derive_seed

IMAGES = (torch.arange(12 * 28 * 28) % 256).to(torch.uint8).reshape(12, 28, 28)
LABELS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 0])
installed = pytest.mark.skipif(not FASHION_MNIST.exists(), reason="needs Debian's package dataset-fashion-mnist")


def idx_file(x):
    """An IDX file's bytes: magic number, sizes, entries."""
    return struct.pack(f">HBB{x.ndim}I", 0, 8, x.ndim, *x.shape) + x.to(torch.uint8).numpy().tobytes()


def write(folder, images=IMAGES, labels=LABELS, split="train", zipped=False):
    for name, x in ((f"{split}-images-idx3-ubyte", images), (f"{split}-labels-idx1-ubyte", labels)):
        path, content = (folder / f"{name}.gz", gzip.compress(idx_file(x))) if zipped else (folder / name, idx_file(x))
        path.write_bytes(content)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path)
    return tmp_path


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("read", [fashion_mnist_levels, mnist_levels])
def test_written_files_are_read_back(read, zipped, tmp_path):
    write(tmp_path, zipped=zipped)
    write(tmp_path, IMAGES[:5].flip(0), LABELS[:5].flip(0), "t10k", zipped=not zipped)
    images, labels = read(tmp_path)
    assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
    assert torch.equal(images, IMAGES[:, None])
    assert torch.equal(labels, LABELS)
    images, labels = read(str(tmp_path), split="test")
    assert torch.equal(images, IMAGES[:5, None].flip(0))
    assert torch.equal(labels, LABELS[:5].flip(0))


@pytest.mark.parametrize("read", [fashion_mnist, mnist])
def test_levels_stand_in_the_middle_of_the_bins_of_outer_edges(read, folder):
    """Level k at 2 k / 255 - 1, the ends exactly: the bins fill the range with which the built-in sets are read."""
    images, labels = read(folder)
    assert images.dtype == torch.float32
    assert torch.equal(labels, LABELS)
    k = IMAGES[:, None].double()
    assert torch.equal(images, ((2 * k - 255) / 255).float())
    assert (float(images.min()), float(images.max())) == (-1, 1)
    middle = dequantized(IMAGES[:, None], 256, data_range=outer_edges(-1.0, 1.0, 256), seed=0).sub(images)
    assert float(middle.abs().max()) <= 1 / 255 + 1e-6


@pytest.mark.parametrize("name", ["fashion-mnist", "fashion-mnist-test"])
def test_the_built_in_sets(name, tmp_path, monkeypatch):
    monkeypatch.setattr(idx, "FASHION_MNIST", tmp_path)
    split = "t10k" if name.endswith("test") else "train"
    with pytest.raises(
        FileNotFoundError, match=f"no {split}-images-idx3-ubyte .*apt-get install dataset-fashion-mnist"
    ):
        read_data(name)
    write(tmp_path, split=split, zipped=True)
    found = read_data(name)
    assert torch.equal(found.x, IMAGES[:, None])
    assert (found.levels, found.data_range, found.names) == (256, outer_edges(-1.0, 1.0, 256), None)
    assert name in BUILT_IN


def test_missing_files_are_named_and_how_to_get_them(folder):
    (folder / "train-labels-idx1-ubyte").unlink()
    for read in (fashion_mnist, mnist):
        with pytest.raises(FileNotFoundError, match=r"no train-labels-idx1-ubyte in .*t10k-labels-idx1-ubyte, gzipped"):
            read(folder)
        with pytest.raises(FileNotFoundError, match="nowhere: expected a folder with train-images-idx3-ubyte"):
            read(folder / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"apt-get install dataset-fashion-mnist; else say which folder"):
        fashion_mnist(folder, "test")
    with pytest.raises(ValueError, match="split='valid': expected one of 'train', 'test'"):
        mnist(folder, "valid")


def test_every_beginning_of_a_file_is_refused(folder):
    """Cut anywhere, gzipped before or not, or with a byte too many, a file is damaged, and named."""
    path, whole = folder / "train-labels-idx1-ubyte", idx_file(LABELS)
    zipped = gzip.compress(whole)
    cut = [content[:n] for content in (whole, zipped) for n in range(len(content))]
    for content in [*cut, whole + b"\0", zipped + b"x", gzip.compress(whole + b"\0"), gzip.compress(whole[:-1])]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="train-labels-idx1-ubyte cannot be read as an IDX file"):
            mnist(folder)
    path.write_bytes(zipped)  # a gzipped file is known by what it holds, not by its name
    assert torch.equal(mnist(folder)[1], LABELS)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (idx_file(LABELS), "begins with the bytes 00 00 08 01, expected 00 00 08 03"),
        (b"\x80\x04cos\nsystem\n", "begins with the bytes 80 04 63 6f"),  # a pickle
        (b"\0\0\x0d\x03" + idx_file(IMAGES)[4:], "begins with the bytes 00 00 0d 03"),  # floating-point entries
        (idx_file(IMAGES[:, :27]), r"its shape is \(12, 27, 28\), expected \(N, 28, 28\)"),
        (idx_file(IMAGES[:0]), r"its shape is \(0, 28, 28\)"),
        (idx_file(IMAGES)[:4] + b"\xff" * 12, r"its shape is \(4294967295, 4294967295, 4294967295\)"),
        (idx_file(IMAGES)[:4] + b"\xff" * 4 + idx_file(IMAGES)[8:], "it has 9408 entries, its shape"),
        (b"\x1f\x8b" + bytes(20), "method"),
        (b"PK\x03\x04" + bytes(40), "begins with the bytes 50 4b"),
    ],
)
def test_foreign_files_are_refused_by_name(content, words, folder):
    (folder / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(ValueError, match=rf"train-images-idx3-ubyte cannot be read.*{words}"):
        fashion_mnist_levels(folder)


def test_images_and_labels_must_go_together(tmp_path):
    write(tmp_path, labels=LABELS[:-1])
    with pytest.raises(ValueError, match=r"images-idx3-ubyte has 12 images, .*labels-idx1-ubyte 11 labels"):
        mnist(tmp_path)
    write(tmp_path, labels=LABELS + 5)
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte has the label 14: expected 0 to 9"):
        mnist(tmp_path)


def test_images_can_be_changed(folder):
    """They share no memory with anything, and are no view of a read-only buffer (torch would warn)."""
    images, _ = mnist_levels(folder)
    images += 1
    assert torch.equal(mnist_levels(folder)[0] + 1, images)


@installed
@pytest.mark.parametrize(("split", "count"), [("train", 60_000), ("test", 10_000)])
def test_the_installed_set(split, count):
    """As it is described: N images, each of the ten classes as often."""
    images, labels = fashion_mnist_levels(split=split)
    assert (tuple(images.shape), tuple(labels.shape)) == ((count, 1, 28, 28), (count,))
    assert torch.equal(labels.bincount(), torch.full((10,), count // 10))
    assert (int(images.min()), int(images.max())) == (0, 255)
    name = "fashion-mnist" if split == "train" else "fashion-mnist-test"
    assert torch.equal(read_data(name).x, images)


# --- downloads -------------------------------------------------------------------------------------------------------


def test_what_is_downloaded_is_checked_first(tmp_path):
    """From file: addresses; the net is never asked."""
    source, path = tmp_path / "source", tmp_path / "new" / "file"
    source.write_bytes(b"content")
    md5 = hashlib.md5(b"content").hexdigest()
    with pytest.raises(ValueError, match=f"checksum {md5}, expected 00"):
        fetch(path, [source.as_uri()], "0" * 32, progress=False)
    with pytest.raises(
        ConnectionError, match=r"file could not be downloaded \(file://.*nothing.*put it in .*new by hand"
    ):
        fetch(path, [(tmp_path / "nothing").as_uri()], md5, progress=False)
    assert list(path.parent.iterdir()) == []
    assert (
        fetch(path, [(tmp_path / "nothing").as_uri(), source.as_uri()], md5, progress=False).read_bytes() == b"content"
    )
    source.unlink()
    assert fetch(path, [source.as_uri()], md5) == path  # it is there


def test_downloaded_sets(tmp_path, monkeypatch):
    served, folder = tmp_path / "served", tmp_path / "folder"
    served.mkdir()
    write(served, zipped=True)
    md5 = {path.name.removesuffix("-ubyte.gz"): hashlib.md5(path.read_bytes()).hexdigest() for path in served.iterdir()}
    monkeypatch.setattr(idx, "_MNIST", (f"{served.as_uri()}/", md5))
    monkeypatch.setattr(idx, "_FASHION", (f"{served.as_uri()}/", md5))
    assert torch.equal(read_data(f"mnist:{folder}", download=True).x, IMAGES[:, None])
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in served.iterdir())
    assert torch.equal(fashion_mnist_levels(folder)[0], mnist_levels(folder, download=True)[0])
    with pytest.raises(ValueError, match="download=True needs path="):
        fashion_mnist(download=True)


# --- CIFAR-10 --------------------------------------------------------------------------------------------------------

PER_FILE = 4
CIFAR = {name: torch.randint(256, (PER_FILE, 3073), generator=torch.Generator().manual_seed(k), dtype=torch.uint8)
         for k, name in enumerate([*cifar._FILES["train"], "test_batch"])}  # fmt: skip
for _records in CIFAR.values():
    _records[:, 0] %= 10


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 did, which the official files are from."""

    dispatch = dict(pickle._Pickler.dispatch)  # noqa: RUF012

    def save_bytes(self, x):
        self.write(b"T" + struct.pack("<i", len(x)) + x)
        self.memoize(x)

    dispatch[bytes] = save_bytes


def python_version(records, numpy="numpy.core"):
    file = io.BytesIO()
    data = np.ascontiguousarray(records[:, 1:].numpy())
    content = {b"data": data, b"labels": records[:, 0].tolist(), b"batch_label": b"training batch 1 of 5"}
    Python2Pickler(file, protocol=2).dump(content)
    return file.getvalue().replace(b"numpy._core", numpy.encode())


def cifar_files(version):
    if version == "bin":
        return {f"cifar-10-batches-bin/{name}.bin": x.numpy().tobytes() for name, x in CIFAR.items()}
    return {f"cifar-10-batches-py/{name}": python_version(x) for name, x in CIFAR.items()}


def write_cifar(folder, version, archived):
    files = cifar_files(version)
    if not archived:
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        return folder / next(iter(files)).split("/")[0]
    path = folder / f"cifar-10-{'binary' if version == 'bin' else 'python'}.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(cifar, "_PER_FILE", PER_FILE)


@pytest.mark.parametrize("archived", [False, True])
@pytest.mark.parametrize("version", ["bin", "py"])
def test_cifar10_is_read_back(version, archived, few, tmp_path):
    path = write_cifar(tmp_path, version, archived)
    records = torch.cat([CIFAR[name] for name in cifar._FILES["train"]])
    for place in (path, tmp_path):
        images, labels = cifar10_levels(place)
        assert torch.equal(images, records[:, 1:].reshape(-1, 3, 32, 32))
        assert torch.equal(labels, records[:, 0].long())
        assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
    found = read_data(f"cifar10-test:{tmp_path}")
    assert torch.equal(found.x, CIFAR["test_batch"][:, 1:].reshape(-1, 3, 32, 32))
    assert torch.equal(cifar10(path, "test")[0], scaled(found.x))
    assert (found.levels, found.data_range, found.classes[3]) == (256, outer_edges(-1.0, 1.0, 256), "cat")
    found.x.add_(1)  # no view of what may not be written


def test_the_binary_version_is_taken_first(few, tmp_path):
    write_cifar(tmp_path, "py", False)
    write_cifar(tmp_path, "bin", True)
    for name in CIFAR:
        (tmp_path / "cifar-10-batches-py" / name).write_bytes(b"damaged")
    assert len(cifar10_levels(tmp_path)[0]) == 5 * PER_FILE


class Runs:
    """What is called when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_a_malicious_pickle_is_refused_and_runs_nothing(few, tmp_path):
    folder, made = write_cifar(tmp_path, "py", False), tmp_path / "made"
    attacks = [
        pickle.dumps(Runs(os.mkdir, str(made))),
        pickle.dumps({b"data": Runs(os.mkdir, str(made)), b"labels": [0] * PER_FILE}, protocol=2),
        pickle.dumps(Runs(eval, f"__import__('os').mkdir({str(made)!r})"), protocol=0),
        b"cposix\nmkdir\n(V" + str(made).encode() + b"\ntR.",
        b"cnumpy\nndarray.mro\n.",
        b"cnumpy.core.multiarray\nfromfile\n(V/etc/passwd\ntR.",
        b"\x82\x01.",  # a name from copyreg's registry
        b"Pnobody\n.",  # a persistent one
        b"cnumpy\nndarray\n}V__class__\ncnumpy\ndtype\nsb.",  # a state for the class itself
    ]
    for attack in attacks:
        (folder / "test_batch").write_bytes(attack)
        with pytest.raises(ValueError, match=r"py/test_batch cannot be read as a file of CIFAR-10"):
            cifar10(folder, "test")
    assert not made.exists()


def test_damaged_pickles_are_refused_by_name(few, tmp_path):
    folder = write_cifar(tmp_path, "py", False)
    whole, ones = python_version(CIFAR["test_batch"]), np.ones((PER_FILE, 3072), np.uint8)
    contents = [whole[:n] for n in (0, 1, 50, 1000, len(whole) - 1)]
    for data in (ones[:-1], ones.astype(np.int16), np.asfortranarray(ones), [1, 2], ones.astype(object)):
        contents.append(pickle.dumps({b"data": data, b"labels": [0] * PER_FILE}))
    for labels in ([0] * (PER_FILE - 1), [10] * PER_FILE, ["0"] * PER_FILE, 7, [2**80] * PER_FILE):
        file = io.BytesIO()
        Python2Pickler(file, protocol=2).dump({b"data": ones, b"labels": labels})
        contents.append(file.getvalue())
    for content in contents:
        (folder / "test_batch").write_bytes(content)
        with pytest.raises(ValueError, match=r"py/test_batch cannot be read as a file of CIFAR-10"):
            cifar10(folder, "test")
    (folder / "test_batch").write_bytes(python_version(CIFAR["test_batch"], "numpy._core"))
    assert torch.equal(cifar10(folder, "test")[1], CIFAR["test_batch"][:, 0].long())


def test_damaged_archives_and_binary_files_are_refused_by_name(few, tmp_path):
    folder, archive = write_cifar(tmp_path, "bin", False), write_cifar(tmp_path, "bin", True)
    whole = archive.read_bytes()
    for content in (whole[:1], whole[: len(whole) // 2], b"PK\x03\x04", b"", gzip.compress(b"no archive" * 100)):
        archive.write_bytes(content)
        with pytest.raises(ValueError, match=r"binary\.tar\.gz cannot be read as an archive of CIFAR-10"):
            cifar10(archive)
    with tarfile.open(archive, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("data_batch_1.bin"))
    with pytest.raises(ValueError, match=r"it lacks data_batch_1, data_batch_2, data_batch_2\.bin"):
        cifar10(archive)
    archive.unlink()
    path = folder / "data_batch_3.bin"
    for content in (path.read_bytes()[:-1], path.read_bytes() + b"\0", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"data_batch_3\.bin cannot be read .* bytes, expected 4 records of 3073"):
            cifar10(tmp_path)
    path.write_bytes(b"\x0a" * 3073 * PER_FILE)
    with pytest.raises(ValueError, match="labels from 10 to 10, expected 0 to 9"):
        cifar10(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no data_batch_3\.bin in"):
        cifar10(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no CIFAR-10 at .*cifar-10-binary\.tar\.gz.*download fetches it"):
        cifar10(tmp_path / "nowhere")


# --- a folder of images ----------------------------------------------------------------------------------------------


def ramp(k, height=6, width=8):
    """Image k: its grey levels are all different, and other than those of its neighbours."""
    return np.roll(np.arange(height * width, dtype=np.uint8) * 5 % 251, k).reshape(height, width)


@pytest.fixture
def pictures(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    for k in range(10):
        path = tmp_path / "images" / ("cats" if k % 3 else "birds") / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(ramp(k)).save(path)
    return tmp_path / "images"


def test_a_folder_is_decoded_when_wanted(pictures):
    folder = ImageFolder(pictures, labels=True)
    assert (folder.shape, folder.classes) == ((1, 6, 8), ["birds", "cats"])
    assert folder.names == sorted(folder.names)
    assert folder.labels.tolist() == [0 if k % 3 == 0 else 1 for k in (0, 3, 6, 9, 1, 2, 4, 5, 7, 8)]
    batch = folder.batch(torch.tensor([4, 0, 4]))
    assert torch.equal(batch, torch.from_numpy(np.stack([ramp(k)[None] for k in (1, 0, 1)])))
    here = training_data(pictures, labels=True, lazy=False)
    there = training_data(pictures, labels=True)
    for data in (here, there):
        x, cond = data.batch(torch.tensor([9, 2]))
        assert torch.equal(x, scaled(torch.from_numpy(np.stack([ramp(8)[None], ramp(6)[None]]))))
        assert cond["label"].tolist() == [1, 0]
        assert (data.classes, data.levels, data.shape) == (folder.classes, 256, (1, 6, 8))
    assert (here.lazy, there.lazy) == (False, True)
    assert read_data(pictures, labels=True).labels.equal(folder.labels)
    assert read_data(pictures).labels is None
    with pytest.raises(ValueError, match=r"is not in memory: .*lazy=False"):
        there.to("cpu")


def test_images_are_made_alike_on_request(tmp_path):
    """Cropped around the centre, then resized: a constant stays constant, the middle stays in the middle."""
    Image = pytest.importorskip("PIL.Image")
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = np.arange(300).reshape(10, 10, 3) % 256
    Image.fromarray(wide).save(tmp_path / "a.png")
    Image.fromarray(np.full((40, 40), 77, np.uint8)).save(tmp_path / "b.png")
    with pytest.raises(
        ValueError, match=r"b\.png is \(1, 40, 40\), .*a\.png \(3, 10, 30\): .*size= and mode= make them"
    ):
        ImageFolder(tmp_path)
    with pytest.raises(ValueError, match=r"b\.png is \(1, 5, 5\)"):
        ImageFolder(tmp_path, size=5)
    x = ImageFolder(tmp_path, size=10, mode="RGB").batch(range(2))
    assert torch.equal(x[0], torch.from_numpy(wide[:, 10:20].transpose(2, 0, 1).copy()))
    assert torch.equal(x[1], torch.full((3, 10, 10), 77, dtype=torch.uint8))
    assert ImageFolder(tmp_path, size=(4, 9), mode="L").batch([0]).shape == (1, 1, 4, 9)
    assert torch.equal(ImageFolder(tmp_path, size=40, mode="L").batch([1])[0, 0], x.new_full((40, 40), 77))
    for wrong in ({"size": 0}, {"mode": "CMYK"}):
        with pytest.raises(ValueError, match="expected"):
            ImageFolder(tmp_path, **wrong)
    with pytest.raises(ValueError, match=r"a\.png has no class: expected it in .*/CLASS/"):
        ImageFolder(tmp_path, labels=True, size=5, mode="L")


def test_photographs_are_turned_upright(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees, clockwise
    Image.fromarray(ramp(0)).save(tmp_path / "a.png", exif=exif)
    assert torch.equal(ImageFolder(tmp_path).batch([0])[0, 0], torch.from_numpy(np.rot90(ramp(0), -1).copy()))


def test_damaged_images_are_named_when_they_are_wanted(pictures):
    Image = pytest.importorskip("PIL.Image")
    file = io.BytesIO()
    Image.fromarray(np.kron(ramp(0), np.ones((20, 20), np.uint8))).save(file, format="jpeg")
    (pictures / "cats" / "x.jpg").write_bytes(file.getvalue()[: len(file.getvalue()) // 2])
    (pictures / "cats" / "._x.jpg").write_bytes(b"left by a file manager")
    data = training_data(pictures, size=8, mode="L")
    assert len(data) == 11
    data.batch(torch.arange(10))
    with pytest.raises(ValueError, match=r"cats/x\.jpg cannot be read as an image: image file is truncated"):
        data.batch(torch.tensor([3, 10]))
    for workers in (0, 1):
        with pytest.raises(ValueError, match=r"^\S*cats/x\.jpg cannot be read as an image: image file is truncated"):
            list(loader(data, Order(11, 11), 0, 1, workers=workers))
    (pictures / "cats" / "x.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"cats/x\.jpg cannot be read as an image"):
        training_data(pictures)
    (pictures / "cats" / "x.jpg").unlink()
    data = training_data(pictures)
    Image.fromarray(ramp(0, 7, 8)).save(pictures / "birds" / "0.png")  # changed since
    with pytest.raises(ValueError, match=r"birds/0\.png is \(1, 7, 8\)"):
        data.batch(torch.tensor([0]))


# --- arrays and names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_arrays_with_labels(suffix, tmp_path):
    path, x, y = tmp_path / f"a.{suffix}", IMAGES[:, None], LABELS

    def save(**arrays):
        if suffix == "npz":
            np.savez(path, **{name: array.numpy() for name, array in arrays.items()})
        else:
            pytest.importorskip("safetensors.torch").save_file(arrays, path)

    for name in ("images", "x"):
        save(**{name: x, "labels": y})
        found = read_data(path, labels=True)
        assert torch.equal(found.x, x)
        assert torch.equal(found.labels, y)
        assert read_data(path).labels is None
    assert training_data(path, labels=True).data_range == outer_edges(-1.0, 1.0, 256)
    whole = path.read_bytes()
    save(x=x)
    with pytest.raises(ValueError, match=rf"a\.{suffix} .*there is none named 'labels'"):
        training_data(path, labels=True)
    for wrong in (y[1:], y.double(), y[:, None]):
        save(x=x, labels=wrong)
        with pytest.raises(ValueError, match=rf"a\.{suffix}: labels are .*expected 12 whole numbers"):
            read_data(path, labels=True)
    save(one=x, two=x + 1)
    with pytest.raises(ValueError, match=rf"a\.{suffix} .*'one', 'two'.*'images'"):
        read_data(path)
    save(x=x.bool())
    with pytest.raises(ValueError, match=rf"a\.{suffix} .*expected integers or floating-point"):
        read_data(path)
    for n in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:n])
        with pytest.raises(ValueError, match=rf"a\.{suffix} cannot be read"):
            read_data(path)


def test_names_and_their_arguments(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    assert torch.equal(read_data("two-moons:50").x, TOYS["two-moons"](50)[0])
    assert torch.equal(training_data("digits", labels=True).labels, digit_levels()[1])
    for source, words in [
        ("mnist", "say where it is, mnist:/data/mnist"),
        ("cifar10-test", "cifar10:/data/cifar10"),
        ("spiral", "expected the number of points, spiral:10000"),
        ("spiral:-3", "expected the number of points"),
        ("digits:/data", "leave the path out"),
    ]:
        with pytest.raises(ValueError, match=words):
            read_data(source)
    for source in ("nothing", "nothing:/data", "digits2"):
        with pytest.raises(FileNotFoundError, match="no such file or folder, nor a built-in"):
            read_data(source, size=4)  # whatever is to be made of it
    with pytest.raises(ValueError, match="size=, mode=, background= and skip= are for a folder"):
        read_data("digits", size=4)
    monkeypatch.chdir(tmp_path)
    np.save("rings:7.npy", np.zeros((3, 2)))
    assert len(read_data("rings:7.npy").x) == 3  # a file that is there
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        read_data(tmp_path / "digits")


# --- toys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOYS)
def test_toys_have_mean_zero_and_square_two(name):
    n, before = 40_000, torch.get_rng_state()
    for noise in ({}, {"noise": 0.0}, {"noise": 0.7}):
        x, labels = TOYS[name](n, 1, **noise)
        assert (x.shape, x.dtype, labels.shape, labels.dtype) == ((n, 2), torch.float32, (n,), torch.int64)
        assert float(x.mean(0).abs().max()) < 5 * math.sqrt(2 / n)
        square = x.square().sum(1)
        assert float(square.mean()) == pytest.approx(2, abs=5 * float(square.std()) / math.sqrt(n) + 1e-6)
        share = labels.bincount() / n
        assert float((share - 1 / len(share)).abs().max()) < 5 * math.sqrt(1 / (4 * n))
    assert torch.equal(TOYS[name](9, 5)[0], TOYS[name](9, torch.Generator().manual_seed(5))[0])
    assert not torch.equal(TOYS[name](9, 5)[0], TOYS[name](9, 6)[0])
    assert torch.equal(torch.get_rng_state(), before)
    for wrong in ((0, 0), (3, 0, -1.0)):
        with pytest.raises(ValueError, match="expected"):
            TOYS[name](*wrong)


def test_toys_without_noise_lie_on_their_figures():
    def points(name):
        return TOYS[name](2000, noise=0.0)

    x, labels = points("eight-gaussians")
    angle = labels * (math.pi / 4)
    assert torch.allclose(x, math.sqrt(2) * torch.stack([angle.cos(), angle.sin()], 1), atol=1e-6)
    x, labels = points("rings")
    assert torch.allclose(x.norm(dim=1), math.sqrt(2 / 0.625) * (1 + labels) / 2, atol=1e-6)
    x, labels = points("two-moons")
    upper, lower = (x[labels == k] / math.sqrt(2 / (21 / 16 - 1 / math.pi)) + torch.tensor([0.5, 0.25]) for k in (0, 1))
    assert torch.allclose(upper.norm(dim=1), torch.ones(()), atol=1e-5)
    assert torch.allclose((lower - torch.tensor([1, 0.5])).norm(dim=1), torch.ones(()), atol=1e-5)
    assert float(upper[:, 1].min()) >= -1e-6
    assert float(lower[:, 1].max()) <= 0.5 + 1e-6
    x, labels = points("checkerboard")
    square = (x / math.sqrt(0.75) + 2).floor().long()
    assert torch.equal(square.sum(1) % 2, torch.zeros(2000, dtype=torch.long))
    assert (int(square.min()), int(square.max())) == (0, 3)
    assert torch.equal(square[:, 0], labels // 2)
    x, labels = points("spiral")
    r, turn = x.norm(dim=1) * 1.5 * math.pi, torch.atan2(x[:, 1], x[:, 0]) + math.pi * labels
    assert torch.allclose(torch.remainder(r - turn + 1, 2 * math.pi), torch.ones(()), atol=1e-4)


# --- items in a batch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [2, 17, 32, 256, 65536])
def test_levels_are_scaled_exactly_at_both_ends_and_rounded_once(levels):
    k = torch.arange(levels)
    x = scaled(k, levels)
    assert (x.dtype, float(x[0]), float(x[-1])) == (torch.float32, -1.0, 1.0)
    assert torch.equal(x, ((2 * k.double() - (levels - 1)) / (levels - 1)).float())
    assert torch.equal(x, -x.flip(0))
    data = TrainingData(k[:, None], levels=levels)
    assert torch.equal(data.batch(k)[0], x[:, None])
    assert data.data_range == outer_edges(-1.0, 1.0, levels)


def test_digits_as_before():
    pytest.importorskip("sklearn")
    assert torch.equal(digits()[0], digit_levels()[0].float() / 8 - 1)
    data = training_data("digits")
    assert torch.equal(data.batch(torch.arange(len(data)))[0], digits()[0])
    assert (data.levels, data.data_range, data.labels) == (17, (-1.0625, 1.0625), None)


def test_floating_point_data_are_taken_as_they_are():
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    data = TrainingData(x, labels=torch.arange(5))
    assert torch.equal(data.batch(torch.tensor([3, 3, 0]))[0], x[[3, 3, 0]])
    assert data.data_range is None
    assert TrainingData(x).fingerprint == TrainingData(x.clone()).fingerprint != TrainingData(x + 1).fingerprint


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"x": torch.tensor([[1.0], [math.nan], [math.inf]])}, r"items 1, 2 are not finite"),
        ({"x": torch.tensor([[1, 2]])}, "say how many levels"),
        ({"x": torch.tensor([[1, 2]]), "levels": 2}, "levels from 1 to 2: expected 0 to 1"),
        ({"x": torch.tensor([[-1, 2]]), "levels": 4}, "levels from -1"),
        ({"x": torch.tensor([[0, 0]]), "levels": 1}, "levels=1"),
        ({"x": torch.ones(2, 3), "levels": 2}, "floating-point data have none"),
        ({"x": torch.ones(2, 3), "labels": torch.ones(3)}, "expected one for each of 2"),
        ({"x": torch.ones(2, 3), "flip": True}, r"flip=True is for images \(C, H, W\)"),
        ({"x": torch.ones(2, 3), "seed": -1}, "seed=-1"),
        ({"x": torch.ones(0, 3)}, "N >= 1"),
        ({"x": torch.ones(2, 8, 8, 3, dtype=torch.uint8), "levels": 256}, r"images are \(N, C, H, W\), take x.movedim"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        TrainingData(**arguments)


def test_training_data_say_what_their_source_lacks(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(6, dtype=np.int16).reshape(3, 2))
    with pytest.raises(ValueError, match=r"a\.npy: x is whole, 0 to 5: say how many levels"):
        training_data(tmp_path / "a.npy")
    assert training_data(tmp_path / "a.npy", levels=6).batch(torch.tensor([0]))[0][0, 0] == -1
    with pytest.raises(ValueError, match=r"a\.npy .*none named 'labels'"):
        training_data(tmp_path / "a.npy", labels=True)


def test_flips_are_a_function_of_seed_epoch_and_item():
    n, epochs = 4000, 5
    x = torch.arange(3).to(torch.uint8).expand(n, 1, 1, 3)

    def flips(items, epoch, seed=0):
        found = TrainingData(x, levels=3, flip=True, seed=seed).batch(items, epoch)[0][:, 0, 0, 0]
        assert set(found.tolist()) <= {-1.0, 1.0}
        return found == 1

    every = torch.arange(n)
    found = torch.stack([flips(every, epoch) for epoch in range(epochs)])
    # 5 standard deviations: half of the items in an epoch, half of the epochs of an item, half unlike the epoch before.
    assert float((found.float().mean(1) - 0.5).abs().max()) < 5 * 0.5 / math.sqrt(n)
    often = found.sum(0).bincount(minlength=epochs + 1) / n
    law = torch.tensor([math.comb(epochs, k) / 2**epochs for k in range(epochs + 1)])
    assert float((often - law).abs().max()) < 5 * math.sqrt(0.25 / n)
    for i in range(epochs):
        for j in range(i):
            assert abs(float((found[i] == found[j]).float().mean()) - 0.5) < 5 * 0.5 / math.sqrt(n)
    # Whatever they are shown with, and wherever in a batch.
    g = torch.Generator().manual_seed(0)
    items, at = torch.randint(n, (500,), generator=g), torch.randint(epochs, (500,), generator=g)
    assert torch.equal(flips(items, at), found[at, items])
    assert not torch.equal(flips(every, 0, seed=1), found[0])
    order = Order(n, 4000)  # an item's place in the order does not decide it
    assert abs(float(flips(order.items(0), 0)[:2000].float().mean()) - 0.5) < 5 * 0.5 / math.sqrt(2000)


# --- the order -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "batch"), [(10, 4), (12, 4), (3, 8), (1, 5), (7, 7), (100, 1)])
def test_every_epoch_shows_every_item_once(n, batch):
    order, steps = Order(n, batch, seed=3), 4 * n // math.gcd(n, batch)
    shown = torch.cat([order.items(step) for step in range(steps)])
    at = torch.cat([order.epochs(step) for step in range(steps)])
    assert len(shown) == steps * batch
    for epoch, items in enumerate(shown.split(n)):
        assert sorted(items.tolist()) == list(range(n))
        assert (at[epoch * n : (epoch + 1) * n] == epoch).all()
    assert [p for step in range(steps) for p in order.positions(step)] == list(range(steps * batch))


def test_the_order_is_that_of_the_runs_of_old():
    """Checkpoints from before this module go on: as `Trainer` drew it when it kept its own order."""
    n, size, seed = 23, 10, 7
    old = torch.cat(
        [torch.randperm(n, generator=torch.Generator().manual_seed(derive_seed(seed, 0, e))) for e in range(10)]
    )
    for step in (0, 1, 2, 5, 17, 3):
        assert torch.equal(Order(n, size, seed).items(step), old[step * size : (step + 1) * size])
    assert not torch.equal(Order(n, size, 8).items(0), Order(n, size, 7).items(0))


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6])
def test_several_processes_show_what_one_shows(world):
    one = Order(17, 6, seed=1)
    for step in range(9):
        parts = [one.share(rank, world) for rank in range(world)]
        assert torch.equal(torch.cat([part.items(step) for part in parts]), one.items(step))
        assert torch.equal(torch.cat([part.epochs(step) for part in parts]), one.epochs(step))
        assert {len(part.items(step)) for part in parts} == {6 // world, -(-6 // world)}


def test_the_order_is_nobody_elses():
    """No global generator; and whoever changes a batch in place changes it alone."""
    before, order = torch.get_rng_state(), Order(8, 4)
    first = order.items(1).clone()
    order.items(1).zero_()
    order.items(0).zero_()
    assert torch.equal(order.items(1), first)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"n": 0}, "n=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"part": (2, 2)}, "rank < world"),
        ({"part": (0, 0)}, "world=0"),
        ({"part": (-1, 2)}, "rank=-1"),
        ({"part": (0, 5)}, "batch_size=4 on 5 processes: one of them would have nothing"),
    ],
)
def test_orders_that_cannot_be(arguments, words):
    with pytest.raises(ValueError, match=words):
        Order(**({"n": 10, "batch_size": 4} | arguments))


# --- the loader ------------------------------------------------------------------------------------------------------

forks = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning", "ignore:This DataLoader will create:UserWarning"
)


def taken(batches, count):
    """The first few, and the loader is let go."""
    found = pairs(itertools.islice(batches, count))
    batches.close()
    return found


def pairs(batches):
    """Items and their labels."""
    return [(x.clone(), cond["label"].clone()) for x, cond in batches]


def same(one, other):
    return len(one) == len(other) and all(map(torch.equal, itertools.chain(*one), itertools.chain(*other)))


@forks
def test_workers_memory_and_resuming_do_not_change_batches(pictures):
    lazy = training_data(pictures, labels=True, flip=True, seed=4)
    order, steps, before = Order(10, 4, seed=1), 12, torch.get_rng_state()
    whole = taken(loader(lazy, order, workers=0), steps)
    assert same(whole, taken(loader(training_data(pictures, labels=True, flip=True, seed=4, lazy=False), order), steps))
    for workers in (1, 2):
        assert same(whole, taken(loader(lazy, order, workers=workers), steps))
        assert multiprocessing.active_children() == []
    assert same(whole[7:], taken(loader(lazy, order, 7, workers=1), steps - 7))  # in the middle of epoch 2
    assert same(whole[7:9], pairs(loader(lazy, order, 7, 9, workers=2)))
    assert multiprocessing.active_children() == []
    halves = [taken(loader(lazy, order.share(rank, 2), workers=rank), steps) for rank in range(2)]
    assert same(whole, [tuple(map(torch.cat, zip(*pair, strict=True))) for pair in zip(*halves, strict=True)])
    assert torch.equal(torch.get_rng_state(), before)
    counts = collections.Counter(tuple(x.abs().flatten().tolist()) for batch, _ in whole[:5] for x in batch)
    assert sum(counts.values()) == 20


@forks
def test_signals_that_a_scheduler_sends_to_all_do_not_end_workers(pictures):
    """The run that they train decides when to stop; its own word does end them."""
    data, order = training_data(pictures, labels=True), Order(10, 4)
    batches = loader(data, order, 0, 40, workers=2)
    found = [next(batches)]
    for worker in multiprocessing.active_children():
        for name in ("TERM", "INT"):
            subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    assert same(pairs(found + list(batches)), pairs(loader(data, order, 0, 40, workers=0)))
    batches = loader(data, order, workers=1)
    next(batches)
    (worker,) = multiprocessing.active_children()
    worker.terminate()
    worker.join(20)
    assert worker.exitcode == 0
    batches.close()


def test_loaders_that_cannot_be(pictures):
    data = training_data(pictures)
    for arguments, words in [
        ((Order(9, 3),), "the order is of 9 items, the data are 10"),
        ((Order(10, 3), -1), "start_step=-1"),
    ]:
        with pytest.raises(ValueError, match=words):
            loader(data, *arguments)
    with pytest.raises(ValueError, match="workers=-1"):
        loader(data, Order(10, 3), workers=-1)
    assert list(loader(data, Order(10, 3), 5, 5)) == []


def test_what_workers_get_can_be_sent_to_another_process(pictures):
    """Where processes are spawned and not forked."""
    data = training_data(pictures, labels=True)
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy.batch(torch.arange(10))[0], data.batch(torch.arange(10))[0])
    assert copy.fingerprint == data.fingerprint


# --- every dtype, and what is none -----------------------------------------------------------------------------------

WHOLE = ("u1", "<u2", ">u2", "<u4", ">u4", "<u8", ">u8", "i1", "<i2", ">i2", "<i4", ">i4", "<i8", ">i8")
FLOATS = ("<f2", ">f2", "<f4", ">f4", "<f8", ">f8")


@pytest.mark.parametrize("suffix", ["npy", "npz"])
@pytest.mark.parametrize("dtype", [*WHOLE, *FLOATS])
def test_numbers_of_every_dtype_and_byte_order_are_read_back(dtype, suffix, tmp_path):
    array = np.arange(24).reshape(4, 1, 2, 3).astype(dtype)
    if suffix == "npy":
        np.save(tmp_path / "a.npy", np.asfortranarray(array))
    else:
        np.savez(tmp_path / "a.npz", images=array, labels=array[:, 0, 0, 0].astype(dtype.replace("f", "u")))
    found = read_data(tmp_path / f"a.{suffix}", labels=suffix == "npz")
    assert found.x.double().tolist() == array.astype(float).tolist()
    assert found.x.dtype.is_floating_point == (dtype in FLOATS)
    if suffix == "npz":
        assert found.labels.tolist() == [0, 6, 12, 18]
    levels = None if dtype in FLOATS else 100
    x = training_data(tmp_path / f"a.{suffix}", levels=levels).batch(torch.tensor([3, 1])).x
    expected = array[[3, 1]].astype(float) if levels is None else (2 * array[[3, 1]].astype(float) - 99) / 99
    assert torch.allclose(x.double(), torch.from_numpy(expected), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64, torch.int32, torch.int64])
def test_tensors_of_every_width_are_levels(dtype):
    """65,536 of them: both ends, mirrored and chosen, told as a condition, and labels beside them."""
    k = torch.tensor([0, 1, 32767, 65534, 65535, 256]).reshape(3, 1, 1, 2)
    data = TrainingData(
        k.to(dtype), torch.tensor([0, 2, 1]).to(dtype), 65536, True, conditions=(Given(k.to(dtype), 65536),)
    )
    assert data.num_classes == 3
    x, cond = data.batch(torch.tensor([2, 0, 1]), 5)
    exact = ((2 * k.double() - 65535) / 65535)[[2, 0, 1]]
    assert torch.allclose(x.double().sort().values, exact.sort().values, atol=1e-7)
    assert torch.equal(cond["image"], x)
    assert cond["label"].tolist() == [1, 0, 2]
    assert data.fingerprint.startswith("(3, 1, 1, 2) in [0, 6.554e+04]")
    assert math.isfinite(data.std())
    assert torch.equal(dequantized(k.to(dtype), 65536, seed=0), dequantized(k, 65536, seed=0))
    with pytest.raises(ValueError, match="x has levels from 0 to 65535: expected 0 to 255"):
        TrainingData(k.to(dtype), levels=256)


def test_levels_that_int64_has_not():
    with pytest.raises(ValueError, match=r"2\^63 or more"):
        TrainingData(torch.tensor([[2**64 - 1]], dtype=torch.uint64), levels=2)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros(5), r"its shape is \(5,\), expected \(N, \.\.\.\).*\(N, 1\)"),
        (np.zeros(()), r"its shape is \(\)"),
        (np.zeros((0, 3)), r"its shape is \(0, 3\)"),
        (np.zeros((3, 0)), r"its shape is \(3, 0\)"),
        (np.array([[1.0], [math.nan]]), "it is not finite in items 1$"),
        (np.full((20, 2), math.inf), r"it is not finite in items 0, 1, .*\(20 in all\)"),
        (np.zeros((2, 2), bool), "its entries are bool, expected integers or floating-point"),
        (np.zeros((2, 2), complex), "its entries are complex128, expected"),
        (np.zeros((2, 2), np.longdouble), "its entries are float128, expected"),
        (np.array([["x"]]), "its entries are <U1, expected"),
        (np.array([[{}]], object), "its entries are object, expected"),
        (np.zeros((2, 2), "datetime64[s]"), "its entries are datetime64"),
        (np.zeros(3, [("a", float), ("b", int)]), r"its entries are \[\('a', '<f8'\), \('b', '<i8'\)\]"),
        (np.zeros(3, [("€", float)]), "its format is numpy's 3.0"),
    ],
)
def test_arrays_of_no_items_are_refused_in_a_sentence(array, words, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of numpy, for its format 3.0
        np.save(tmp_path / "a.npy", array)
        np.savez(tmp_path / "a.npz", images=array)
    for name in ("a.npy", "a.npz"):
        for read in (read_data, training_data):
            with pytest.raises(ValueError, match=rf"{name} cannot be read as an array of numbers: {words}") as error:
                read(tmp_path / name)
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [(10**12, 1), (10**6, 10**6), (2**62, 4), (-1, 4), (5, 1)])
def test_a_head_is_not_believed_before_the_file_is_as_long(shape, tmp_path):
    """No memory is asked for."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": shape})
    (tmp_path / "a.npy").write_bytes(file.getvalue() + bytes(32))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as members:
        members.writestr("images.npy", file.getvalue() + bytes(32))
    for name in ("a.npy", "a.npz"):
        with pytest.raises(
            ValueError, match=rf"{name} cannot be read as an array of numbers: it has 32 bytes, and its"
        ):
            read_data(tmp_path / name)


def test_data_without_a_name(capsys, monkeypatch, tmp_path):
    """Not the folder where one is, nor what another option says."""
    Image = pytest.importorskip("PIL.Image")
    Image.fromarray(ramp(0)).save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", np.zeros((20, 2)))
    monkeypatch.chdir(tmp_path)
    assert len(read_data(".").x) == 1
    for read in (read_data, training_data):
        with pytest.raises(ValueError, match="the data have no name"):
            read("")
    with pytest.raises(ValueError, match="condition='given:'"):
        training_data(".", conditions=["given:"])
    for command in (
        ["train", "--data", "", "--out", "run"],
        ["evaluate", "a.npy", "--data", ""],
        ["evaluate", "a.npy", "--data", "a.npy", "--floor", ""],
        ["likelihood", "a.npy", "--denoiser", "tests.common:none", "--data", "", "--out", "a.json"],
    ):
        with pytest.raises(SystemExit) as stop:
            main([*command, "--device", "cpu"])
        assert (stop.value.code, "an argument is empty" in capsys.readouterr().err) == (2, True)


@pytest.mark.parametrize(
    "refuses",
    [
        lambda k: scaled(k, 1),
        lambda k: outer_edges(-1.0, 1.0, 1),
        lambda k: dequantized(k, 1),
        lambda k: TrainingData(k, levels=1),
        lambda k: Given(k, 1),
    ],
)
def test_one_level_is_none(refuses):
    with pytest.raises(ValueError, match=r"levels=1\b"):
        refuses(torch.zeros(3, 1, 2, 2, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "u16.npy"], "u16.npy: x is whole, 0 to 65535: say how many levels there are, --set data.levels="),
        (["--data", "f.npy", "--set", "data.levels=4"], "f.npy: --set data.levels=4: floating-point data have none"),
        (["--data", "f.npy", "--set", "data.flip=true"], "--set data.flip=True is for images"),
        (["--data", "f.npy", "--drop", "0.1"], "--drop 0.1: there are no labels"),
        (["--data", "f.npy", "--size", "8"], "--size, --mode, --background and --skip-unreadable are for a folder"),
        (["--data", "fashion-mnist", "--set", "data.download=true"], "say where it is, fashion-mnist:/data"),
        (["--data", "f.npy", "--classes"], "it holds one array without a name: there is none named 'labels'"),
    ],
)
def test_the_command_line_names_what_it_was_given(arguments, words, capsys, monkeypatch, tmp_path):
    """Python's messages name its arguments; those of `train` flags, or entries of --set where there is no flag."""
    monkeypatch.chdir(tmp_path)
    np.save("u16.npy", np.array([0, 65535], np.uint16).reshape(2, 1, 1, 1))
    np.save("f.npy", np.zeros((4, 2), np.float32))
    status = main(["train", *arguments, "--set", "model.network=mlp", "--device", "cpu", "--out", "run"])
    said = capsys.readouterr().err
    assert (status, words in said, said.count("\n")) == (2, True, 1)
