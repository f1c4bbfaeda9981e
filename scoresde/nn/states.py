"""Networks of time: what is known before a step of the steps before it, as a state that the step's network is told.

    h_k = state(u_1, ..., u_k),    p(x_k | x_<k) by a diffusion that is told h_k        u_k = (x_{k-1}, c_k)

(TimeGrad: Rasul et al., 2021, "Autoregressive denoising diffusion models for multivariate probabilistic time series
forecasting", eq. 6 and section 3.) A network of states is called as

    states, memory = state(inputs, memory)        inputs (B, L, c), states (B, L, H)

with the memory that it returned before, or None at the beginning, a tensor (B, ...): inputs in pieces give the states
of the whole, to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde.checks import ArgumentError, check_count
from scoresde.networks import first_parameter

__all__ = ["CausalTransformer", "Recurrent", "Stepwise"]


class Recurrent(nn.Module):
    """States by gated recurrent units (Cho et al., 2014), `torch.nn.GRU`.

    Args:
        inputs: c, numbers in what it sees at a step: d and those of the covariates.
        width: H, numbers of a state.
        depth: layers.

    >>> state = Recurrent(3, width=8)
    >>> inputs = torch.randn(4, 10, 3)
    >>> whole, _ = state(inputs)
    >>> first, memory = state(inputs[:, :6])
    >>> torch.allclose(state(inputs[:, 6:], memory)[0], whole[:, 6:], atol=1e-6)
    True
    """

    def __init__(self, inputs: int, width: int = 64, depth: int = 1) -> None:
        super().__init__()
        check_count(inputs=inputs, width=width, depth=depth)
        self.inputs, self.width = inputs, width
        self.gru = nn.GRU(inputs, width, depth, batch_first=True)

    def forward(self, inputs: Tensor, memory: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """inputs (B, L, c) and memory (B, depth, H) to states (B, L, H) and memory."""
        states, last = self.gru(inputs, None if memory is None else memory.movedim(1, 0).contiguous())
        return states, last.movedim(1, 0)


class CausalTransformer(nn.Module):
    """States by a transformer in which a step attends to itself and to the reach - 1 steps before it, in each layer, so
    that a state is of depth (reach - 1) + 1 inputs. Weights of attention know how far back they look: a learned number
    for each head and distance is added to them. Its memory are the inputs that states to come depend on.

    Args:
        inputs: c, numbers in what it sees at a step.
        width: H, numbers of a state, a multiple of heads.
        depth: layers.
        heads: of attention.
        reach: steps that a layer sees.

    Raises:
        ValueError: if width is no multiple of heads.
    """

    def __init__(self, inputs: int, width: int = 64, depth: int = 2, heads: int = 4, reach: int = 24) -> None:
        super().__init__()
        check_count(inputs=inputs, width=width, depth=depth, heads=heads, reach=reach)
        if width % heads:
            raise ArgumentError(f"width={width}: expected a multiple of heads={heads}")
        self.inputs, self.width, self.heads, self.reach = inputs, width, heads, reach
        self.inward = nn.Linear(inputs, width)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(width),
                    "qkv": nn.Linear(width, 3 * width),
                    "out": nn.Linear(width, width),
                    "mlp": nn.Sequential(
                        nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)
                    ),
                }
            )
            for _ in range(depth)
        )
        self.nearness = nn.Parameter(torch.zeros(depth, heads, reach))
        self.norm = nn.LayerNorm(width)

    def forward(self, inputs: Tensor, memory: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """inputs (B, L, c) and memory (B, M, c) to states (B, L, H) and memory."""
        seen = inputs if memory is None else torch.cat([memory, inputs], 1)
        B, S, _ = seen.shape
        back = torch.arange(S, device=seen.device)
        back = back[:, None] - back  # how far back the key is of the query
        hidden = (back < 0) | (back >= self.reach)
        h = self.inward(seen)
        for layer, nearness in zip(self.layers, self.nearness, strict=True):
            assert isinstance(layer, nn.ModuleDict)
            bias = nearness[:, back.clamp(0, self.reach - 1)].masked_fill(hidden, -torch.inf)
            q, k, v = layer["qkv"](layer["norm"](h)).view(B, S, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None].to(q.dtype))
            h = h + layer["out"](mixed.mT.reshape(B, self.heads, -1, S).flatten(1, 2).mT)
            h = h + layer["mlp"](h)
        kept = len(self.layers) * (self.reach - 1)
        return self.norm(h)[:, S - inputs.shape[1] :], seen[:, max(0, S - kept) :]


class Stepwise(nn.Module):
    """net(x, time, past=...) of one step x (B, d): a network that is told, by its keyword `key`, the state after the
    steps before x. The network of states is trained along, averaged, saved and resumed with it.

    Unlike `Encoding`'s raw conditions, a past of zeros is one: a series may well be zero.

    Args:
        net: net(x, time, **cond), an `MLP(d, vector=H)` say.
        state: a network of states, `Recurrent`, `CausalTransformer` or your own.
        key: the keyword of the network that the state is.
        scaled: values are divided by the mean absolute value of the context, series by series, wherever the network is
            trained or rolled out: one model for series of any size. Without, give data of about unit size. It is kept
            with the weights, and those that are loaded bring theirs.

    >>> from scoresde.nn import MLP
    >>> net = Stepwise(MLP(2, width=8, vector=16), Recurrent(2, width=16))
    >>> x, time, past = torch.randn(4, 2), torch.ones(4), torch.randn(4, 10, 2)
    >>> net.encode(past=past)["vector"].shape, net.encode(window=past)["vector"].shape
    (torch.Size([4, 16]), torch.Size([4, 10, 16]))
    >>> torch.equal(net(x, time, past=past), net(x, time, **net.encode(past=past)))
    True
    """

    def __init__(self, net: nn.Module, state: nn.Module, *, key: str = "vector", scaled: bool = True) -> None:
        super().__init__()
        self.net, self.encoders, self.key = net, nn.ModuleDict({"past": state}), key
        self.scaled = scaled
        self.register_buffer("kept_scaled", torch.tensor(float(scaled)))  # which, read at each step, would stall a GPU

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.kept_scaled.is_meta:
            self.scaled = bool(self.kept_scaled)

    @property
    def state(self) -> nn.Module:
        """The network of states."""
        return self.encoders["past"]

    @property
    def condition_sizes(self) -> dict[str, int]:
        """What it can be told: a past, and what the network can."""
        return {"past": 1, **getattr(self.net, "condition_sizes", {})}

    def forward(self, x: Tensor, time: Tensor, **cond: Any) -> Tensor:
        """x (B, ...) and time (B,) to the shape of x, told a past (B, L, c), or a state."""
        out: Tensor = self.net(x, time, **self._encoded(cond))
        return out

    def encode(self, **cond: Any) -> dict[str, Any]:
        """The conditions with states in place of inputs: of `past`, (B, L, c), the last one, (B, H); of `window`, for a
        loss of many steps, all of them, (B, L, H).

        Raises:
            ValueError: if two of them are given, or inputs of another shape.
        """
        return self._encoded(cond)

    def _encoded(self, cond: dict[str, Any]) -> dict[str, Any]:
        given = [name for name in ("past", "window", self.key) if cond.get(name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given, of which each says the state: give one")
        found = {name: value for name, value in cond.items() if name not in ("past", "window")}
        if given and given[0] != self.key:
            inputs = cond[given[0]]
            if inputs.ndim != 3:
                raise ValueError(f"{given[0]}= of shape {tuple(inputs.shape)}: expected inputs (B, L, c)")
            at = first_parameter(self.state)
            states, _ = self.state(inputs if at is None else inputs.to(at.dtype))
            found[self.key] = states if given[0] == "window" else states[:, -1]
        return found
