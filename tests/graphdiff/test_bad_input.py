"""Bad input: refused at the door, saying what was given, what is allowed and what to do."""

import networkx
import numpy
import pytest
import scipy.sparse
import torch

import graphdiff as gd

P = gd.AttentionTransition(torch.randn(4, 2))
D = gd.DenseTransition(torch.full((2, 2), 0.5))
S = torch.randn(4, 3)


def raises(error, message):
    return pytest.raises(error, match=message)


@pytest.mark.parametrize(
    ("s", "error", "message"),
    [
        (
            torch.randn(5, 3),
            ValueError,
            r"s: expected shape \[..., N, K\] or \[N\] with N = 4 .* got \[5, 3\]",
        ),
        (torch.randn(3), ValueError, r"N = 4 nodes .* got \[3\]$"),
        (torch.randn(2, 2), ValueError, r"got \[2, 2\]; a map of pixels is a signal as s.flatten\(\)$"),
        (torch.randn(1, 2, 2), ValueError, r"got \[1, 2, 2\]; a map of pixels is a signal as s.flatten"),
        (torch.randn(3, 2, 2), ValueError, r"\[3, 2, 2\]; maps .* as s.flatten\(-2\).mT$"),
        (torch.randn(3, 3, 2), ValueError, r"got \[3, 3, 2\]$"),
        (torch.tensor(1.0), ValueError, r"got \[\]"),
        (torch.randn(4, 0), ValueError, r"K ≥ 1, got \[4, 0\]"),
        (
            torch.ones(4, 3, dtype=torch.int64),
            TypeError,
            r"s: .* got torch.int64; convert it with s.float\(\)",
        ),
        (torch.ones(4, 3, dtype=torch.bool), TypeError, r"got torch.bool"),
        (torch.randn(4, 3, dtype=torch.complex64), TypeError, r"real floating-point"),
        (torch.randn(4, 3).double(), TypeError, r"s: expected dtype torch.float32 like P, got torch.float64"),
        (torch.randn(4, 3, device="meta"), ValueError, r"s: expected device cpu like P, got meta"),
        (torch.full((4, 3), torch.nan), ValueError, r"s: expected finite values, got 12 .* of 12"),
        ([1.0, 2.0], TypeError, r"s: expected a torch.Tensor, got list; use torch.as_tensor"),
    ],
)
def test_signals(s, error, message):
    with raises(error, message):
        gd.solve(P, s, 0.5)


@pytest.mark.parametrize(
    ("mu", "error", "message"),
    [
        (1.0, ValueError, r"mu: expected 0 ≤ µ < 1, got values from 1 to 1; at µ = 1 the system is singular"),
        (-0.1, ValueError, r"got values from -0.1"),
        (float("nan"), ValueError, r"expected 0 ≤ µ < 1"),
        (torch.tensor([[0.5, 1.5, 0.1]]), ValueError, r"from 0.1 to 1.5"),
        (torch.rand(3), ValueError, r"shape \[3\] is ambiguous; give \[1, 3\] .*mu.unsqueeze\(0\)"),
        (torch.rand(4), ValueError, r"or \[4, 1\] for one per node \(mu.unsqueeze\(-1\)\)"),
        (torch.rand(4, 3), ValueError, r"expected a number, a 0-d tensor, .* got \[4, 3\]"),
        (torch.rand(5, 1, 3), ValueError, None),
        (torch.tensor(1), TypeError, r"mu: .* got torch.int64"),
        (
            torch.tensor(0.5, device="meta"),
            ValueError,
            r"mu: expected device cpu like the operator, got meta",
        ),
        ("0.5", TypeError, r"mu: expected a number or a tensor, got str"),
        (True, TypeError, r"got bool"),
    ],
)
def test_mu(mu, error, message):
    with raises(error, message):
        gd.solve(P, torch.randn(2, 4, 3), mu)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tol": 0.0}, ValueError, r"tol: expected a finite number > 0, got 0.0"),
        ({"max_steps": 0}, ValueError, r"max_steps: expected an integer ≥ 1, got 0"),
        ({"max_steps": 2.5}, ValueError, r"max_steps: expected an integer"),
        ({"on_failure": "explode"}, ValueError, r"""expected "warn", "raise" or "ignore", got 'explode'"""),
        ({"solver": "walk"}, TypeError, r"solver: expected a solver such as solvers.Walk\(\), got 'walk'"),
        ({"initial": torch.randn(5, 3)}, ValueError, r"initial: expected shape .* N = 4"),
        (
            {"initial": torch.randn(2, 4, 3)},
            ValueError,
            r"initial: expected shape \[4, 3\] like s, got \[2, 4, 3\]",
        ),
        ({"initial": S.double()}, TypeError, r"initial: expected dtype torch.float32"),
    ],
)
def test_options_of_solve(options, error, message):
    with raises(error, message):
        gd.solve(P, S, 0.5, **options)


CALLS = [
    lambda given: gd.solve(given, S, 0.5),
    lambda given: gd.solve_path(given, S, [0.5]),
    lambda given: gd.solve_symmetric(given, S, 0.5),
    lambda given: gd.minimize_energy(given, S, 0.5),
    lambda given: gd.energy(given, S, S, 0.5),
    lambda given: gd.heat_kernel(given, S, 1.0),
    lambda given: gd.polynomial(given, S, [1.0]),
    lambda given: gd.harmonic(given, S, torch.ones(4, dtype=torch.bool)),
    lambda given: gd.estimate(given, 0.5),
    gd.pagerank,
    lambda given: gd.top_k(given, 0, 1),
]
NO_TRANSITIONS = [
    (scipy.sparse.eye_array(4), r"dia_array; .* with SparseTransition.from_scipy\(W\)$"),
    (scipy.sparse.csr_matrix((4, 4)), r"csr_matrix; .* with SparseTransition.from_scipy\(W\)$"),
    (networkx.star_graph(3), r"Graph; .* with SparseTransition.from_networkx\(G\)$"),
    (networkx.DiGraph([(0, 1)]), r"DiGraph; .* with SparseTransition.from_networkx\(G\)$"),
    (torch.eye(4).to_sparse(), r"Tensor; .* with SparseTransition.from_torch\(W\)$"),
    (torch.eye(4).to_sparse_csr(), r"Tensor; .* with SparseTransition.from_torch\(W\)$"),
    (
        numpy.eye(4),
        r"ndarray; make it a tensor with torch.as_tensor, then wrap a matrix with DenseTransition",
    ),
    (torch.eye(4), r"Tensor; .* DenseTransition\(P\), .*from_edge_index\(edges\), .*Attention\w+\(psi\)$"),
    (None, r"NoneType; wrap a matrix with DenseTransition"),
]


def test_operator_arguments_of_solve():
    with raises(TypeError, r"P: expected a Transition, got Tensor; wrap a matrix with DenseTransition\(P\)"):
        gd.solve(torch.eye(4), S, 0.5)
    for call in CALLS:
        for given, message in NO_TRANSITIONS:
            with raises(TypeError, r"P: expected a Transition, got " + message):
                call(given)
    with raises(ValueError, r"the tensors of AttentionTransition: expected finite values"):
        gd.solve(gd.AttentionTransition(torch.full((4, 2), torch.inf)), S, 0.5)
    with raises(ValueError, r"P, s and mu: expected leading dimensions that broadcast, got \[2\] and \[3\]"):
        gd.solve(gd.AttentionTransition(torch.randn(2, 4, 2)), torch.randn(3, 4, 1), 0.5)


@pytest.mark.parametrize(
    ("W", "error", "message"),
    [
        (
            torch.tensor([[1.0, -2.0], [1.0, 1.0]]),
            ValueError,
            r"W: expected values ≥ 0, got a smallest value of -2",
        ),
        (
            torch.tensor([[1.0, torch.inf], [1.0, 1.0]]),
            ValueError,
            r"W: expected finite values, got 1 .* of 4",
        ),
        (torch.tensor([[1.0, torch.nan], [1.0, 1.0]]), ValueError, r"W: expected finite values"),
        (torch.tensor([[1.0, 1.0], [0.0, 0.0]]), ValueError, r"W: row 1 is all zero, .* a self-loop"),
        (torch.ones(2, 3), ValueError, r"W: expected shape \[..., N, N\] with N ≥ 1, got \[2, 3\]"),
        (torch.ones(0, 0), ValueError, r"N ≥ 1, got \[0, 0\]"),
        (torch.ones(3), ValueError, r"got \[3\]"),
        (torch.ones(2, 2, dtype=torch.int32), TypeError, r"W: .* got torch.int32"),
    ],
)
def test_affinities(W, error, message):
    with raises(error, message):
        gd.DenseTransition.from_affinity(W)


def test_dense_transitions():
    with raises(ValueError, r"P: expected rows that sum to 1 within .*, got one that sums to 0.9; normalise"):
        gd.DenseTransition(torch.tensor([[0.5, 0.5], [0.5, 0.4]]))
    with raises(ValueError, r"P: expected values ≥ 0"):
        gd.DenseTransition(torch.tensor([[1.5, -0.5], [0.5, 0.5]]))
    with raises(ValueError, r"log_degree: expected shape \[2\], got \[3\]"):
        gd.DenseTransition(torch.full((2, 2), 0.5), log_degree=torch.zeros(3))


def test_attention_transitions():
    with raises(ValueError, r"psi: expected shape \[..., N, d\] with N ≥ 1 and d ≥ 1, got \[3\]"):
        gd.AttentionTransition(torch.randn(3))
    with raises(ValueError, r"N ≥ 1 and d ≥ 1, got \[0, 3\]"):
        gd.AttentionTransition(torch.randn(0, 3))
    with raises(TypeError, r"psi: expected a real floating-point tensor, got torch.int64"):
        gd.AttentionTransition(torch.ones(3, 2, dtype=torch.int64))
    for scale in (0.0, -1.0, float("inf")):
        with raises(ValueError, r"scale: expected a finite number > 0"):
            gd.AttentionTransition(torch.randn(3, 2), scale=scale)


def test_products_and_rows():
    with raises(TypeError, r"y: expected dtype torch.float32 like the operator, got torch.float64"):
        P @ S.double()
    with raises(ValueError, r"y: expected shape .* N = 4"):
        P @ torch.randn(3)
    with raises(ValueError, r"y: expected device cpu"):
        D @ torch.randn(2, device="meta")
    with raises(IndexError, r"index: expected nodes 0 to 3, got \[4\]"):
        P.rows([4])
    with raises(IndexError, r"index: expected nodes 0 to 3, got \[-1\]"):
        P.rows([-1])
    with raises(ValueError, r"index: expected a list or 1-d tensor of node numbers, got torch.float32"):
        P.rows(torch.tensor([0.0]))


# --- modules


def test_cascade_construction():
    with raises(ValueError, r"expected either feature_channels, .* or steps, .* got feature_channels=None"):
        gd.CascadedWalk()
    with raises(ValueError, r"number of walks: expected an integer ≥ 1, got 0"):
        gd.CascadedWalk([])
    with raises(ValueError, r"mu: expected a number between 0 and 1, both excluded, got 1.0"):
        gd.CascadedWalk([3], mu=1.0)
    with raises(ValueError, r"mu: expected 0 ≤ number < 1, got 1.0"):
        gd.CascadedWalk([3], mu=1.0, learn_mu=False)
    with raises(ValueError, r"beta: expected 0 ≤ number ≤ 1, got 1.5"):
        gd.CascadedWalk([3], beta=1.5, learn_beta=False)
    with raises(ValueError, r"init_gain: expected a finite number > 0"):
        gd.CascadedWalk([3], init_gain=0.0)
    with raises(ValueError, r"embedding_channels: expected an integer ≥ 1"):
        gd.CascadedWalk([3], 0)


def test_cascade_inputs():
    model = gd.CascadedWalk([3, 5], 4)
    image, deep, seed = torch.randn(2, 3, 8, 8), torch.randn(2, 5, 4, 4), torch.randn(2, 7, 4, 4)
    with raises(ValueError, r"features: expected 2, one per walk, got 1"):
        model(seed, [image])
    with raises(
        ValueError, r"features: expected maps \[B, 3, H, W\] or node features \[B, N, 3\], got \[2, 5, 4, 4\]"
    ):
        model(seed, [deep, deep])
    with raises(ValueError, r"seed: expected a map \[B, K, h, w\] or node values \[B, N, K\]"):
        model(seed[0, 0], [image, deep])
    with raises(ValueError, r"features: expected node features .* with a seed of shape \[2, 16, 7\]"):
        model(seed.flatten(2).mT, [image, deep])
    with raises(TypeError, r"seed: expected a real floating-point tensor, got torch.int64"):
        model(seed.long(), [image, deep])
    with raises(TypeError, r"seed: expected dtype torch.float32 like the features, got torch.float64"):
        model(seed.double(), [image, deep])
    with raises(ValueError, r"features and seed: expected leading dimensions that broadcast"):
        model(seed, [image.repeat(3, 1, 1, 1), deep.repeat(3, 1, 1, 1)])
    with raises(ValueError, r"seed: expected one value per node of the walk, which has 2, got 16 nodes"):
        gd.CascadedWalk(steps=1)(seed, [D])
    with raises(ValueError, r"made with steps=, so give it ready transitions"):
        gd.CascadedWalk(steps=2)(seed, [image, deep])


@pytest.mark.parametrize("module", [gd.CascadedWalk, gd.Diffusion])
def test_what_networks_hand_out_and_modules_do_not_take(module):
    refine = module(feature_channels=[3], embedding_channels=4)
    seed, image = torch.randn(1, 2, 3, 3), torch.randn(1, 3, 9, 9)
    with raises(TypeError, r"seed: expected a torch.Tensor, got dict; take one of \['out', 'aux'\]"):
        refine({"out": seed, "aux": seed}, [image])
    with raises(TypeError, r"features: expected a list .*, got dict; give list\(features.values\(\)\)"):
        refine(seed, {"out": image})
    with raises(TypeError, r"features: expected a list .*, got Tensor; give \[features\]"):
        refine(seed, image)
    with raises(TypeError, r"features: expected dtype torch.float32 like the weights .*, got torch.float64"):
        refine(seed.double(), [image.double()])
    with raises(TypeError, r"features: expected a real floating-point tensor, got torch.uint8"):
        refine(seed, [image.byte()])
    with torch.autocast("cpu", dtype=torch.bfloat16):  # casts by itself
        assert refine(seed, [image.bfloat16()]).shape == seed.shape
    for given in (3, "rgb"):
        with raises(TypeError, r"feature_channels: expected a list of numbers, one for each feature, got"):
            module(feature_channels=given)
    with raises(ValueError, r"feature_channels: expected an integer ≥ 1, got 0"):
        module(feature_channels=[3, 0])
