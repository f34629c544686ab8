"""Gradients of a solve: theory 9, first and second order, over every operator and solver."""

import gc
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from torch.autograd import gradcheck, gradgradcheck

import graphdiff as gd
from graphdiff.solvers.base import Budget, solve_certified
from tests.graphdiff.zoo import OPERATORS, SOLVERS, applies, oracle, problems

TIGHT = {"tol": 1e-13, "on_failure": "ignore"}
pairs = pytest.mark.parametrize(
    ("name", "solver"),
    [
        (name, solver)
        for name, kind in OPERATORS.items()
        for solver in SOLVERS
        if solver != "Auto" and applies(SOLVERS[solver], kind.build(kind.leaf(torch.Generator(), (), 4)))
    ],
    ids=lambda x: x,
)


def instance(name, kind="number", n=4):
    g = torch.Generator().manual_seed(17)
    leaf = OPERATORS[name].leaf(g, (), n)
    s = torch.randn(n, 2, generator=g, dtype=torch.float64)
    shape = {"number": (), "channel": (1, 2), "node": (n, 1), "graph": (2, 1, 1)}[kind]
    mu = 0.2 + 0.6 * torch.rand(shape, generator=g, dtype=torch.float64)
    return tuple(t.requires_grad_() for t in (leaf, s, mu))


def diffuse_from(name, solver, transposed):
    # A zero weight of a graph stays one: perturbing it would change the graph.
    edges = (instance(name)[0] != 0).double()

    # Solvers for reversible walks alone want the perturbed affinity symmetric too.
    symmetric = (
        solver in ("CG", "BlockCG", "MixedPrecision", "Chebyshev", "Multigrid", "SSOR")
        and edges.shape[-1] == edges.shape[-2]
    )

    def function(leaf, s, mu):
        leaf = (leaf + leaf.mT) / 2 if symmetric else leaf
        P = OPERATORS[name].build(leaf * edges)
        return gd.diffuse(P.T if transposed else P, s, mu, solver=SOLVERS[solver], **TIGHT)

    return function


@pairs
@pytest.mark.parametrize("transposed", [False, True])
def test_gradcheck_and_gradgradcheck(name, solver, transposed):
    """Second derivatives of transposed walks are left to the slow test below."""
    inputs = instance(name)
    function = diffuse_from(name, solver, transposed)
    assert gradcheck(function, inputs, fast_mode=True)
    if not transposed:
        assert gradgradcheck(function, inputs, fast_mode=True, atol=1e-4)


@pytest.mark.parametrize("kind", ["channel", "node", "graph"])
@pytest.mark.parametrize("name", ["directed", "sharp attention"])
@pytest.mark.parametrize("transposed", [False, True])
def test_mu_of_every_shape(name, kind, transposed):
    function, inputs = diffuse_from(name, "Direct", transposed), instance(name, kind)
    assert gradcheck(function, inputs, fast_mode=True)
    assert gradgradcheck(function, inputs, fast_mode=True, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "solver", "kind"),
    [
        (name, solver, kind)
        for name, solver in pairs.args[1]
        for kind in ("number", "channel", "node", "graph")
        if (solver, kind) != ("BlockCG", "channel")  # which it refuses
    ],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_gradcheck_and_gradgradcheck_entry_by_entry(name, solver, transposed, kind):
    function, inputs = diffuse_from(name, solver, transposed), instance(name, kind)
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs, atol=1e-4)


@settings(max_examples=40)
@given(problems(mus=(0.3, 0.85, 0.99), batches=((),)))
def test_theory_9_against_autograd_through_a_dense_solve(problem):
    leaf, s = problem.leaf.clone().requires_grad_(), problem.s.clone().requires_grad_()
    mu = torch.tensor(problem.mu, dtype=torch.float64, requires_grad=True)
    y = gd.diffuse(OPERATORS[problem.name].build(leaf), s, mu)
    exact = oracle(OPERATORS[problem.name].dense(leaf), s, mu)
    g = torch.randn(s.shape, generator=torch.Generator().manual_seed(19), dtype=torch.float64)
    got, expected = (torch.autograd.grad(out, (leaf, s, mu), g) for out in (y, exact))
    scale = float(s.detach().abs().max()) / (1 - problem.mu) ** 2
    for a, b, size in zip(got, expected, (scale, 1.0, scale), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8 * size * s.numel())


def test_theory_9_closed_forms():
    psi = torch.randn(6, 3, generator=torch.Generator().manual_seed(23), dtype=torch.float64)
    P = gd.AttentionTransition(psi)
    s, g = psi[:, :2].clone().requires_grad_(), psi[:, 1:].clone()
    mu = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    y = gd.diffuse(P, s, mu)
    y.backward(g)
    adjoint = torch.linalg.solve(torch.eye(6).double() - 0.7 * P.dense().T, g)
    torch.testing.assert_close(s.grad, 0.3 * adjoint)
    torch.testing.assert_close(mu.grad, (adjoint * (P @ y.detach() - s.detach())).sum())
    # The signal's gradient is diffusion by the transpose.
    torch.testing.assert_close(s.grad, gd.diffuse(P.T, g, 0.7))


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-4), (torch.bfloat16, 0.02)])
def test_gradients_in_lower_precision(dtype, close):
    """Against float64 at the same rounded inputs and cotangent."""
    g = torch.Generator().manual_seed(29)
    inputs = [torch.randn(20, 3, generator=g), torch.randn(20, 2, generator=g), torch.tensor(0.9)]
    cotangent = torch.randn(20, 2, generator=g).to(dtype)

    def gradients(working):
        psi, s, mu = (x.clone().to(dtype).to(working).requires_grad_() for x in inputs)
        gd.diffuse(gd.AttentionTransition(psi), s, mu).backward(cotangent.to(working))
        return psi.grad, s.grad, mu.grad

    for a, b in zip(gradients(dtype), gradients(torch.float64), strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).abs().max() <= close * b.abs().max()


def test_a_backward_has_the_products_of_its_solve_and_no_others():
    """P x is known from the forward's certificate, Pᵀ v from the backward's; unless somebody goes on."""
    calls = []

    def step(name, left, right):
        def walked(y):
            calls.append(name)
            return left * y.roll(1, -2) + right * y.roll(-1, -2)

        return walked

    P = gd.FunctionTransition(step("P", 0.7, 0.3), 12, rmatmul=step("P.T", 0.3, 0.7), dtype=torch.float64)
    s = torch.randn(12, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
    mu = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    y = gd.diffuse(P, s, mu, solver=gd.solvers.Walk())
    calls.clear()
    once = torch.autograd.grad(y.square().sum(), (s, mu), retain_graph=True)
    # Row sums are a product too.
    backward = {name: calls.count(name) for name in ("P", "P.T")}
    assert backward["P"] == 1
    calls.clear()
    again = torch.autograd.grad(y.square().sum(), (s, mu), create_graph=True)
    assert {name: calls.count(name) - 1 for name in backward} == backward
    for a, b in zip(once, again, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("max_steps", [None, 0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", [gd.solvers.CG(), gd.solvers.Walk(), gd.solvers.Direct()])
def test_the_product_that_is_kept_is_that_of_the_answer(solver, dtype, max_steps):
    """Of signals that are done at once, refined, given up, or so badly guessed that 0 is better."""
    g = torch.Generator().manual_seed(3)
    operator = gd.AttentionTransition(torch.randn(30, 3, generator=g, dtype=torch.float64).to(dtype))
    b = torch.randn(30, 4, generator=g, dtype=torch.float64)
    mu = torch.tensor([[0.9]], dtype=torch.float64)
    P = operator.to(torch.float64).dense()
    initial = torch.linalg.solve(torch.eye(30, dtype=torch.float64) - 0.9 * P, b)
    initial[:, 1], initial[:, 2] = 1e9 * b[:, 1], 0
    atol = torch.tensor([[1e-6, 1e-6, 1e-9, 1e-2]], dtype=torch.float64)
    state, budget = solver.prepare(operator, mu.to(dtype)), Budget(max_steps=max_steps)
    given = {"initial": initial, "atol": atol, "budget": budget}
    found = solve_certified(solver, state, operator, b, mu, keep=True, **given)
    assert max_steps != 0 or isinstance(solver, gd.solvers.Direct) or (found.x[:, 1] == 0).all()
    scale = 1e-4 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(found.product.double(), P @ found.x, rtol=scale, atol=scale)
    assert solve_certified(solver, state, operator, b, mu, **given).product is None


def test_a_backward_that_misses_its_promise_warns():
    P = gd.DenseTransition(torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64))
    s = torch.ones(2, dtype=torch.float64, requires_grad=True)
    y = gd.diffuse(P, s, 0.9, solver=gd.solvers.Walk(), max_steps=3)  # a constant: done in one step
    with pytest.warns(gd.ConvergenceWarning, match="gradient of a solve"):
        y.backward(torch.tensor([1.0, -1.0], dtype=torch.float64))


@pytest.mark.parametrize("name", ["CG", "BlockCG", "Chebyshev", "BiCGSTAB"])
def test_the_backward_takes_about_as_many_products_as_the_forward(name):
    """With wrong weights for Pᵀ, CG would give up and go on as Chebyshev."""
    counts = {"P": 0, "PT": 0}

    class Counted(gd.AttentionTransition):
        def matmul(self, y):
            counts["P"] += 1
            return super().matmul(y)

        def rmatmul(self, v):
            counts["PT"] += 1
            return super().rmatmul(v)

        def held(self):
            return self

    g = torch.Generator().manual_seed(3)
    psi = 1.5 * torch.randn(300, 4, generator=g, dtype=torch.float64)
    s = torch.randn(300, 2, generator=g, dtype=torch.float64).requires_grad_()
    y = gd.diffuse(Counted(psi), s, 0.99, solver=SOLVERS[name], tol=1e-8)
    forward = counts["P"]
    y.backward(torch.randn(300, 2, generator=g, dtype=torch.float64))
    assert forward > 20
    assert counts["PT"] < 1.5 * forward


def test_the_matrix_of_a_walk_is_not_kept_for_the_backward():
    matrices = []

    class Watched(gd.AttentionTransition):
        def held(self):
            held = super().held()
            matrices.append(weakref.ref(held.matrix))
            return held

    psi = torch.randn(300, 4, generator=torch.Generator().manual_seed(3)).requires_grad_()
    y = gd.diffuse(Watched(psi), torch.arange(300.0), 0.9, solver=gd.solvers.CG())
    gc.collect()
    assert matrices
    assert not [matrix for matrix in matrices if matrix() is not None]
    (gradient,) = torch.autograd.grad(y.square().sum(), psi)
    assert len(matrices) > 1
    assert gradient.isfinite().all()


def test_no_graph_of_the_steps_is_kept():
    """The nodes reachable from y do not grow with the number of walks."""

    def nodes(mu):
        psi = torch.randn(10, 2, generator=torch.Generator().manual_seed(37), requires_grad=True)
        y = gd.diffuse(gd.AttentionTransition(psi), torch.arange(10.0), mu, solver=gd.solvers.Walk())
        seen, pending = set(), [y.grad_fn]
        while pending:
            node = pending.pop()
            if node is not None and node not in seen:
                seen.add(node)
                pending.extend(parent for parent, _ in node.next_functions)
        return len(seen)

    assert nodes(0.1) == nodes(0.95)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_memory_of_a_solve_and_its_backward_does_not_grow_with_the_square_of_nodes():
    """The benchmark in a process of its own: a peak is of a whole process."""
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "memory.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    nodes, grown, matrix = (int(cell) for cell in done.stdout.splitlines()[-1].strip("| ").split(" | "))
    assert (nodes, matrix) == (20_000, 3200)
    assert grown < 100
