"""A sampler as one piece of tensor code: compiled, captured and in a file; the same samples each time."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import gpu
from common import normal

from scoresde import VPSDE, Clip, EpsDenoiser, Grid, Latent, VDenoiser, sample
from scoresde.codecs import Standardise
from scoresde.compiled import SamplerModule, save_sampler
from scoresde.guidance import ClassifierFree, Replacement
from scoresde.noise import CounterNoise
from scoresde.solvers import DDIM, DDPM, AdaptiveODE, Captured, Heun, Parallel, UniPC, available, captured

SDE = VPSDE()
TABLES = [entry for entry in available() if entry.solver.has_table]
SEEDS = [5, 6, 7]


class Net(torch.nn.Module):
    """Told a label, one of six, where it is given one."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(4, 4, generator=generator))
        self.labels = torch.nn.Embedding(6, 4)
        with torch.no_grad():
            self.labels.weight.normal_(generator=generator)

    def forward(self, x, t, label=None):
        h = x @ self.weight + t.reshape(x.shape[0], -1).cos().sum(1, keepdim=True)
        return (h if label is None else h + self.labels(label)).tanh()


@pytest.fixture
def net():
    return Net().eval().requires_grad_(False)


@pytest.fixture
def denoiser(net):
    return EpsDenoiser(net, SDE, time=lambda t: 999 * t)


@pytest.fixture
def graphs(monkeypatch):
    """Graphs on a CPU: the same memory is filled, and the recorded function runs again. Counts recordings."""
    made = []

    def recorded(run, device):
        made.append(run)
        return lambda fill: (fill(), run().clone())[1]

    monkeypatch.setattr(captured, "recordable", lambda x: True)
    monkeypatch.setattr(captured, "recorded", recorded)
    return made


@pytest.mark.parametrize("entry", TABLES, ids=lambda entry: entry.name)
def test_a_module_gives_the_samples_of_every_solver_with_a_table(denoiser, entry):
    module = SamplerModule(denoiser, entry.solver, (3, 4), steps=4)
    plain = sample(denoiser, (3, 4), entry.solver, steps=4, noise=CounterNoise(SEEDS)).x
    assert torch.equal(module(torch.tensor(SEEDS)), plain)


COMPILED = ["ddim", "ddpm", "unipc3", "heun", "dpm++2m", "eab3-v"]


@pytest.mark.parametrize("name", [*COMPILED, "clip"])
def test_the_whole_loop_compiles_without_a_break(denoiser, name):
    """The tables differ in numbers alone; benchmarks/gpu.py --breaks tries them all."""
    solver = {entry.name: entry.solver for entry in TABLES}.get(name, DDIM())
    module = SamplerModule(Clip(denoiser) if name == "clip" else denoiser, solver, (3, 4), steps=3)
    x, z = normal(3, 4, dtype=torch.float32), normal(module.rows, 3, 4, dtype=torch.float32)
    noise = (z,) if module.rows else ()
    torch._dynamo.reset()
    made = torch.compile(module, fullgraph=True, backend="eager", dynamic=False)(x, *noise)
    assert torch.equal(made, module(x, *noise))


def test_labels_of_further_dimensions_and_guidance_compile(net):
    two = EpsDenoiser(net, SDE, time=lambda t: torch.stack([t, 2 * t], 1))
    guided = ClassifierFree(two, 2.0, null={"label": 5}, interval=(0.1, 10.0))  # the first step is not guided
    module, label = SamplerModule(guided, DDIM(), (3, 4), steps=2), torch.tensor([1, 2, 3])
    x = normal(3, 4, dtype=torch.float32)
    torch._dynamo.reset()
    made = torch.compile(module, fullgraph=True, backend="eager", dynamic=False)(x, label=label)
    assert torch.equal(made, sample(guided, x, DDIM(), steps=2, cond={"label": label}).x)


def test_a_label_of_further_dimensions_is_moved_once(monkeypatch):
    """To where the network is: in the loop nothing is copied from the host."""
    moves, to = [], torch.Tensor.to

    def counting(self, *args, **kwargs):
        made = to(self, *args, **kwargs)
        moves.extend([self] if made.device != self.device else [])
        return made

    class OnMeta(torch.nn.Linear):
        def forward(self, x, t):
            return super().forward(x + t.sum(1, keepdim=True))

    monkeypatch.setattr(torch.Tensor, "to", counting)
    denoiser = EpsDenoiser(OnMeta(4, 4, device="meta"), SDE, time=lambda t: torch.stack([t, 2 * t], 1))
    states = DDIM().iterate(denoiser, torch.empty(3, 4, device="meta"), Grid.uniform(SDE, 5))
    assert len(list(states)) == 5
    assert len(moves) == 1


def test_a_module_takes_noise_half_precision_codecs_and_other_batches(denoiser):
    module = SamplerModule(denoiser, DDPM(), (3, 4), steps=4)
    x, z = normal(2, 4, dtype=torch.float32), normal(module.rows, 2, 4, dtype=torch.float32)
    order = {row: k for k, row in enumerate(range(module.rows))}
    assert torch.equal(module(x, z), sample(denoiser, x, DDPM(), steps=4, noise=lambda row, x: z[order[row]]).x)
    assert torch.equal(
        module(x, torch.tensor([1, 2])), sample(denoiser, x, DDPM(), steps=4, noise=CounterNoise([1, 2])).x
    )
    half, plain = x.bfloat16(), SamplerModule(denoiser, DDIM(), (3, 4), steps=4)
    assert torch.equal(plain(half), sample(denoiser, half, DDIM(), steps=4).x)
    coded = Latent(denoiser, Standardise(mean=100.0, std=5.0))
    assert torch.equal(SamplerModule(coded, DDIM(), (3, 4), steps=4)(x), sample(coded, x, DDIM(), steps=4).x)
    up = Grid.uniform(SDE, 4, end=1e-3).reversed()
    assert torch.equal(SamplerModule(coded, DDIM(), (3, 4), grid=up)(x), sample(coded, x, DDIM(), grid=up).x)
    assert [tuple(p.shape) for p in module.parameters()] == [(4, 4), (6, 4)]


def test_a_module_returns_a_nan_where_sample_tells_of_it(net):
    broken = EpsDenoiser(lambda x, t: x * torch.nan, SDE)
    assert SamplerModule(broken, DDIM(), (3, 4), steps=2)(torch.ones(3, 4)).isnan().all()


def test_what_is_no_sampler_is_refused(denoiser, tmp_path):
    with pytest.raises(TypeError, match=r"AdaptiveODE.* has no table"):
        SamplerModule(denoiser, AdaptiveODE(), (3, 4))
    module = SamplerModule(denoiser, DDPM(), (3, 4), steps=3)
    for wrong, message in [
        ((torch.ones(3, 5),), r"expected \(B, ...\) with \(4,\)"),
        ((torch.ones(3, 4),), r"noise is none: expected z, \(2, 3, 4\)"),
        ((torch.ones(3, 4), torch.ones(1, 3, 4)), r"noise is torch.float32 of shape \(1, 3, 4\)"),
        ((torch.arange(3), torch.ones(2, 3, 4)), "give them alone"),
    ]:
        with pytest.raises(ValueError, match=message):
            module(*wrong)
    with pytest.raises(ValueError, match="draws nothing"):
        SamplerModule(denoiser, DDIM(), (3, 4), steps=3)(torch.ones(3, 4), torch.ones(3, 3, 4))
    with pytest.raises(ValueError, match=r"end in \.pt2"):
        save_sampler(denoiser, DDIM(), tmp_path / "a.pt", shape=(3, 4), steps=3)
    with pytest.raises(ValueError, match="conditions called"):
        save_sampler(denoiser, DDIM(), tmp_path / "a.pt2", shape=(3, 4), steps=3, cond={"noise": torch.ones(3)})
    up = Grid.uniform(SDE, 4, end=1e-3).reversed()
    with pytest.raises(ValueError, match="it encodes data"):
        save_sampler(denoiser, DDIM(), tmp_path / "a.pt2", shape=(3, 4), grid=up)


PROGRAM = """
import sys
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "scoresde":
            raise ImportError("not here")
sys.meta_path.insert(0, Nothing())
import torch
program = torch.export.load(sys.argv[1]).module()
torch.save(program(torch.tensor([5, 6, 7, 8, 9]), label=torch.tensor([0, 1, 2, 3, 4])), sys.argv[2])
assert "scoresde" not in sys.modules
"""


def test_a_file_samples_without_the_package(denoiser, tmp_path):
    """In any batch, from seeds, a stochastic solver and a condition."""
    path, out = tmp_path / "sampler.pt2", tmp_path / "x.pt"
    label = torch.tensor([1, 2, 3])
    assert save_sampler(denoiser, DDPM(), path, shape=(3, 4), steps=2, cond={"label": label}) is None
    subprocess.run([sys.executable, "-I", "-c", PROGRAM, str(path), str(out)], check=True)
    cond = {"label": torch.tensor([0, 1, 2, 3, 4])}
    x = sample(denoiser, (5, 4), DDPM(), steps=2, noise=CounterNoise([5, 6, 7, 8, 9]), cond=cond).x
    assert torch.equal(torch.load(out), x)
    with zipfile.ZipFile(path) as archive:
        about = json.loads(archive.read(next(n for n in archive.namelist() if n.endswith("scoresde.json"))))
    assert about["times"][-1] == 0.0
    assert about["takes"] == "seeds"
    assert "DDPM" in about["sampler"]


def test_a_file_takes_noise_and_says_where_its_batch_is_fixed(denoiser, tmp_path):
    path, x = tmp_path / "sampler.pt2", normal(1, 4, dtype=torch.float32)
    denoiser.net.weight.requires_grad_(True)
    assert save_sampler(denoiser, Heun(), path, shape=(1, 4), steps=3, takes="noise") is None
    assert denoiser.net.weight.requires_grad
    program = torch.export.load(path).module()
    assert torch.equal(program(x), sample(denoiser, x, Heun(), steps=3).x)
    assert not program(x).requires_grad
    fixed = EpsDenoiser(lambda x, t, scale: scale * x.reshape(3, 4), SDE)
    with pytest.warns(UserWarning, match="takes batches of 3 alone"):
        assert save_sampler(fixed, DDIM(), path, shape=(3, 4), steps=1, takes="noise", cond={"scale": 0.5}) == 3
    x = normal(3, 4, dtype=torch.float32)
    assert torch.equal(torch.export.load(path).module()(x), sample(fixed, x, DDIM(), steps=1, cond={"scale": 0.5}).x)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "unipc3", "heun", "sa-solver", "restart"])
def test_captured_samples_are_those_without(denoiser, graphs, name):
    solver = {entry.name: entry.solver for entry in TABLES}[name]
    one = Captured(solver)
    for seed in (0, 1):
        for kind in ({"seed": seed}, {"noise": CounterNoise([seed, 3])}):
            plain = sample(denoiser, (2, 4), solver, nfe=20, **kind)
            found = sample(denoiser, (2, 4), one, nfe=20, **kind)
            assert torch.equal(found.x, plain.x)
            assert found.nfe == plain.nfe
            assert found.status == "complete"
    assert len(graphs) == (1 if solver.tableau(plain.grid).c.max() == 0 else 2)


def test_a_graph_sees_new_weights_and_is_made_anew_for_new_parameters(denoiser, graphs):
    solver, x = Captured(DDIM()), normal(2, 4, dtype=torch.float32)

    def same(**options):
        return torch.equal(
            sample(denoiser, x, solver, steps=3, **options).x, sample(denoiser, x, DDIM(), steps=3, **options).x
        )

    assert same()
    assert len(graphs) == 1
    denoiser.net.weight.mul_(0.5)
    assert same()
    assert len(graphs) == 1
    denoiser.net.weight = torch.nn.Parameter(torch.eye(4), requires_grad=False)
    assert same()
    assert len(graphs) == 2
    denoiser.time = lambda t: 10 * t
    assert same()
    assert len(graphs) == 3
    for label in ([1, 2], [3, 4]):  # an input
        assert same(cond={"label": torch.tensor(label)})
        assert len(graphs) == 4
    guided = ClassifierFree(denoiser, 2.0, null={"label": 5})
    cond = {"label": torch.tensor([1, 2])}
    for weight in (2.0, 3.0):  # an option
        guided.weight = weight
        found = sample(guided, x, solver, steps=3, cond=cond).x
        assert torch.equal(found, sample(guided, x, DDIM(), steps=3, cond=cond).x)
    assert len(graphs) == 6
    again = copy.deepcopy(solver)
    assert again == solver
    assert torch.equal(sample(denoiser, x, again, steps=3).x, sample(denoiser, x, solver, steps=3).x)


def test_results_are_not_overwritten_and_what_looks_between_runs_by_rows(denoiser, graphs):
    solver, x = Captured(UniPC(3)), normal(2, 4, dtype=torch.float32)
    first = sample(denoiser, x, solver, steps=4).x
    kept = first.clone()
    sample(denoiser, -x, solver, steps=4)
    assert torch.equal(first, kept)
    assert torch.equal(sample(denoiser, x, solver, steps=4, trajectory=True).trajectory[-1], first)
    mask, y = torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.ones(2, 4)
    plain, around = (Replacement(s, mask, y) for s in (DDPM(), Captured(DDPM())))
    assert torch.equal(*(sample(denoiser, (2, 4), s, steps=4, seed=0).x for s in (plain, around)))
    broken = VDenoiser(lambda x, t: torch.where(t[:, None] < 0.6, torch.nan, x), SDE)
    with pytest.raises(ArithmeticError, match="in step 2"):
        sample(broken, x, Captured(DDIM()), grid=Grid.uniform(SDE, 4))
    assert len(graphs) == 2


def test_what_cannot_be_captured_is_refused(denoiser, graphs):
    with pytest.raises(ValueError, match=r"AdaptiveODE.* cannot be captured: it is adaptive"):
        Captured(AdaptiveODE())
    with pytest.raises(ValueError, match=r"Parallel.* stops by the states that it meets"):
        Captured(Parallel(DDIM()))
    with pytest.raises(ValueError, match=r"Parallel.* stops by the states that it meets"):
        SamplerModule(denoiser, Parallel(DDIM()), (3, 4), steps=2)
    with pytest.raises(TypeError, match="wraps a solver"):
        Captured(DDIM)
    cond = {"label": torch.ones(2, device="meta")}
    with torch.no_grad(), pytest.raises(ValueError, match=r"conditions on \['meta'\]"):
        list(Captured(DDIM()).iterate(denoiser, torch.ones(2, 4), Grid.uniform(SDE, 2), None, cond))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: graphs are recorded on one alone")
@pytest.mark.parametrize("solver", [DDIM(), DDPM(), UniPC(3), Heun()], ids=repr)
def test_on_a_gpu(denoiser, solver):
    denoiser.net.to("cuda")
    one = Captured(solver)
    for seed in (0, 1):
        for kind in ({"seed": seed}, {"noise": CounterNoise([seed, 3])}):
            plain, found = (sample(denoiser, (2, 4), s, steps=5, **kind).x for s in (solver, one))
            torch.testing.assert_close(found, plain, rtol=0, atol=1e-6)
    x = torch.randn(2, 4, device="cuda")
    denoiser.net.weight.mul_(0.5)
    torch.testing.assert_close(
        sample(denoiser, x, one, steps=5, seed=0).x, sample(denoiser, x, solver, steps=5, seed=0).x
    )


def test_the_benchmark_runs_on_a_cpu_and_says_what_it_lacks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "SMALL", gpu.SMALL[1:])
    monkeypatch.setattr(gpu, "trained", lambda args, budget: {"lacks": "no time left"})
    gpu.main(["--device", "cpu", "--small", "--out", str(tmp_path)])
    page = capsys.readouterr().out
    assert page.strip() == (tmp_path / "README.md").read_text().strip()
    for said in ("no result", "no CUDA graphs on this device", "Training: no time left"):
        assert said in page
    rows = json.loads((tmp_path / "results.json").read_text())["sampling"]
    assert [(row["mode"], row["batch"]) for row in rows] == [
        ("eager", 1), ("captured", 1), ("eager", 2), ("captured", 2)
    ]  # fmt: skip
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            gpu.main([])
