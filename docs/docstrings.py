"""For the pages of docs/api: docstrings as they stand in the code, made readable for mkdocstrings.

Formulas in LaTeX become MathML, which browsers draw without a program; the section "Example:" becomes the
"Examples:" that griffe shows as code.
"""

import re
import textwrap
from typing import Any

import griffe
from latex2mathml.converter import convert

# The directive, what stands on its line, and the more deeply indented lines below it.
FORMULA = re.compile(r"^( *)\.\. math::(.*(?:\n+\1 +\S.*)*)", re.MULTILINE)
EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)


def readable(docstring: str) -> str:
    """The same text for mkdocstrings."""

    def drawn(found: re.Match[str]) -> str:
        formula = convert(" ".join(found[2].split()), display="block")
        return textwrap.indent(f"<div>{formula}</div>", found[1])

    return EXAMPLE.sub(r"\1Examples:", FORMULA.sub(drawn, docstring))


class Docstrings(griffe.Extension):
    """Applies `readable` to every docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for whatever it has read."""
        if obj.docstring:
            obj.docstring.value = readable(obj.docstring.value)
