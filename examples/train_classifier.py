"""A small classifier whose hidden layer is a feature space for metrics: seconds for the digits, minutes for clothes.

    python examples/train_classifier.py --data digits --out digits.npz
    python examples/train_classifier.py --data fashion-mnist --out fashion-mnist.npz
    python examples/train_classifier.py --data fashion-mnist --out fashion-mnist.npz --check

Then `scoresde.metrics.classifier_features("digits.npz")` is the space. The two in the package were made so. The weights
that are saved, rounded to float16, are the ones whose held-out accuracy is measured, saved with them and printed;
--check reads a file and measures it again. Held out are the 500 digits that examples/digits.py holds out, or the test
set.
"""

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

from scoresde.data import digits, fashion_mnist, mnist
from scoresde.metrics import Classifier, load_classifier

SHAPES = {  # channels of the convolutions, epochs, the shift in pixels and whether images are mirrored, to augment
    "digits": ((32, 64, 64), 60, 1, False),
    "fashion-mnist": ((24, 48, 64, 64), 10, 1, True),
    "mnist": ((24, 48, 64, 64), 8, 2, False),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=SHAPES, required=True)
    parser.add_argument("--path", type=Path, help="folder of the IDX files, for MNIST or another Fashion-MNIST")
    parser.add_argument("--out", type=Path, required=True, help="file of the weights, .npz")
    parser.add_argument("--epochs", type=int, help="passes over the data (by the data)")
    parser.add_argument("--lr", type=float, default=4e-3, help="highest learning rate (4e-3)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation (0)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--check", action="store_true", help="train nothing: measure the accuracy of --out again")
    args = parser.parse_args(argv)
    if args.data == "mnist" and args.path is None:
        parser.error("--data mnist needs --path, the folder of its files")

    (images, labels), held_out = load(args)
    if not args.check:
        start, cpu = time.perf_counter(), time.process_time()
        net = train(images, labels, args)
        print(f"{time.perf_counter() - start:.0f} s, {time.process_time() - cpu:.0f} s of processor time")
        about = {"data": args.data, "trained_on": len(images), "held_out": len(held_out[0])}
        net.cpu().save(args.out, about)  # rounds; what is measured is what was saved
        accuracy = load_classifier(args.out)[0].accuracy(*held_out)
        net.save(args.out, {**about, "accuracy": accuracy, "seed": args.seed})
    net, about = load_classifier(args.out)
    print(
        f"{args.out}: {sum(p.numel() for p in net.parameters()):,} parameters, {args.out.stat().st_size / 1e3:.0f} kB, "
        f"accuracy on {about['held_out']} held-out images {about['accuracy']:.2%} (measured now: "
        f"{net.accuracy(*held_out):.2%})"
    )


def load(args: argparse.Namespace) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images and labels to train on, and those held out."""
    if args.data == "digits":
        images, labels = digits()
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        return (images[order[500:]], labels[order[500:]]), (images[order[:500]], labels[order[:500]])
    read = fashion_mnist if args.data == "fashion-mnist" else mnist
    return read(args.path, "train"), read(args.path, "test")


def train(images: Tensor, labels: Tensor, args: argparse.Namespace) -> Classifier:
    channels, epochs, shift, mirror = SHAPES[args.data]
    epochs, batch = args.epochs or epochs, 64 if len(images) < 10_000 else 256
    with torch.random.fork_rng():
        torch.manual_seed(args.seed)
        net = Classifier(images.shape[1:], channels=channels)
    net.to(device=args.device, memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(args.seed)
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps)
    for epoch in range(epochs):
        order, total = torch.randperm(len(images), generator=generator), 0.0
        for chosen in order[: len(order) // batch * batch].split(batch):
            x = augment(images[chosen], shift, mirror, generator).to(args.device)
            loss = torch.nn.functional.cross_entropy(net(x), labels[chosen].to(args.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * batch / len(images)
        print(f"epoch {epoch + 1} of {epochs}: loss {total:.3f}", flush=True)
    return net


def augment(x: Tensor, shift: int, mirror: bool, generator: torch.Generator) -> Tensor:
    """Each image moved by up to `shift` pixels each way, the background -1 coming in, and every second mirrored."""
    B, _, H, W = x.shape
    padded = torch.nn.functional.pad(x, [shift] * 4, value=-1.0)
    down, right = torch.randint(0, 2 * shift + 1, (2, B), generator=generator)
    rows = (down[:, None] + torch.arange(H))[:, None, :, None]
    columns = right[:, None] + torch.arange(W)
    if mirror:
        columns = torch.where(torch.rand(B, 1, generator=generator) < 0.5, columns.flip(1), columns)
    return padded[
        torch.arange(B)[:, None, None, None], torch.arange(x.shape[1])[:, None, None], rows, columns[:, None, None]
    ]


if __name__ == "__main__":
    main()
