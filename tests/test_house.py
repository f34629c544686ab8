"""The house: which file may import which, what an import needs, and what the wheel holds."""

import ast
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Ground floor first: each line may import only lines above it; files of one line, only what is listed
# before them in the same line.
FLOORS = {
    "graphdiff": [
        ["checks", "solution", "memory"],
        [
            "operators.compiled",
            "operators.lanes",
            "operators.rows",
            "operators.threads",
            "operators.edges",
            "operators.vectors",
            "operators.products",
            "operators.tiles",
            "operators.strips",
            "operators.fused",
            "operators.base",
            "operators.held",
            "operators.dense",
            "operators.neighbours",
            "operators.sparse",
            "operators.attention",
            "operators.grid",
            "operators.function",
            "operators.permutohedral",
            "operators",
        ],
        [
            "solvers.evidence",
            "solvers.base",
            "solvers.direct",
            "solvers.walk",
            "solvers.chebyshev",
            "solvers.cg",
            "solvers.triangles",
            "solvers.groups",
            "solvers.starts",
            "solvers.sweeps",
            "solvers.ssor",
            "solvers.directed_sweeps",
            "solvers.directed_ssor",
            "solvers.block_cg",
            "solvers.mixed_precision",
            "solvers.multigrid",
            "solvers.bicgstab",
            "solvers.push",
            "solvers.ranks",
            "solvers.localsor",
            "solvers.auto",
            "solvers.shifted",
            "solvers",
        ],
        ["estimate", "implicit"],
        ["diffusion"],
        ["energy", "ranking", "topk", "filters", "boundary"],
        ["nn.embedding", "nn.seed", "nn.padding", "nn.cascade", "nn.diffusion", "nn"],
        [""],
    ],
    "segmentation": [
        ["errors", "files", "processes", "commandline"],
        ["data", "data.transforms", "data.shapes", "data.labels", "data.folder"],
        ["data.voc", "data.archives", "data.sbd", "data.coco", "data.context", "data.loader"],
        [
            "models.backbone",
            "models.fcn",
            "models.heads",
            "models.deeplab",
            "models.difnet",
            "models.multiscale",
            "models",
        ],
        ["metrics", "boundary", "fragments", "crf"],
        ["config"],
        ["checkpoint", "rundir", "progress", "figures", "figures.drawing", "figures.panel", "images"],
        ["engine", "timing"],
        ["trainer"],
        ["inference"],
        [""],
        ["prepare", "train", "evaluate", "predict"],
        ["figures.inputs", "figures.maps", "figures.transitions", "figures.walks", "figures.coefficients"],
        ["figures.times", "figures.explore", "figures.__main__"],
    ],
}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, known: set[str]) -> set[str]:
    """Our own modules that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} & known or {node.module}
    return {name for name in found if name.split(".")[0] in FLOORS}


@pytest.mark.parametrize("package", FLOORS)
def test_imports_go_down_only(package):
    order = [f"{package}.{name}".rstrip(".") for floor in FLOORS[package] for name in floor]
    files = {module_of(path): path for path in sorted((ROOT / package).rglob("*.py"))}
    assert sorted(files) == sorted(order), "a file has no floor: give it one in FLOORS"
    for module, path in files.items():
        for imported in imports_of(path, set(order)):
            if imported.split(".")[0] == package:
                assert imported in order, f"{module} imports {imported}, which is no module"
                assert order.index(imported) < order.index(module), f"{module} may not import {imported}"
            else:
                assert (package, imported) == ("segmentation", "graphdiff"), (
                    f"{module} imports {imported}: segmentation uses graphdiff's public names, and "
                    "graphdiff knows nothing of segmentation"
                )


def test_graphdiff_imports_with_torch_and_numpy_alone():
    script = """
        import sys
        forbidden = {"scipy", "torchvision", "timm", "lightning", "torchmetrics", "safetensors", "typer",
                     "yaml", "tqdm", "matplotlib", "PIL", "hypothesis", "numba", "segmentation"}
        class Without:
            def __init__(self, finder):
                self.finder = finder
            def find_spec(self, name, path=None, target=None):
                absent = name.split(".")[0] in forbidden
                return None if absent else self.finder.find_spec(name, path, target)
        sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
        import torch, graphdiff as gd
        print(gd.diffuse(gd.AttentionTransition(torch.zeros(2, 1)), torch.tensor([0., 1.]), 0.5))
        print(sorted(forbidden & {name.split(".")[0] for name in sys.modules}))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["tensor([0.2500, 0.7500])", "[]"]


def test_the_wheel_installs_elsewhere(tmp_path):
    """Built, installed into an empty folder and imported from there, not from the checkout."""
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "-w", str(tmp_path), str(ROOT)], check=True, timeout=200, cwd=tmp_path)
    (wheel,) = tmp_path.glob("graphdiff-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    for needed in (
        "graphdiff/py.typed",
        "segmentation/py.typed",
        "segmentation/configs/shapes.yaml",
        "segmentation/configs/paper/voc-difnet-50.yaml",
        "segmentation/figures/explore.html",
    ):
        assert needed in names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]
    script = (
        "import graphdiff, segmentation.config, segmentation.train; print(graphdiff.__file__);"
        "print(segmentation.config.__file__);"
        "print(segmentation.config.resolve({}, None).dataset)"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); {script}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert all(str(tmp_path / "site") in line for line in lines[:2])
    assert lines[2] == "shapes"
