"""Labels of Python source, character by character, from the standard library's own ``tokenize`` and ``ast``.

Nothing here is written by hand: whether a character stands in a keyword, a docstring or two brackets deep is what
Python's tokenizer and parser say of the file.
"""

import ast
import builtins
import io
import keyword
import tokenize
import warnings
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int8

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "token_class": ("keyword", "builtin", "name", "number", "operator"),
    "text": ("code", "string", "docstring", "comment"),
    "brackets": ("depth 0", "depth 1", "depth 2+"),
    "indent": ("level 0", "level 1", "level 2", "level 3+"),
    "scope": ("module", "class body", "function", "method"),
}
"""What characters are labelled with, and the classes of each; -1 where a character has none."""
_BUILTINS = frozenset(dir(builtins))
_SKIP = (tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING, tokenize.ENDMARKER)


@dataclass(frozen=True, eq=False)
class SourceLabels:
    """Labels of one file."""

    labels: dict[str, Int8[np.ndarray, " characters"]]
    """For each attribute, the class of each character, -1 for none."""


def label_source(source: str) -> SourceLabels | None:
    """Label a Python file; None when it is not valid Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in the text are no business of ours
            tree = ast.parse(source)
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (SyntaxError, ValueError, RecursionError, MemoryError, tokenize.TokenError):
        return None
    starts = _line_starts(source)
    labels = {name: np.full(len(source), -1, np.int8) for name in ATTRIBUTES}
    docstrings = _docstring_starts(tree)
    depth = level = 0
    for token in tokens:
        if token.type == tokenize.INDENT:
            level += 1
        elif token.type == tokenize.DEDENT:
            level -= 1
        if token.type in _SKIP:
            continue
        span = slice(_place(starts, token.start), _place(starts, token.end))
        if token.string in (")", "]", "}") and token.type == tokenize.OP:
            depth -= 1
        labels["brackets"][span] = min(depth, 2)
        labels["indent"][span] = min(level, 3)
        _classify(labels, span, token, docstrings)
        if token.string in ("(", "[", "{") and token.type == tokenize.OP:
            depth += 1
    _label_scopes(labels["scope"], tree, starts)
    labels["scope"][labels["indent"] < 0] = -1
    return SourceLabels(labels)


def _classify(
    labels: dict[str, np.ndarray], span: slice, token: tokenize.TokenInfo, docstrings: set[tuple[int, int]]
) -> None:
    texts, classes = ATTRIBUTES["text"], ATTRIBUTES["token_class"]
    name = tokenize.tok_name[token.type]
    if token.type == tokenize.COMMENT:
        labels["text"][span] = texts.index("comment")
    elif token.type == tokenize.STRING or name.startswith("FSTRING"):
        kind = "docstring" if token.start in docstrings else "string"
        labels["text"][span] = texts.index(kind)
    else:
        labels["text"][span] = texts.index("code")
        if token.type == tokenize.NAME:
            text = token.string
            kind = "keyword" if keyword.iskeyword(text) else "builtin" if text in _BUILTINS else "name"
            labels["token_class"][span] = classes.index(kind)
        elif token.type == tokenize.NUMBER:
            labels["token_class"][span] = classes.index("number")
        elif token.type == tokenize.OP:
            labels["token_class"][span] = classes.index("operator")


def _line_starts(source: str) -> list[int]:
    starts = [0]
    for line in io.StringIO(source):
        starts.append(starts[-1] + len(line))
    return starts


def _place(starts: list[int], position: tuple[int, int]) -> int:
    line, column = position
    return starts[min(line - 1, len(starts) - 1)] + column


def _docstring_starts(tree: ast.Module) -> set[tuple[int, int]]:
    """(line, column) at which docstrings begin."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                found.add((first.lineno, first.col_offset))
    return found


def _label_scopes(labels: np.ndarray, tree: ast.Module, starts: list[int]) -> None:
    """Paint the lines of every class and function, inner ones over outer ones."""
    names = ATTRIBUTES["scope"]
    labels[:] = names.index("module")

    def visit(node: ast.AST, in_class: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                _paint(labels, child, starts, names.index("class body"))
                visit(child, True)
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                _paint(labels, child, starts, names.index("method" if in_class else "function"))
                visit(child, False)
            else:
                visit(child, in_class)

    visit(tree, False)


def _paint(labels: np.ndarray, node: ast.stmt, starts: list[int], value: int) -> None:
    last = node.end_lineno or node.lineno
    labels[starts[node.lineno - 1] : starts[min(last, len(starts) - 1)]] = value
