"""One self-contained page that computes rows of P_t in the browser, from ψ_t shipped in 16 bits.

Each column of an array [N, C] is shipped as whole numbers q in 0..65535 with value = low + step·q, little
endian, in base64: half the size of float32, and finer than float16 where the values of a column are of one
magnitude, as those of ψ are after batch normalisation. Both sides compute a row alike:

    p_j = exp(a_j − max a) / Σ_k exp(a_k − max a),   a_j = scale · Σ_c ψ_ic ψ_jc
"""

import base64
import io
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

import graphdiff as gd
from segmentation.data import VOID
from segmentation.data.labels import voc_palette
from segmentation.errors import UsageError
from segmentation.figures.inputs import Nodes, Sample, Study, check_new, nodes_of
from segmentation.figures.panel import step_title
from segmentation.figures.transitions import DECADES, HEAT, telling_pixels
from segmentation.files import write_text
from segmentation.models import DifNetMaps

LARGEST = 20_000_000
"""Bytes of a page."""

COMPARED = 256
"""Rows of every P_t, evenly spread, over which the page's arithmetic is compared with the model's."""


def write_page(study: Study, out: Path, overwrite: bool = False) -> tuple[Path, float]:
    """Write explore-NAME.html for the one image of a study.

    Args:
        study: model and image.
        out: folder to write into.
        overwrite: replace what an earlier call wrote.

    Returns:
        The file, and the largest difference between an entry of a row computed as the page does, from what
        it ships, and the model's, over `COMPARED` rows of every P_t.

    Raises:
        UsageError: the page would be larger than `LARGEST`.
    """
    (sample,) = study
    page = out / f"explore-{sample.name}.html"
    check_new([page], overwrite)
    maps = study.maps(sample)
    with torch.no_grad():
        operators = study.model.transitions(sample.padded)
    embedded: list[gd.AttentionTransition] = []
    for P in operators:
        assert isinstance(P, gd.AttentionTransition)  # DifNet makes no others
        embedded.append(P)
    # Steps that share a P ship it once.
    distinct = list(dict.fromkeys(embedded))
    nodes = nodes_of(sample, maps)
    shipped = [pack(P.psi[0].double().cpu().numpy()) for P in distinct]
    apart = max(_difference(P, packed) for P, packed in zip(distinct, shipped, strict=True))
    data = _told(study, sample, maps, nodes) | {
        "psi": shipped,
        "psiOf": [distinct.index(P) for P in embedded],
        "scale": [P.scale for P in distinct],
        "difference": apart,
    }
    # Within a script element only "</" could end it.
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("</", "<\\/")
    template = (files("segmentation.figures") / "explore.html").read_text(encoding="utf-8")
    html = template.replace('"DATA"', text)
    size = len(html.encode())
    if size > LARGEST:
        raise UsageError(
            f"the page of {sample.name} ({sample.size[1]}x{sample.size[0]} pixels, {maps.seed[0, 0].numel()} "
            f"nodes) would be {size / 1e6:.0f} MB, above {LARGEST / 1e6:.0f} MB: shrink the image"
        )
    write_text(page, html)
    return page, apart


def pack(values: NDArray[np.float64]) -> dict[str, Any]:
    """An array [N, C] in 16 bits: value = low + step·q for each column; `unpack` is the way back."""
    low, high = values.min(0), values.max(0)
    # A column of one value ships as zeros.
    step = np.where(high > low, (high - low) / 65535, 1.0)
    whole_numbers = ((values - low) / step).round().astype("<u2")
    return {
        "low": low.tolist(),
        "step": step.tolist(),
        "data": base64.b64encode(whole_numbers.tobytes()).decode(),
    }


def unpack(packed: dict[str, Any]) -> NDArray[np.float32]:
    """What the page makes of a packed array, [N, C]."""
    whole_numbers = np.frombuffer(base64.b64decode(packed["data"]), "<u2").reshape(-1, len(packed["low"]))
    values: NDArray[np.float64] = np.array(packed["low"]) + np.array(packed["step"]) * whole_numbers
    return values.astype(np.float32)


def row_of(psi: NDArray[np.float32], scale: float, node: int) -> NDArray[np.float64]:
    """Row `node` of softmax(scale · ψψᵀ), as the page computes it, [N]."""
    wide = psi.astype(np.float64)
    logits = scale * (wide @ wide[node])
    weights = np.exp(logits - logits.max())
    row: NDArray[np.float64] = weights / weights.sum()
    return row


def _difference(P: gd.AttentionTransition, packed: dict[str, Any]) -> float:
    psi = unpack(packed)
    index = np.unique(np.linspace(0, len(psi) - 1, COMPARED).round().astype(int)).tolist()
    with torch.no_grad():
        rows = P.rows(index)[0].double().cpu().numpy()
    return max(
        float(np.abs(row_of(psi, P.scale, node) - row).max()) for node, row in zip(index, rows, strict=True)
    )


def _told(study: Study, sample: Sample, maps: DifNetMaps, nodes: Nodes) -> dict[str, Any]:
    """What the page needs beside the ψ_t."""
    model, about = study.model, study.about
    height, width = sample.size
    scores = [maps.seed, *maps.walks]
    prediction: NDArray[np.int64] = np.asarray(maps.logits[0, :, :height, :width].argmax(0).cpu())
    labels = prediction if sample.label is None else sample.label
    start = telling_pixels(labels)[0]
    weight = torch.stack([maps.importance[0, 0], maps.score[0].abs().sum(0)], -1)
    coefficients = {name: values.detach().double().tolist() for name, values in model.coefficients.items()}
    return {
        "name": sample.name,
        "model": f"{about.config.model} on {about.config.backbone}, step {about.step}",
        "image": _data_url(sample.pixels),
        "width": width,
        "height": height,
        "grid": list(nodes.grid),
        "padded": list(sample.padded.shape[-2:]),
        "start": list(start),
        "classes": list(study.classes),
        "colours": voc_palette()[: len(study.classes)].tolist(),
        "heat": (255 * matplotlib.colormaps[HEAT](np.arange(256))[:, :3]).round().astype(int).tolist(),
        "decades": DECADES,
        "steps": [step_title(step) for step in model.steps],
        "coefficients": coefficients,
        "stages": ["seed", *map(step_title, model.steps)],
        "scores": pack(torch.cat([_by_node(score) for score in scores], -1).double().cpu().numpy()),
        # The classes themselves, for rounding the scores could turn a tie.
        "largest": [_bytes(score[0].argmax(0).flatten()) for score in scores],
        "weight": pack(weight.flatten(0, 1).double().cpu().numpy()),
        "truth": None
        if sample.label is None
        else _bytes(torch.from_numpy(nodes.at_nodes(sample.label, VOID).ravel())),
    }


def _by_node(score: Tensor) -> Tensor:
    """A score [1, K, h, w] as [N, K]."""
    return score[0].flatten(1).T


def _bytes(classes: Tensor) -> str:
    return base64.b64encode(classes.cpu().numpy().astype(np.uint8).tobytes()).decode()


def _data_url(pixels: NDArray[np.uint8]) -> str:
    """A JPEG, unless the image is small: then a PNG, which keeps every pixel."""
    stream = io.BytesIO()
    kind = "png" if pixels.size < 300_000 else "jpeg"
    Image.fromarray(pixels).save(stream, format=kind, quality=92)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
