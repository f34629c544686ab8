"""The scripts of examples/: each runs here with its own options, made small, and says what it should."""

import ast
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = {path.stem: path for path in sorted((ROOT / "examples").glob("*.py"))}
DATA = Path(os.environ.get("GRAPHDIFF_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture
def run(capsys):
    """Run an example as `python examples/NAME.py ARGUMENTS` would, and return what it prints."""

    def run(name, *arguments):
        main = runpy.run_path(str(EXAMPLES[name]))["main"]
        main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    with torch.random.fork_rng():
        yield run


def table(text, first):
    """Rows of numbers of the table whose rows match `first`, as lists of floats."""
    numbers = r"[-+]?\d+\.?\d*(?:e[-+]\d+)?"
    return [
        [float(x) for x in re.findall(numbers, line)] for line in text.splitlines() if re.match(first, line)
    ]


def picture(file):
    """A PNG that is small enough for the documents."""
    return file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size < 200_000


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_script_is_short_explains_itself_and_imports_matplotlib_on_use(name, capsys):
    text = EXAMPLES[name].read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert len(text.splitlines()) < 150
    assert f"python examples/{name}.py" in ast.get_docstring(tree)
    top = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    top |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert not any(module.split(".")[0] == "matplotlib" for module in top)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES[name]))["main"](["--help"])
    assert ended.value.code == 0
    assert f"python examples/{name}.py" in capsys.readouterr().out
    assert f"`{name}.py" in (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")


def test_as_a_program_from_another_folder(tmp_path):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES["diffuse"]), "--mu", "0.9"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert len(table(done.stdout, r" +0\.9 ")) == 1


def test_diffuse(run, tmp_path):
    out = run("diffuse", "--out", tmp_path / "diffused.png")
    rows = table(out, r" +0")
    assert [row[0] for row in rows] == [0, 0.9, 0.99, 0.999]
    right = [row[1] for row in rows]
    assert right == sorted(right)
    assert right[0] < 70
    assert right[-1] > 99
    assert picture(tmp_path / "diffused.png")


def test_convergence(run, tmp_path):
    out = run(
        "convergence",
        "--mu",
        0.9,
        "--walks",
        1,
        5,
        "--nodes",
        100,
        "--steps",
        40,
        "--out",
        tmp_path / "c.png",
    )
    for mu, T, walk, walks, chebyshev, chebyshevs, sigmoid, free, products in table(out, r" +0\.9"):
        assert walk < walks
        assert abs(walks - mu**T) < 1e-2 * walks
        assert chebyshev < chebyshevs
        assert sigmoid < 1.1 * walk
        assert free < 1.1 * min(walk, chebyshev)
        assert 10 < products < 40
    assert abs(chebyshevs - 0.0756) < 1e-4  # theory 7: five steps at µ = .9
    assert free < 0.5 * min(walk, chebyshev)
    assert picture(tmp_path / "c.png")


def test_strokes(run, tmp_path):
    out = run("strokes", "--out", tmp_path / "s.png")
    rows = table(out, r" +\d ")
    assert [row[0] for row in rows] == [1, 2, 3]
    assert sum(row[2] for row in rows) == 120**2
    assert all(sure == pixels for _, _, pixels, sure in rows)
    assert float(re.search(r"right: ([\d.]+)", out)[1]) > 99
    assert picture(tmp_path / "s.png")


def test_strokes_on_ones_own_image(run, tmp_path):
    from PIL import Image

    image = np.zeros((20, 30, 3), dtype=np.uint8)
    image[:, 15:] = 200
    Image.fromarray(image).save(tmp_path / "photo.png")
    strokes = np.zeros((20, 30), dtype=np.uint8)
    strokes[5, 2:6], strokes[15, 22:26] = 4, 9
    np.save(tmp_path / "strokes.npy", strokes)
    Image.fromarray(strokes).save(tmp_path / "strokes.png")
    for file in ("strokes.npy", "strokes.png"):
        out = run("strokes", "--image", tmp_path / "photo.png", "--strokes", tmp_path / file)
        assert table(out, r" +\d ") == [[4, 4, 300, 300], [9, 4, 300, 300]]
    with pytest.raises(SystemExit):
        run("strokes", "--image", tmp_path / "photo.png")


@pytest.fixture
def citations(tmp_path):
    """Three groups that cite one another rarely, and use words of their own; in the layout of cora.npz."""
    rng = np.random.default_rng(0)
    y = np.arange(150) % 3
    src, dst = np.triu_indices(150, 1)
    kept = rng.random(len(src)) < np.where(y[src] == y[dst], 0.08, 0.01)
    words = rng.random((150, 30)) < np.where(np.arange(30) % 3 == y[:, None], 0.3, 0.1)
    words[:, 0] |= ~words.any(1)
    indices = np.nonzero(words)[1]
    file = tmp_path / "citations.npz"
    np.savez(
        file,
        **{"src": src[kept], "dst": dst[kept], "num_nodes": 150, "directed": False, "y": y},
        **{"train_idx": np.arange(15), "val_idx": np.arange(15, 60), "test_idx": np.arange(60, 150)},
        x_data=np.ones(len(indices), np.float32),
        x_indices=indices,
        x_indptr=np.concatenate([[0], words.sum(1).cumsum()]),
        x_shape=np.array([150, 30]),
    )
    return file


def test_ppnp(run, citations):
    out = run("ppnp", citations, "--seeds", 2, "--epochs", 30)
    appnp, exact, learned, spreading = (
        [float(x) for x in re.findall(r"\d+\.\d+", line)] for line in out.splitlines()[1:]
    )
    assert appnp[-1] == exact[-1] == spreading[-1] == 0.9
    assert learned[-1] != 0.9
    assert min(appnp[0], exact[0], learned[0], spreading[0]) > 60  # a guess is right one time in three


def test_ppnp_approaches_its_limit(run, citations):
    """With as many power steps as it takes, APPNP and PPNP are one model and train alike."""
    out = run("ppnp", citations, "--seeds", 2, "--epochs", 20, "--power-steps", 80, "--mu", 0.8)
    appnp, exact = (float(re.search(r"(\d+\.\d) ±", line)[1]) for line in out.splitlines()[1:3])
    assert abs(appnp - exact) < 1.2  # one test node of 90


def test_ppnp_says_what_a_file_lacks(run, tmp_path):
    np.savez(tmp_path / "bare.npz", src=[0], dst=[1], num_nodes=2, directed=False)
    with pytest.raises(SystemExit, match="has no y, train_idx, val_idx, test_idx, x_indptr"):
        run("ppnp", tmp_path / "bare.npz")


@pytest.fixture
def cora():
    file = DATA / "graphs" / "cora.npz"
    if not file.is_file():
        pytest.skip(f"no real data: {file} does not exist (name the folder of data as GRAPHDIFF_DATA)")
    return file


def test_ppnp_on_cora(run, cora):
    out = run("ppnp", cora, "--seeds", 1, "--epochs", 10)
    assert len(out.splitlines()) == 5
    assert float(re.search(r"label spreading +([\d.]+)", out)[1]) > 70  # no network: not made small


@pytest.mark.parametrize("directed", [False, True])
def test_ranks(run, tmp_path, directed):
    if directed:
        nodes = np.arange(300)
        np.savez(
            tmp_path / "web.npz",
            src=np.concatenate([nodes, nodes]),
            dst=np.concatenate([(nodes + 1) % 300, (7 * nodes + 2) % 300]),
            num_nodes=300,
            directed=True,
        )
        out = run("ranks", "--graph", tmp_path / "web.npz", "--source", 5, "--k", 4)
    else:
        out = run("ranks", "--nodes", 3000, "--edges", 12000, "--k", 4)
    rows = table(out, r" +\d+ +\d+ 0|    \d")
    assert [row[0] for row in rows] == [1, 2, 3, 4]
    for _, _, y, low, high, whole in rows:
        assert low <= y * (1 + 1e-6)
        assert y <= high * (1 + 1e-6)
        assert abs(whole - y) < 1e-4
    if directed:
        with np.load(tmp_path / "web.npz") as web:
            step = np.zeros((300, 300))
            np.add.at(step, (web["src"], web["dst"]), 1)  # an edge given twice counts twice
        step /= step.sum(1, keepdims=True)
        exact = np.linalg.solve(np.eye(300) - 0.85 * step.T, 0.15 * np.eye(300)[5])
        for rank, (_, node, _, low, high, whole) in enumerate(rows):
            true = exact[int(node)]
            assert low <= true * (1 + 1e-8)
            assert true <= high * (1 + 1e-8)
            assert abs(whole - true) < 2e-7
            assert true > np.sort(exact)[-1 - rank] - 1e-6


def test_own_operator(run):
    out = run("own_operator", "--moments", 10, "--places", 60)
    assert out.count("≤ bound") == 4
    assert "600 nodes in float32" in out
    assert "NOT converged" not in out


def test_own_solver(run):
    out = run("own_solver", "--side", 9, "--mu", 0.9)
    counts = {line.split()[1]: int(line.split()[2]) for line in out.splitlines() if line.startswith("   0.9")}
    assert counts["HeavyBall"] < counts["Walk"] / 2
    assert "not converged" in out.splitlines()[-1]
    assert "the solver stopped short" in out.splitlines()[-1]


def test_which_mu(run, tmp_path):
    out = run("which_mu", "--points", 400, "--measured", 200, "--values", 6, "--out", tmp_path / "mu.png")
    rows = table(out, r" 0\.\d")
    assert len(rows) == 6
    best = min(rows, key=lambda row: row[3])
    assert any(f"{best[0]:.5f}" in line for line in out.splitlines() if "chosen" in line)
    path, alone = (int(x) for x in re.search(r"products: (\d+) for the path, (\d+)", out).groups())
    assert path < alone / 2
    assert picture(tmp_path / "mu.png")


@pytest.mark.parametrize("network", ["torchvision", "timm"])
def test_refine(run, network):
    out = run("refine", "--network", network, "--steps", 2, "--more-steps", 2, "--images", 8)
    scores = refined(out)
    assert [len(row) for row in scores.values()] == [1, 1, 2, 2]
    assert all(0 < x < 100 for row in scores.values() for x in row)


def refined(out):
    """mIoU of each row of refine.py: of the new layers alone, where there are any, and of everything."""
    rows = {line.split()[0]: re.findall(r"\d+\.\d\d(?!\d)", line) for line in out.splitlines()[3:]}
    assert list(rows) == ["before", "alone", "CascadedWalk", "Diffusion"]
    return {name: [float(x) for x in row] for name, row in rows.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(EXAMPLES) - {"ppnp", "refine"}))
def test_at_full_size(run, name):
    assert run(name)


@pytest.mark.slow
def test_ppnp_at_full_size(run, cora):
    out = run("ppnp", cora)
    accuracy = [float(x) for x in re.findall(r"(\d+\.\d) ±", out)]
    assert len(accuracy) == 3
    assert min(accuracy) > 77
    assert max(accuracy[:2]) > 81


@pytest.mark.slow
@pytest.mark.parametrize("network", ["torchvision", "timm"])
def test_refine_at_full_size(run, network):
    scores = refined(run("refine", "--network", network))
    before = scores.pop("before")[0]
    assert before > 20  # all ground would be some 12
    assert all(row[-1] > before + 2 for row in scores.values())
