"""What a network is told of an item is a function of the item, the seed and the epoch: whatever the batch, the process
and the worker; it is what the task says, and a network that is told it learns more."""

import io
import itertools
import math
import sys

import numpy as np
import pytest
import torch
from common import generator

from scoresde import VPSDE, X0Denoiser, sample_seeds
from scoresde import sample as draw
from scoresde.cli import main
from scoresde.cli.config import DataConfig, RunConfig
from scoresde.cli.defaults import completed
from scoresde.cli.models import About, open_run, run_config
from scoresde.data import (
    Colourisation,
    Given,
    ImageFolder,
    Inpainting,
    JPEGRestoration,
    OneOf,
    Order,
    Shown,
    SuperResolution,
    TrainingData,
    Uncropping,
    condition_of,
    digits,
    dropped,
    loader,
    nothing,
    scaled,
    training_data,
)
from scoresde.nn import MLP, UNet
from scoresde.solvers import Adams
from scoresde.training import CheckpointError, TrainConfig, Trainer
from scoresde.training.feed import batches
from scoresde.training.weights import uniform_in

Image = pytest.importorskip("PIL.Image")

N = 12
SIZES = [(8, 8), (28, 28), (32, 32), (7, 9), (1, 5)]
TASKS = {
    "inpainting": Inpainting(),
    "three boxes": Inpainting(0.1, 0.4, boxes=3, fill="noise"),
    "uncropping": Uncropping(),
    "uncropping noise": Uncropping(0.3, fill="noise"),
    "colourisation": Colourisation(),
    "jpeg": JPEGRestoration(),
    "super-resolution": SuperResolution(4),
    "super-resolution 3": SuperResolution(3),
    "one of": OneOf((Inpainting(), Uncropping(0.3, fill="noise"), Colourisation(), JPEGRestoration())),
}
MIRRORED = {"colourisation", "super-resolution"}  # the condition of a mirrored item is the mirrored condition


def levels(size, channels=3, n=N, seed=0):
    return torch.randint(256, (n, channels, *size), dtype=torch.uint8, generator=generator(seed))


def same(one, other):
    """Whether two batches are, bit for bit."""
    return (
        torch.equal(one.x, other.x)
        and list(one.cond) == list(other.cond)
        and all(torch.equal(one.cond[key], other.cond[key]) for key in one.cond)
    )


def joined(parts):
    parts = list(parts)
    x, cond = torch.cat([x for x, _ in parts]), {}
    for key in parts[0].cond:
        cond[key] = torch.cat([part.cond[key] for part in parts])
    return parts[0]._replace(x=x, cond=cond)


# --- each condition --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("task", TASKS)
def test_a_condition_is_an_image_of_the_items_size_in_any_batch(task, size):
    condition = TASKS[task]
    data = TrainingData(levels(size), levels=256, seed=5, conditions=(condition,))
    items = torch.arange(N)
    whole = data.batch(items, 3)
    assert whole.cond["image"].shape == (N, condition.channels(data.shape), *size)
    assert whole.cond["image"].dtype == whole.x.dtype == torch.float32
    assert whole.cond["image"].isfinite().all()
    assert data.network_options == {"image_condition": condition.channels(data.shape)}
    shuffled = torch.randperm(N, generator=generator())
    again = data.batch(shuffled, 3)
    assert torch.equal(again.cond["image"], whole.cond["image"][shuffled])
    assert same(joined(data.batch(items[[i]], 3) for i in range(N)), whole)
    # A batch that spans epochs, and the first of them alone.
    mixed = data.batch(items, torch.tensor([2, 3] * (N // 2)))
    assert torch.equal(mixed.cond["image"][1::2], whole.cond["image"][1::2])
    assert torch.equal(data.first(5).batch(items[:5], 3).cond["image"], whole.cond["image"][:5])


@pytest.mark.parametrize("task", ["inpainting", "three boxes", "uncropping", "jpeg", "one of"])
def test_what_is_random_follows_seed_epoch_and_item(task):
    x = levels((16, 16), n=1).expand(40, -1, -1, -1).contiguous()  # one image, shown 40 times

    def shown(epoch, seed):
        data = TrainingData(x, levels=256, seed=seed, conditions=(TASKS[task],))
        return data.batch(torch.arange(40), epoch).cond["image"]

    a, b, c = shown(0, 0), shown(1, 0), shown(0, 1)
    assert len(a.unique(dim=0)) > 4
    for other in (b, c, a.roll(1, 0)):
        assert (a != other).flatten(1).any(1).sum() >= 20
    before = torch.get_rng_state()
    assert torch.equal(a, shown(0, 0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("task", TASKS)
def test_items_are_mirrored_before_the_condition_is_made(task):
    """So it fits them; and where the task has no left and right, it is the mirror image."""
    x = levels((8, 13))
    plain = TrainingData(x, levels=256, seed=2, conditions=(TASKS[task],)).batch(torch.arange(N), 1)
    found = TrainingData(x, levels=256, seed=2, flip=True, conditions=(TASKS[task],)).batch(torch.arange(N), 1)
    flipped = (found.x != plain.x).flatten(1).any(1)
    assert 0 < flipped.sum() < N
    assert torch.equal(found.x[flipped], plain.x[flipped].flip(-1))
    assert torch.equal(found.cond["image"][~flipped], plain.cond["image"][~flipped])
    remade = TASKS[task](found.x, Shown(torch.arange(N), N, 1, seed=2))
    assert torch.equal(found.cond["image"], remade)
    if task in MIRRORED:
        torch.testing.assert_close(found.cond["image"][flipped], plain.cond["image"][flipped].flip(-1))


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 31), (1, 5, 6, 7), (1, 1, 1)])
@pytest.mark.parametrize("condition", [Inpainting(), Inpainting(0.3, 0.3), Inpainting(0.2, 1, 2), Uncropping()])
def test_where_it_is_known_it_is_the_item(condition, shape):
    x = torch.randn(200, *shape, generator=generator())
    told = condition(x, Shown(torch.arange(200), 200))
    image, known = told[:, :-1], told[:, -1:]
    assert set(known.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(image, x * known)
    assert condition.channels(shape) == shape[0] + 1
    for axis, n in enumerate(shape[1:]):
        rest = [d for d in range(1, known.ndim) if d != axis + 2]
        if isinstance(condition, Inpainting) and condition.boxes == 1:
            side = (known == 0).amax(rest).sum(1)
            assert int(side.min()) >= max(1, math.floor(0.25 * n))
            assert int(side.max()) <= max(1, math.ceil(0.75 * n))


def test_a_box_is_anywhere_and_of_any_side():
    """Sides are uniform, and so is the place, given the side: to 5 standard errors, of 4000 items."""
    x, n = torch.zeros(4000, 1, 41), 41
    hole = Inpainting(0.2, 0.8)(x, Shown(torch.arange(4000), 4000))[:, 1] == 0
    side, start = hole.sum(1), hole.int().argmax(1)
    assert (int(side.min()), int(side.max())) == (round(0.2 * n), round(0.8 * n))
    place = (start / (n - side)).double()
    for u, low, high in ((side / n, 0.2, 0.8), (place, 0, 1)):
        stderr = (high - low) / math.sqrt(12 * 4000)
        assert abs(float(u.mean()) - (low + high) / 2) < 5 * stderr
        assert float(u.double().std()) == pytest.approx((high - low) / math.sqrt(12), rel=0.06)


def test_noise_fills_what_is_unknown():
    x = torch.full((300, 3, 8, 8), 7.0)
    told = Inpainting(fill="noise")(x, Shown(torch.arange(300), 300, seed=1))
    known = told[:, 3:].expand(-1, 3, -1, -1) == 1
    z = told[:, :3][~known]
    assert (told[:, :3][known] == 7).all()
    assert abs(float(z.mean())) < 5 / math.sqrt(len(z))
    assert abs(float(z.var()) - 1) < 5 * math.sqrt(2 / len(z))


def test_half_of_an_image_is_kept_in_one_of_five_ways():
    n = 3000
    known = Uncropping()(torch.zeros(n, 1, 20, 20), Shown(torch.arange(n), n))[:, 1].bool()
    ways = torch.zeros(5, 20, 20, dtype=torch.bool)
    ways[0, :10], ways[1, 10:], ways[2, :, :10], ways[3, :, 10:], ways[4, 3:17, 3:17] = True, True, True, True, True
    counts = (known[:, None] == ways).flatten(2).all(2).sum(0)
    assert int(counts.sum()) == n
    assert float((counts - n / 5).abs().max()) < 5 * math.sqrt(n * 0.2 * 0.8)
    assert pytest.approx(0.5, abs=0.02) == 14 * 14 / 400


def test_grey_is_pillows():
    x = levels((9, 7))
    expected = [np.array(Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L")) for image in x]
    found = Colourisation()(scaled(x), Shown(torch.arange(N), N))[:, 0]
    assert float((found - scaled(torch.from_numpy(np.stack(expected)))).abs().max()) < 1.01 / 127.5
    grey = scaled(x[:, :1]).expand(-1, 3, -1, -1)
    torch.testing.assert_close(Colourisation()(grey, Shown(torch.arange(N), N)), grey[:, :1])


@pytest.mark.parametrize("size", SIZES)
def test_super_resolution_is_pillows_bicubic_down_and_up(size):
    condition, shown = SuperResolution(4), Shown(torch.arange(2), 2)
    x = torch.randn(2, 3, *size, generator=generator())
    found = condition(x, shown)
    small = (-(-size[1] // 4), -(-size[0] // 4))
    for image, told in itertools.product(range(2), range(3)):
        down = Image.fromarray(x[image, told].numpy()).resize(small, Image.Resampling.BICUBIC)
        up = np.array(down.resize((size[1], size[0]), Image.Resampling.BICUBIC))
        assert np.abs(found[image, told].numpy() - up).max() < 1e-4
    torch.testing.assert_close(condition(torch.full_like(x, 0.3), shown), torch.full_like(x, 0.3))
    torch.testing.assert_close(condition(2 * x - 1, shown), 2 * found - 1)
    if min(size) >= 28:  # a wave that is too fine for it is gone, one that is not stays
        k = torch.arange(size[1])
        fine, coarse = (torch.cos(math.pi * f * (k + 0.5)).expand(2, 1, *size) for f in (0.9, 1 / 16))
        assert float(condition(fine, shown).abs().max()) < 0.1
        assert float((condition(coarse, shown) - coarse).abs().mean()) < 0.05


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_jpeg_is_pillows(size, channels):
    x, shown = levels(size, channels, n=3), Shown(torch.arange(3), 3)
    found = JPEGRestoration(40, 40)(scaled(x), shown)
    for image, told in zip(x, found, strict=True):
        file, array = io.BytesIO(), image.permute(1, 2, 0).numpy()
        Image.fromarray(array[..., 0] if channels == 1 else array).save(file, "JPEG", quality=40)
        decoded = torch.from_numpy(np.array(Image.open(file)).reshape(*size, channels)).permute(2, 0, 1)
        assert torch.equal(told, scaled(decoded))


def test_the_quality_is_uniform():
    """An image of one item, coded at each quality: which was taken is told by the result."""
    x = scaled(levels((16, 16), 1, n=1)).expand(600, -1, -1, -1)
    shown = Shown(torch.arange(600), 600)
    drawn = JPEGRestoration(10, 14)(x, shown)
    each = torch.cat([JPEGRestoration(q, q)(x[:1], Shown(torch.tensor([0]), 1)) for q in range(10, 15)])
    assert len(each.unique(dim=0)) == 5
    counts = (drawn[:, None] == each).flatten(2).all(2).sum(0)
    assert int(counts.sum()) == 600
    assert float((counts - 120).abs().max()) < 5 * math.sqrt(600 * 0.2 * 0.8)


def test_given_values_go_with_their_items(tmp_path):
    """Vectors, levels, and images from a folder in step with the folder of the items; images are mirrored with them."""
    masks, photos, k = levels((6, 8), 1), levels((6, 8), 3, seed=1), torch.arange(N)
    vectors = torch.randn(N, 4, generator=generator())
    for name, x in (("masks", masks), ("photos", photos)):
        (tmp_path / name).mkdir()
        for i, image in enumerate(x):
            array = image.permute(1, 2, 0).numpy()
            Image.fromarray(array[..., 0] if len(image) == 1 else array).save(tmp_path / name / f"{i:02d}.png")
    here = TrainingData(masks, levels=256, flip=True, conditions=(Given(vectors), Given(photos, 256)))
    batch = here.batch(k[3:], 1)
    assert torch.equal(batch.cond["vector"], vectors[3:])
    flipped = (batch.x != scaled(masks[3:])).flatten(1).any(1)
    assert 0 < flipped.sum() < len(flipped)
    expected = scaled(photos[3:])
    expected[flipped] = expected[flipped].flip(-1)
    assert torch.equal(batch.cond["image"], expected)
    assert here.network_options == {"vector": 4, "image_condition": 3}
    told = condition_of(f"given:{tmp_path / 'photos'}")
    there = training_data(tmp_path / "masks", flip=True, conditions=[Given(vectors), told])
    assert (here.lazy, there.lazy, there.shape) == (False, True, (1, 6, 8))
    order = Order(N, 5)
    for step, batch in enumerate(loader(there, order, 0, 4, workers=0)):
        assert same(batch, here.batch(order.items(step), order.epochs(step)))
    (tmp_path / "photos" / "03.png").rename(tmp_path / "photos" / "03b.png")
    with pytest.raises(ValueError, match=r"masks/03\.png and .*photos/03b\.png have other names"):
        training_data(tmp_path / "masks", conditions=[f"given:{tmp_path / 'photos'}"])


def test_several_images_are_concatenated():
    conditions = (Inpainting(), SuperResolution(2), Given(levels((8, 8), 2), 256))
    data = TrainingData(levels((8, 8)), levels=256, conditions=conditions)
    shown = Shown(torch.arange(N), N)
    batch = data.batch(torch.arange(N))
    assert data.network_options == {"image_condition": 4 + 3 + 2}
    assert torch.equal(batch.cond["image"], torch.cat([one(batch.x, shown) for one in conditions], 1))


def test_one_of_several_tasks_is_that_task():
    """With m = 1 behind it where nothing is masked; each as often as the others; and its random numbers are not those
    by which it was chosen.
    """
    tasks = (Inpainting(), Colourisation(), JPEGRestoration(10, 29), SuperResolution(2))
    n = 400
    x = scaled(levels((8, 8), n=1)).expand(n, -1, -1, -1)
    shown = Shown(torch.arange(n), n, 1, seed=4)
    found = OneOf(tasks)(x, shown)
    alone = [OneOf((task,))(x, shown) for task in tasks]
    for task, y in zip(tasks, alone, strict=True):
        own = task(x, shown)
        assert torch.equal(y[:, : max(3, own.shape[1])], own.expand(-1, max(3, own.shape[1]), -1, -1))
        assert bool((y[:, 3] == 1).all()) == (own.shape[1] < 4)
    counts = [(found == y).flatten(1).all(1) for y in alone]
    assert torch.equal(torch.stack(counts).sum(0), torch.ones(n, dtype=torch.long))
    # Binomial(400, 1/4) is outside of 100 +- 45 with probability 3e-7.
    assert all(55 <= int(count.sum()) <= 145 for count in counts)
    qualities = shown.uniform(1)[counts[2], 0]  # uniform still: their mean is outside of 1/2 +- 0.15 with 2e-6 or less
    assert 0.35 < float(qualities.mean()) < 0.65
    assert condition_of("inpainting+colourisation+jpeg:10-29+super-resolution:2") == OneOf(tasks)


def test_what_was_measured_is_what_would_have_been_told():
    """Each task's y, measured of x, gives the condition that x gives."""
    x, shown = scaled(levels((12, 20))), Shown(torch.arange(N), N)
    small = torch.nn.functional.interpolate(x, size=(3, 5), mode="bicubic", antialias=True)
    shape = (3, 12, 20)
    for task, condition in TASKS.items():
        told = condition(x, shown)
        y = small if task == "super-resolution" else x if task == "colourisation" else told.clone()
        if "boxes" in task or "noise" in task or task in ("inpainting", "uncropping"):
            y[:, -1] = 2 * y[:, -1] - 1  # the mask as an image in [-1, 1], and anything where it is black
            y[:, :-1] += 5 * (y[:, -1:] < 0)
        found = condition.taken(y, shape)
        assert torch.equal(found, told), task
        with pytest.raises(ValueError, match=r"measurements of shape \(4, 12, 19\)"):
            condition.taken(torch.zeros(1, 4, 12, 19), shape)


# --- nothing ---------------------------------------------------------------------------------------------------------


def test_nothing_is_told_as_often_as_said():
    """Of 5000 items in each of 3 epochs: to 5 standard errors; independently in each epoch, and of the flips."""
    n, p = 5000, 0.2
    x = torch.arange(n).reshape(n, 1, 1, 1) + torch.tensor([0.25, 0.5])
    labels = torch.arange(n) % 7
    data = TrainingData(x, labels, flip=True, seed=3, num_classes=9, conditions=(Given(torch.ones(n, 2)),), drop=p)
    found, flipped = [], []
    for epoch in range(3):
        batch = data.batch(torch.arange(n), epoch)
        gone = batch.cond["label"] == 9
        assert torch.equal(batch.cond["label"][~gone], labels[~gone])
        assert torch.equal(batch.cond["vector"], (~gone).float()[:, None].expand(-1, 2))  # all at once
        found.append(gone)
        flipped.append(batch.x[:, 0, 0, 0] > batch.x[:, 0, 0, 1])
    for gone, other, mirror in zip(found, found[1:] + found[:1], flipped, strict=True):
        for which, share in ((gone, p), (gone & other, p * p), (gone & mirror, p / 2)):
            assert abs(float(which.double().mean()) - share) < 5 * math.sqrt(share * (1 - share) / n)
    assert torch.equal(data.batch(torch.tensor([17, 4, 17]), 2).cond["label"] == 9, found[2][[17, 4, 17]])
    other = TrainingData(x, labels, seed=4, drop=p).batch(torch.arange(n)).cond["label"] == 7
    assert 0.2 < float((other != found[0]).double().mean()) < 0.45


def test_nothing_is_the_null_class_and_zeros():
    """What the networks take as no class, and what is known of an item where no pixel is."""
    cond = {"label": torch.tensor([1, 2]), "vector": torch.ones(2, 3), "image": torch.ones(2, 1, 4, 4)}
    null = nothing(cond, 5)
    assert null["label"].tolist() == [5, 5]
    assert not null["vector"].any()
    assert not null["image"].any()
    net = MLP(2, 16, num_classes=5)
    x, t = torch.randn(2, 2, generator=generator()), torch.ones(2)
    torch.nn.init.ones_(net.outward.weight)
    assert torch.equal(net(x, t, **nothing({"label": cond["label"]}, 5)), net(x, t))
    everything = Inpainting(1, 1)(cond["image"], Shown(torch.arange(2), 2))
    assert torch.equal(everything, nothing({"image": everything})["image"])
    assert torch.equal(dropped(cond, torch.tensor([False, True]), 5)["label"], torch.tensor([1, 5]))
    for drop, expected in ((0.0, cond), (1.0, null)):
        data = TrainingData(torch.zeros(2, 1, 4, 4), cond["label"], num_classes=5, drop=drop,
                            conditions=(Given(cond["vector"]), Given(cond["image"])))  # fmt: skip
        found = data.batch(torch.arange(2)).cond
        assert all(torch.equal(found[key], expected[key]) for key in cond)


# --- in a run --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["three boxes", "jpeg", "super-resolution"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_a_run_that_goes_on_and_shares_see_the_same(task):
    data = TrainingData(levels((8, 8)), torch.arange(N) % 3, 256, True, 7, conditions=(TASKS[task],), drop=0.3)
    order, steps = Order(N, 8, seed=1), 7
    whole = [data.batch(order.items(step), order.epochs(step)) for step in range(steps)]
    assert all(map(same, loader(data, order, 4, steps, workers=0), whole[4:]))  # from the middle of an epoch on
    if data.lazy:
        assert all(map(same, loader(data, order, 0, steps, workers=1), whole))
    halves = [loader(data, order.share(rank, 2), 0, steps, workers=0) for rank in range(2)]
    assert all(same(joined(pair), one) for pair, one in zip(zip(*halves, strict=True), whole, strict=True))
    fed = list(batches(data, order, 0, steps, workers=0))
    assert all(same(one._replace(x=x, cond=cond), one) for (x, cond), one in zip(fed, whole, strict=True))


def test_a_checkpoint_knows_the_conditions():
    x, labels = levels((8, 8)), torch.arange(N)
    several = [
        TrainingData(x, labels, 256, **more)
        for more in (
            {}, {"drop": 0.1}, {"drop": 0.2}, {"drop": 0.1, "seed": 1}, {"conditions": (Inpainting(),)},
            {"conditions": (Inpainting(0.3),)}, {"conditions": (Inpainting(),), "seed": 1},
            {"conditions": (Given(torch.zeros(N, 1)),)}, {"conditions": (Given(torch.ones(N, 1)),)},
        )
    ]  # fmt: skip
    assert len({data.fingerprint for data in several}) == len(several)
    assert several[0].fingerprint == TrainingData(x, labels, 256, seed=1).fingerprint  # nothing random in it


class Copying(torch.nn.Module):
    """A network that can copy what it is told, beside x_t."""

    def __init__(self, channels, told):
        super().__init__()
        self.inward = torch.nn.Conv2d(channels + told, 16, 3, padding=1)
        self.outward = torch.nn.Conv2d(16, channels, 3, padding=1)

    def forward(self, x, time, image):
        return self.outward(torch.nn.functional.silu(self.inward(torch.cat([x, image], 1))))


def final_loss(data, net):
    config = TrainConfig(steps=100, batch_size=32, lr=5e-3, warmup=1, log_every=50, workers=0)
    weighting = uniform_in("x0")
    trainer = Trainer(X0Denoiser(net, VPSDE()), data, config, weighting=weighting).fit(progress=False)
    return trainer.losses[-1][1]


def test_a_run_goes_on_to_the_same_weights_and_under_no_other_condition(tmp_path):
    """From the middle of an epoch, mirrored, partly told nothing."""

    def trainer(steps, folder, task="three boxes", drop=0.3):
        data = TrainingData(levels((8, 8)), levels=256, flip=True, seed=7, conditions=(TASKS[task],), drop=drop)
        torch.manual_seed(0)
        config = TrainConfig(steps=steps, batch_size=8, warmup=1, workers=0, schedule="constant")
        return Trainer(X0Denoiser(Copying(3, 4), VPSDE()), data, config, folder=folder)

    whole = trainer(5, None).fit(progress=False)
    trainer(2, tmp_path).fit(progress=False)
    again = trainer(5, tmp_path).fit(progress=False)
    assert all(torch.equal(a, b) for a, b in zip(whole.net.parameters(), again.net.parameters(), strict=True))
    for other in ({"task": "inpainting"}, {"drop": 0.2}):
        with pytest.raises(CheckpointError, match=r"data: .*Inpainting\(.* in the file, "):
            trainer(5, tmp_path, **other)


def smooth(channels=3, n=64, size=8):
    """Images with coarse structure, in [-1, 1]."""
    x = torch.randn(n, channels, 3, 3, generator=generator())
    x = torch.nn.functional.interpolate(x, size=(size, size), mode="bicubic") + 0.7 * x.mean((1, 2, 3), keepdim=True)
    return x.tanh()


@pytest.mark.parametrize("task", ["inpainting", "uncropping", "colourisation", "jpeg", "super-resolution", "given"])
def test_a_network_that_is_told_learns_more(task):
    """The mean square error of x_0, all noise levels alike, with the image and with nothing in its place."""
    x = smooth()
    condition = Given(-x[:, :2]) if task == "given" else TASKS[task]
    losses = []
    for drop in (0.0, 1.0):
        data = TrainingData(x, conditions=(condition,), drop=drop)
        torch.manual_seed(0)
        losses.append(final_loss(data, Copying(3, condition.channels(data.shape))))
    assert losses[0] < 0.8 * losses[1], losses


@pytest.mark.parametrize("kind", ["label", "vector"])
def test_a_class_and_a_vector_are_learnt_from(kind):
    which = torch.arange(60) % 4
    x = torch.eye(4)[which] * 2 - 0.5 + 0.05 * torch.randn(60, 4, generator=generator())
    losses = []
    for drop in (0.0, 1.0):
        if kind == "label":
            data = TrainingData(x, which, drop=drop)
        else:
            data = TrainingData(x, conditions=(Given(torch.eye(4)[which]),), drop=drop)
        torch.manual_seed(0)
        losses.append(final_loss(data, MLP(4, 32, 1, **data.network_options)))
    assert losses[0] < 0.7 * losses[1], losses


def test_the_networks_take_what_the_data_say():
    data = TrainingData(levels((8, 8)), torch.arange(N) % 3, 256, conditions=(Inpainting(), Given(torch.ones(N, 5))))
    net = UNet.preset(8, image_channels=3, channels=8, heads=1, **data.network_options)
    x, cond = data.batch(torch.arange(2))
    assert net(x, torch.ones(2), **cond).shape == x.shape


# --- what is refused -------------------------------------------------------------------------------------------------

X = torch.zeros(4, 3, 8, 8)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"labels": torch.tensor([0, 1, 2, 5]), "num_classes": 5}, "labels are 0 to 5: there are 5 classes, 0 to 4"),
        ({"labels": torch.tensor([0, -1, 2, 5])}, "labels are -1 to 5"),
        ({"labels": torch.arange(4), "classes": ["a", "b"]}, "there are 2 classes"),
        ({"num_classes": 3}, "num_classes=3: there are no labels"),
        ({"labels": torch.arange(4.0), "drop": 0.1}, "expected classes, whole numbers"),
        ({"labels": torch.arange(4), "drop": -0.1}, "drop=-0.1: expected a probability"),
        ({"labels": torch.arange(4), "drop": 1.1}, "drop=1.1: expected a probability"),
        ({"labels": torch.arange(4), "drop": math.nan}, "drop=nan: expected a probability"),
        ({"drop": 0.1}, "no labels and no conditions to drop"),
        ({"conditions": (Given(torch.zeros(3, 2)),)}, "has 3 entries for 4 items"),
        ({"conditions": (Given(torch.zeros(4, 2, 8, 7)),)}, r"is for items of \(8, 7\)"),
        ({"x": torch.zeros(4, 8), "conditions": (Inpainting(),)}, "an item has the shape"),
        ({"x": torch.zeros(4, 1, 8, 8), "conditions": (Colourisation(),)}, "images of 3 channels"),
        ({"x": torch.zeros(4, 2, 8, 8), "conditions": (JPEGRestoration(),)}, "images of 1 or 3 channels"),
        ({"x": torch.zeros(4, 2, 8), "conditions": (SuperResolution(),)}, r"images \(C, H, W\)"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        TrainingData(**{"x": X, **arguments})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Inpainting(0.5, 0.2), "least=0.5, most=0.2"),
        (lambda: Inpainting(boxes=0), "boxes=0"),
        (lambda: Inpainting(fill="ones"), "fill='ones'"),
        (lambda: Uncropping(1.0), "keep=1.0"),
        (lambda: JPEGRestoration(30, 5), "lowest=30, highest=5"),
        (lambda: JPEGRestoration(5, 96), "highest=96"),
        (lambda: SuperResolution(1), "factor=1"),
        (lambda: Given(torch.zeros(4)), "values are"),
        (lambda: Given(torch.full((4, 1), math.inf)), "expected finite numbers"),
        (lambda: Given(torch.ones(4, 1, dtype=torch.uint8)), "levels=None"),
        (lambda: Given(torch.full((4, 1), 9), levels=9), "9 to 9, and levels=9"),
        (lambda: condition_of("superresolution"), "'superresolution': expected 'super-resolution', or one of"),
        (lambda: condition_of("super-resolution:big"), "expected a factor, super-resolution:4"),
        (lambda: condition_of("jpeg:x"), "jpeg:5-30"),
        (lambda: condition_of("colourisation:3"), "no argument"),
        (lambda: condition_of("inpainting:ones"), "fill='ones'"),
        (lambda: condition_of("given:"), "given:PATH"),
        (lambda: condition_of("jpeg+colour"), "'colour': expected"),
        (lambda: OneOf(()), "one or more"),
        (lambda: OneOf((Given(X),)), "functions of the item"),
        (lambda: OneOf((Colourisation(),)).channels((1, 8, 8)), "3 channels"),
        (lambda: Shown(torch.tensor([0, 4]), 4), "items 0 to 4: there are 4"),
        (lambda: Shown(torch.tensor([0, 1]), 4, torch.tensor([0, 1, 2])), r"epochs of shape \(3,\)"),
        (lambda: Inpainting()(X, Shown(torch.arange(3), 4)), "x has 4 items, but 3 are shown"),
        (lambda: JPEGRestoration()(X + 2, Shown(torch.arange(4), 4)), "expected images in"),
        (lambda: nothing({"label": torch.arange(3)}), "how many classes there are"),
        (lambda: dropped({"vector": X}, torch.ones(3, dtype=torch.bool)), "4 entries for 3 samples"),
        (lambda: TrainingData(X).batch(torch.arange(2), torch.arange(3)), "one epoch for each"),
    ],
)
def test_wrong_arguments_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_no_such_file_of_conditions(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        condition_of(f"given:{tmp_path / 'nothing'}")


# --- the command line ------------------------------------------------------------------------------------------------

SMALL = ["--batch-size", "8", "--steps", "2", "--device", "cpu", "--quiet", "--set", "model.options.channels=8",
         "--set", "model.options.heads=1", "--set", "evaluate.nfe=1", "--set", "evaluate.grid=2",
         "--set", "train.workers=0"]  # fmt: skip


def run(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_configuration_builds_the_network():
    data = DataConfig("digits", classes=True, condition=("super-resolution:2", "inpainting"), drop=0.1).open(seed=3)
    assert data.conditions == (SuperResolution(2), Inpainting())
    settings = {"data": {"source": "digits", "classes": True, "condition": ["super-resolution:2", "inpainting"]}}
    config = completed(settings, data)
    assert config.model.options == {"image_channels": 1, "num_classes": 10, "image_condition": 3}
    assert RunConfig.of(config.to_dict()) == config
    with pytest.raises(ValueError, match=r"model.options.image_condition = 1, but the data's is 3"):
        completed({**settings, "model": {"options": {"image_condition": 1}}}, data)
    points = TrainingData(torch.randn(9, 2, generator=generator()), conditions=(Given(torch.ones(9, 4)),))
    assert completed({"data": {"source": "x"}}, points).model.options == {"event_shape": [2], "vector": 4}
    assert DataConfig("digits", classes=True, limit=3).open().num_classes == 10  # a part has the classes of the whole


def test_a_conditional_run_is_sampled_from(here, capsys, monkeypatch):
    """Sample i is told of item i, and which items these are is said by --condition-from."""
    assert run("train", "--data", "digits", "--classes", "--condition", "super-resolution:2", "--drop", 0.1,
               "--set", "data.limit=20", "--set", "evaluate.data=digits", "--set", "evaluate.n=12", "--out", "run",
               *SMALL) == 0  # fmt: skip
    assert (here / "run" / "samples" / "00000002.png").exists()
    config = run_config(here / "run")
    assert (config.data.condition, config.data.drop) == ("super-resolution:2", 0.1)
    model = open_run(here / "run")
    assert model.about.conditions == ("SuperResolution(factor=2)",)
    assert About.read(here / "run") == model.about
    sample = ["sample", "run", "--nfe", 2, "--device", "cpu", "--quiet", "--float"]
    images, labels = digits()
    np.savez("held.npz", images=images[40:45].numpy(), labels=labels[40:45].numpy())
    assert run(*sample, "--n", 7, "--out", "own.npz") == 0
    own = np.load("own.npz")
    assert own["labels"].tolist() == labels[:7].tolist()
    with monkeypatch.context() as patch:  # what only training needs is not there
        patch.setitem(sys.modules, "msgspec", None)
        patch.setitem(sys.modules, "tomli_w", None)
        assert run_config(here / "run") == config
        assert run(*sample, "--n", 7, "--out", "without.npz") == 0
    assert np.array_equal(np.load("without.npz")["x"], own["x"])
    assert run(*sample, "--n", 7, "--condition-from", "held.npz", "--out", "held_out.npz") == 0
    found = np.load("held_out.npz")
    assert found["labels"].tolist() == labels[[40, 41, 42, 43, 44, 40, 41]].tolist()
    told = TrainingData(images[40:45], labels[40:45], conditions=(SuperResolution(2),), num_classes=10)
    cond = told.batch(torch.tensor([0, 1, 2, 3, 4, 0, 1])).cond
    expected = draw(model.denoiser, (7, 1, 8, 8), Adams(), nfe=2, seed=sample_seeds(0, 7), cond=cond).x
    assert np.abs(found["x"] - expected.numpy()).max() < 1e-5
    np.save("plain.npy", images[40:45].numpy())  # without labels, which are not asked for
    assert run(*sample, "--n", 2, "--class", 3, "--condition-from", "plain.npy", "--out", "threes.npz") == 0
    assert np.load("threes.npz")["labels"].tolist() == [3, 3]
    assert run("evaluate", "run", "--n", 12, "--nfe", 1, "--metrics", "energy", "--features", "pixels",
               "--data", "digits", "--limit", 12, "--device", "cpu", "--quiet") == 0  # fmt: skip
    capsys.readouterr()
    np.save("large.npy", np.zeros((5, 1, 9, 9), np.uint8))
    np.savez("large.npz", images=np.zeros((5, 1, 9, 9), np.uint8), labels=np.zeros(5, int))
    # The same, measured: half as large.
    small = torch.nn.functional.interpolate(images[40:45], size=(4, 4), mode="bicubic", antialias=True)
    np.save("small.npy", small.numpy())
    for more in (["--condition-from", "held.npz"], ["--condition-from", "small.npy", "--measured"]):
        assert run(*sample, "--n", 5, "--class", 3, *more, "--out", f"{len(more)}.npz") == 0
    assert np.abs(np.load("2.npz")["x"] - np.load("3.npz")["x"]).max() < 1e-5
    assert run(*sample, "--n", 5, "--class", 3, "--measured", "--out", "a.npz") == 2
    assert run(*sample, "--condition-from", "large.npz", "--measured", "--out", "a.npz") == 2
    assert "measurements of shape (1, 9, 9), expected (1, 8, 8)" in capsys.readouterr().err
    for source, words in [("nothing", "nothing: no such file"), ("large.npz", "items (1, 9, 9), not (1, 8, 8)")]:
        assert run(*sample, "--condition-from", source, "--out", "a.npz") == 2
        assert words in capsys.readouterr().err
    assert run("train", "--data", "digits", "--out", "plain", *SMALL) == 0
    assert run("sample", "plain", "--condition-from", "digits", "--out", "a.npz", "--device", "cpu") == 2
    assert "has no condition but a class" in capsys.readouterr().err


def test_given_images_are_sampled_from(here, capsys):
    """Segmentation: what is drawn is a mask, and --condition-from names the images themselves."""
    np.save("masks.npy", (levels((8, 8), 1, n=16) > 127).numpy().astype(np.uint8) * 255)
    np.save("photos.npy", levels((8, 8), 3, n=16, seed=1).numpy())
    assert run("train", "--data", "masks.npy", "--condition", "given:photos.npy", "--out", "run", *SMALL) == 0
    np.save("other.npy", levels((8, 8), 3, n=3, seed=2).numpy())
    for source in ("other.npy", "photos.npy"):
        assert run("sample", "run", "--n", 4, "--nfe", 1, "--condition-from", source, "--out", f"{source}.npz",
                   "--float", "--device", "cpu", "--quiet") == 0  # fmt: skip
    assert run("sample", "run", "--n", 4, "--nfe", 1, "--out", "own.npz", "--float", "--device", "cpu", "--quiet") == 0
    own, photos, other = (np.load(name)["x"] for name in ("own.npz", "photos.npy.npz", "other.npy.npz"))
    assert np.array_equal(own, photos)
    assert own.shape == other.shape == (4, 1, 8, 8)
    capsys.readouterr()
    assert run("train", "--data", "masks.npy", "--condition", "given:other.npy", "--out", "no", *SMALL) == 2
    assert "has 3 entries for 16 items" in capsys.readouterr().err
    for wrong, words in [("sharpen", "super-resolution"), ("colourisation", "images of 3 channels")]:
        assert run("train", "--data", "masks.npy", "--condition", wrong, "--out", "no", *SMALL) == 2
        assert words in capsys.readouterr().err
    assert not (here / "no").exists()


def test_a_folder_in_workers_is_told_of_too(here):
    (here / "photos").mkdir()
    for i, image in enumerate(levels((12, 12), 3, n=9)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(here / "photos" / f"{i}.png")
    assert run("train", "--data", "photos", "--size", 8, "--condition", "inpainting:noise", "--set", "data.flip=true",
               "--out", "run", *SMALL) == 0  # fmt: skip
    assert open_run(here / "run").about.conditions == (repr(Inpainting(fill="noise")),)
    assert isinstance(run_config(here / "run").data.told("photos").x, ImageFolder)
    assert run("sample", "run", "--n", 3, "--nfe", 1, "--condition-from", "photos", "--out", "a.png", "--device", "cpu",
               "--quiet") == 0  # fmt: skip
