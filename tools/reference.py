"""Builds the API reference, a folder of web pages, from the docstrings: `python tools/reference.py [folder]`.

It needs pdoc: `pip install -e '.[docs]'`. The folder is build/reference unless another is given. pdoc imports the
package, so the functions that are made at import are shown as `help` shows them. A warning of pdoc's ends the build.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import typing
import warnings
from dataclasses import is_dataclass
from pathlib import Path

import pdoc

ROOT = Path(__file__).parents[1]
PUBLIC = ("fastsample", "fastsample.distill", "fastsample.lora", "fastsample.ops", "fastsample.zoo")
# Only what `__all__` names is public: the modules below these four are where it happens to live.
PRIVATE = (r"!fastsample\.(?!(distill|lora|ops|zoo)$)",)
# A NamedTuple keeps its annotations as unresolved references that do not know their module: they are shown as written.
UNRESOLVED = r"Error parsing type annotation ForwardRef"


def main() -> None:
    """Writes the pages, or raises what pdoc warned of, or names public names without a section."""
    folder = Path(sys.argv[1]) if sys.argv[1:] else ROOT / "build" / "reference"
    pdoc.render.configure(docformat="google", show_source=False, template_directory=ROOT / "docs" / "reference")
    resolve_annotations()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", UNRESOLVED)
        pdoc.pdoc("fastsample", *PRIVATE, output_directory=folder)
    if missing := undocumented(folder):
        sys.exit(f"the reference lacks {', '.join(missing)}")
    print(folder / "fastsample.html")


def resolve_annotations() -> None:
    """Annotations are text, which pdoc reads in the module where a thing is defined, and all names need not be there.

    A dataclass has its bases' annotations, and a function that is made from one has them too.
    """
    for name in PUBLIC:
        module = importlib.import_module(name)
        for thing in (getattr(module, member) for member in module.__all__):
            if is_dataclass(thing):
                hints = typing.get_type_hints(thing)
                thing.__init__.__annotations__.update({field: hints[field] for field in thing.__dataclass_fields__})
            elif inspect.isfunction(thing):
                thing.__annotations__ = typing.get_type_hints(thing)


def undocumented(folder: Path) -> list[str]:
    """The public names that have no section in the pages."""
    missing = []
    for name in PUBLIC:
        page = folder.joinpath(*name.split(".")).with_suffix(".html").read_text()
        sections = set(re.findall(r'id="([\w.]+)"', page))
        members = [member for member in sys.modules[name].__all__ if f"{name}.{member}" not in PUBLIC]
        missing += [f"{name}.{member}" for member in members if member not in sections]
    return missing


if __name__ == "__main__":
    main()
