"""Speech from text: spoken prompts, as Grad-TTS makes them (Popov et al., 2021), in small.

    python examples/speech.py --data FOLDER      some ten minutes on two cores, most of it training; --help

An encoder reads a text's phones and gives each a mean mel spectrum; frames are aligned with phones by monotonic
alignment search (`monotonic_durations`), and a network learns how long each lasts. mu is the means, spread over the
frames. Then

    x_T ~ N(mu, I / temperature),   dX = (mu - X) beta / 2 dt + sqrt(beta) dw

is a plain VP process of X - mu: `Latent(denoiser, Shift(mu))`, `Tempered` by a temperature; the network sees mu too.
The ODE takes N = 4, 10 or 50 steps, and Griffin-Lim's algorithm makes a sound of the spectrogram.

FOLDER has WAV files, in folders or not, and a transcript "name: text" a line, .txt or .txt.gz, anywhere below it; the
name is a file's without .wav. Those measured are Debian's, 568 prompts of one voice at 8 kHz, which need no root:

    apt-get download asterisk-core-sounds-en-wav asterisk-core-sounds-en
    for package in asterisk-core-sounds-en*.deb; do dpkg -x $package FOLDER; done
    pip install "scoresde[speech]"

Measured, on prompts that no network saw: the word error rate of pocketsphinx and DNSMOS (speechmos, P.835), of the
real recordings, of their spectrograms through Griffin-Lim (the ceiling), of mu alone, of samples, and of the mean
spectrum at every frame (the floor). Writes speech.png, results.json, README.md and wav/ into --out; a run that is
killed goes on.
"""

from __future__ import annotations

import gzip
import itertools
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jiwer
import librosa
import numpy as np
import pocketsphinx
import torch
from scipy.io import wavfile
from shared import arguments, cell, mean_and_error, picture, place, publish, ran, seeded, trained
from speechmos import dnsmos
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde import VPSDE, Denoiser, EpsDenoiser, Latent, Tempered, X0Denoiser, sample
from scoresde.codecs import Shift
from scoresde.nn import UNet, aligned, monotonic_durations
from scoresde.nn.dit import Layer, positions
from scoresde.noise import derive_seed
from scoresde.report import table
from scoresde.solvers import DPMSolverPP
from scoresde.training import dsm_loss

RATE, HOP, WINDOW, FFT, MELS = 8000, 128, 400, 512, 40
CROP, STEPS, SOLVER = 64, (4, 10, 50), DPMSolverPP(order=2)
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def main(argv: list[str] | None = None) -> None:
    parser = arguments(
        __doc__, "speech", data=(Path("prompts"), "folder of WAV files and their transcript"),
        encoder_steps=(1500, "of the encoder, 16 prompts a step"),
        train_steps=(4000, "of the denoiser, 16 crops of a second a step"),
        held_out=(40, "prompts to measure on"), measured=(40, "of them to hear"),
        rated=(10, "of these, by DNSMOS, whose window is 10 seconds, filled by repetition"),
        temperature=(1.5, "of the prior"),
        models=(Path("runs", "speech"), "folder of the networks' runs"),
    )  # fmt: skip
    args = parser.parse_args(argv)
    known, held_out = split(read(args.data), args.held_out, args.seed)
    mels = torch.cat([spoken.mel for spoken in known], 1)
    scale = mels.mean(1, keepdim=True), mels.std(1, keepdim=True)
    known, held_out = ([s._replace(mel=(s.mel - scale[0]) / scale[1]) for s in some] for some in (known, held_out))
    encoder, denoiser = learned(known, args)
    held_out = held_out[: args.measured]
    start, voices = time.perf_counter(), {}
    language_model([spoken.text for spoken in known], args.models / "prompts.arpa")
    spectra = spoken_by(encoder.net, denoiser, held_out, args)
    rows = []
    for name, mel in {"real recordings": None, **spectra}.items():
        voices[name] = [s.sound if mel is None else sound(m * scale[1] + scale[0]) for s, m in
                        zip(held_out, mel or spectra["vocoded-real"], strict=True)]  # fmt: skip
        rows.append({"voice": name} | measured(voices[name], held_out, args))
        print(rows[-1], flush=True)
    write(voices, held_out, args.out / "wav")
    results = ran(args.models, {"encoder": encoder, "denoiser": denoiser}, start) | {
        "rows": rows, "prompts": len(known), "measured": len(held_out), "solver": repr(SOLVER),
        "minutes": sum(s.mel.shape[1] for s in known) * HOP / RATE / 60,
        "shown": [s.text for s in held_out[:3]],
    }  # fmt: skip
    publish(args, "speech", results, report, lambda path: draw(spectra, held_out, path))


# --- the data --------------------------------------------------------------------------------------------------------


class Spoken(NamedTuple):
    """A prompt: its words, its phones as numbers >= 1, its sound, and log-mel (MELS, T)."""

    text: str
    phones: Tensor
    sound: np.ndarray
    mel: Tensor


def words(text: str) -> str:
    """Lower case, digits as words, nothing but letters and apostrophes; empty where something is not spoken as told."""
    if re.search(r"[\[<(@/]|\d{2}", text):
        return ""
    text = re.sub(r"\d", lambda found: f" {DIGITS[int(found[0])]} ", text.lower()).replace("*", " star ")
    return " ".join(re.sub(r"[^a-z' ]+", " ", text).split())


def read(folder: Path) -> list[Spoken]:
    """The prompts of a folder whose words the dictionary of pocketsphinx (CMU's) knows, of 0.3 to 10 seconds."""
    files = {str(path): path for path in sorted(folder.rglob("*.wav"))}
    named = {"/".join(path.parts[-k:]).removesuffix(".wav"): path for k in (1, 2) for path in files.values()}
    cmu = Path(pocketsphinx.get_model_path("en-us/cmudict-en-us.dict")).read_text()
    dictionary = dict(line.split(maxsplit=1) for line in cmu.splitlines())
    number = {phone: i + 2 for i, phone in enumerate(sorted({p for line in dictionary.values() for p in line.split()}))}
    found = []
    for line in transcripts(folder):
        name, _, text = line.partition(": ")
        said = words(text)
        if name not in named or not said or any(word not in dictionary for word in said.split()):
            continue
        phones = [1]  # between words
        for word in said.split():
            phones += [number[phone] for phone in dictionary[word].split()] + [1]
        _, x = wavfile.read(named[name])
        x = librosa.effects.trim(x.astype(np.float32) / 32768, top_db=40, frame_length=FFT, hop_length=HOP)[0]
        if 0.3 < len(x) / RATE < 10 and len(phones) < len(x) // HOP:
            found.append(Spoken(said, torch.tensor(phones), x, log_mel(x)))
    return found


def transcripts(folder: Path) -> Iterator[str]:
    for path in sorted([*folder.rglob("*.txt"), *folder.rglob("*.txt.gz")]):
        data = path.read_bytes()
        yield from (gzip.decompress(data) if path.suffix == ".gz" else data).decode().splitlines()


def split(prompts: list[Spoken], count: int, seed: int) -> tuple[list[Spoken], list[Spoken]]:
    """Prompts to learn from, and held-out ones: of three words at least, said once, each word heard elsewhere too."""
    order = np.random.default_rng(seed).permutation(len(prompts))
    held_out: list[int] = []
    for i in order:
        others = [prompts[j].text for j in range(len(prompts)) if j != i and j not in held_out]
        own, heard = prompts[i].text, {word for text in others for word in text.split()}
        if len(own.split()) >= 3 and own not in others and set(own.split()) <= heard and len(held_out) < count:
            held_out.append(int(i))
    return [p for i, p in enumerate(prompts) if i not in held_out], [prompts[i] for i in held_out]


def log_mel(x: np.ndarray) -> Tensor:
    power = librosa.feature.melspectrogram(
        y=x, sr=RATE, n_fft=FFT, hop_length=HOP, win_length=WINDOW, n_mels=MELS, power=1.0
    )
    return torch.from_numpy(np.log(np.maximum(power, 1e-3))).float()


def sound(mel: Tensor) -> np.ndarray:
    """Of a log-mel, by Griffin and Lim's algorithm (1984) on the magnitudes of the filters' pseudo-inverse."""
    filters = librosa.filters.mel(sr=RATE, n_fft=FFT, n_mels=MELS)
    magnitudes = np.maximum(np.linalg.pinv(filters) @ mel.clamp(max=6.0).exp().numpy(), 0)
    x = librosa.griffinlim(magnitudes, n_iter=60, hop_length=HOP, win_length=WINDOW, n_fft=FFT, random_state=0)
    return (0.99 * x / max(1.0, float(np.abs(x).max()))).astype(np.float32)


# --- the networks ----------------------------------------------------------------------------------------------------


class Reader(nn.Module):
    """phones (B, N), 0 for none -> a mean spectrum of each (B, N, MELS) and the logarithm of its frames (B, N)."""

    def __init__(self, phones: int, width: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(phones + 1, width)
        self.near = nn.ModuleList(nn.Conv1d(width, width, 5, padding=2) for _ in range(3))
        self.layers = nn.ModuleList(Layer(width, 4, 2 * width, 0.1) for _ in range(2))
        self.outward, self.lasts = (
            nn.Linear(width, MELS),
            nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)),
        )
        self.dropout = nn.Dropout(0.1)

    def forward(self, phones: Tensor) -> tuple[Tensor, Tensor]:
        mask = phones != 0
        h = self.embedding(phones)
        for near in self.near:
            h = h + self.dropout(F.relu(near((F.layer_norm(h, h.shape[2:]) * mask[..., None]).mT).mT))
        h = h + positions((h.shape[1],), h.shape[2], h.device).to(h) / 4
        for layer in self.layers:
            h = layer(h, mask)
        h = F.layer_norm(h, h.shape[2:])
        return self.outward(h), self.lasts(h.detach())[..., 0]

    def means(self, phones: Tensor, mel: Tensor) -> Tensor:
        """mu (MELS, T) of a recording, by its alignment."""
        h, _ = self(phones[None])
        return (aligned(monotonic_durations(scores(h, mel[None]))).float() @ h)[0].mT

    def spoken(self, phones: Tensor) -> Tensor:
        """mu (MELS, T) of a text, by what the phones are said to last."""
        h, lasts = self(phones[None])
        return (aligned(lasts.exp().round().clamp(1, 40).long()).float() @ h)[0].mT


def scores(h: Tensor, mel: Tensor) -> Tensor:
    """log N(mel_t; h_n, I) but for a constant, of means (B, N, MELS) and mels (B, MELS, T): (B, N, T)."""
    return h @ mel - (h**2).sum(2)[..., None] / 2


def learned(known: Sequence[Spoken], args: Any) -> tuple[Any, Any]:
    """The encoder, then the denoiser of mel - mu on crops of the aligned prompts; trained or continued."""

    def likelihood(model: Any, x0: Tensor, draws: Any, cond: Any) -> Tensor:
        """The encoder's loss: -log N(mel; mu, I) at the best alignment, and the error of log-durations; a `Loss`."""
        some = [known[int(i)] for i in x0[:, 0]]
        phones = nn.utils.rnn.pad_sequence([s.phones for s in some], batch_first=True)
        mel = nn.utils.rnn.pad_sequence([s.mel.mT for s in some], batch_first=True)
        tokens, frames = (
            torch.tensor([len(y) for y in ys]) for ys in ([s.phones for s in some], [s.mel.mT for s in some])
        )
        h, lasts = model.net(phones)
        durations = monotonic_durations(scores(h, mel.mT), tokens, frames)
        error = (aligned(durations, mel.shape[1]).to(h) @ h - mel)[torch.arange(mel.shape[1]) < frames[:, None]]
        said = phones != 0
        return error.square().mean() / 2 + (lasts[said] - durations[said].log()).square().mean()

    reader = X0Denoiser(seeded(lambda: Reader(1 + max(int(s.phones.max()) for s in known)), args.seed), VPSDE())
    index = torch.arange(len(known)).float()[:, None]
    how: dict[str, Any] = {"checkpoint_every": 200, "lr": 1e-3}
    encoder = trained(
        reader, index, args.models / "encoder", args.encoder_steps, args.seed, loss=likelihood, batch_size=16, **how
    )
    encoder.net.eval()
    with torch.no_grad():
        pairs = [torch.cat([s.mel, encoder.net.means(s.phones, s.mel)]) for s in known]
    crops = torch.cat(
        [F.pad(p, (0, max(0, CROP - p.shape[1]))).unfold(1, CROP, CROP // 4).movedim(1, 0) for p in pairs]
    )

    def residual(model: Any, x0: Tensor, draws: Any, cond: Any) -> Tensor:
        """The denoising loss of mel - mu, the network being told mu; a `Loss`."""
        mel, mu = x0.split(MELS, 1)
        return dsm_loss(model, mel - mu, generator=draws, cond={"image": mu})

    net = seeded(lambda: UNet(MELS, 96, (1, 2), 1, dims=1, image_condition=MELS, dropout=0.05), args.seed)
    denoiser = EpsDenoiser(net, VPSDE(), time=lambda t: 999 * t)
    denoiser = trained(
        denoiser,
        crops.contiguous(),
        args.models / "denoiser",
        args.train_steps,
        args.seed,
        loss=residual,
        batch_size=16,
        **how,
    )
    denoiser.net.eval()
    return encoder, denoiser


# --- speech, and what is measured ------------------------------------------------------------------------------------


def spoken_by(reader: Reader, denoiser: Denoiser, prompts: Sequence[Spoken], args: Any) -> dict[str, list[Tensor]]:
    """The log-mels of each voice, standardised."""
    model = Tempered(Latent(denoiser, Shift(lambda image: image)), args.temperature)
    with torch.no_grad():
        means = [reader.spoken(s.phones) for s in prompts]

    def drawn(mu: Tensor, steps: int, seed: int) -> Tensor:
        image = F.pad(mu, (0, -mu.shape[1] % 4), mode="replicate")[None]  # the U-Net halves its length twice
        x = sample(model, image.shape, SOLVER, steps=steps, seed=seed, cond={"image": image}).x
        return x[0, :, : mu.shape[1]]

    mean = torch.zeros(MELS, 1)  # of standardised spectra
    spectra = {"vocoded-real": [s.mel for s in prompts]}
    for steps in reversed(STEPS):
        spectra[f"N = {steps}"] = [drawn(mu, steps, derive_seed(args.seed, i)) for i, mu in enumerate(means)]
    return spectra | {"mu alone": means, "mean spectrum": [mean.expand_as(mu) for mu in means]}


def measured(sounds: Sequence[np.ndarray], prompts: Sequence[Spoken], args: Any) -> dict[str, Any]:
    """The word error rate over all words, with its standard error over prompts, and DNSMOS of some prompts."""
    decoder = pocketsphinx.Decoder(samprate=16000, loglevel="FATAL", lm=str(args.models / "prompts.arpa"))
    wide = [librosa.resample(x, orig_sr=RATE, target_sr=16000).clip(-1, 1) for x in sounds]
    heard = [recognised(decoder, x) for x in wide]
    wrong = torch.tensor(
        [jiwer.wer(s.text, text) * len(s.text.split()) for s, text in zip(prompts, heard, strict=True)]
    )
    count = torch.tensor([float(len(s.text.split())) for s in prompts])
    rate = float(wrong.sum() / count.sum())
    error = float((wrong - rate * count).std() / count.mean() / len(count) ** 0.5)
    marks = torch.tensor([float(dnsmos.run(np.resize(x, 160000), sr=16000)["ovrl_mos"]) for x in wide[: args.rated]])
    return {"wer": [rate, error], "dnsmos": mean_and_error(marks), "heard": heard[:3]}


def language_model(texts: Sequence[str], path: Path, discount: float = 0.5) -> Path:
    """Bigrams of the known prompts' words, with absolute discounting, as an ARPA file: what the recogniser expects."""
    singles: Counter[str] = Counter()
    pairs: Counter[tuple[str, str]] = Counter()
    for text in texts:
        line = ["<s>", *text.split(), "</s>"]
        singles.update(line)
        pairs.update(itertools.pairwise(line))
    followers, total = Counter(a for a, _ in pairs), singles.total() - singles["<s>"]
    back = {a: discount * followers[a] / n for a, n in singles.items()}
    once = {b: -99.0 if b == "<s>" else np.log10(n / total) for b, n in singles.items()}
    lines = ["\\data\\", f"ngram 1={len(singles)}", f"ngram 2={len(pairs)}", "", "\\1-grams:"]
    lines += [f"{p:.4f} {b}" + (f" {np.log10(back[b]):.4f}" if back[b] else "") for b, p in once.items()] + [
        "",
        "\\2-grams:",
    ]
    for (a, b), n in pairs.items():
        lines.append(f"{np.log10((n - discount) / singles[a] + back[a] * 10 ** once[b]):.4f} {a} {b}")
    path.write_text("\n".join([*lines, "", "\\end\\", ""]))
    return path


def recognised(decoder: Any, x: np.ndarray) -> str:
    padded = np.pad(x, 3200)
    decoder.start_utt()
    decoder.process_raw((padded * 32767).astype(np.int16).tobytes(), full_utt=True)
    decoder.end_utt()
    return decoder.hyp().hypstr if decoder.hyp() else ""


# --- what is written -------------------------------------------------------------------------------------------------


def write(voices: Mapping[str, Sequence[np.ndarray]], prompts: Sequence[Spoken], folder: Path) -> None:
    """Three prompts of each voice, as 16-bit WAV files."""
    folder.mkdir(parents=True, exist_ok=True)
    for voice, sounds in voices.items():
        for i, x in enumerate(sounds[:3]):
            name = f"{voice} {prompts[i].text[:30]}.wav".replace(" ", "_").replace("=", "")
            wavfile.write(folder / name, RATE, (x * 32767).astype(np.int16))


def report(results: Mapping[str, Any]) -> str:
    """The page."""
    sizes, rows = results["parameters"], results["rows"]
    lines = [[r["voice"], cell(r["wer"], 1, factor=100), cell(r["dnsmos"]), r["heard"][0]] for r in rows]
    rate = {r["voice"]: 100 * r["wer"][0] for r in rows}
    gap = rate["N = 50"] - rate["vocoded-real"]
    return f"""# Speech

{place(results)}

{results["prompts"]} spoken prompts of one voice to learn from, {results["minutes"]:.1f} minutes, {MELS} mels at
{RATE} Hz; an encoder of phones, {sizes["encoder"]:,} parameters, {results["encoder_steps"]} steps of 16 prompts; a
1-D U-Net of mel - mu, {sizes["denoiser"]:,} parameters, {results["train_steps"]} steps of 16 crops of {CROP}
frames. Each row:
{results["measured"]} of {results["held_out"]} prompts that were held out, by DPM-Solver++ (2M) with N steps from
N(mu, I / temperature), temperature {results["temperature"]:g}, mu and its length being of the text alone.

Word errors in % of words, as pocketsphinx hears them (at 16 kHz, with bigrams of the known prompts' words), with the
standard error over prompts; DNSMOS P.835 overall, of {results["rated"]} of them. "vocoded-real" is Griffin-Lim of the
real spectrogram, the ceiling; "mu alone" what the diffusion starts from; "mean spectrum" the floor.

{chr(10).join(table(["voice", "word errors, %", "DNSMOS", "heard of the first"], lines))}

The first prompt is "{results["shown"][0]}". Target: N = 50 within 15 points of vocoded-real; it is {gap:+.1f} points
away.

![Log-mel spectrograms of a held-out prompt](speech.png)
"""


def draw(spectra: Mapping[str, Sequence[Tensor]], prompts: Sequence[Spoken], path: Path) -> None:
    """The first prompt's log-mels."""
    with picture(path, 11, 6.5) as figure:
        for axis, (voice, mels) in zip(figure.subplots(2, 3).flat, spectra.items(), strict=False):
            extent = (0, mels[0].shape[1] * HOP / RATE, 0, MELS)
            axis.imshow(mels[0], origin="lower", aspect="auto", vmin=-2.5, vmax=2.5, extent=extent)
            axis.set(title=voice, xlabel="s", ylabel="mel")
        figure.suptitle(f'"{prompts[0].text}"')


if __name__ == "__main__":
    main()
