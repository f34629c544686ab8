"""Importing segmentation without its extra."""

import importlib
import importlib.util

import pytest

import segmentation


def test_missing_packages_are_named_with_what_brings_them(monkeypatch):
    found = importlib.util.find_spec
    absent = {"timm", "yaml"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else found(name))
    with pytest.raises(ImportError, match=r"needs timm, pyyaml, .*: pip install timm pyyaml, or .*clone"):
        importlib.reload(segmentation)
    monkeypatch.undo()
    importlib.reload(segmentation)
