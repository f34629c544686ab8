"""The page to explore P_t with: what it ships, its arithmetic run for real, and the page in a browser."""

import base64
import html
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from segmentation.data.shapes import ShapesDataset
from segmentation.data.transforms import evaluation_transform
from segmentation.errors import UsageError
from segmentation.figures import explore
from segmentation.figures.__main__ import run_command_line
from segmentation.figures.explore import LARGEST, pack, row_of, unpack, write_page
from segmentation.figures.inputs import Study
from segmentation.inference import load_model

TOLERANCE = 1e-3
"""Of an entry of a row, which sums to 1."""


def data_of(text):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


@pytest.fixture(scope="module")
def page(many_classes, tmp_path_factory):
    """The page of an image shorter than what the model sees, written by the command line."""
    folder = tmp_path_factory.mktemp("page")
    image, _ = ShapesDataset("val")[7]
    Image.fromarray(image.permute(1, 2, 0).numpy()[:70]).save(folder / "a <script> & b.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys, "argv",
            ["figures", "explore", str(folder / "a <script> & b.png"), "--out", str(folder / "out"),
             "--checkpoint", str(many_classes), "--threads", "1"],
        )  # fmt: skip
        with pytest.raises(SystemExit) as caught:
            run_command_line()
    assert not caught.value.code
    (written,) = (folder / "out").iterdir()
    return written


@pytest.fixture(scope="module")
def model(many_classes):
    return load_model(many_classes, "cpu")[0]


@pytest.fixture(scope="module")
def maps(model):
    """All maps of the image, and the dense P_t."""
    image, _ = ShapesDataset("val")[7]
    padded = evaluation_transform(tv_tensors.Image(image[:, :70]), 97)[None]
    with torch.no_grad():
        return model(padded, return_maps=True), [
            P.dense()[0].double().numpy() for P in model.transitions(padded)
        ]


def test_rows_from_what_the_page_ships_are_the_models(page, maps):
    data = data_of(page.read_text())
    _, dense = maps
    assert data["psiOf"] == [0, 1, 2, 3, 4]
    for t, P in enumerate(dense):
        psi = unpack(data["psi"][t])
        rows = np.array([row_of(psi, data["scale"][t], node) for node in range(len(P))])
        np.testing.assert_allclose(rows.sum(1), 1, atol=1e-12)
        assert np.abs(rows - P).max() <= TOLERANCE
        assert np.abs(rows - P).max() <= data["difference"] + 1e-9, "told too small"


def test_the_page_holds_all_it_shows_and_asks_for_nothing_else(page, maps, model):
    text = page.read_text()
    data = data_of(text)
    seen, _ = maps
    assert page.stat().st_size < LARGEST
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:)|https?://|@import|url\(|fetch\(|XMLHttp""", text)
    stages = [seen.seed, *seen.walks]
    shipped = unpack(data["scores"]).reshape(169, 6, 6)
    for t, score in enumerate(stages):
        by_node = score[0].flatten(1).T.numpy()
        np.testing.assert_allclose(shipped[:, t], by_node, atol=1e-4 * np.abs(by_node).max())
        classes = np.frombuffer(base64.b64decode(data["largest"][t]), np.uint8)
        np.testing.assert_array_equal(classes, score[0].argmax(0).flatten())
    weight = unpack(data["weight"])
    np.testing.assert_allclose(weight[:, 0], seen.importance.flatten(), atol=1e-4)
    np.testing.assert_allclose(weight[:, 1], seen.score.abs().sum(1).flatten(), rtol=1e-3)
    assert data["coefficients"]["mu"] == pytest.approx(model.cascade.mu.tolist())
    assert data["coefficients"]["beta"] == pytest.approx(model.cascade.beta.tolist())
    assert (data["width"], data["height"], data["grid"], data["truth"]) == (97, 70, [13, 13], None)
    assert data["name"] == "a <script> & b"


def test_packing_rounds_each_column_by_half_a_step():
    values = np.random.default_rng(0).normal(size=(50, 3)) * [1e-6, 1.0, 1e6]
    values[:, 1] = 4.25
    packed = pack(values)
    assert unpack(packed)[:, 1].tolist() == [4.25] * 50
    range_ = np.ptp(values, axis=0)
    # Half a step, and the rounding to float32.
    bound = range_ / 65535 / 2 + np.abs(values).max(0) * 2.0**-24
    assert (np.abs(unpack(packed) - values).max(0) <= bound * 1.001).all()
    # Little endian, row after row.
    low, high = base64.b64decode(packed["data"])[6:8]
    assert packed["low"][0] + packed["step"][0] * (low + 256 * high) == pytest.approx(
        values[1, 0], abs=bound[0]
    )


def test_a_page_too_large_is_refused(many_classes, tmp_path, monkeypatch):
    monkeypatch.setattr(explore, "LARGEST", 100_000)
    study = Study(many_classes, ["val-0"])
    with pytest.raises(UsageError, match=r"the page of val-0 \(97x97 pixels, 169 nodes\) would be .* shrink"):
        write_page(study, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_truth_is_shown_where_it_is_known(many_classes, tmp_path):
    file, apart = write_page(Study(many_classes, ["val-0"]), tmp_path)
    data = data_of(file.read_text())
    _, label = ShapesDataset("val")[0]
    np.testing.assert_array_equal(
        np.frombuffer(base64.b64decode(data["truth"]), np.uint8), label[::8, ::8].flatten()
    )
    assert data["difference"] == apart
    with pytest.raises(UsageError, match=r"explore-val-0\.html is there: pass --overwrite"):
        write_page(Study(many_classes, ["val-0"]), tmp_path)


def test_the_pages_own_arithmetic_gives_the_models_rows(page, maps, tmp_path):
    """Its script as it stands, run by node."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node here to run the page's script: install Node.js")
    script = re.search(r'<script id="arithmetic">(.*?)</script>', page.read_text(), re.S)[1]
    data = tmp_path / "data.json"
    data.write_text(json.dumps(data_of(page.read_text())))
    program = tmp_path / "run.js"
    program.write_text(
        script
        + f"""
        const data = JSON.parse(require("fs").readFileSync({json.dumps(str(data))}, "utf8"));
        const rows = data.psi.map((packed, t) => [0, 40, 168].map(
          (node) => Array.from(rowOf(unpack(packed), packed.low.length, data.scale[t], node))));
        console.log(JSON.stringify(rows));
        """
    )
    done = subprocess.run([node, program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    rows = np.array(json.loads(done.stdout))
    assert rows.shape == (5, 3, 169)
    _, dense = maps
    for t, P in enumerate(dense):
        assert np.abs(rows[t] - P[[0, 40, 168]]).max() <= TOLERANCE
        psi = unpack(data_of(page.read_text())["psi"][t])
        same = np.array([row_of(psi, 1.0, node) for node in (0, 40, 168)])
        np.testing.assert_allclose(rows[t], same, rtol=1e-9, atol=1e-300)


@pytest.fixture(scope="module")
def browser():
    """Chromium's executable, named by CHROMIUM or found on the path."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome-headless-shell")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("no Chromium here to open the page in: install one, or name its executable as CHROMIUM")
    return found


def opened(browser, page, folder, acts, size="1200,900", place=""):
    """What the page has become after some script was run in it."""
    acting = folder / "acting.html"
    script = f"<script>addEventListener('load', () => setTimeout(() => {{ {acts} }}, 500));</script>"
    acting.write_text(page.read_text().replace("</body>", f"{script}</body>"))
    done = subprocess.run(
        [browser, "--headless", "--disable-gpu", "--no-sandbox", f"--window-size={size}",
         f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=6000", "--dump-dom",
         f"{acting.as_uri()}{place}"],
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert "<html" in done.stdout, done.stderr
    return html.unescape(done.stdout)


def test_in_a_browser_keys_move_and_the_numbers_are_the_models(browser, page, maps, tmp_path):
    press = (
        "document.getElementById('image').dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight'}));"
    )
    far = press.replace("{key: 'ArrowRight'}", "{key: 'ArrowDown', shiftKey: true}")
    beyond = press.replace("ArrowRight", "ArrowLeft") * 9
    seen, dense = maps
    # From row 1, column 3 one to the right, five down; then to the left until the edge stops it.
    dom = opened(browser, page, tmp_path, press + far, place="#25,8")
    node = 6 * 13 + 4
    assert f'data-node="{node}"' in dom
    assert "Node 6, 4 at pixel 32, 48" in dom
    text = re.sub(r"<[^>]+>", " ", dom)
    for t, P in enumerate(dense):
        share = P[node, node]
        stays = f"{100 * share:.{2 if share < 0.0995 else 1}f}\u00a0%"
        assert f"walk {t}: stays {stays}" in dom
        outside = P[node].reshape(13, 13)[10:].sum()
        assert f"padding {100 * outside:.{2 if outside < 0.0995 else 1}f}" in text
    for score in [seen.seed, *seen.walks]:
        for value in score[0].flatten(1)[:, node].tolist():
            # Rounded to three digits from what was rounded to 16 bits.
            assert any(f"{v:.3f}" in text for v in (value, value + 4e-4, value - 4e-4)), value
    dom = opened(browser, page, tmp_path, press + far + beyond, place="#25,8")
    assert f'data-node="{6 * 13}"' in dom
    # The last move is told to screen readers.
    assert re.search(r'role="status"[^>]*>Node 6, 0 at pixel 0, 48', dom)


def test_in_a_browser_the_pointer_moves_and_a_phone_shows_it_whole(browser, page, tmp_path):
    acts = """
        const box = document.getElementById("image").getBoundingClientRect();
        document.getElementById("image").dispatchEvent(new PointerEvent("pointermove", {
          pointerType: "touch",
          clientX: box.left + box.width * 81 / 97,
          clientY: box.top + box.height * 31 / 70,
        }));
        document.getElementById("theme").click();
        document.documentElement.dataset.overflow =
          document.documentElement.scrollWidth - document.documentElement.clientWidth;
    """
    dom = opened(browser, page, tmp_path, acts, size="390,800")
    assert f'data-node="{4 * 13 + 10}"' in dom
    assert 'data-overflow="0"' in dom
    assert re.search(r'data-theme="(dark|light)"', dom)
