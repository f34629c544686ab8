"""Bad graphs, images and functions: refused when the operator is made."""

import pytest
import torch

import graphdiff as gd

from_edges = gd.SparseTransition.from_edge_index
EDGES = torch.tensor([[0, 1, 2], [1, 2, 0]])
INDPTR, INDICES, VALUES = torch.tensor([0, 1, 2]), torch.tensor([1, 0]), torch.ones(2)


def raises(error, message):
    return pytest.raises(error, match=message)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"indptr": [0, 1, 2]}, TypeError, r"indptr: expected a torch.Tensor, got list"),
        (
            {"indptr": INDPTR.float()},
            TypeError,
            r"indptr: expected an int32 or int64 tensor, .* indptr.long\(\)",
        ),
        ({"indices": INDICES.short()}, TypeError, r"indices: expected an int32 or int64 .* got torch.int16"),
        ({"indices": INDICES.int()}, TypeError, r"indices: expected dtype torch.int64 like indptr"),
        ({"values": VALUES.long()}, TypeError, r"values: expected a real floating-point tensor"),
        ({"values": VALUES.to("meta")}, ValueError, r"values: expected device cpu like indptr, got meta"),
        ({"indptr": INDPTR[:1]}, ValueError, r"indptr: expected shape \[N \+ 1\] with N ≥ 1, got \[1\]"),
        ({"indptr": INDPTR.unsqueeze(0)}, ValueError, r"indptr: .* got \[1, 3\]"),
        ({"indptr": torch.tensor([0, 1, 3])}, ValueError, r"indptr: .* rise from 0 to 2, .* got 0 to 3"),
        ({"indptr": torch.tensor([1, 1, 2])}, ValueError, r"indptr: .* got 1 to 2"),
        ({"indptr": torch.tensor([0, 3, 2])}, ValueError, r"indptr: .* smallest step of -1"),
        ({"indices": INDICES[:1]}, ValueError, r"indices: expected shape \[2\], one node per edge"),
        (
            {"values": VALUES.unsqueeze(1)},
            ValueError,
            r"values: expected shape \[2\], one probability per edge",
        ),
        (
            {"indices": torch.tensor([1, 2])},
            ValueError,
            r"indices: .* 0 to 1 for N = 2 nodes, got 2; number the",
        ),
        ({"indices": torch.tensor([-1, 0])}, ValueError, r"indices: .* got -1"),
        ({"values": torch.tensor([1.0, torch.nan])}, ValueError, r"values: expected finite values, got 1"),
        ({"values": torch.tensor([1.0, -1.0])}, ValueError, r"values: expected values ≥ 0, .* value of -1"),
        (
            {"values": torch.tensor([1.0, 0.9])},
            ValueError,
            r"values: expected rows that sum to 1 within .*, got row 1 that sums to 0.9; .*from_scipy",
        ),
        (
            {"dangling": torch.tensor([1])},
            ValueError,
            r"expected rows that sum to 0 .*, got row 1 that sums to 1",
        ),
        ({"dangling": torch.tensor([2])}, ValueError, r"dangling: .* got 2"),
        ({"dangling": torch.tensor([0.0])}, TypeError, r"dangling: expected an int32 or int64"),
        (
            {"jump": torch.full((2,), 0.5)},
            ValueError,
            r"jump: expected dangling=, the nodes that jump, beside it",
        ),
        (
            {"log_degree": torch.zeros(3)},
            ValueError,
            r"log_degree: expected shape \[2\], one degree per node",
        ),
        ({"log_degree": torch.zeros(2).double()}, TypeError, r"log_degree: expected dtype torch.float32"),
    ],
)
def test_ready_matrices(given, error, message):
    with raises(error, message):
        gd.SparseTransition(**{"indptr": INDPTR, "indices": INDICES, "values": VALUES} | given)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"edge_index": EDGES.T}, ValueError, r"edge_index: expected shape \[2, edges\], .* got \[3, 2\]"),
        ({"edge_index": EDGES[0]}, ValueError, r"edge_index: .* got \[3\]"),
        ({"edge_index": EDGES.float()}, TypeError, r"edge_index: expected an int32 or int64"),
        ({"edge_index": EDGES.tolist()}, TypeError, r"edge_index: .* got list; use torch.as_tensor"),
        ({"edge_index": EDGES - 1}, ValueError, r"edge_index: .* from 0 to 1 for N = 2 nodes, got -1"),
        ({"num_nodes": 2}, ValueError, r"edge_index: .* N = 2 nodes, got 2; .* say how many there are"),
        ({"num_nodes": 0}, ValueError, r"num_nodes: expected an integer ≥ 1, got 0"),
        ({"edge_index": EDGES[:, :0]}, ValueError, r"num_nodes: expected a number beside .* without edges"),
        (
            {"weight": torch.ones(2)},
            ValueError,
            r"weight: expected shape \[3\], one weight per edge, got \[2\]",
        ),
        ({"weight": torch.ones(3, 1)}, ValueError, r"weight: .* got \[3, 1\]"),
        ({"weight": torch.ones(3, dtype=torch.int64)}, TypeError, r"weight: .* weight.float\(\)"),
        (
            {"weight": torch.ones(3, device="meta")},
            ValueError,
            r"weight: expected device cpu like edge_index",
        ),
        ({"weight": torch.tensor([1.0, -2.0, 1.0])}, ValueError, r"weight: expected values ≥ 0, .* of -2"),
        ({"weight": torch.tensor([1.0, torch.nan, 1.0])}, ValueError, r"weight: expected finite values"),
        ({"weight": torch.tensor([1.0, torch.inf, 1.0])}, ValueError, r"weight: expected finite values"),
        (
            {"dangling": "restarts"},
            ValueError,
            r"""dangling: expected "self", "uniform", "restart", "error" or .* \[N\], got 'restarts'""",
        ),
        ({"dangling": None}, ValueError, r"dangling: expected .* got None"),
        ({"dangling": torch.ones(2) / 2}, ValueError, r"dangling: expected shape .* N = 3 nodes, got \[2\]"),
        (
            {"dangling": torch.ones(3) / 2},
            ValueError,
            r"dangling: .* sum to 1, got 1.5; divide by dangling.sum",
        ),
        ({"dangling": torch.tensor([2.0, -1.0, 0.0])}, ValueError, r"dangling: expected values ≥ 0"),
        ({"dangling": (torch.ones(3) / 3).double()}, TypeError, r"dangling: expected dtype torch.float32"),
        ({"dangling": torch.ones(3, device="meta")}, ValueError, r"dangling: expected device cpu"),
        (
            {"dtype": torch.int64},
            TypeError,
            r"dtype: expected a real floating-point dtype .*, got torch.int64",
        ),
    ],
)
def test_edge_lists(given, error, message):
    with raises(error, message):
        from_edges(**{"edge_index": EDGES} | given)


def test_nodes_that_must_have_an_edge_out():
    with raises(ValueError, r"dangling: .* got 7 of 8 nodes without, for example \[1, 2, 3, 4, 5\]; choose"):
        from_edges(torch.tensor([[0], [1]]), num_nodes=8, dangling="error")


def test_distributions_to_restart_at():
    P = from_edges(torch.tensor([[0], [1]]), dangling="restart")
    with raises(ValueError, r"distribution: expected shape \[..., N\] with N = 2 nodes, got \[3\]"):
        P.restarting_at(torch.ones(3) / 3)
    with raises(ValueError, r"distribution: expected probabilities that sum to 1, got 2"):
        P.restarting_at(torch.ones(2))


def test_scipy_matrices():
    scipy = pytest.importorskip("scipy.sparse")
    for given, error, message in (
        (torch.eye(2), TypeError, r"A: expected a scipy sparse array or matrix, got Tensor; wrap it with"),
        (scipy.csr_array((2, 3)), ValueError, r"A: expected shape \[N, N\] with N ≥ 1, got \[2, 3\]"),
        (scipy.coo_array((0, 0)), ValueError, r"A: .* got \[0, 0\]"),
        (scipy.coo_array([1.0]), ValueError, r"A: .* got \[1\]"),
        (scipy.csr_array([[1j]]), TypeError, r"A: expected real numbers, got complex128"),
        (scipy.csr_array([[-1.0]]), ValueError, r"A: expected values ≥ 0"),
        (scipy.csr_array([[float("nan")]]), ValueError, r"A: expected finite values"),
    ):
        with raises(error, message):
            gd.SparseTransition.from_scipy(given)


def test_sparse_tensors():
    for given, error, message in (
        (
            torch.eye(2),
            TypeError,
            r"A: expected layout torch.sparse_coo or torch.sparse_csr, got torch.strided",
        ),
        (
            torch.eye(2).to_sparse_csc(),
            TypeError,
            r"got torch.sparse_csc; convert it with A.to_sparse_coo\(\)",
        ),
        (torch.ones(2, 3).to_sparse(), ValueError, r"A: expected shape \[N, N\] with N ≥ 1, got \[2, 3\]"),
        (torch.ones(2, 2, 2).to_sparse(), ValueError, r"A: .* got \[2, 2, 2\]"),
        (torch.eye(2).long().to_sparse(), TypeError, r"A: expected a real floating-point tensor"),
        ((-torch.eye(2)).to_sparse_csr(), ValueError, r"A: expected values ≥ 0"),
        ("A", TypeError, r"A: expected a torch.Tensor, got str"),
    ):
        with raises(error, message):
            gd.SparseTransition.from_torch(given)


def test_networkx_graphs():
    networkx = pytest.importorskip("networkx")
    with raises(TypeError, r"G: expected a networkx graph, got list; for matrices there are from_scipy"):
        gd.SparseTransition.from_networkx([(0, 1)])
    with raises(ValueError, r"the adjacency matrix of G: expected shape \[N, N\] with N ≥ 1, got \[0, 0\]"):
        gd.SparseTransition.from_networkx(networkx.Graph())
    G = networkx.path_graph(2)
    G[0][1]["weight"] = -1
    with raises(ValueError, r"weight: expected values ≥ 0"):
        gd.SparseTransition.from_networkx(G)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            {"image": torch.rand(4, 4)},
            ValueError,
            r"image: expected shape \[C, H, W\] or \[C, D, H, W\], not empty, got \[4, 4\]",
        ),
        ({"image": torch.rand(3, 0, 4)}, ValueError, r"not empty, got \[3, 0, 4\]"),
        ({"image": torch.ones(3, 4, 4, dtype=torch.uint8)}, TypeError, r"image: .* image.float\(\)"),
        ({"image": torch.full((1, 2, 2), torch.nan)}, ValueError, r"image: expected finite values"),
        ({"beta": -1.0}, ValueError, r"beta: expected a finite number ≥ 0, got -1.0"),
        ({"beta": float("inf")}, ValueError, r"beta: expected a finite number ≥ 0"),
        ({"beta": torch.tensor(1.0)}, ValueError, r"beta: expected a finite number ≥ 0"),
        ({"connectivity": 6}, ValueError, r"connectivity: expected 4 or 8, got 6"),
    ],
)
def test_images(given, error, message):
    with raises(error, message):
        gd.grid_transition(**{"image": torch.rand(3, 4, 4)} | given)


def keep(y, *tensors):
    return y


@pytest.mark.parametrize(
    ("matmul", "shape", "options", "error", "message"),
    [
        (keep, 0, {}, ValueError, r"shape: expected N or \[..., N, N\] with N ≥ 1, got 0"),
        (keep, (2, 3), {}, ValueError, r"shape: .* got \(2, 3\)"),
        (keep, (3,), {}, ValueError, r"shape: .* got \(3,\)"),
        (lambda y: 2 * y, 3, {}, ValueError, r"matmul: expected rows that sum to 1, got 2 for node 0"),
        (
            lambda y: y * torch.tensor([[1.0], [0.5], [1.0]]),
            3,
            {},
            ValueError,
            r"got 0.5 for node 1; divide by the product with ones",
        ),
        (lambda y: y * torch.nan, 3, {}, ValueError, r"got nan for node 0"),
        (
            lambda y: y[..., :1],
            3,
            {},
            ValueError,
            r"matmul: expected shape \[3, 2\], that of y, got \[3, 1\]",
        ),
        (
            lambda y: y.double(),
            3,
            {},
            TypeError,
            r"matmul: expected a tensor of y's dtype, torch.float32, got",
        ),
        (lambda y: y.numpy(), 3, {}, TypeError, r"got ndarray; hand it its tensors through tensors="),
        (keep, 3, {"tensors": [1.0]}, TypeError, r"tensors\[0\]: expected a torch.Tensor, got float"),
        (
            keep,
            3,
            {"tensors": [torch.ones(1), torch.ones(1).double()]},
            TypeError,
            r"tensors\[1\]: expected dtype torch.float32 like the operator",
        ),
        (
            keep,
            3,
            {"tensors": [torch.ones(1), torch.ones(1, device="meta")]},
            ValueError,
            r"tensors\[1\]: expected device cpu",
        ),
        (
            keep,
            3,
            {"tensors": [torch.ones(1)], "dtype": torch.float32},
            ValueError,
            r"those of the tensors hold",
        ),
        (keep, 3, {"dtype": torch.int64}, TypeError, r"dtype: expected a real floating-point"),
        (keep, 3, {"log_degree": torch.zeros(2)}, ValueError, r"log_degree: expected shape \[3\]"),
        (keep, 3, {"positive_semidefinite": True}, ValueError, r"expected log_degree beside it, got None"),
    ],
)
def test_functions(matmul, shape, options, error, message):
    with raises(error, message):
        gd.FunctionTransition(matmul, shape, **options)
