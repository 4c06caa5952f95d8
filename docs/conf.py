"""How these pages are built: `make docs`. Nothing of Motet is imported, so no torch is needed."""

import re
from pathlib import Path

_SOURCE = (Path(__file__).parent.parent / "server" / "__init__.py").read_text("utf-8")
_VERSION = re.search(r'^__version__ = "([^"]+)"', _SOURCE, re.MULTILINE)
assert _VERSION is not None, "server/__init__.py says the version"

project = "Motet"
release = version = _VERSION[1]
language = "en"
smartquotes = False  # what stands in quotes is often typed

extensions = ["myst_parser"]
myst_heading_anchors = 3  # pages link to each other's headings
exclude_patterns = ["_build"]
highlight_language = "none"  # of blocks that do not say: frames, trees, pictures made of characters

html_theme = "furo"
html_title = f"Motet {release}"
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
html_show_sphinx = False
