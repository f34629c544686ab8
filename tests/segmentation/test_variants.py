"""The networks that the paper argues against, and DifNet with one of its parts left out."""

import csv
import math

import pytest
import torch

import graphdiff as gd
import segmentation
from segmentation import engine
from segmentation.config import resolve
from segmentation.errors import UsageError
from segmentation.evaluate import evaluate
from segmentation.models import DifNet, SimDeepLab
from segmentation.train import train
from tests.segmentation.conftest import tiny

VARIANTS = {
    "exact": {"diffusion": "exact"},
    "exact, fixed µ": {"diffusion": "exact", "walks": (0, 3), "fixed_mu": 0.75},
    "none": {"diffusion": "none"},
    "none, no importance": {"diffusion": "none", "importance": False},
    "one P": {"transitions": "last", "walks": (0, 2, 3)},
    "one P, all fixed": {"transitions": "last", "walks": (0,), "fixed_mu": 0.75, "fixed_beta": 1.0},
    "fixed µ": {"fixed_mu": 0.75, "walks": (1, 4)},
    "no identity": {"fixed_beta": 1.0, "walks": (0,)},
    "no importance": {"importance": False, "walks": (4,)},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_every_parameter_of_a_variant_learns(options):
    torch.manual_seed(3)
    model = DifNet("resnet18", 4, **options)
    image = torch.randn(2, 3, 41, 33)
    maps = model(image, return_maps=True)
    assert len(maps.walks) == len(model.steps) == len(model.transitions(image))
    assert {walk.shape for walk in maps.walks} <= {(2, 4, 6, 5)}
    assert maps.logits.shape == (2, 4, 41, 33)
    # At sizes 8k+1 grid point (i, j) lies on pixel (8i, 8j).
    torch.testing.assert_close(maps.logits[..., ::8, ::8], [maps.seed, *maps.walks][-1])
    maps.logits.square().mean().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def pieces(model, image):
    """Seed and outputs of the steps as signals, the operators dense."""
    with torch.no_grad():
        maps = model(image, return_maps=True)
        signals = [y.flatten(2).mT.double() for y in (maps.seed, *maps.walks)]
        return signals[0], signals[1:], [P.dense().double() for P in model.transitions(image)]


def test_exact_is_the_inverse_of_one_matrix_made_of_all_embeddings():
    torch.manual_seed(3)
    image = torch.randn(1, 3, 41, 33)
    model = DifNet("resnet18", 4, diffusion="exact", affinity_scale=0.1, fixed_mu=0.9).eval()
    s, (y,), (P,) = pieces(model, image)
    with torch.no_grad():
        features = model.similarity_features(image)
        assert len(features) == 5
        psi = [embed(f, (6, 5)).psi for embed, f in zip(model.cascade.embeddings, features, strict=True)]
    product = math.prod(torch.exp(0.1 * each @ each.mT).double() for each in psi)
    torch.testing.assert_close(P, product / product.sum(-1, keepdim=True), atol=1e-5, rtol=1e-3)
    exact = 0.1 * torch.linalg.solve(torch.eye(30, dtype=torch.float64) - 0.9 * P, s)
    assert (y - exact).abs().max() <= 1e-3 * s.abs().max()  # the layer's tolerance
    assert (y - s).abs().max() > 0.05 * s.abs().max()


def test_one_p_for_all_steps_is_that_of_the_last_walk():
    torch.manual_seed(3)
    image = torch.randn(1, 3, 41, 33)
    model = DifNet("resnet18", 4, transitions="last", affinity_scale=0.1, fixed_beta=1.0).eval()
    s, walks, operators = pieces(model, image)
    (features,) = model.similarity_features(image)
    assert features.shape[1] == 512
    psi = model.shared(features, (6, 5)).psi
    assert len(operators) == 5
    for P in operators:
        torch.testing.assert_close(P.float(), torch.softmax(0.1 * psi @ psi.mT, -1), atol=1e-6, rtol=1e-4)
    y = s
    for walk in walks:
        y = 0.5 * operators[0] @ y + 0.5 * s  # β = 1: without the identity mapping
        torch.testing.assert_close(walk, y, atol=1e-5, rtol=1e-4)


def test_without_diffusion_the_similarity_branch_is_absent():
    with torch.device("meta"):
        model = DifNet("resnet18", 4, diffusion="none")
        assert len(model.backbones) == 1
        assert (model.cascade, model.similarity_branch, model.coefficients) == (None, None, {})
        # The branch of a shared P reaches as far as its one walk.
        count = [
            sum(p.numel() for p in DifNet("resnet18", 4, transitions="last", walks=w).parameters())
            for w in ((0, 1, 2), (0, 1, 2, 3, 4))
        ]
    assert count[0] < count[1] - 10e6


def test_with_neither_walks_nor_importance_it_is_sim_deeplab():
    torch.manual_seed(3)
    image = torch.randn(1, 3, 41, 33)
    baseline = SimDeepLab("resnet18", 4).eval()
    model = DifNet("resnet18", 4, **VARIANTS["none, no importance"]).eval()
    weights = {f"seed_branch.{name}": w for name, w in baseline.backbone.state_dict().items()}
    model.load_state_dict(weights | {f"score.{name}": w for name, w in baseline.score.state_dict().items()})
    with torch.no_grad():
        assert torch.equal(model(image), baseline(image))


def test_without_importance_the_score_is_the_seed():
    torch.manual_seed(3)
    maps = DifNet("resnet18", 4, importance=False)(torch.randn(2, 3, 33, 33), return_maps=True)
    assert torch.equal(maps.seed, maps.score)
    assert torch.equal(maps.importance, torch.ones(2, 1, 5, 5))


def test_fixed_values_stay_and_learned_ones_have_their_group():
    fixed = {"fixed_mu": 0.75}
    for options, count in (
        ({}, 10), (fixed, 5), ({"fixed_beta": 1.0}, 5), ({"fixed_beta": 1.0} | fixed, 0),
        ({"transitions": "last"}, 10), ({"diffusion": "exact"}, 1), ({"diffusion": "exact"} | fixed, 0),
        ({"diffusion": "none"}, 0),
    ):  # fmt: skip
        config = resolve(options, None)
        with torch.device("meta"):
            model = engine.build_model(config, 3)
        groups = engine.parameter_groups(model, [frozenset() for _ in model.backbones], config)
        assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
        assert len(groups[-1]["params"]) == count
        for name, option in (("mu", "fixed_mu"), ("beta", "fixed_beta")):
            if name in model.coefficients:
                assert model.coefficients[name].requires_grad == (option not in options)


LOGGED = {
    "exact": ["mu_exact", "diagonal_exact", "hub_exact"],
    "none, no importance": [],
    "one P, all fixed": ["mu_0", "beta_0", "diagonal_0", "hub_0"],
}


@pytest.mark.parametrize("variant", LOGGED)
def test_a_variant_trains_is_logged_drawn_saved_and_loaded(variant, tmp_path, capsys):
    run, columns = tmp_path / "run", LOGGED[variant]
    assert train(tiny(run, **VARIANTS[variant], max_steps=1, limit_val_batches=1)) == 0
    told = capsys.readouterr().out
    assert ("walk" in told, "fixed" in told) == (bool(columns), variant == "one P, all fixed")
    assert ("learned, they start at 0.5" in told) == (variant == "exact")
    with open(run / "metrics.csv", newline="") as stream:
        (row,) = csv.DictReader(stream)
    own = [name for name in row if name.split("_")[0] in ("mu", "beta", "diagonal", "hub")]
    assert own == columns
    assert all(0 <= float(row[name]) <= 1 for name in own)
    assert (run / "panel.png").stat().st_size > 10_000

    scores = evaluate(run / "last.safetensors", limit_batches=1, threads=1)
    assert scores.miou == float(row["miou"])
    model, classes, _ = segmentation.load(run / "last.safetensors")
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 33, 33)).shape == (1, len(classes), 33, 33)


def test_walks_that_share_a_p_have_its_health_in_common():
    torch.manual_seed(4)
    model = DifNet("resnet18", 3, **VARIANTS["one P"]).eval()
    columns = engine.walk_columns(model, [(torch.randn(1, 3, 41, 41), None)])
    assert len(columns) == 12
    assert columns["hub_0"] == columns["hub_2"] == columns["hub_3"]
    assert len(set(model.transitions(torch.randn(1, 3, 41, 41)))) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"diffusion": "exact", "transitions": "last"}, "--transitions last belongs to --diffusion casc"),
        ({"diffusion": "exact", "fixed_beta": 1.0}, "diffusion cascade: exact has no β"),
        ({"diffusion": "none", "fixed_beta": 1.0}, "--fixed-beta belongs to --diffusion casc"),
        ({"diffusion": "none", "fixed_mu": 0.5}, "--fixed-mu belongs to --diffusion cascade or exact"),
        ({"diffusion": "none", "walks": "0"}, "--walks belongs to --diffusion cascade or exact: none has no"),
        ({"diffusion": "none", "affinity_scale": 0.5}, "--affinity-scale belongs to --diffusion"),
        ({"diffusion": "none", "similarity_backbone": "resnet34"}, "none has no similarity branch"),
        ({"fixed_mu": 1.0}, r"--fixed-mu 1 would forget the seed: give less, such as 0\.9"),
        ({"fixed_mu": 0.0}, "--fixed-mu 0 would leave the seed as it is: give more, or pass --diff"),
        ({"fixed_beta": 0.0}, "--fixed-beta 0 would leave the seed as it is"),
        ({"fixed_beta": 1.5}, "fixed_beta is 1.5, expected a number of at least 0 and at most 1"),
        ({"diffusion": "inverse"}, "diffusion is 'inverse', expected one of cascade, exact, none"),
        ({"model": "sim-deeplab", "diffusion": "none"}, "--diffusion belongs to --model difnet: "),
        ({"model": "sim-deeplab", "importance": False}, "--no-importance belongs to --model difnet"),
        ({"model": "sim-deeplab", "fixed_mu": 0.5}, "--fixed-mu belongs to --model difnet"),
    ],
)  # fmt: skip
def test_options_without_use_are_refused(flags, message):
    with pytest.raises(UsageError, match=message) as caught:
        resolve(flags, None)
    assert "\n" not in str(caught.value)


def test_deterministic_algorithms_on_a_gpu_ask_which_maps_are_pooled():
    cuda = torch.device("cuda")
    for flags in ({"transitions": "last"}, {"diffusion": "none"}, {"diffusion": "exact", "walks": "2,3"}):
        engine.check_device(resolve({"deterministic": True, **flags}, None), cuda, 1)
    with pytest.raises(UsageError, match="walks 0 and 1 pool adaptively"):
        engine.check_device(resolve({"deterministic": True, "diffusion": "exact"}, None), cuda, 1)


def test_files_from_before_the_options_are_read():
    config = resolve({}, None)
    old = {k: v for k, v in config.as_dict().items() if k not in ("diffusion", "fixed_mu", "importance")}
    assert type(config).from_dict(old, "an old file") == config
    assert isinstance(engine.build_model(config, 3).cascade, gd.CascadedWalk)
