"""Settings of the documentation: Markdown pages and a reference from docstrings; needs no network to build."""

from __future__ import annotations

import sys
from pathlib import Path

from llava_scale import __version__

_here = Path(__file__).parent
sys.path.insert(0, str(_here))
from generated_pages import write_pages  # noqa: E402

write_pages(_here)

project = "LLaVA-scale"
author = "The LLaVA-scale authors"
copyright = "2026, " + author
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.apidoc", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
suppress_warnings = [
    "ref.python",  # short names in signatures that several modules have; the links then go to the first
]

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence", "deflist"]

apidoc_modules = [
    {
        "path": "../llava_scale",
        "destination": "api",
        "separate_modules": True,
        "module_first": True,
        "exclude_patterns": ["../llava_scale/cli"],
        "automodule_options": {"members"},
    }
]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"LLaVA-scale {version}"
