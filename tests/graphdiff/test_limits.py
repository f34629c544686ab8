"""Time limits and the progress of a solve, the same in every solver."""

import time
from itertools import count, pairwise

import pytest
import torch

import graphdiff as gd
from graphdiff.solvers import base
from graphdiff.solvers.auto import WatchedWalk
from tests.graphdiff.zoo import SOLVERS, oracle

# Push takes signals one after the other.
STEPWISE = [name for name in SOLVERS if name not in ("Direct", "Push", "Auto")]


@pytest.fixture
def chain():
    """A walk that needs many steps, and a signal."""
    nodes = torch.arange(300)
    edges = torch.stack([nodes[:-1], nodes[1:]])
    P = gd.SparseTransition.from_edge_index(edges, undirected=True, dtype=torch.float64)
    return P, torch.randn(300, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("name", STEPWISE)
def test_no_step_begins_after_the_time_is_up_and_the_bound_still_holds(chain, name):
    P, s = chain
    sol = gd.solve(P, s, 0.99, solver=SOLVERS[name], max_seconds=1e-9, on_failure="ignore")
    assert (sol.steps == 1).all()
    assert not sol.converged.any()
    assert "stopped at max_seconds = 1e-09" in sol.reason
    exact = oracle(P.dense(), s, 0.99)
    assert ((sol.value - exact).abs().amax(0) <= sol.error_bound).all()
    assert ((sol.lower <= exact) & (exact <= sol.upper)).all()


@pytest.mark.parametrize("name", STEPWISE)
def test_time_enough_changes_nothing(chain, name):
    P, s = chain
    plain = gd.solve(P, s, 0.9, solver=SOLVERS[name])
    timed = gd.solve(P, s, 0.9, solver=SOLVERS[name], max_seconds=1e6)
    assert torch.equal(plain.value, timed.value)
    assert torch.equal(plain.steps, timed.steps)
    assert plain.reason == timed.reason


def test_push_keeps_to_the_time_and_tells_of_one_signal_after_the_other(chain):
    P, s = chain
    seen: list[gd.Progress] = []
    sol = gd.solve(P, s, 0.9, solver=gd.solvers.Push(), progress=seen.append)
    assert sol.converged.all()
    assert [report.unfinished for report in seen] == sorted((r.unfinished for r in seen), reverse=True)
    assert {report.unfinished for report in seen} >= {1, 2, 3}
    brief = gd.solve(P, s, 0.99, solver=gd.solvers.Push(), max_seconds=1e-9, on_failure="ignore")
    assert brief.steps.tolist() == [1, 0, 0]
    assert "stopped at max_seconds = 1e-09" in brief.reason
    exact = oracle(P.dense(), s, 0.99)
    assert ((brief.value - exact).abs().amax(0) <= brief.error_bound).all()


def test_a_missed_tolerance_names_the_time(chain):
    P, s = chain
    walk = {"solver": gd.solvers.Walk(), "max_seconds": 1e-9}
    with pytest.warns(gd.ConvergenceWarning, match=r"stopped at max_seconds = 1e-09.*; raise max_seconds or"):
        gd.diffuse(P, s, 0.99, **walk)
    with pytest.raises(gd.ConvergenceError, match="raise max_seconds") as error:
        gd.pagerank(P, s.abs(), 0.99, on_failure="raise", **walk)
    assert error.value.solution.error_bound.isfinite().all()


def test_the_time_ends_refinements_and_what_takes_over_too(chain):
    P, s = chain
    # One step leaves a third of the error, so without the clock a refinement would go on.
    walked = gd.solve(P, s, 0.3, solver=gd.solvers.Walk(), max_seconds=1e-9, on_failure="ignore")
    assert (walked.steps == 1).all()
    around = torch.stack([torch.arange(300), torch.arange(1, 301) % 300])
    P = gd.SparseTransition.from_edge_index(around, dtype=torch.float64)
    watched = gd.solve(P, s, 0.999, solver=WatchedWalk(), max_seconds=1e-9, on_failure="ignore")
    assert watched.solver == "Walk() or BiCGSTAB()"
    assert (watched.steps == 1).all()


def test_the_backward_has_as_much_time_again(chain, monkeypatch):
    P, s = chain
    s = s.requires_grad_()
    calls = []
    ticks = count()
    monkeypatch.setattr(time, "monotonic", lambda: float(next(ticks)))

    y = gd.diffuse(P, s, 0.9, solver=gd.solvers.CG(), max_seconds=1e6, progress=calls.append)
    forward = len(calls)
    y.square().sum().backward()
    assert len(calls) > forward, "the backward tells of its steps too"
    assert calls[forward].steps == 1
    assert calls[forward].seconds == calls[0].seconds
    # From the answer itself the forward has nothing to do; the backward starts from nothing of the kind.
    y = gd.diffuse(P, s, 0.9, solver=gd.solvers.CG(), max_seconds=1e-9, initial=y.detach())
    loss = (y * torch.linspace(-1, 1, 300)[:, None]).sum()
    with pytest.warns(gd.ConvergenceWarning, match=r"gradient of a solve.*raise max_seconds"):
        loss.backward()


@pytest.mark.parametrize("name", STEPWISE)
def test_progress_is_told_after_every_step(chain, name):
    P, s = chain
    seen: list[gd.Progress] = []
    sol = gd.solve(P, s, 0.9, solver=SOLVERS[name], progress=seen.append)
    assert [report.steps for report in seen] == list(range(1, int(sol.steps.max()) + 1))
    assert seen[-1].unfinished == 0
    assert seen[0].unfinished == 3
    assert all(later.seconds >= before.seconds for before, later in pairwise(seen))
    bounds = torch.tensor([report.error_bound for report in seen[:-1]])
    assert bounds[-1] < 1e-3 * bounds[0]


def test_progress_goes_on_counting_where_rounding_takes_a_refinement(chain):
    """float32 needs one here; told are the steps of both solves."""
    P, s = chain
    seen: list[gd.Progress] = []
    options = {"solver": gd.solvers.Walk(), "tol": 1e-6, "on_failure": "ignore"}
    sol = gd.solve(P.to(torch.float32), s.float(), 0.99, progress=seen.append, **options)
    told = [report.steps for report in seen]
    assert told[-1] == int(sol.steps.max())
    assert all(after - before in (0, 1) for before, after in pairwise(told))


def test_what_progress_raises_ends_the_solve(chain):
    P, s = chain

    def stop(report):
        if report.steps == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gd.solve(P, s, 0.99, solver=gd.solvers.Walk(), progress=stop)


@pytest.fixture
def narrow(monkeypatch):
    """Two channels at a time."""
    monkeypatch.setattr(base, "CACHED", 0)
    monkeypatch.setattr(base, "FEWEST", {torch.float32: 2, torch.float64: 2})


FIELDS = ("value", "lower", "upper", "error_bound", "converged", "steps", "matvecs")


# The channels of BlockCG are not solved some at a time: test_block_cg.py.
@pytest.mark.parametrize("name", [name for name in (*STEPWISE, "Push", "Direct") if name != "BlockCG"])
@pytest.mark.parametrize("shape", [(5,), (2, 5)], ids=str)
def test_channels_solved_some_at_a_time_are_as_solved_alone(chain, narrow, name, shape):
    P, _ = chain
    g = torch.Generator().manual_seed(7)
    s = torch.randn(*shape[:-1], 300, shape[-1], generator=g, dtype=torch.float64)
    together = gd.solve(P, s, 0.9, solver=SOLVERS[name])
    for k in range(5):
        alone = gd.solve(P, s[..., k : k + 1], 0.9, solver=SOLVERS[name])
        for field in FIELDS:
            assert torch.equal(getattr(together, field)[..., k : k + 1], getattr(alone, field)), field


def test_a_gradient_of_channels_solved_some_at_a_time(chain, narrow):
    P, _ = chain
    s = torch.randn(300, 5, generator=torch.Generator().manual_seed(9), dtype=torch.float64).requires_grad_()
    g = torch.randn(300, 5, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    (found,) = torch.autograd.grad(gd.diffuse(P, s, 0.9), s, g)
    torch.testing.assert_close(found, oracle(P.dense().mT, g, 0.9), rtol=0, atol=1e-8)


def test_channels_whose_turn_has_not_come_count_as_unfinished_and_have_no_time_left(chain, narrow):
    P, _ = chain
    s = torch.randn(300, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    seen: list[gd.Progress] = []
    assert gd.solve(P, s, 0.9, solver=gd.solvers.CG(), progress=seen.append).converged.all()
    left = [report.unfinished for report in seen]
    assert left[0] == 5
    assert left[-1] == 0
    assert left == sorted(left, reverse=True)
    brief = gd.solve(P, s, 0.99, solver=gd.solvers.CG(), max_seconds=1e-9, on_failure="ignore")
    assert brief.steps.tolist() == [1, 1, 0, 0, 0]
    exact = oracle(P.dense(), s, 0.99)
    assert ((brief.value - exact).abs().amax(0) <= brief.error_bound).all()
    # A first guess is looked at all the same.
    guess = torch.cat([s[:, :2], exact[:, 2:]], 1)
    told = gd.solve(
        *(P, s, 0.99), solver=gd.solvers.CG(), initial=guess, max_seconds=1e-9, on_failure="ignore"
    )
    assert told.converged.tolist() == [False, False, True, True, True]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_seconds": 0}, ValueError, r"max_seconds: expected a finite number > 0, got 0"),
        ({"max_seconds": float("nan")}, ValueError, r"max_seconds: expected a finite number > 0, got nan"),
        ({"progress": 3}, TypeError, r"progress: expected a function of one Progress, got int"),
    ],
)
def test_bad_limits(chain, arguments, error, message):
    P, s = chain
    with pytest.raises(error, match=message):
        gd.solve(P, s, 0.9, **arguments)
