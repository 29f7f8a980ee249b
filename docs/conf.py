"""The documentation site: `sphinx-build -W --keep-going docs build/docs`. No network is needed."""

import os
import re
import shutil
import sys
import typing
from importlib.metadata import version as version_of
from pathlib import Path

# Where this is set, jaxtyping and Equinox write short annotations: "Float[Array, 'groups K']".
typing.GENERATING_DOCUMENTATION = "nercc_jax"  # pyright: ignore[reportAttributeAccessIssue]
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # of the pages' own programs, too
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
# Programs that the pages compile are kept, so that a second build takes seconds.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(HERE.parent / "build" / "programs"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Most of a page's time is compiling: quickly rather than well.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
if version_of("jax").startswith("0.10."):  # as in tests/conftest.py
    plain = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ.setdefault("XLA_FLAGS", plain)
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
)

project = "nercc_jax"
author = "The authors of nercc_jax"
copyright = author
version = release = version_of("nercc-jax")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",  # before `_site.entries`, which reads what it made
    "sphinx_copybutton",
    "_site.entries",
]
exclude_patterns = ["_site"]


# Pages are Markdown; those with code cells are run, and what they print is shown. A link to a page,
# section or file that is not there is a warning.
myst_enable_extensions = ["amsmath", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "force"  # the library may have changed where the page has not
nb_execution_raise_on_error = True
nb_execution_timeout = 300  # seconds a cell, on a busy machine
nb_merge_streams = True

# Docstrings are Markdown: `_site.entries` writes what Sphinx reads of them.
default_role = "py:obj"
autoclass_content = "both"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_use_ivar = True  # a field with a text of its own is described once
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True
add_module_names = False
toc_object_entries = False

html_theme = "furo"
html_title = "nercc_jax"
html_theme_options = {"footer_icons": []}
html_static_path = ["_static"]
html_css_files = ["narrow.css"]
html_show_sphinx = False
smartquotes = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# `sphinx-build -b linkcheck` asks the network; nothing else does.
linkcheck_ignore = [r"http://localhost.*", r"http://127\.0\.0\.1.*"]
linkcheck_timeout = 20


def _lead(app, docname, source):
    """Let links to the benchmarks' tables lead to the site's copies of these, and back."""
    if docname.startswith("measured/"):
        back = source[0].replace("](../../docs/", "](../")
        source[0] = re.sub(r"\]\((?=[\w-]+\.png\))", "](../../bench/results/", back)
    else:
        source[0] = re.sub(r"\]\(\.\./bench/results/(?=[\w-]+\.md)", "](measured/", source[0])


def setup(app):
    """Copy the benchmarks' tables to where pages are read."""
    folder = HERE / "measured"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for page in (HERE.parent / "bench" / "results").glob("*.md"):
        shutil.copy(page, folder)
    app.connect("source-read", _lead)
