"""What it takes to load published networks: seconds, memory, lines, and what one evaluation differs from theirs.

    python benchmarks/interop.py            # needs scoresde[interop] for those of diffusers

The configurations are those of published models, the weights random numbers, so nothing is downloaded: diffusers'
folders are written by diffusers, the other files by stand-in writers of the same formats (tests/standins.py), from a
network that is written down from the papers (tests/textbook_song.py, tests/adm_reference.py). Each is loaded in
processes of its own, three times, with everything imported before:

    loading     seconds, of the wall clock and of the processor; the sha256 of the file is in them
    memory      largest resident memory above that before, after loading and after one evaluation of one item, over the
                size of the stored weights. Files of torch.save are mapped: what of them is read counts when it is
    difference  of that evaluation, one forward pass of the network, from the same pass of the network that wrote the
                file: largest, over the standard deviation of theirs, float32 here. Diffusers' networks are their own
                code, called by it on one side and by us on the other
    lines       of user code, with the import

Written into --out: README.md and results.json. Seconds are of a shared machine: the least of three.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from kept import made_on
from torch import Tensor

from scoresde.info import environment
from scoresde.interop import from_diffusers, from_edm, from_guided_diffusion, from_score_sde
from scoresde.interop.diffusers import library
from scoresde.interop.model import Published
from scoresde.interop.score_sde import CIFAR10, SCORE_SDE
from scoresde.report import table, write_json
from scoresde.wrappers import Wrapper

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from adm_reference import Adm
from standins import snapshot, write_edm, write_score_sde
from textbook_song import Made, edm, score_sde

MIB = 2**20


@dataclass(frozen=True)
class Case:
    """A published configuration.

    Attributes:
        what: it is, in words.
        write: writes its files into a folder, of random weights, and saves what `forward` needs.
        load: the line of a user.
        code: that line.
        forward: what theirs predicts of x at label c, of the files' weights.
        label: c of one item, in their words.
        cond: what else it is told.
        half: whether the weights are float16.
    """

    what: str
    write: Callable[[Path], None]
    load: Callable[[Path], Published]
    code: str
    forward: Callable[[Path, Tensor, Tensor, dict[str, Tensor]], Tensor]
    label: float
    cond: Callable[[], dict[str, Tensor]] = dict
    half: bool = False


# ---- EDM, CIFAR-10, class-conditional DDPM++ ----

EDM: dict[str, Any] = {"img_resolution": 32, "in_channels": 3, "out_channels": 3, "label_dim": 10, "augment_dim": 9}
EDM |= {"model_channels": 128, "channel_mult": [2, 2, 2], "channel_mult_emb": 4, "num_blocks": 4, "dropout": 0.13}
EDM |= {"attn_resolutions": [16], "embedding_type": "positional", "channel_mult_noise": 1, "resample_filter": [1, 1]}
EDM |= {"encoder_type": "standard", "decoder_type": "standard"}


def _single(made: Made) -> Made:
    for name in made:
        made[name] = made[name].float()
    return made


def _write_edm(folder: Path) -> None:
    made = Made(0)
    edm(made, EDM, torch.zeros(1, 3, 32, 32).double(), torch.zeros(1).double(), torch.zeros(1, 10).double())
    attributes = {"sigma_data": 0.5, "sigma_min": 0, "sigma_max": math.inf}
    write_edm(folder / "edm-cifar10-32x32-cond-vp.pkl", snapshot("EDMPrecond", EDM, _single(made), **attributes))
    torch.save(dict(made), folder / "theirs.pt")


def _forward_edm(folder: Path, x: Tensor, c: Tensor, cond: dict[str, Tensor]) -> Tensor:
    made = Made(0)
    made.update(torch.load(folder / "theirs.pt", weights_only=True))
    return edm(made, EDM, x.double(), c.double(), torch.eye(10)[cond["label"]].double())


# ---- score_sde, NCSN++ of CIFAR-10 ----

NCSNPP = "ve/cifar10_ncsnpp_continuous"
OPTIONS = {**CIFAR10, **SCORE_SDE[NCSNPP]}


def _write_ncsnpp(folder: Path) -> None:
    made = Made(0)
    score_sde(made, OPTIONS, torch.zeros(1, 3, 32, 32).double(), torch.zeros(1).double())
    write_score_sde(folder / "checkpoint_24.pth", _single(made))
    torch.save(dict(made), folder / "theirs.pt")


def _forward_ncsnpp(folder: Path, x: Tensor, c: Tensor, cond: dict[str, Tensor]) -> Tensor:
    made = Made(0)
    made.update(torch.load(folder / "theirs.pt", weights_only=True))
    return -score_sde(made, OPTIONS, x.double(), c.double())


# ---- guided-diffusion, ADM of ImageNet 64 ----

ADM: dict[str, Any] = {"channels": 192, "mult": (1, 2, 3, 4), "blocks": 3, "attend": (1, 2, 3), "head_channels": 64}
ADM |= {"classes": 1000, "updown": True, "new_order": True}


def _write_adm(folder: Path) -> None:
    state = {name: tensor.float() for name, tensor in Adm(**ADM).state.items()}
    torch.save(state, folder / "64x64_diffusion.pt")


def _forward_adm(folder: Path, x: Tensor, c: Tensor, cond: dict[str, Tensor]) -> Tensor:
    net = Adm(**ADM)
    held = torch.load(folder / "64x64_diffusion.pt", weights_only=True)
    net.state = {name: tensor.double() for name, tensor in held.items()}
    return net(x.double(), c.double(), cond["label"])[:, :3]


# ---- diffusers: DDPM of CIFAR-10, and a latent model of stable diffusion's shape ----

DDPM = {"sample_size": 32, "in_channels": 3, "out_channels": 3, "layers_per_block": 2, "norm_num_groups": 32}
DDPM |= {"block_out_channels": (128, 256, 256, 256), "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1}
DDPM |= {"down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D")}
DDPM |= {"up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": None}
LATENT = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4, "sample_size": 512}
VAE |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}


def _write_ddpm(folder: Path) -> None:
    torch.manual_seed(0)
    diffusers = library()
    net, scheduler = diffusers.UNet2DModel(**DDPM), diffusers.DDPMScheduler()
    diffusers.DDPMPipeline(net, scheduler).save_pretrained(folder / "ddpm-cifar10-32")


def _write_latent(folder: Path) -> None:
    torch.manual_seed(0)
    diffusers, folder = library(), folder / "stable-diffusion"
    diffusers.UNet2DConditionModel(**LATENT).half().save_pretrained(folder / "unet", max_shard_size="1GB")
    diffusers.AutoencoderKL(**VAE).half().save_pretrained(folder / "vae")
    diffusers.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False).save_pretrained(folder / "scheduler")


def _forward_diffusers(kind: str, part: str) -> Callable[[Path, Tensor, Tensor, dict[str, Tensor]], Tensor]:
    def forward(folder: Path, x: Tensor, c: Tensor, cond: dict[str, Tensor]) -> Tensor:
        net = getattr(library(), kind).from_pretrained(folder / part, torch_dtype=torch.float32)
        out: Tensor = net(x, c, **cond).sample
        return out

    return forward


CASES = {
    "ddpm-cifar10-32": Case(
        "diffusers, UNet2DModel",
        _write_ddpm,
        lambda folder: from_diffusers(folder / "ddpm-cifar10-32"),
        'from_diffusers("ddpm-cifar10-32")',
        _forward_diffusers("UNet2DModel", "ddpm-cifar10-32/unet"),
        500.0,
    ),
    "stable diffusion 1.5": Case(
        "diffusers, UNet2DConditionModel and AutoencoderKL; float16, in shards",
        _write_latent,
        lambda folder: from_diffusers(folder / "stable-diffusion"),
        'from_diffusers("stable-diffusion")',
        _forward_diffusers("UNet2DConditionModel", "stable-diffusion/unet"),
        500.0,
        lambda: {"encoder_hidden_states": torch.randn(1, 77, 768, generator=torch.Generator().manual_seed(2))},
        half=True,
    ),
    "ADM 64": Case(
        "guided-diffusion, 64x64_diffusion.pt",
        _write_adm,
        lambda folder: from_guided_diffusion(folder / "64x64_diffusion.pt"),
        'from_guided_diffusion("64x64_diffusion.pt")',
        _forward_adm,
        500.0,
        lambda: {"label": torch.tensor([3])},
    ),
    "EDM CIFAR-10": Case(
        "EDM, edm-cifar10-32x32-cond-vp.pkl",
        _write_edm,
        lambda folder: from_edm(folder / "edm-cifar10-32x32-cond-vp.pkl"),
        'from_edm("edm-cifar10-32x32-cond-vp.pkl")',
        _forward_edm,
        0.3,
        lambda: {"label": torch.tensor([3])},
    ),
    "NCSN++ CIFAR-10": Case(
        f"score_sde, {NCSNPP}",
        _write_ncsnpp,
        lambda folder: from_score_sde(folder / "checkpoint_24.pth", NCSNPP),
        f'from_score_sde("checkpoint_24.pth", "{NCSNPP}")',
        _forward_ncsnpp,
        -0.7,
    ),
}


HEAD = """# Loading published networks

    python benchmarks/interop.py        # needs scoresde[interop]

The configurations of published models with random weights, loaded with everything imported before. Seconds are the
least of three processes, the sha256 of the files in them. Memory is the largest resident memory above that before, over
the stored weights: after loading, and after one evaluation of one item, whose activations are in it. Files of
torch.save are mapped, so that they count when they are read; score_sde's has parameters and averages, and the averages
are.

The difference is that of one forward pass in float32 from the network that wrote the file, largest over the standard
deviation: of diffusers' networks, which are their own code, from a call of their own; of the others from the networks
of the papers, in float64 (tests/textbook_song.py, tests/adm_reference.py). The latent model's is in float32, of the
same numbers, since a CPU is slow in float16, and its memory after an evaluation was not measured for the same reason.
"""


def stored(folder: Path, about: dict[str, Any]) -> float:
    """MiB of the files that were read."""
    return sum(
        next(path for path in folder.rglob(Path(name).name) if str(path).endswith(name)).stat().st_size
        for name in about["files"]
    ) / MIB  # fmt: skip


def loaded(case: Case, folder: Path, forward: bool) -> dict[str, Any]:
    """One loading, in a process of its own."""
    if "diffusers" in case.what:
        library().UNet2DConditionModel, library().AutoencoderKL, library().UNet2DModel
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    wall, cpu = time.perf_counter(), time.process_time()
    model = case.load(folder)
    seconds = time.perf_counter() - wall, time.process_time() - cpu
    loading = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    assert model.shape is not None
    found = {"seconds": seconds[0], "processor": seconds[1], "loading": loading, "stored": stored(folder, model.about)}
    found["parameters"] = model.about["parameters"]
    if not forward:
        return found
    inner: Any = model
    while isinstance(inner, Wrapper):
        inner = inner.denoiser
    x, c = torch.randn(1, *model.shape, generator=torch.Generator().manual_seed(1)), torch.tensor([case.label])
    cond = case.cond()
    with torch.inference_mode():
        if case.half:  # a CPU computes in it slowly: the pass is in float32, from the same numbers
            found["evaluated"] = math.nan
            inner.net.float()
        ours = inner.net(x, c, **cond)
        if not case.half:
            found["evaluated"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
        ours = ours[:, : x.shape[1]]
        theirs = case.forward(folder, x, c, cond)
    found["difference"] = float((ours - theirs).abs().max() / theirs.std())
    return found


def measured(name: str, folder: Path) -> dict[str, Any]:
    """The files are written, and loaded three times."""

    def call(*words: str) -> Any:
        command = [sys.executable, __file__, "--case", name, "--folder", str(folder), *words]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return json.loads(out.splitlines()[-1]) if out else None

    call("--write")
    runs = [call("--forward"), call(), call()]
    return {**runs[0], **{key: min(run[key] for run in runs) for key in ("seconds", "processor", "loading")}}


def page(results: dict[str, Any]) -> str:
    head = ["", "parameters", "stored, MiB", "loading, s", "processor, s", "memory: loading", "and one evaluation",
            "difference"]  # fmt: skip
    rows = []
    for name, case in CASES.items():
        if (r := results["cases"].get(name)) is None:
            continue
        evaluated = "" if r["evaluated"] is None else f"{r['evaluated'] / r['stored']:.2f}"
        rows.append([f"{name}: {case.what}", f"{r['parameters'] / 1e6:.1f} M", f"{r['stored']:.0f}",
                     f"{r['seconds']:.1f}", f"{r['processor']:.1f}", f"{r['loading'] / r['stored']:.2f}", evaluated,
                     f"{r['difference']:.1e}"])  # fmt: skip
    codes = [f"    {CASES[name].code}" for name in results["cases"]]
    lines = [HEAD, *table(head, rows), "", "Lines of user code, one each beside the import:", "", *codes, "",
             "Every step of diffusers' schedulers beside ours: [agreement](agreement/README.md).", "",
             made_on(results["environment"])]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CASES, nargs="+", default=list(CASES), help="some of them (all)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/interop")
    for flag in ("--case", "--folder", "--write", "--forward"):
        kind: dict[str, Any] = {"action": "store_true"} if flag in ("--write", "--forward") else {}
        parser.add_argument(flag, help=argparse.SUPPRESS, **kind)
    options = parser.parse_args()
    if options.case:
        case, folder = CASES[options.case], Path(options.folder)
        if options.write:
            case.write(folder)
        else:
            print(json.dumps(loaded(case, folder, options.forward)))
        return
    results: dict[str, Any] = {"environment": environment(), "cases": {}}
    for name in options.only:
        with tempfile.TemporaryDirectory() as folder:
            found = measured(name, Path(folder))
        results["cases"][name] = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in found.items()}
        print(name, found, flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "results.json", results)
    (options.out / "README.md").write_text(page(results))


if __name__ == "__main__":
    main()
