"""Data sets in IDX files: what is written is read back, and nothing else is."""

import gzip
import struct

import pytest
import torch

from scoresde import data
from scoresde.data import BUILT_IN, FASHION_MNIST, fashion_mnist, fashion_mnist_levels, mnist, mnist_levels, read_data
from scoresde.likelihood.discrete import dequantized, outer_edges

IMAGES = (torch.arange(12 * 28 * 28) % 256).to(torch.uint8).reshape(12, 28, 28)
LABELS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 0])
installed = pytest.mark.skipif(not FASHION_MNIST.exists(), reason="needs Debian's package dataset-fashion-mnist")


def idx(x):
    """An IDX file's bytes: magic number, sizes, entries."""
    return struct.pack(f">HBB{x.ndim}I", 0, 8, x.ndim, *x.shape) + x.to(torch.uint8).numpy().tobytes()


def write(folder, images=IMAGES, labels=LABELS, split="train", zipped=False):
    for name, x in ((f"{split}-images-idx3-ubyte", images), (f"{split}-labels-idx1-ubyte", labels)):
        path, content = (folder / f"{name}.gz", gzip.compress(idx(x))) if zipped else (folder / name, idx(x))
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
    monkeypatch.setattr(data, "FASHION_MNIST", tmp_path)
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
    with pytest.raises(FileNotFoundError, match=r"apt-get install dataset-fashion-mnist; else give path="):
        fashion_mnist(folder, "test")
    with pytest.raises(ValueError, match="split='valid': expected one of 'train', 'test'"):
        mnist(folder, "valid")


def test_every_beginning_of_a_file_is_refused(folder):
    """Cut anywhere, gzipped before or not, or with a byte too many, a file is damaged, and named."""
    path, whole = folder / "train-labels-idx1-ubyte", idx(LABELS)
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
        (idx(LABELS), "begins with the bytes 00 00 08 01, expected 00 00 08 03"),
        (b"\x80\x04cos\nsystem\n", "begins with the bytes 80 04 63 6f"),  # a pickle
        (b"\0\0\x0d\x03" + idx(IMAGES)[4:], "begins with the bytes 00 00 0d 03"),  # floating-point entries
        (idx(IMAGES[:, :27]), r"its shape is \(12, 27, 28\), expected \(N, 28, 28\)"),
        (idx(IMAGES[:0]), r"its shape is \(0, 28, 28\)"),
        (idx(IMAGES)[:4] + b"\xff" * 12, r"its shape is \(4294967295, 4294967295, 4294967295\)"),
        (idx(IMAGES)[:4] + b"\xff" * 4 + idx(IMAGES)[8:], "it has 9408 entries, its shape"),
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
