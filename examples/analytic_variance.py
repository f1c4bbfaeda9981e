"""Analytic-DPM in twenty lines: train a small network, estimate, sample, compare. Two minutes on a CPU.

python examples/analytic_variance.py
"""

from scoresde import DDPMChain, EpsDenoiser, Grid, elbo, sample
from scoresde.data import digits
from scoresde.likelihood import outer_edges
from scoresde.metrics import RandomFeatures, frechet_distance
from scoresde.nn import UNet
from scoresde.solvers import DDPM
from scoresde.training import TrainConfig, Trainer
from scoresde.variance import AnalyticDenoiser, OptimalVariance, estimate

images, chain = digits()[0], DDPMChain.linear(1000)
held_out, training = images[:500], images[500:]
trainer = Trainer(EpsDenoiser(UNet(blocks=1), chain), training, TrainConfig(steps=500, lr=2e-3, ema_decay=0.99))
network = trainer.fit().ema

table = estimate(network, training, progress=True)  # once a model; table.save("table.npz") keeps it
analytic = AnalyticDenoiser(network, table, data_range=(-1, 1))  # the same mean, and now a variance

features, bins = RandomFeatures(images.shape[1:]), {"levels": 17, "data_range": outer_edges(-1, 1, 17)}
print("  K  variance   Frechet distance  bound, bits/dim")
for steps in (5, 10, 25):
    grid = Grid.strided(chain, steps, "linspace")
    for name, solver in {"small": DDPM(), "large": DDPM("beta"), "optimal": OptimalVariance(DDPM())}.items():
        x = sample(analytic, held_out.shape, solver, grid=grid, seed=0).x.clamp(-1, 1)
        distance = frechet_distance(features(x), features(held_out))
        optimal = isinstance(solver, OptimalVariance)
        of = {"solver": DDPM(), "variance": "posterior"} if optimal else {"solver": solver}
        bits = elbo(analytic, held_out[:200], grid=grid, seed=0, **of, **bins).bits_per_dim.mean()
        print(f"{steps:3d}  {name:9s}  {distance:16.2f} {bits:16.2f}")
