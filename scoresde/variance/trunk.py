"""Networks with two outputs, and a denoiser beside its head: a prediction N and a head's output h for one noisy x_t.

    TrunkWithHead    f = features(x_t, time),    N = readout(f),    h = conv(silu(norm(g))),    g = f or block(f, time)
    SplitOutput      (N, h) = net(x_t, time), the halves of its channels
    a head alone     N = net(x_t, time),    h = head(x_t, time)

In the first two one evaluation gives both. `Pair` is the one way in which denoisers (`scoresde.variance.heads`,
`scoresde.variance.learned_range`) and losses ask for the two, and N makes the mean and the noise prediction

    D = r x_t + s N,    eps_hat = u x_t + w N.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde.denoiser import Denoiser, NetworkDenoiser, X0Denoiser, check_denoiser
from scoresde.nn.blocks import ResidualBlock, conv, group_norm, shuffle, zero
from scoresde.nn.embedding import TimeEmbedding
from scoresde.nn.unet import UNet
from scoresde.tensors import Time
from scoresde.views import combine, view_of_mean

__all__ = ["Head", "Pair", "SplitOutput", "TrunkWithHead"]

Head = Callable[..., Tensor] | NetworkDenoiser
"""head(x, time, **cond), of the shape of x; or an adapter around one, with a time label of its own."""


class TrunkWithHead(nn.Module):
    """A U-Net with a further output on its last feature map: GroupNorm, SiLU and a 3 x 3 convolution that starts at
    zero. As a network it returns what the U-Net does, to the last bit; `both` returns the head's output too.

    Args:
        net: the trained `UNet`, or another module with `features(x, time, **cond)`, a feature map of the images' size
            (or a `patch` of it, and then the head's output is shuffled as the U-Net's is), `readout(features)`, and
            the layers `outward` and, for block=True, `time`. It is held, not copied.
        channels: of the head's output, by default those of the image.
        block: put a residual block that knows the time before the head.
        freeze: the U-Net's weights take no gradients any more, and it stays in eval mode (no dropout) while the head
            is trained. False to train both together, as for `hybrid_loss`.

    Raises:
        TypeError: if net has not what is needed.
        ValueError: if it has frames apart (`time_attention`), and patches.
    """

    def __init__(self, net: UNet, channels: int | None = None, *, block: bool = False, freeze: bool = True) -> None:
        super().__init__()
        needed = ["features", "readout", "outward", *(["time"] if block else [])]
        if lacking := [name for name in needed if not hasattr(net, name)]:
            raise TypeError(
                f"{type(net).__name__} has no {', '.join(lacking)}: a head on its features needs a UNet; for other "
                "networks pass a head that is a network of its own"
            )
        self.net, self.frozen = net, freeze
        width, self.patch, dims = net.outward.in_channels, getattr(net, "patch", 1), getattr(net, "dims", 2)
        if self.patch > 1 and getattr(net, "frames_apart", False):
            raise ValueError(f"a U-Net of clips with patch={self.patch}: a head on its features needs patch=1")
        self.block = ResidualBlock(width, width, net.time.outward.out_features, 0.0, dims=dims) if block else None
        self.norm = group_norm(width)
        outputs = net.outward.out_channels if channels is None else channels * self.patch**dims
        self.outward = zero(conv(dims, width, outputs, 3))
        self.to(next(net.parameters()))
        if freeze:
            net.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> TrunkWithHead:
        super().train(mode)
        if self.frozen:
            self.net.eval()
        return self

    def forward(self, x: Tensor, time: Tensor, **cond: Any) -> Tensor:
        """What the U-Net returns."""
        out: Tensor = self.net(x, time, **cond)
        return out

    def both(self, x: Tensor, time: Tensor, **cond: Any) -> tuple[Tensor, Tensor]:
        """What the U-Net returns, and the head's output, from one evaluation of the U-Net."""
        h = self.net.features(x, time, **cond)
        g = h
        if self.block is not None:
            known = [cond.get("label"), cond.get("vector")]
            if isinstance(self.net.time, TimeEmbedding):
                known.append(self.net.time.tokens(time, cond.get("context"), cond.get("context_mask")))
            g = self.block(h, self.net.time(time, *known))
        return self.net.readout(h), shuffle(self.outward(F.silu(self.norm(g))), self.patch)


class SplitOutput(nn.Module):
    """A network whose output has twice the channels of x, (B, 2 C, ...), the prediction first, then the head's: the
    networks of improved DDPM and of guided diffusion.

    Args:
        net: the module; held, not copied.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, time: Tensor, **cond: Any) -> Tensor:
        """The first half."""
        return self.both(x, time, **cond)[0]

    def both(self, x: Tensor, time: Tensor, **cond: Any) -> tuple[Tensor, Tensor]:
        """The two halves.

        Raises:
            ValueError: if the network's output has not twice the channels of x.
        """
        out = self.net(x, time, **cond)
        if out.shape != (len(x), 2 * x.shape[1], *x.shape[2:]):
            raise ValueError(
                f"the network returned {tuple(out.shape)} for x of shape {tuple(x.shape)}: expected twice the channels"
            )
        first, second = out.chunk(2, dim=1)
        return first, second


class _Tap(nn.Module):
    """A network of two outputs that returns the first and keeps the second. One is made for each call, so that threads
    share nothing; it is a module since a denoiser reads the network's dtype from its parameters.
    """

    side: Tensor | None = None

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, time: Tensor, **cond: Any) -> Tensor:
        out, self.side = self.net.both(x, time, **cond)  # type: ignore[operator]
        return out


class Pair(NamedTuple):
    """A denoiser, and the head beside it: a network of its own, or None for the second output of the denoiser's."""

    denoiser: Denoiser
    head: Head | None

    @classmethod
    def of(cls, denoiser: Denoiser, head: Head | None) -> Pair:
        """The two, when they fit.

        Raises:
            TypeError: if denoiser is none, head is no network, or there is no head.
            ValueError: if they are of two SDEs.
        """
        check_denoiser(denoiser)
        if head is not None and not callable(head):
            raise TypeError(f"head is {type(head).__name__}: expected a callable head(x, time, **cond)")
        if isinstance(head, Denoiser):
            if not isinstance(head, NetworkDenoiser):
                raise TypeError(f"head is {type(head).__name__}: expected a network, or an adapter around one")
            if head.sde != denoiser.sde:
                raise ValueError(f"the head was made for {head.sde!r}, the denoiser for {denoiser.sde!r}")
        if head is None and not (isinstance(denoiser, NetworkDenoiser) and hasattr(denoiser.net, "both")):
            raise TypeError(
                f"no head given, and {denoiser!r} has none: pass head=, or a denoiser around TrunkWithHead(unet) or "
                "SplitOutput(net)"
            )
        return cls(denoiser, head)

    def both(self, x: Tensor, t: Time, cond: Mapping[str, Any], *, fixed: bool = False) -> tuple[Tensor, Tensor]:
        """N and h, in the dtype of x; fixed: no graph leads to N.

        Raises:
            ValueError: if h has not the shape of x.
        """
        if self.head is not None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not fixed):
                N = self.denoiser.output(x, t, **cond)
            return N, self.second(x, t, cond)
        assert isinstance(self.denoiser, NetworkDenoiser)
        assert isinstance(self.denoiser.net, nn.Module)
        tap = _Tap(self.denoiser.net)
        N = self.denoiser.with_net(tap).output(x, t, **cond)
        if tap.side is None or tap.side.shape != x.shape:
            found = None if tap.side is None else tuple(tap.side.shape)
            raise ValueError(f"the head returned {found} for x of shape {tuple(x.shape)}: expected that shape")
        return N.detach() if fixed else N, tap.side.to(x.dtype)

    def second(self, x: Tensor, t: Time, cond: Mapping[str, Any]) -> Tensor:
        """h, where N is not wanted: a head of its own is all that is called. It sees x and the time label as the
        denoiser's network does.
        """
        if self.head is None:
            return self.both(x, t, cond, fixed=True)[1]
        if isinstance(self.head, NetworkDenoiser):
            return self.head.output(x, t, **cond)
        denoiser = self.denoiser
        while isinstance(inner := getattr(denoiser, "denoiser", None), Denoiser):
            denoiser = inner
        if isinstance(denoiser, NetworkDenoiser):
            return denoiser.with_net(self.head).output(x, t, **cond)
        return X0Denoiser(self.head, denoiser.sde).output(x, t, **cond)

    def eps(self, x: Tensor, t: Tensor, N: Tensor) -> Tensor:
        """eps_hat = u x + w N, for t > 0."""
        u, w = self.denoiser.view_of_output(*view_of_mean("eps", self.denoiser.sde, t), t)
        return combine(u, x, w, N)
