"""CPU threads are chosen once, by a clock, and change nothing else; the rate shown is that of the last seconds."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_trainer import assert_same, make

from scoresde import VPSDE, VDenoiser
from scoresde.training import TrainConfig, Trainer, threads
from scoresde.training.log import Rate, Reports, duration


class Clock:
    """Time passes by what it is told, and at each reading by what a step costs with so many threads."""

    def __init__(self, **costs):
        self.now, self.costs = 0.0, {int(n.removeprefix("with_")): cost for n, cost in costs.items()}

    def __call__(self):
        self.now += self.costs.get(torch.get_num_threads(), 0.0)
        return self.now


@pytest.fixture
def two(monkeypatch):
    """Torch takes two threads of itself."""
    monkeypatch.setattr(threads, "by_default", lambda: 2)


@pytest.mark.parametrize(("costs", "best", "steps"), [((0.5, 0.3), 2, 6), ((0.5, 0.9), 1, 6), ((0.55, 12.0), 1, 4)])
def test_the_faster_number_is_taken(costs, best, steps, two, tmp_path):
    """And what takes ten times longer is not tried to the end."""
    done, told = [], []
    clock = Clock(with_1=costs[0], with_2=costs[1])
    found = threads.choose(tmp_path, lambda: lambda: done.append(torch.get_num_threads()), told.append, clock)
    assert (found, torch.get_num_threads()) == (best, 1)
    assert done == [1, 1, 1, 2, 2, 2][:steps]
    (text,) = told
    assert f"{costs[0]:.3g} s with 1 and {costs[1]:.3g} s with 2, so {best} from here on" in text
    assert threads.choose(tmp_path, None) == best  # kept


def test_one_slow_step_decides_nothing():
    """The first warms up, and a machine stutters."""
    costs = iter([9.0, 0.5, 0.5, 0.2, 0.2, 7.0])
    now = itertools.accumulate(value for cost in costs for value in (0.0, cost))
    assert threads.timed(lambda: None, (1, 2), lambda: next(now)) == pytest.approx({1: 0.5, 2: 0.2})


def test_what_the_user_chose_stands(monkeypatch, tmp_path):
    (tmp_path / threads.KEPT).write_text(threads.sealed({"threads": 2, "seconds": {}}))
    assert threads.choose(tmp_path, None) == 1  # the suite's own choice
    monkeypatch.setattr(threads, "_AT_IMPORT", 1)
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: {0}, raising=False)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    assert threads.by_default() == 1
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "1")
            assert threads.by_default() is None
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: {*range(8)}, raising=False)
    assert threads.by_default() is None  # torch.set_num_threads, before
    monkeypatch.setattr(threads, "_AT_IMPORT", 8)
    assert threads.by_default() is None  # or after the import
    trainer = make(steps=1, threads=2).fit(progress=False)
    assert (trainer.threads, torch.get_num_threads()) == (2, 1)
    with pytest.raises(ValueError, match="threads=0: expected a whole number >= 1"):
        TrainConfig(steps=1, threads=0)


@pytest.mark.parametrize("best", [1, 2])
def test_timing_changes_no_bit_of_a_run_and_is_done_once(best, two, tmp_path, monkeypatch, capsys):
    """Nor the global generator; a resumed run takes what is kept, and a damaged file is told of."""
    timed = []

    def fake(step, counts, clock):
        step(), step()
        timed.append(counts)
        return {n: 1.0 + (n != best) for n in counts}

    monkeypatch.setattr(threads, "timed", fake)
    expected = make(tmp_path / "plain", steps=9, threads=best).fit(progress=False)
    before = torch.get_rng_state()
    first = make(tmp_path / "run", steps=4, schedule="constant")
    first.fit()
    assert torch.equal(torch.get_rng_state(), before)
    assert (first.threads, torch.get_num_threads(), timed) == (best, 1, [(1, 2)])
    assert f"so {best} from here on" in capsys.readouterr().err
    assert_same(make(tmp_path / "whole", steps=9).fit(progress=False), expected)
    timed.clear()
    resumed = make(tmp_path / "run", steps=9, schedule="constant").fit(progress=False)
    assert (resumed.threads, timed) == (best, [])
    assert_same(resumed, make(steps=9, schedule="constant", threads=best).fit(progress=False))
    assert make(tmp_path / "run", steps=9, schedule="constant").fit(progress=False).threads == best  # done
    path = tmp_path / "run" / threads.KEPT
    path.write_bytes(path.read_bytes().replace(b'"threads": ', b'"threads": 1'))
    with pytest.warns(UserWarning, match=r"threads\.json is damaged .*chosen anew"):
        make(tmp_path / "run", steps=10, schedule="constant").fit(progress=False)
    assert timed == [(1, 2)]


def test_a_step_is_timed_with_conditions_of_any_structure(two):
    def net(x, label, text, scale):
        assert len(x) == len(text["tokens"]) == len(text["words"]) == 2  # a part of four
        return x * weight

    weight = torch.nn.Parameter(torch.ones(()))
    module = torch.nn.Module()
    module.weight, module.forward = weight, net
    cond = {"text": {"tokens": torch.zeros(6, 3), "words": ["a"] * 6}, "scale": 0.5}
    config = TrainConfig(steps=1, batch_size=4, accumulate=2)
    assert Trainer(VDenoiser(module, VPSDE()), torch.randn(6, 2), config, cond=cond).fit(progress=False).threads in (
        1,
        2,
    )


def test_the_rate_is_that_of_the_last_seconds():
    clock = Clock()
    rate = Rate(clock, window=10.0)
    assert rate.seconds == 0

    def steps(n, cost):
        for _ in range(n):
            clock.now += cost
            rate.add()

    steps(2, 40.0)
    assert rate.seconds == 40.0
    assert not rate.settled
    steps(30, 0.5)
    assert rate.seconds == 0.5
    assert rate.settled
    steps(1, 40.0)
    assert rate.seconds == 40.0
    clock.now += 1000  # an evaluation
    rate.restart()
    steps(4, 0.25)
    assert rate.seconds == 0.25
    assert not rate.settled


def test_how_long_it_takes_is_said_once_after_some_steps(capsys):
    clock = Clock()
    reports = Reports(TrainConfig(steps=1000, batch_size=8), 100, None, True, clock)
    for _ in range(60):
        clock.now += 0.5
        reports.step()
    reports.close()
    told = capsys.readouterr().err
    assert told.count("0.5 s a step, about 7 min for the 880 left") == 1
    assert told.count("s a step") == 1
    assert "items=16/s" in told
    assert [duration(s) for s in (5400, 47 * 3600 + 1799, 48 * 3600)] == ["1 h 30 min", "47 h 30 min", "2 d 0 h"]
