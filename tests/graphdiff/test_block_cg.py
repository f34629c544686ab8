"""BlockCG: one space for many signals, against CG and a dense oracle; blocks without full rank; layers."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import graphdiff as gd
from graphdiff.solvers import base
from graphdiff.solvers.base import Budget, Limits
from graphdiff.solvers.block_cg import factorised
from tests.graphdiff.zoo import OPERATORS, applies, oracle

BLOCK, CG = gd.solvers.BlockCG(), gd.solvers.CG()
REVERSIBLE = tuple(name for name, kind in OPERATORS.items() if kind.reversible)
# Degrees alike enough for the weighted norm to see all nodes.
WELL_WEIGHTED = ("symmetric", "path", "disconnected", "sparse path", "grid", "function", "flat attention")


def randn(*shape, seed=3, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def norm(x, transposed=False):
    return x.abs().sum(-2) if transposed else x.abs().amax(-2)


@st.composite
def blocks(draw, names=REVERSIBLE, most=12):
    """An operator, and signals some of which are copies, zeros, sums, or all but copies of others."""
    name, g = draw(st.sampled_from(names)), torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    kind, n = OPERATORS[name], draw(st.integers(2, 14))
    batch = draw(st.sampled_from([(), (2,)])) if kind.batched else ()
    P = kind.build(kind.leaf(g, batch, n))
    assume(P.reversible)
    columns = [torch.randn(*batch, n, generator=g, dtype=torch.float64)]
    for what in draw(
        st.lists(st.sampled_from(["new", "copy", "zero", "sum", "near", "constant", "large"]), max_size=most)
    ):
        new = torch.randn(*batch, n, generator=g, dtype=torch.float64)
        other = columns[draw(st.integers(0, len(columns) - 1))]
        columns.append(
            {
                "new": new,
                "copy": other.clone(),
                "zero": 0 * new,
                "sum": 2 * other - columns[-1],
                "near": other + 10.0 ** draw(st.integers(-15, -5)) * new,
                "constant": torch.ones_like(new),
                "large": 1e6 * new,
            }[what]
        )
    return P, torch.stack(columns, -1)


# --- mathematics


@settings(max_examples=60)
@given(blocks(), st.sampled_from([0.0, 0.3, 0.9, 0.99]), st.booleans(), st.booleans())
def test_blocks_of_any_rank_keep_the_promise(problem, mu, transposed, single):
    """Copies, zeros, combinations, more signals than nodes; in both precisions and directions."""
    dtype = torch.float32 if single else torch.float64
    P, s = problem[0].to(dtype), problem[1].to(dtype)
    exact = oracle(P.to(torch.float64).dense(), s, mu)
    if transposed:
        P, exact = P.T, oracle(P.to(torch.float64).dense().mT, s, mu)
    sol = gd.solve(P, s, mu, solver=BLOCK, on_failure="ignore")
    assert sol.value.isfinite().all()
    size = norm(s.double(), transposed)
    slip = 1e-13 * size / (1 - mu)
    assert (norm(sol.value.double() - exact, transposed) <= sol.error_bound + slip).all()
    tol = 1e-5 if single else 1e-10
    reachable = 5 * torch.as_tensor(P.rounding(torch.float64)) / (1 - mu) <= tol
    assert (sol.converged | ~reachable.reshape(*reachable.shape[:-2], -1)).all()
    assert (sol.error_bound[sol.converged] <= (tol * size)[sol.converged]).all()


@settings(max_examples=100)
@given(blocks(WELL_WEIGHTED, most=5), st.sampled_from([0.3, 0.9, 0.99]), st.integers(1, 5), st.booleans())
def test_theory_5_the_error_is_the_least_of_the_block_krylov_space(problem, mu, steps, transposed):
    """In the energy norm, for each signal; so it is no more than that of CG, whose space is within this."""
    P, s = problem
    P = P.T if transposed else P
    m = torch.full((1, 1), mu, dtype=torch.float64)
    weight = (P.log_degree - P.log_degree.amax(-1, keepdim=True)).exp().unsqueeze(-1)
    A = torch.eye(s.shape[-2], dtype=torch.float64) - mu * P.dense()
    exact = oracle(P.dense(), s, mu)

    def energy(e):
        return (weight * e * (A @ e)).sum(-2).clamp(min=0).sqrt()

    powers = [A @ (exact - s)]
    for _ in range(steps - 1):
        powers.append(A @ powers[-1])
    space, sizes, _ = torch.linalg.svd(torch.cat(powers, -1), full_matrices=False)
    space = torch.where((sizes > 1e-9 * sizes[..., :1]).unsqueeze(-2), space, 0.0)
    image = weight * (A @ space)
    least = space @ torch.linalg.pinv(space.mT @ image, hermitian=True, rtol=1e-12) @ image.mT @ (exact - s)
    never = torch.full((*s.shape[:-2], 1, s.shape[-1]), 1e-300, dtype=torch.float64)
    limit = torch.full_like(never, steps, dtype=torch.int64)
    found = BLOCK.solve(BLOCK.prepare(P, m), (1 - mu) * s, s, never, Limits(limit, Budget()))
    # The last step, x + r, is one of walking: µ times the energy, or less.
    assert (energy(found.x - exact) <= mu * energy(exact - s - least) * (1 + 1e-6) + 1e-11 * energy(s)).all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_signal_takes_more_steps_than_by_cg(dtype, transposed):
    """The bound is not the energy norm, hence two steps of slack."""
    grid = gd.grid_transition(randn(3, 15, 16), beta=0.5)
    W = grid.log_degree.exp().unsqueeze(-1) * grid.dense()
    walks = [
        gd.AttentionTransition(randn(300, 4, dtype=dtype)),
        gd.DenseTransition.from_affinity(((W + W.T) / 2).to(dtype)),
    ]
    for P in walks:
        Q, n = P.T if transposed else P, P.shape[-1]
        for channels, mu in ((2, 0.9), (7, 0.9), (7, 0.99), (20, 0.99)):
            s = randn(n, channels, seed=5, dtype=dtype) ** 3
            block, one_by_one = (gd.solve(Q, s, mu, tol=1e-4, solver=solver) for solver in (BLOCK, CG))
            assert (block.steps <= one_by_one.steps + 2).all(), (P, channels, mu)
            assert channels < 20 or (2 * block.steps < one_by_one.steps).all(), P


def clusters(parts, size):
    """Groups of nodes with weak links of different strengths: as many eigenvalues near 1, the rest near 0."""
    group = torch.arange(parts).repeat_interleave(size)
    g = torch.Generator().manual_seed(3)
    links = 10 ** (-4 + 2 * torch.rand(parts, parts, generator=g, dtype=torch.float64))
    W = (links + links.T).fill_diagonal_(1)[group][:, group]
    noise = torch.rand(len(group), len(group), generator=g, dtype=torch.float64)
    return gd.DenseTransition.from_affinity(W * (1 + 0.1 * (noise + noise.T)))


def test_no_more_outlying_eigenvalues_than_signals_take_few_steps():
    """The other eigenvalues of A lie in [.9, 1.1]: they alone take five or six for these digits."""
    P = clusters(12, 25)
    eigenvalues = torch.linalg.eigvals(P.dense()).real.sort(descending=True).values
    assert (eigenvalues[:12] > 0.8).all()
    assert (eigenvalues[12:].abs() < 0.1).all()
    s = randn(300, 16)
    taken = [gd.solve(P, s, 0.999, tol=1e-8, solver=solver) for solver in (BLOCK, CG)]
    for sol in taken:
        assert sol.converged.all()
    assert (taken[0].steps <= 8).all()
    assert (taken[1].steps >= 20).all()


def test_more_signals_than_nodes_take_one_step():
    P = gd.AttentionTransition(randn(9, 3))
    sol = gd.solve(P, randn(9, 30), 0.95, solver=BLOCK)
    assert sol.converged.all()
    assert (sol.steps == 1).all()


@given(blocks(("symmetric",), most=9), st.integers(0, 2**20))
def test_a_block_is_its_orthonormal_factor_times_its_coordinates(problem, seed):
    Z = problem[1].reshape(-1, *problem[1].shape[-2:])[0]
    Z = Z * 10.0 ** torch.randint(-20, 20, (Z.shape[-1],), generator=torch.Generator().manual_seed(seed))
    weight = 10 ** (-3 * torch.rand(len(Z), 1, generator=torch.Generator().manual_seed(seed))).double()
    Q, sigma = factorised(Z, weight)
    rank = Q.shape[-1]
    assert rank <= min(Z.shape)
    torch.testing.assert_close(Q.T @ (weight * Q), torch.eye(rank).double(), rtol=0, atol=1e-4)
    length = (weight * Z * Z).sum(0).sqrt()
    left = (weight * (Q @ sigma - Z) ** 2).sum(0).sqrt()
    assert (left <= 1e-10 * length).all()


# --- what users see


def test_signals_that_are_done_stand_still_and_help_on():
    """An answer is that after its own steps; one that is exact from the start takes none."""
    P, s, mu = gd.AttentionTransition(1.5 * randn(200, 3)), randn(200, 6), 0.99
    s[:, 1] = 1  # a constant: nothing to do
    start = s.clone()
    start[:, 2] = oracle(P.dense(), s, mu)[:, 2]
    start[:, 3] = start[:, 2] + 1e-6 * randn(200, seed=7)
    s[:, 3] = s[:, 2]
    sol = gd.solve(P, s, mu, solver=BLOCK, initial=start)
    assert sol.converged.all()
    assert (sol.steps[[1, 2]] == 0).all()
    assert (sol.steps[3] > 0) & (sol.steps[3] < sol.steps[[0, 4, 5]].min())
    some = int(sol.steps[3])
    brief = gd.solve(P, s, mu, solver=BLOCK, initial=start, max_steps=some, on_failure="ignore")
    assert brief.converged.tolist() == [False, True, True, True, False, False]
    assert brief.steps.tolist() == [some, 0, 0, some, some, some]
    assert torch.equal(brief.value[:, 1:4], sol.value[:, 1:4])


def test_the_graphs_of_a_batch_do_not_see_each_other():
    """Bits and steps, where ranks and steps differ."""
    # Of odd sizes, so that in a batch they do not all begin at whole lines of memory.
    psi, s = randn(4, 101, 3) * torch.tensor([0.3, 1.0, 2.0, 1.0]).double().reshape(4, 1, 1), randn(4, 101, 7)
    s[1, :, 4:] = s[1, :, :3]
    s[3] = 0
    for dtype in (torch.float32, torch.float64):
        P, signal = gd.AttentionTransition(psi.to(dtype)), s.to(dtype)
        together = gd.solve(P, signal, 0.95, solver=BLOCK)
        assert together.converged.all()
        assert len(set(together.steps.amax(-1).tolist())) > 2
        for i in range(4):
            alone = gd.solve(gd.AttentionTransition(psi[i].to(dtype)), signal[i], 0.95, solver=BLOCK)
            for field in ("value", "lower", "upper", "error_bound", "steps", "matvecs"):
                assert torch.equal(getattr(together, field)[i], getattr(alone, field)), field
    # One walk for signals in a batch, and walks in a batch for one block of signals.
    shared = gd.solve(gd.AttentionTransition(psi[0]), s, 0.9, solver=BLOCK).value
    torch.testing.assert_close(shared, oracle(gd.AttentionTransition(psi[0]).dense(), s, 0.9))
    many = gd.solve(gd.AttentionTransition(psi), s[0], 0.9, solver=BLOCK).value
    torch.testing.assert_close(many[2], oracle(gd.AttentionTransition(psi[2]).dense(), s[0], 0.9))


def test_signals_are_not_solved_some_at_a_time(monkeypatch):
    """On a sparse walk either: a block is the faster, in steps, the wider it is."""
    P, s = gd.grid_transition(randn(3, 12, 15), beta=0.5), randn(180, 10)
    whole = gd.solve(P, s, 0.99, solver=BLOCK)
    monkeypatch.setattr(base, "CACHED", 0)
    monkeypatch.setattr(base, "FEWEST", {torch.float32: 2, torch.float64: 2})
    assert torch.equal(gd.solve(P, s, 0.99, solver=BLOCK).value, whole.value)
    assert (whole.steps < gd.solve(P, s, 0.99, solver=CG).steps).all()


@pytest.mark.parametrize("mu", ["number", "node"])
def test_gradients_of_a_block(mu):
    """Of signals, walk and µ, some signals copies, against autograd through the dense system."""
    psi, s = randn(40, 3), randn(40, 6)
    s[:, 4] = s[:, 0]
    mu = torch.tensor(0.9).double() if mu == "number" else 0.95 * torch.rand(40, 1).double()
    inputs = [x.requires_grad_() for x in (psi, s, mu)]
    y = gd.diffuse(gd.AttentionTransition(psi), s, mu, solver=BLOCK, tol=1e-12)
    exact = oracle(torch.softmax(psi @ psi.T, -1), s, mu)
    cotangent = randn(40, 6, seed=11)
    for got, expected in zip(*(torch.autograd.grad(x, inputs, cotangent) for x in (y, exact)), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-8 * float(expected.abs().max()))


def test_each_node_may_have_a_mu_of_its_own():
    P, s, guess = gd.AttentionTransition(1.5 * randn(300, 3)), randn(300, 5), randn(300, 5, seed=7)
    mu = 1 - 10.0 ** (-3 * torch.rand(300, 1, generator=torch.Generator().manual_seed(3)).double())
    for zeros in (0, 20):
        mu[:zeros] = 0
        for Q, start in ((P, None), (P, guess), (P.T, guess)):
            block, one_by_one = (
                gd.solve(Q, s, mu, tol=1e-8, solver=solver, initial=start) for solver in (BLOCK, CG)
            )
            assert block.converged.all()
            assert (norm(block.value - oracle(Q.dense(), s, mu), Q is not P) <= block.error_bound).all()
            assert (block.steps < 0.8 * one_by_one.steps).all()


def test_disconnected_and_padded_graphs():
    W = torch.rand(60, 60, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    W[:20, 20:] = W[20:, :20] = 0
    P, s = gd.DenseTransition.from_affinity(W + W.T), randn(60, 6)
    s[20:, :3] = 0
    y = gd.diffuse(P, s, 0.99, solver=BLOCK)
    torch.testing.assert_close(y, oracle(P.dense(), s, 0.99), rtol=0, atol=1e-9)
    # Where a signal does not come, rounding of those that do is left.
    assert (y[20:, :3].abs() <= 1e-13).all()
    mask = torch.arange(60).unsqueeze(0) < torch.tensor([[60], [23]])
    psi = randn(2, 60, 3)
    padded = torch.where(mask.unsqueeze(-1), psi, torch.nan)
    sol = gd.solve(gd.AttentionTransition(padded, mask=mask), s.expand(2, 60, 6), 0.99, solver=BLOCK)
    alone = oracle(gd.AttentionTransition(psi[1, :23]).dense(), s[:23], 0.99)
    assert sol.converged.all()
    torch.testing.assert_close(sol.value[1, :23], alone, rtol=0, atol=1e-9)
    assert (sol.value[1, 23:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [40, 150, 250])
@pytest.mark.parametrize("transposed", [False, True])
def test_degrees_that_differ_by_many_orders(dtype, spread, transposed):
    """Beyond what the weights can tell, and directions that float32 cannot hold, Chebyshev goes on."""
    psi = randn(200, 8)
    psi = psi / psi.norm(dim=1, keepdim=True) * torch.linspace(1, spread, 200).double().sqrt()[:, None]
    P, s = gd.AttentionTransition(psi.to(dtype)), randn(200, 6, seed=5, dtype=dtype)
    P = P.T if transposed else P
    for mu in (0.85, 0.99):
        exact = oracle(P.to(torch.float64).dense(), s, mu)
        block, other = (
            gd.solve(P, s, mu, solver=solver, tol=1e-6) for solver in (BLOCK, gd.solvers.Chebyshev())
        )
        assert block.converged.all()
        assert (norm(block.value.double() - exact, transposed) <= block.error_bound).all()
        assert (block.matvecs <= 2 * other.matvecs).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(3, 9))
def test_residuals_that_grow_or_stand_unseen_are_given_up(dtype, seed):
    """Log-degrees spread by 196: what the block makes of the smallest nodes is no start for Chebyshev."""
    psi = randn(40, 3, seed=seed)
    psi = psi / psi.norm(dim=1, keepdim=True) * torch.linspace(1, 196, 40).double().sqrt()[:, None]
    P, s = gd.AttentionTransition(psi.to(dtype)), randn(40, 4, seed=5, dtype=dtype)
    block, other = (gd.solve(P, s, 0.99, solver=solver) for solver in (BLOCK, gd.solvers.Chebyshev()))
    assert block.converged.all()
    assert (block.matvecs < other.matvecs).all()


def test_a_walk_that_is_not_what_it_says_is_not_trusted():
    """A false claim of symmetry ends in a certified answer or a False."""
    g = torch.Generator().manual_seed(3)
    for power in (1, 8):
        W = torch.rand(40, 40, generator=g, dtype=torch.float64) ** power
        P = gd.DenseTransition(W / W.sum(-1, keepdim=True), log_degree=randn(40))
        for Q in (P, P.T):
            s = randn(40, 5)
            sol = gd.solve(Q, s, 0.99, solver=BLOCK, on_failure="ignore")
            error = norm(sol.value - oracle(Q.dense(), s, 0.99), Q is not P)
            assert (error <= sol.error_bound).all()
            assert sol.value.isfinite().all()


def test_directions_without_curvature_are_left_to_chebyshev():
    """Under false degrees ⟨x, Ax⟩ is negative for some x; the walk mixes fast, so that Chebyshev is right."""
    W, degree, s = (
        torch.rand(40, 40, generator=torch.Generator().manual_seed(3)).double(),
        randn(40),
        randn(40, 5),
    )
    P = gd.DenseTransition(W / W.sum(-1, keepdim=True), log_degree=10 * degree)
    weight = (P.log_degree - P.log_degree.max()).exp().unsqueeze(-1)
    energy = weight * (torch.eye(40).double() - 0.9 * P.dense())
    assert torch.linalg.eigvalsh(energy + energy.T)[0] < 0
    sol, other = (gd.solve(P, s, 0.9, solver=solver) for solver in (BLOCK, gd.solvers.Chebyshev()))
    assert sol.converged.all()
    assert (sol.matvecs <= other.matvecs + 15).all()


@pytest.mark.parametrize("size", [1e-300, 1e-170, 1e150, 1e200])
def test_signals_whose_squares_are_no_numbers(size):
    P, s = gd.AttentionTransition(randn(30, 3)), randn(30, 5)
    sol = gd.solve(P, size * s, 0.9, solver=BLOCK)
    assert sol.converged.all()
    torch.testing.assert_close(sol.value / size, oracle(P.dense(), s, 0.9))


# --- in a layer


def test_a_layer_takes_a_block_in_both_directions(monkeypatch):
    """What `Diffusion` does in training: the forward and the backward of many signals."""
    used = []
    solve = gd.solvers.BlockCG.solve

    def watched(self, state, *rest):
        used.append(state.operator.stochastic)
        return solve(self, state, *rest)

    monkeypatch.setattr(gd.solvers.BlockCG, "solve", watched)
    layer = gd.Diffusion([3], embedding_channels=4, solver=BLOCK)
    seed = torch.randn(1, 8, 20, 20, requires_grad=True)
    layer(seed, [torch.randn(1, 3, 20, 20)]).square().sum().backward()
    assert used == ["rows", "columns"]
    assert seed.grad.isfinite().all()


# --- bad input


def test_a_mu_for_each_signal_is_refused():
    P, s = gd.AttentionTransition(torch.zeros(3, 2)), torch.ones(3, 2)
    message = r"solver: BlockCG needs one µ for all signals, got mu of shape \[1, 2\]; use CG\(\)"
    with pytest.raises(ValueError, match=message):
        gd.solve(P, s, torch.tensor([[0.5, 0.5]]), solver=BLOCK)


def test_a_walk_not_known_to_be_reversible_is_refused():
    P = gd.DenseTransition(torch.eye(3))
    assert not applies(BLOCK, P)
    with pytest.raises(ValueError, match="solver: BlockCG needs a walk known to be reversible"):
        gd.solve(P, torch.ones(3, 2), 0.5, solver=BLOCK)
