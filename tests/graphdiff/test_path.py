"""All µ of a grid from one Krylov space: the promise of `solve` for each, at the products of the largest."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import graphdiff as gd
from graphdiff.solvers.auto import WatchedWalk
from tests.graphdiff.zoo import OPERATORS, oracle, problems

TWENTY = [1 - 10 ** (-3 * (i + 1) / 20) for i in range(20)]  # 0.29 … 0.999


def norm(x, transposed):
    return x.abs().sum(-2) if transposed else x.abs().amax(-2)


class Counted(gd.SparseTransition):
    """Counts products with P and Pᵀ, and columns multiplied."""

    def __post_init__(self):
        super().__post_init__()
        self.__dict__["counts"] = {"calls": 0, "columns": 0}

    def _replaced(self, tensors, device):
        other = super()._replaced(tensors, device)
        other.__dict__["counts"] = self.counts
        return other

    def _count(self, y):
        self.counts["calls"] += 1
        self.counts["columns"] += y.numel() // y.shape[-2]

    def matmul(self, y):
        self._count(y)
        return super().matmul(y)

    def rmatmul(self, v):
        self._count(v)
        return super().rmatmul(v)


def counted(P):
    return Counted(P.indptr, P.indices, P.values, log_degree=P.log_degree)


def chain(nodes=300, undirected=True):
    """A cycle with chords; one way, where it is not undirected."""
    node = torch.arange(nodes)
    edges = torch.cat([torch.stack([node, (node + step) % nodes]) for step in (1, 7)], 1)
    return gd.SparseTransition.from_edge_index(edges, undirected=undirected, dtype=torch.float64)


def scattered(nodes=600, undirected=True, seed=3):
    g = torch.Generator().manual_seed(seed)
    edges = torch.randint(nodes, (2, 4 * nodes), generator=g)
    return gd.SparseTransition.from_edge_index(
        edges, num_nodes=nodes, undirected=undirected, dtype=torch.float64
    )


def attention(nodes=200, seed=3):
    g = torch.Generator().manual_seed(seed)
    return gd.AttentionTransition(1.5 * torch.randn(nodes, 4, generator=g, dtype=torch.float64))


WALKS = {
    "cycle": chain(),
    "scattered": scattered(),
    "attention": attention(),
    "one-way cycle": chain(undirected=False),
    "one-way, scattered": scattered(undirected=False),
}
walks = pytest.mark.parametrize("P", WALKS.values(), ids=WALKS)


def signal(P, channels=2, seed=5):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(P.shape[-1], channels, generator=g, dtype=torch.float64)


# --- mathematics


@settings(max_examples=40)
@given(
    problem=problems(),
    mus=st.lists(st.sampled_from([0.0, 1e-12, 0.2, 0.5, 0.85, 0.99]), min_size=1, max_size=4),
    transposed=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_every_mu_keeps_the_promise(problem, mus, transposed, dtype):
    """Against the dense oracle: all operators, any order and multiplicity of µ, both directions."""
    P = problem.P.to(dtype)
    D = P.to(torch.float64).dense()
    P, D = (P.T, D.mT) if transposed else (P, D)
    s = problem.s.to(dtype)
    sol = gd.solve_path(P, s, mus, on_failure="ignore")
    tol = 1e-5 if dtype == torch.float32 else 1e-10
    for m, mu in enumerate(mus):
        exact = oracle(D, s, mu)
        slip = 1e-13 * norm(s.double(), transposed) / (1 - mu)
        assert (norm(sol.value[m].double() - exact, transposed) <= sol.error_bound[m] + slip).all()
        assert (sol.lower[m].double() <= exact + slip.unsqueeze(-2)).all()
        assert (sol.upper[m].double() >= exact - slip.unsqueeze(-2)).all()
        reachable = 5 * torch.as_tensor(P.rounding(torch.float64)) / (1 - mu) <= tol
        assert (sol.converged[m] | ~reachable.reshape(*reachable.shape[:-2], -1)).all()
    assert sol.value.shape == (len(mus), *torch.broadcast_shapes(D.shape[:-2], s.shape[:-2]), *s.shape[-2:])
    assert sol.error_bound.shape == sol.steps.shape == (*sol.value.shape[:-2], s.shape[-1])


@walks
@pytest.mark.parametrize("transposed", [False, True])
def test_twenty_mu_take_the_products_of_the_hardest_and_one_each(P, transposed):
    """The bar: 1.1 times the products of the hardest µ alone, and one certifying product per µ."""
    Q = P.T if transposed else P
    s = signal(P)
    sol = gd.solve_path(Q, s, TWENTY, tol=1e-8)
    # The same method, not preconditioned.
    alone = gd.solve(Q, s, TWENTY[-1], tol=1e-8, solver=gd.solvers.CG() if P.reversible else WatchedWalk())
    assert sol.converged.all()
    assert (sol.matvecs.sum(0) <= 1.1 * alone.matvecs + len(TWENTY)).all()


@walks
def test_each_mu_takes_the_steps_that_it_takes_alone(P):
    """In exact arithmetic one Krylov method for all is that method for each; easy µ stop long before."""
    s = signal(P)
    sol = gd.solve_path(P, s, TWENTY, tol=1e-8)
    assert (sol.steps[0] < sol.steps[-1] / 2).all()
    for m in (0, 9, 19):
        alone = gd.solve(P, s, TWENTY[m], tol=1e-8, solver=gd.solvers.Shifted())
        close = 1 if P.reversible else 2 + 0.2 * alone.steps
        assert ((alone.steps - sol.steps[m]).abs() <= close).all()
        if P.reversible:
            cg = gd.solve(P, s, TWENTY[m], tol=1e-8, solver=gd.solvers.CG())
            assert ((cg.steps - alone.steps).abs() <= 1).all()
    assert torch.equal(s, signal(P))


def test_matvecs_add_up_to_the_columns_that_were_multiplied():
    P = counted(chain())
    s = signal(P, 1)
    sol = gd.solve_path(P, s, TWENTY, tol=1e-8)
    assert int(sol.matvecs.sum()) == P.counts["columns"]
    # The certificates of all µ are one product of many columns.
    assert P.counts["calls"] == int(sol.matvecs[-1].sum())


@walks
def test_float32_needs_no_refinement_in_ordinary_cases(P):
    """The recurrences of the shifted systems lose nothing: one certifying product each is enough."""
    P, s = P.to(torch.float32), signal(P).float()
    mus = [0.1, 0.5, 0.8, 0.9, 0.95]
    sol = gd.solve_path(P, s, mus, tol=1e-3)
    assert sol.converged.all()
    assert (sol.matvecs[:-1] <= 2).all()


def test_order_and_repetitions_of_mu_do_not_matter():
    P, s = scattered(), signal(scattered())
    mus = [0.9, 0.0, 0.99, 0.5, 0.99]
    sol = gd.solve_path(P, s, mus)
    ordered = gd.solve_path(P, s, sorted(mus))
    for m, place in enumerate([2, 0, 3, 1, 4]):
        assert torch.equal(sol.value[m], ordered.value[place])
    assert torch.equal(sol.value[2], sol.value[4])
    assert torch.equal(sol.value[1], s)
    assert (sol.steps[1] == 0).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_batches_of_graphs_and_signals(transposed):
    g = torch.Generator().manual_seed(3)
    psi = torch.randn(3, 20, 2, generator=g, dtype=torch.float64)
    s = torch.randn(3, 20, 2, generator=g, dtype=torch.float64)
    P = gd.AttentionTransition(psi)
    together = gd.solve_path(P.T if transposed else P, s, [0.5, 0.9])
    assert together.value.shape == (2, 3, 20, 2)
    for b in range(3):
        one = gd.AttentionTransition(psi[b])
        alone = gd.solve_path(one.T if transposed else one, s[b], [0.5, 0.9])
        assert torch.equal(alone.value, together.value[:, b])
        assert torch.equal(alone.steps, together.steps[:, b])
    shared = gd.AttentionTransition(psi[0])
    many = gd.solve_path(shared, s[:, None], [0.5, 0.9])
    assert many.value.shape == (2, 3, 1, 20, 2)
    for b in range(3):
        assert torch.equal(many.value[:, b, 0], gd.solve_path(shared, s[b], [0.5, 0.9]).value)
    # A batch of graphs as long as the path is still one.
    assert gd.solve_path(P, s[0], [0.1, 0.5, 0.9]).value.shape == (3, 3, 20, 2)


def test_shapes_follow_the_signal():
    P, s = scattered(), signal(scattered())[:, 0]
    sol = gd.solve_path(P, s, torch.tensor([0.5, 0.9, 0.95]))
    assert sol.value.shape == sol.lower.shape == (3, 600)
    assert sol.error_bound.shape == sol.matvecs.shape == sol.converged.shape == (3,)
    assert sol.solver == "Shifted()"
    assert sol.reason == "as asked; reached the tolerance"


def test_a_walk_that_restarts_at_the_signal():
    edges = torch.tensor([[0, 0, 1, 2], [1, 2, 2, 3]])  # node 3 has no edge out
    P = gd.SparseTransition.from_edge_index(edges, dangling="restart", dtype=torch.float64)
    s = torch.rand(4, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    sol = gd.solve_path(P.T, s, [0.3, 0.9])
    for m, mu in enumerate((0.3, 0.9)):
        assert (sol.value[m] - gd.solve(P.T, s, mu).value).abs().max() < 1e-9


def test_any_other_solver_will_do():
    P, s = attention(), signal(attention())
    for solver in (gd.solvers.Direct(), gd.solvers.Auto(), gd.solvers.Walk()):
        sol = gd.solve_path(P, s, [0.2, 0.9], solver=solver)
        assert sol.converged.all()
        assert (sol.value - gd.solve_path(P, s, [0.2, 0.9]).value).abs().max() < 1e-8


def test_where_weights_hide_a_node_another_method_goes_on():
    """Log-degrees spread by some hundred: the residuals of all µ are as blind as the first one's."""
    g = torch.Generator().manual_seed(3)
    psi = torch.randn(200, 8, generator=g, dtype=torch.float64)
    psi = psi / psi.norm(dim=1, keepdim=True) * torch.linspace(1, 150, 200).double().sqrt()[:, None]
    P, s = gd.AttentionTransition(psi), signal(gd.AttentionTransition(psi))
    for Q, transposed in ((P, False), (P.T, True)):
        sol = gd.solve_path(Q, s, [0.5, 0.85, 0.99], tol=1e-6)
        assert sol.converged.all()
        for m, mu in enumerate((0.5, 0.85, 0.99)):
            assert (norm(sol.value[m] - oracle(Q.dense(), s, mu), transposed) <= sol.error_bound[m]).all()


def test_a_walk_wrongly_called_reversible_is_found_out():
    P = scattered(undirected=False)
    liar = gd.SparseTransition(
        P.indptr, P.indices, P.values, log_degree=torch.zeros(600, dtype=torch.float64)
    )
    s = signal(P)
    sol = gd.solve_path(liar, s, [0.5, 0.9], on_failure="ignore")
    for m, mu in enumerate((0.5, 0.9)):
        error = norm(sol.value[m] - oracle(P.dense(), s, mu), False)
        assert (error <= sol.error_bound[m] + 1e-12).all()


def test_total_rank():
    """∫ y dµ over (0, 1) is Σ P^t s / ((t + 1)(t + 2)); Gauss's nodes are a path."""
    import numpy as np

    P = gd.AttentionTransition(attention(60).psi / 3)
    s = signal(P)
    nodes, weights = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(24))
    path = gd.solve_path(P, s, (nodes + 1) / 2)
    total = (weights / 2 * path.value.permute(1, 2, 0)).sum(-1)
    y, w = torch.zeros_like(s), s
    constant = (P.log_degree.softmax(-1) @ s).expand_as(s)
    for t in range(200):
        y, w = y + (w - constant) / ((t + 1) * (t + 2)), P @ w
    assert (total - (y + constant)).abs().max() < 1e-6


# --- gradients


@pytest.mark.parametrize("name", ["symmetric", "directed", "sparse path", "uniform jump", "sharp attention"])
@pytest.mark.parametrize("transposed", [False, True])
def test_gradcheck_and_gradgradcheck(name, transposed):
    g = torch.Generator().manual_seed(17)
    leaf = OPERATORS[name].leaf(g, (), 4)
    s = torch.randn(4, 2, generator=g, dtype=torch.float64)
    mus = torch.tensor([0.8, 0.3, 0.6], dtype=torch.float64)
    edges = (leaf != 0).double()
    symmetric = name in ("symmetric", "sparse path")

    def path(leaf, s, mus):
        leaf = (leaf + leaf.mT) / 2 if symmetric else leaf
        P = OPERATORS[name].build(leaf * edges)
        return gd.solve_path(P.T if transposed else P, s, mus, tol=1e-13, on_failure="ignore").value

    inputs = tuple(t.requires_grad_() for t in (leaf, s, mus))
    assert gradcheck(path, inputs, fast_mode=True)
    assert gradgradcheck(path, inputs, fast_mode=True, atol=1e-4)


def test_the_gradient_is_that_of_the_solves_one_by_one():
    P, s = attention(), signal(attention()).requires_grad_()
    psi = P.psi.clone().requires_grad_()
    mus = torch.tensor([0.95, 0.2], dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 200, 2, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    got = torch.autograd.grad(gd.solve_path(gd.AttentionTransition(psi), s, mus).value, (psi, s, mus), g)
    one = sum((g[m] * gd.diffuse(gd.AttentionTransition(psi), s, mus[m])).sum() for m in range(2))
    for a, b in zip(got, torch.autograd.grad(one, (psi, s, mus)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


# --- limits and bad input


def test_max_steps_is_kept_for_each_mu_and_reported():
    P, s = chain(), signal(chain())
    with pytest.warns(
        gd.ConvergenceWarning, match=r"Shifted\(\), stopped at max_steps = 9.*; raise max_steps"
    ):
        sol = gd.solve_path(P, s, [0.1, 0.99], max_steps=9)
    assert sol.converged[0].all()
    assert not sol.converged[1].any()
    assert (sol.steps[1] == 9).all()
    assert (norm(sol.value[1] - oracle(P.dense(), s, 0.99), False) <= sol.error_bound[1]).all()
    with pytest.raises(gd.ConvergenceError):
        gd.solve_path(P, s, [0.1, 0.99], max_steps=9, on_failure="raise")


P4, S4 = gd.AttentionTransition(torch.randn(4, 2)), torch.randn(4, 3)


@pytest.mark.parametrize(
    ("mus", "error", "message"),
    [
        (0.5, TypeError, r"mus: expected a list of numbers or a tensor \[M\], got float; .* there is solve"),
        (["0.5"], TypeError, r"mus: expected a list of numbers or a tensor \[M\], got list"),
        ([], ValueError, r"mus: expected shape \[M\] with M ≥ 1, got \[0\]"),
        (torch.tensor(0.5), ValueError, r"mus: expected shape \[M\] with M ≥ 1, got \[\]"),
        (torch.rand(2, 1), ValueError, r"got \[2, 1\]; one µ per channel or node goes into solve"),
        (torch.tensor([0, 1]), TypeError, r"mus: .* got torch.int64"),
        (torch.rand(2, device="meta"), ValueError, r"mus: expected device cpu like the operator, got meta"),
        ([0.5, 1.0], ValueError, r"mus: expected 0 ≤ µ < 1, got values from 0.5 to 1; at µ = 1 the system"),
        ([0.5, float("nan")], ValueError, r"mus: expected 0 ≤ µ < 1"),
    ],
)
def test_bad_paths(mus, error, message):
    with pytest.raises(error, match=message):
        gd.solve_path(P4, S4, mus)


def test_bad_arguments_beside_the_path():
    with pytest.raises(TypeError, match=r"P: expected a Transition, got Tensor"):
        gd.solve_path(torch.eye(4), S4, [0.5])
    with pytest.raises(TypeError, match=r"s: expected a torch.Tensor, got list"):
        gd.solve_path(P4, [1.0, 2.0], [0.5])
    with pytest.raises(ValueError, match=r"s: expected shape .* N = 4"):
        gd.solve_path(P4, torch.randn(5), [0.5])
    with pytest.raises(TypeError, match=r"solver: expected a solver"):
        gd.solve_path(P4, S4, [0.5], solver="cg")
