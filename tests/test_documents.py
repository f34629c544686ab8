"""The Python of the README and of docs/ runs as it stands there."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
DOCUMENTS = [
    path
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if BLOCK.search(path.read_text())
]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_block_runs_after_those_before_it(path):
    torch.manual_seed(0)
    names = {}
    for block in BLOCK.findall(path.read_text(encoding="utf-8")):
        exec(compile(block, path.name, "exec"), names)
    if path.name == "README.md":
        # The model of the README, somebody else's network with a cascade on top, learns.
        assert names["losses"][-1] < names["losses"][0]
        gradients = [parameter.grad for parameter in names["model"].refine.parameters()]
        assert all(g is not None and g.abs().sum() > 0 for g in gradients)


def test_links_inside_the_repository_lead_somewhere():
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for target in re.findall(r"\]\((?!https?://)([^)#]+)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_tests_that_documents_name_exist():
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    for path in sorted((ROOT / "docs").rglob("*.md")):
        for name in re.findall(r"`(test_\w+)`", path.read_text(encoding="utf-8")):
            assert f"def {name}(" in tests, f"{path.name} names {name}, which is no test"


def test_pictures_are_small_and_their_commands_stand_beside_them():
    documents = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    text = "\n".join(path.read_text(encoding="utf-8") for path in documents)
    for path in sorted((ROOT / "docs" / "pictures").iterdir()):
        assert path.stat().st_size < 200_000
        assert f"pictures/{path.name})" in text, f"no document shows {path.name}"
        assert re.search(rf"python \S+\.py .*--out docs/pictures/{path.name}", text), (
            f"what made {path.name}?"
        )
