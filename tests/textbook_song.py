"""The networks of EDM and score_sde as functions of a dictionary of tensors by their own names, from the papers'
formulas (Song et al., 2021, appendix H; Karras et al., 2022, table 7): what `SongUNet` is held against and, since the
dictionary makes what it is asked for, what the stand-in files are written of.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class Made(dict[str, Tensor]):
    """Tensors by name, drawn when they are first asked for, in that order."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, name: str, *shape: int, scale: float = 0.2, mean: float = 0.0) -> Tensor:
        if name not in self:
            fan = math.prod(shape[1:]) if len(shape) > 1 else 1
            self[name] = mean + torch.randn(shape, generator=self.generator) * (
                0.8 * fan**-0.5 if len(shape) > 1 else scale
            )
        assert self[name].shape == shape, name
        return self[name].double()


def dense(p: Made, name: str, x: Tensor, n: int, bias: bool = True) -> Tensor:
    w = p(f"{name}.weight", n, x.shape[1])
    return F.linear(x, w, p(f"{name}.bias", n) if bias else None)


def conv(p: Made, name: str, x: Tensor, n: int, k: int = 3, **options: Any) -> Tensor:
    w = p(f"{name}.weight", n, x.shape[1], k, k)
    return F.conv2d(x, w, p(f"{name}.bias", n), **{"padding": k // 2, **options})


def nin(p: Made, name: str, x: Tensor, n: int) -> Tensor:
    """One tap, its matrix transposed."""
    return torch.einsum("bchw,cn->bnhw", x, p(f"{name}.W", x.shape[1], n)) + p(f"{name}.b", n)[:, None, None]


def norm(p: Made, name: str, x: Tensor, eps: float = 1e-6) -> Tensor:
    C = x.shape[1]
    return F.group_norm(x, min(32, C // 4), p(f"{name}.weight", C, mean=1.0), p(f"{name}.bias", C), eps)


def resampled(x: Tensor, taps: list[int], way: str | None, before: int | None = None) -> Tensor:
    """Zeros between the entries (up) and around them, then the filter, then every second entry (down): one axis after
    the other, tap by tap.
    """
    if way is None:
        return x
    f = torch.tensor(taps, dtype=x.dtype) / sum(taps)
    L = len(taps)
    for axis in (2, 3):
        x = x.movedim(axis, -1)
        if way == "up":
            x = 2 * torch.stack([x, torch.zeros_like(x)], dim=-1).flatten(-2)
            low, n = L - 1 - (L - 1) // 2, x.shape[-1]
        else:
            low = (L - 1) // 2 if before is None else before
            n = x.shape[-1] if before is None else x.shape[-1] + 2 * before - L + 1
        x = F.pad(x, (low, L))
        x = sum(f[k] * x[..., k : k + n] for k in range(L))
        if way == "down" and before is None:
            x = x[..., ::2]
        x = x.movedim(-1, axis)
    return x


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All (B, heads, d, N)."""
    return v @ (q.transpose(-1, -2) @ k / math.sqrt(q.shape[2])).softmax(-1).transpose(-1, -2)


def sinusoids(c: Tensor, pairs: int, longest: int) -> tuple[Tensor, Tensor]:
    angles = c[:, None] * (1e-4 ** (torch.arange(pairs, dtype=torch.float32) / longest)).double()
    return angles.sin(), angles.cos()


# ---- EDM ----


def edm(
    p: Made, o: dict[str, Any], x: Tensor, c: Tensor, onehot: Tensor | None = None, augment: Tensor | None = None
) -> Tensor:
    """SongUNet or, where o has no embedding_type, DhariwalUNet."""
    song, nf = "embedding_type" in o, o["model_channels"]
    size, taps, s, eps = o["img_resolution"], o.get("resample_filter", [1, 1]), math.sqrt(0.5), 1e-6
    if not song:
        s, eps = 1.0, 1e-5
    entrance, exit, width = o.get("encoder_type"), o.get("decoder_type"), nf * o.get("channel_mult_noise", 1)
    if o.get("embedding_type") == "fourier":
        angles = c[:, None] * (2 * math.pi * p("map_noise.freqs", width // 2, scale=16.0).float()).double()
        sin, cos = angles.sin(), angles.cos()
    else:
        sin, cos = sinusoids(c, width // 2, width // 2 - song)
    e = torch.cat([sin, cos] if song else [cos, sin], dim=1)
    K = o["label_dim"]
    if K and song:
        e = e + dense(p, "map_label", (torch.zeros(1, K).double() if onehot is None else onehot) * math.sqrt(K), width)
    if o["augment_dim"]:
        told = dense(
            p, "map_augment", torch.zeros(1, o["augment_dim"]).double() if augment is None else augment, width, False
        )
        e = e + told
    e = dense(p, "map_layer1", F.silu(dense(p, "map_layer0", e, 4 * nf)), 4 * nf)
    if K and not song:
        e = e + dense(p, "map_label", torch.zeros(1, K).double() if onehot is None else onehot, 4 * nf, False)
    e = F.silu(e)

    def block(n: str, h: Tensor, w: int, way: str | None = None, attend: bool = False) -> Tensor:
        if way is not None:
            outer = torch.outer(torch.tensor(taps).float(), torch.tensor(taps).float()) / sum(taps) ** 2
            p[f"{n}.conv0.resample_filter"] = outer[None, None]
        y = conv(p, f"{n}.conv0", resampled(F.silu(norm(p, f"{n}.norm0", h, eps)), taps, way), w)
        a = dense(p, f"{n}.affine", e, w if song else 2 * w)[:, :, None, None]
        if song:
            y = F.silu(norm(p, f"{n}.norm1", y + a, eps))
        else:
            y = F.silu(norm(p, f"{n}.norm1", y, eps) * (1 + a[:, :w]) + a[:, w:])
        y = conv(p, f"{n}.conv1", y, w)
        h0 = resampled(h, taps, way)
        h = s * (y + (conv(p, f"{n}.skip", h0, w, 1) if h.shape[1] != w or (song and way) else h0))
        if attend:
            heads = 1 if song else w // 64
            qkv = conv(p, f"{n}.qkv", norm(p, f"{n}.norm2", h, eps), 3 * w, 1)
            q, k, v = qkv.reshape(len(h), heads, w // heads, 3, -1).unbind(3)  # q, k and v alternate
            h = s * (h + conv(p, f"{n}.proj", attended(q, k, v).reshape(h.shape), w, 1))
        return h

    widths, N, R = [nf * m for m in o["channel_mult"]], o["num_blocks"], o["attn_resolutions"]
    h = conv(p, f"enc.{size}x{size}_conv", x, nf if song else widths[0])
    skips, aux = [h], x
    for level, w in enumerate(widths):
        at = f"enc.{size >> level}x{size >> level}"
        if level:
            h = block(f"{at}_down", h, h.shape[1], "down")
            if entrance == "skip":
                aux = resampled(aux, taps, "down")
                h = h + conv(p, f"{at}_aux_skip", aux, h.shape[1], 1)
            elif entrance == "residual":
                smooth = resampled(aux, taps, "down", before=1 + (len(taps) - 1) // 2)
                h = aux = (h + conv(p, f"{at}_aux_residual", smooth, h.shape[1], stride=2, padding=0)) / math.sqrt(2)
            skips.append(h)
        for i in range(N):
            h = block(f"{at}_block{i}", h, w, attend=size >> level in R)
            skips.append(h)
    image: Tensor | None = None
    for level, w in reversed(list(enumerate(widths))):
        at = f"dec.{size >> level}x{size >> level}"
        if level == len(widths) - 1:
            h = block(f"{at}_in1", block(f"{at}_in0", h, h.shape[1], attend=True), h.shape[1])
        else:
            h = block(f"{at}_up", h, h.shape[1], "up")
        for i in range(N + 1):
            attend = size >> level in R and (not song or i == N)
            h = block(f"{at}_block{i}", torch.cat([h, skips.pop()], 1), w, attend=attend)
        if song and (exit == "skip" or level == 0):
            here = conv(p, f"{at}_aux_conv", F.silu(norm(p, f"{at}_aux_norm", h)), o["out_channels"])
            image = here if image is None else here + resampled(image, taps, "up")
    return conv(p, "out_conv", F.silu(norm(p, "out_norm", h, eps)), o["out_channels"]) if image is None else image


# ---- EDM2 ----


def unit(x: Tensor, axes: list[int]) -> Tensor:
    return x / (1e-4 + x.square().mean(axes, keepdim=True).sqrt())


def layer(p: Made, name: str, x: Tensor, n: int, k: int = 0, gain: Tensor | float = 1.0) -> Tensor:
    w = p(f"{name}.weight", n, x.shape[1], *([k, k] if k else []))
    w = gain * unit(w, list(range(1, w.ndim))) / math.sqrt(w[0].numel())
    return F.conv2d(x, w, padding=k // 2) if k else x @ w.T


def edm2(p: Made, o: dict[str, Any], x: Tensor, c: Tensor, onehot: Tensor | None = None) -> Tensor:
    nf, size, taps, clip = o["model_channels"], o["img_resolution"], o["resample_filter"], o["clip_act"]
    widths, N, R, K = [nf * m for m in o["channel_mult"]], o["num_blocks"], o["attn_resolutions"], o["label_dim"]
    angles = c[:, None] * p("emb_fourier.freqs", widths[0], scale=6.0) + p("emb_fourier.phases", widths[0], scale=3.0)
    e = layer(p, "emb_noise", math.sqrt(2) * angles.cos(), max(widths))
    if K:
        onehot = torch.zeros(len(x), K).double() if onehot is None else onehot
        e = (e + layer(p, "emb_label", math.sqrt(K) * onehot, max(widths))) / math.sqrt(2)
    e = F.silu(e) / 0.596

    def block(n: str, x: Tensor, w: int, way: str | None = None, attend: bool = False) -> Tensor:
        x = resampled(x, taps, way)
        skip = (lambda h: layer(p, f"{n}.conv_skip", h, w, 1)) if x.shape[1] != w else lambda h: h
        if n.startswith("enc"):
            x = unit(skip(x), [1])
        scale = 1 + layer(p, f"{n}.emb_linear", e, w, gain=p(f"{n}.emb_gain", scale=0.5))[:, :, None, None]
        y = scale * layer(p, f"{n}.conv_res0", F.silu(x) / 0.596, w, 3)
        y = layer(p, f"{n}.conv_res1", F.silu(y) / 0.596, w, 3)
        if n.startswith("dec"):
            x = skip(x)
        x = (0.7 * x + 0.3 * y) / math.sqrt(0.58)
        if attend:
            d = o["channels_per_head"]
            parts = layer(p, f"{n}.attn_qkv", x, 3 * w, 1).reshape(len(x), w // d, d, 3, -1)
            y = attended(*unit(parts, [2]).unbind(3)).reshape(x.shape)
            x = (0.7 * x + 0.3 * layer(p, f"{n}.attn_proj", y, w, 1)) / math.sqrt(0.58)
        return x.clamp(-clip, clip)

    h = layer(p, f"enc.{size}x{size}_conv", torch.cat([x, torch.ones_like(x[:, :1])], 1), widths[0], 3)
    skips = [h]
    for level, w in enumerate(widths):
        at = f"enc.{size >> level}x{size >> level}"
        if level:
            h = block(f"{at}_down", h, h.shape[1], "down")
            skips.append(h)
        for i in range(N):
            h = block(f"{at}_block{i}", h, w, attend=size >> level in R)
            skips.append(h)
    for level, w in reversed(list(enumerate(widths))):
        at = f"dec.{size >> level}x{size >> level}"
        if level == len(widths) - 1:
            h = block(f"{at}_in1", block(f"{at}_in0", h, w, attend=True), w)
        else:
            h = block(f"{at}_up", h, h.shape[1], "up")
        for i in range(N + 1):
            across = skips.pop()
            a, b = h.shape[1], across.shape[1]
            both = math.sqrt((a + b) / 2) * torch.cat([h / math.sqrt(a), across / math.sqrt(b)], 1)
            h = block(f"{at}_block{i}", both, w, attend=size >> level in R)
    return layer(p, "out_conv", h, o["img_channels"], 3, gain=p("out_gain", scale=1.0, mean=1.0))


# ---- score_sde ----


def score_sde(p: Made, o: dict[str, Any], x: Tensor, c: Tensor) -> Tensor:
    """ncsnpp or ddpm: what it makes of x in [-1, 1] before it is divided by sigma. c is what the features are of."""
    counted = iter(range(10_000))
    nf, ddpm = o["nf"], o["name"] == "ddpm"
    s, taps = math.sqrt(0.5) if o["skip_rescale"] else 1.0, list(o["fir_kernel"]) if o["fir"] else [1, 1]

    def here() -> str:
        return f"all_modules.{next(counted)}"

    if o["embedding_type"] == "fourier":
        angles = c[:, None] * (2 * math.pi * p(f"{here()}.W", nf, scale=16.0).float()).double()
        e = torch.cat([angles.sin(), angles.cos()], dim=1)
    else:
        e = torch.cat(sinusoids(c, nf // 2, nf // 2 - 1), dim=1)
    e = F.silu(dense(p, here(), e, 4 * nf))
    e = dense(p, here(), e, 4 * nf)

    def block(h: Tensor, w: int, way: str | None = None) -> Tensor:
        n = here()
        if ddpm and way == "down":
            return conv(p, f"{n}.Conv_0", F.pad(h, (0, 1, 0, 1)), w, stride=2, padding=0)
        if ddpm and way == "up":
            return conv(p, f"{n}.Conv_0", resampled(h, [1, 1], "up"), w)
        y = conv(p, f"{n}.Conv_0", resampled(F.silu(norm(p, f"{n}.GroupNorm_0", h)), taps, way), w)
        y = y + dense(p, f"{n}.Dense_0", F.silu(e), w)[:, :, None, None]
        y = conv(p, f"{n}.Conv_1", F.silu(norm(p, f"{n}.GroupNorm_1", y)), w)
        h = resampled(h, taps, way)
        if h.shape[1] != w or way:
            h = nin(p, f"{n}.NIN_0", h, w) if ddpm else conv(p, f"{n}.Conv_2", h, w, 1)
        return s * (h + y)

    def attention(h: Tensor) -> Tensor:
        n, C = here(), h.shape[1]
        g = norm(p, f"{n}.GroupNorm_0", h)
        q, k, v = (nin(p, f"{n}.NIN_{i}", g, C).flatten(2)[:, None] for i in range(3))
        return s * (h + nin(p, f"{n}.NIN_3", attended(q, k, v).reshape(h.shape), C))

    widths, N, R = [nf * m for m in o["ch_mult"]], o["num_res_blocks"], o["attn_resolutions"]
    h = conv(p, here(), x, nf)
    skips, pyramid = [h], x
    for level, w in enumerate(widths):
        for _ in range(N):
            h = block(h, w)
            h = attention(h) if h.shape[-1] in R else h
            skips.append(h)
        if level < len(widths) - 1:
            h = block(h, w, "down")
            if o["progressive_input"] == "input_skip":
                pyramid = resampled(pyramid, taps, "down")
                h = h + conv(p, f"{here()}.Conv_0", pyramid, w, 1)
            elif o["progressive_input"] == "residual":
                smooth = resampled(pyramid, taps, "down", before=2)
                h = pyramid = s * (h + conv(p, f"{here()}.Conv2d_0", smooth, w, stride=2, padding=0))
            skips.append(h)
    h = block(attention(block(h, w)), w)
    image: Tensor | None = None
    for level, w in reversed(list(enumerate(widths))):
        for _ in range(N + 1):
            h = block(torch.cat([h, skips.pop()], 1), w)
        h = attention(h) if h.shape[-1] in R else h
        if o["progressive"] == "output_skip" or level == 0:
            g = F.silu(norm(p, here(), h))
            read = conv(p, here(), g, o["num_channels"])
            image = read if image is None else read + resampled(image, taps, "up")
        if level:
            h = block(h, w, "up")
    assert image is not None
    return image


def in_order(p: Made) -> Iterator[tuple[str, Tensor]]:
    """As a state_dict has them: by module, in the order of first use, weights before biases."""
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in p))
    for module in modules:
        yield from ((name, tensor) for name, tensor in p.items() if name.rpartition(".")[0] == module)
