"""Code that numba keeps on disk: made anew where any file has changed from which it is compiled."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import graphdiff

pytest.importorskip("numba", reason="numba, the extra [compiled], is absent")

SCRIPT = """
import torch, graphdiff as gd
from graphdiff.operators import tiles
print(gd.AttentionTransition(torch.eye(3)).matmul(torch.arange(3.0).unsqueeze(-1)).tolist())
print(sum(tiles._forward.stats.cache_misses.values()))
"""


@pytest.mark.slow
def test_code_on_disk_is_that_of_all_files_it_is_compiled_from(tmp_path, monkeypatch):
    """Of a copy: a file changes from which another's functions are compiled."""
    shutil.copytree(
        Path(graphdiff.__file__).parent, tmp_path / "graphdiff", ignore=shutil.ignore_patterns("__pycache__")
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)

    def run():
        done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        value, compiled = done.stdout.splitlines()
        return value, int(compiled)

    first, compiled = run()
    assert compiled == 1
    assert run() == (first, 0)
    vectors = tmp_path / "graphdiff" / "operators" / "vectors.py"
    text = vectors.read_text()
    assert "builder.fmul(series, power)" in text
    vectors.write_text(text.replace("builder.fmul(series, power)", "builder.fadd(series, power)"))
    changed, compiled = run()
    assert compiled == 1
    assert changed != first
