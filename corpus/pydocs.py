"""Documents that every Python carries with it: the documentation of its own standard library."""

import ast
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path


def pydocs_documents() -> list[str]:
    """Return the English prose of this Python: its help topics, then its modules' docstrings.

    Each topic is a document, and so is each docstring, in the order of the sources; a docstring
    that occurs again is left out.
    """
    from pydoc_data.topics import topics

    prose = [topics[name].strip() for name in sorted(topics)]
    return prose + [text for docstrings in _module_docstrings() for text in docstrings]


def _module_docstrings() -> Iterator[list[str]]:
    """Yield each standard module's docstrings, without those seen before, in a fixed order."""
    library = Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    for path in sorted(p.relative_to(library).as_posix() for p in library.rglob("*.py")):
        if _SKIPPED.search(path):
            continue
        docstrings = list(dict.fromkeys(_docstrings((library / path).read_bytes())))
        yield [text for text in docstrings if text not in seen]
        seen.update(docstrings)


# Tests and the like, other people's packages, and what differs between builds of the same version.
_SKIPPED = re.compile(
    r"(^|/)(tests?|idlelib|idle_test|lib2to3|site-packages|dist-packages|config-[^/]*)/"
    r"|(^|/)(_sysconfigdata[^/]*|sitecustomize|usercustomize)\.py$"
)


def _docstrings(source: bytes) -> list[str]:
    """Return the cleaned docstrings of a module, in the order they are written; never runs it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [ast.get_docstring(node) for node in _documented(ast.parse(source))]
    return [text.strip() for text in found if text]


def _documented(node: ast.AST) -> Iterator[ast.AST]:
    """Yield a module and the classes and functions in it, passing over expressions."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        yield node
    for part in ("body", "handlers", "orelse", "finalbody", "cases"):
        for child in getattr(node, part, []):
            yield from _documented(child)
