"""Text that is always there: the language reference and the docstrings of installed Python code.

A document is one help topic or one module (its docstrings in source order, each under its name).
Only the source text is parsed; nothing is imported or run.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import inspect
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SKIPPED_FOLDERS = frozenset({"site-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__", "_vendor", "externals"})
SHORTEST_DOCSTRING = 40  # characters; shorter ones are mostly boilerplate
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Document:
    """A named piece of text."""

    name: str
    text: str


@functools.lru_cache(maxsize=1)
def pydoc_documents() -> list[Document]:
    """The help topics and the standard library's docstrings, sorted by name (about 2 MB)."""
    from pydoc_data.topics import topics

    found = [Document(f"topic:{name}", text.strip()) for name, text in topics.items()]
    found += package_documents(Path(sysconfig.get_paths()["stdlib"]), prefix="std")
    return sorted(found, key=lambda d: d.name)


def library_documents(packages: tuple[str, ...]) -> list[Document]:
    """Docstrings of installed packages; a package that is not installed is left out."""
    found: list[Document] = []
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            found += package_documents(Path(spec.origin).parent, prefix=package)
    return sorted(found, key=lambda d: d.name)


def package_documents(root: Path, prefix: str) -> list[Document]:
    """One document for each module under `root` that has docstrings."""
    documents = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if SKIPPED_FOLDERS.intersection(parts[:-1]):
            continue
        text = module_text(path)
        if text:
            documents.append(Document(f"{prefix}:{'.'.join(parts)[:-3]}", text))
    return documents


def module_text(path: Path) -> str:
    """The docstrings of one source file, each preceded by the name of what it documents."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError, RecursionError, OSError):
        return ""  # template or broken file: it carries no readable documentation
    return "\n\n".join(_entries(tree, path.stem, set()))


def _entries(node: ast.AST, name: str, seen: set[str]) -> Iterator[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    if isinstance(node, documented):
        text = ast.get_docstring(node) or ""
        if len(text) >= SHORTEST_DOCSTRING and text not in seen:
            seen.add(text)
            yield f"{_heading(node, name)}\n{inspect.cleandoc(text)}"
    for child in ast.iter_child_nodes(node):
        if isinstance(child, documented):
            yield from _entries(child, child.name, seen)  # type: ignore[union-attr]


def _heading(node: ast.AST, name: str) -> str:
    if isinstance(node, ast.ClassDef):
        return f"class {name}"
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return f"def {name}({', '.join(a.arg for a in node.args.args)})"
    return f"module {name}"


def split_of(document: Document) -> str:
    """`test` and `validation` for one document in sixteen each, by a hash of its name; `train` otherwise."""
    bucket = hashlib.sha256(document.name.encode()).digest()[0] % 16
    return {0: "test", 1: "validation"}.get(bucket, "train")


def without_overlap(documents: list[Document], held_out: list[Document]) -> list[Document]:
    """`documents` without the paragraphs that also stand in `held_out` (copied docstrings would leak)."""
    leaked = {p for d in held_out for p in paragraphs(d.text)}
    cleaned = []
    for document in documents:
        kept = "\n\n".join(p for p in paragraphs(document.text) if p not in leaked)
        if kept:
            cleaned.append(Document(document.name, kept))
    return cleaned


def paragraphs(text: str) -> list[str]:
    """The non-empty paragraphs of a text (parts between blank lines)."""
    return [p for p in text.split("\n\n") if p.strip()]


def pydoc_split(split: str) -> list[Document]:
    """The `train`, `validation` or `test` part of `pydoc_documents`, free of each other's paragraphs."""
    parts: dict[str, list[Document]] = {name: [] for name in SPLITS}
    for document in pydoc_documents():
        parts[split_of(document)].append(document)
    if split == "test":
        return parts["test"]
    if split == "validation":
        return without_overlap(parts["validation"], parts["test"])
    return without_overlap(parts["train"], parts["test"] + parts["validation"])
