"""Conditions of any structure: whatever is done to a batch, a network that is told a structure gives what one does that
is told the same in one tensor."""

from collections import UserDict
from types import SimpleNamespace

import pytest
import torch
from common import every_pair, normal

from scoresde import VPSDE, EpsDenoiser, sample
from scoresde.data import dropped
from scoresde.diagnose import diagnose
from scoresde.editing import edit, interpolation, interpolation_grid, variations
from scoresde.entries import check_cond, entries_of, joined
from scoresde.guidance import Autoguidance, ClassifierFree, Conditioned, MomentMatching, Potential, Product, TwistedSMC
from scoresde.guidance.operators import Mask
from scoresde.likelihood import bits_per_dim, elbo, log_prob
from scoresde.solvers import DDIM, DDPM, UniPC
from scoresde.training import TrainConfig, Trainer, dsm_loss
from scoresde.variance import estimate, measure_errors

B, SDE = 4, VPSDE()
SHIFT = torch.tensor([0.25, -0.5, 1.0, 0.125], dtype=torch.float64)  # dyadic, so that their sums are exact


class Net(torch.nn.Module):
    """Told a shift, by a tensor or in parts of a structure; it remembers how many samples it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        self.batches: list[int] = []

    def forward(self, x, time, told=None):
        self.batches.append(len(x))
        parts = [] if told is None else shifts(told)
        assert all(part.shape in ((), (1,), (len(x),)) for part in parts), "not as many entries as samples"
        shift = sum((part.to(x) for part in parts), torch.zeros(len(x)).to(x))
        return torch.sin(self.weight * x + time.to(x)[:, None] + shift[:, None]) + x


def shifts(told):
    if isinstance(told, torch.Tensor):
        return [told.reshape(len(told), -1).sum(1) if told.ndim else told]
    if isinstance(told, (list, tuple)) and all(isinstance(text, str) for text in told):
        return [torch.tensor([float(text or 0) for text in told])]
    if isinstance(told, dict):
        return [part for value in told.values() for part in shifts(value)]
    if isinstance(told, (list, tuple)):
        return [part for value in told for part in shifts(value)]
    return []  # a number, a name


def structures(shift):
    """The same told in other ways."""
    texts = [str(float(part)) for part in shift]
    half = shift / 2
    return {
        "strings": texts,
        "tuple of strings": tuple(texts),
        "two encoders": (half[:, None], [half]),
        "nested": {"tokens": {"a": half / 2, "b": [half / 2, {"one": torch.zeros(1), "of all": 0.0}]},
                   "prompts": [[str(float(part)) for part in half], ["0"]], "size": (8, 8, 8), "mode": "s", "no": None},
    }  # fmt: skip


X, DATA = normal(B, 3), normal(B, 3, seed=1)
IMAGES = torch.tensor([[3, 200, 90], [120, 7, 0], [255, 13, 77], [1, 2, 3]], dtype=torch.uint8)


def nothing(structure):
    """Its null: a number, or a string, for the tensors; for mixed ones the structure with both."""
    if isinstance(structure, dict):
        return {**structures(torch.zeros(1))["nested"], "prompts": [[""], [""]]}
    return "" if isinstance(structure[0], str) else 0


def product(net, cond):
    several = [net, Conditioned(net, told=nothing(cond)), Conditioned(net, told=cond)]
    return Product(several, base=net)(X, 0.5, told=cond).mean


def smc(net, cond):
    told = entries_of({"told": cond}, [0, 0, 1, 1], B)
    twisted = Potential(net, lambda x, t: -x.square().sum(1))
    return sample(twisted, X, TwistedSMC(particles=2), steps=3, seed=0, cond=told).x


def trained(net, cond):
    config = TrainConfig(steps=3, batch_size=3, accumulate=2, log_every=1)
    trainer = Trainer(net, DATA, config, cond={"told": cond}, augment=lambda x, generator: x + 0.5)
    return torch.tensor(trainer.fit(progress=False).losses)


def adjoint(net, cond):
    leaves = [leaf.requires_grad_() for leaf in torch.utils._pytree.tree_leaves(cond) if isinstance(leaf, torch.Tensor)
              and len(leaf) == B]  # fmt: skip
    found = log_prob(net, X, cond={"told": cond}, differentiable="adjoint", divergence="exact", rtol=1e-3, atol=1e-3)
    grads = torch.autograd.grad(found.value.sum(), [*leaves, net.net.weight])
    for leaf in leaves:
        leaf.requires_grad_(False)
    return grads[-1] if not leaves else torch.stack([grads[-1], grads[0].sum()])


def matched(net, cond):
    with torch.inference_mode():
        told = torch.utils._pytree.tree_map_only(torch.Tensor, lambda leaf: leaf.clone(), cond)
        return MomentMatching(net, Mask(torch.tensor([True, True, False])), X, 0.1)(X, 0.5, told=told).mean


ACTS = {
    "guided": lambda net, cond: sample(
        ClassifierFree(net, 3.0, null={"told": nothing(cond)}), X, DDIM(), steps=3, cond={"told": cond}
    ).x,
    "guided apart": lambda net, cond: ClassifierFree(net, 3.0, batched=False, null={"told": nothing(cond)})(
        X, 0.5, told=cond
    ).mean,
    "product": product,
    "autoguidance": lambda net, cond: Autoguidance(net, Conditioned(net, drop=("told",)))(X, 0.5, told=cond).mean,
    "estimate": lambda net, cond: estimate(net, DATA, [0.1, 0.9], samples=6, cond={"told": cond}).eps_square,
    "errors": lambda net, cond: measure_errors(net, DATA, [0.1, 0.9], samples=6, cond={"told": cond}, batch_size=4).mse,
    "bits": lambda net, cond: bits_per_dim(
        net, IMAGES, steps=3, repeats=2, batch_size=3, seed=0, cond={"told": cond}, dtype=torch.float64
    ).per_image,
    "variations": lambda net, cond: variations(net, X, 2, DDPM(), steps=3, seed=0, cond={"told": cond}).x,
    "variations by encoding": lambda net, cond: variations(
        net, X, 2, UniPC(), by="encoding", steps=3, seed=0, cond={"told": cond}
    ).x,
    "interpolation": lambda net, cond: interpolation(net, X, DATA, UniPC(), weights=3, steps=3, cond={"told": cond}).x,
    "edit": lambda net, cond: edit(net, X, UniPC(), steps=3, cond_to={"told": cond}).x,
    "bound": lambda net, cond: elbo(net, X, draws=4, seed=0, cond={"told": cond}).value,
    "diagnosis": lambda net, cond: diagnose(net, DATA, cond={"told": cond}).error,
    "adjoint": adjoint,
    "matched": matched,
    "particles": smc,
    "trainer": trained,
    "dropped": lambda net, cond: dsm_loss(
        net, DATA, t=torch.tensor(0.5), noise=X, cond=dropped({"told": cond}, torch.tensor([True, False, False, True]))
    ),
}  # fmt: skip


def of_tensor(act):
    return ACTS[act](EpsDenoiser(Net(), SDE), SHIFT.clone())


@every_pair(act=list(ACTS), structure=list(structures(SHIFT)))
def test_a_structure_is_what_its_parts_are(act: str, structure: str) -> None:
    net = EpsDenoiser(Net(), SDE)
    if act == "adjoint" and "strings" in structure:
        pytest.skip("strings have no gradient")
    told = structures(SHIFT.clone())[structure]
    if act in ("dropped", "trainer") and isinstance(told, dict):  # of which each part has an entry for each
        told = {"tokens": [told["tokens"]["a"], {"b": told["tokens"]["b"][:1]}], "prompts": told["prompts"][:1]}
    torch.testing.assert_close(ACTS[act](net, told), of_tensor(act), rtol=1e-12, atol=1e-12)
    if act == "guided":  # in one call
        assert set(net.net.batches) == {2 * B}


def test_what_is_for_all_stays_for_all_in_one_call() -> None:
    """A number, a string, a tensor of no dimension and one of one entry, the same in both branches."""
    one, scale = torch.zeros(1, 3), torch.tensor(0.5)
    found = joined([{"a": {"one": one, "scale": scale}, "size": "xl", "y": torch.ones(B)}] * 2, X)
    assert found is not None
    assert found["a"]["one"] is one
    assert found["a"]["scale"] is scale
    assert found["size"] == "xl"
    assert found["y"].shape == (2 * B,)


def test_what_may_be_one_for_each_or_one_for_all_is_not_put_together() -> None:
    """Of as many numbers as there are samples nobody can tell which: guidance makes two calls."""
    numbers, size = [1, 2, 3, 4], (8, 8)
    assert joined([{"y": numbers}] * 2, X) is None
    assert joined([{"y": size}] * 2, X) == {"y": size}


WRONG = {
    "too few": ({"a": SHIFT, "b": [SHIFT[:2], 1.0]}, r"cond\['told'\]\['b'\]\[0\] has 2 entries for 4 samples"),
    "strings": ((SHIFT, ["a", "b", "c"]), r"cond\['told'\]\[1\] has 3 entries for 4 samples"),
    "numbers": ({"a": SHIFT, "b": [1, 2, 3, 4]}, r"cond\['told'\]\['b'\] is list with entries for 4 .* give a tensor"),
    "an array": (SHIFT.numpy(), r"cond\['told'\] is ndarray with entries for 4 .* give a tensor"),
    "a mapping": (UserDict(a=SHIFT), r"cond\['told'\] is UserDict with entries for 4 .* give a dict"),
    "an object": ([SimpleNamespace(tokens=SHIFT)], r"cond\['told'\] is list with .* give a dict"),
}
WHOLE = ("guided", "bound", "diagnosis")  # which take no batch apart
APART = ("estimate", "errors", "bits", "variations", "interpolation", "trainer")


@every_pair(act=WHOLE + APART, wrong=list(WRONG))
def test_wrong_conditions_are_refused_before_the_first_call(act: str, wrong: str) -> None:
    told, message = WRONG[wrong]
    if act in WHOLE and message.endswith(("tensor", "dict")):
        return
    net = Net()
    with pytest.raises(ValueError, match=message):
        ACTS[act](EpsDenoiser(net, SDE), told)
    assert net.batches == []


def test_a_sheet_takes_one_condition_for_all() -> None:
    corners, net = normal(4, 3), EpsDenoiser(Net(), SDE)
    sheet = {"rows": 2, "columns": 2, "steps": 3}
    found = interpolation_grid(net, corners, UniPC(), cond={"told": (["0.25"], {"a": ["0.5"]})}, **sheet).x
    expected = interpolation_grid(net, corners, UniPC(), cond={"told": torch.tensor([0.75])}, **sheet).x
    torch.testing.assert_close(found, expected)


def test_particles_of_a_group_have_one_condition() -> None:
    twisted = Potential(EpsDenoiser(Net(), SDE), lambda x, t: -x.square().sum(1))
    for told in (SHIFT, {"text": ["a", "a", "b", "c"]}):
        with pytest.raises(ValueError, match=r"cond told.* differs within a group of 2 particles"):
            sample(twisted, X, TwistedSMC(particles=2), steps=2, seed=0, cond={"told": told})


def test_a_sources_own_conditions_are_checked() -> None:
    class Source:
        def __len__(self) -> int:
            return len(DATA)

        def batch(self, items, epochs):
            return DATA[items], {"told": {"a": SHIFT[:2]}}

    with pytest.raises(ValueError, match=r"cond\['told'\]\['a'\] has 2 entries for 3 samples"):
        Trainer(EpsDenoiser(Net(), SDE), Source(), TrainConfig(steps=1, batch_size=3)).fit(progress=False)


def test_a_checkpoint_of_other_strings_is_another_runs(tmp_path) -> None:
    def run(*texts):
        config, cond = TrainConfig(steps=1, batch_size=2), {"told": {"t": list(texts)}}
        return Trainer(EpsDenoiser(Net(), SDE), DATA, config, cond=cond, folder=tmp_path)

    run("0", "1", "2", "3").fit(progress=False)
    run("0", "1", "2", "3")
    with pytest.raises(Exception, match="cond"):
        run("0", "1", "2", "4")


def test_a_loss_checks_its_condition() -> None:
    net = Net()
    with pytest.raises(ValueError, match=r"cond\['told'\]\['a'\] has 2 entries for 4 samples"):
        dsm_loss(EpsDenoiser(net, SDE), X, cond={"told": {"a": SHIFT[:2]}})
    assert net.batches == []


def test_a_condition_is_a_mapping() -> None:
    with pytest.raises(TypeError, match="cond is list: expected a mapping"):
        check_cond([1], 2)  # type: ignore[arg-type]
