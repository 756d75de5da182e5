"""Labels of Python source are what Python says of it, character by character."""

import numpy as np

from saelab.analysis.saebench.python_labels import ATTRIBUTES, label_source

SOURCE = '''"""Module text."""
import os  # a comment é
VALUE = {"key": [1, (2 + len("x"))]}


class Thing:
    """Class text."""

    size = 3

    def method(self, n):
        if n:
            return f"{n}"
        return lambda: n


def outer():
    def inner():
        return None

    return inner
'''


def label(attribute, piece, offset=0, start=0):
    found = label_source(SOURCE)
    place = SOURCE.index(piece, start) + offset
    value = int(found.labels[attribute][place])
    return ATTRIBUTES[attribute][value] if value >= 0 else None


def test_text():
    assert label("text", "Module text") == "docstring"
    assert label("text", "Class text") == "docstring"
    assert label("text", "comment é") == "comment"
    assert label("text", "comment é", 8) == "comment"
    assert label("text", "key") == "string"
    assert label("text", '"x"') == "string"
    assert label("text", "VALUE") == "code"


def test_token_class():
    assert label("token_class", "import") == "keyword"
    assert label("token_class", "len") == "builtin"
    assert label("token_class", "VALUE") == "name"
    assert label("token_class", "3\n") == "number"
    assert label("token_class", "+") == "operator"
    assert label("token_class", "key") is None
    assert label("token_class", "a comment") is None


def test_brackets():
    assert label("brackets", "VALUE") == "depth 0"
    assert label("brackets", "{") == "depth 0"
    assert label("brackets", '"key"') == "depth 1"
    assert label("brackets", "1, (") == "depth 2+"
    assert label("brackets", "}\n") == "depth 0"


def test_indent():
    assert label("indent", "import") == "level 0"
    assert label("indent", "size") == "level 1"
    assert label("indent", "if n") == "level 2"
    assert label("indent", 'return f"') == "level 3+"
    assert label("indent", "    size") is None  # the blanks themselves


def test_scope():
    assert label("scope", "VALUE") == "module"
    assert label("scope", "size") == "class body"
    assert label("scope", "if n") == "method"
    assert label("scope", "return None") == "function"
    assert label("scope", "return inner") == "function"


def test_what_is_no_python_has_no_labels():
    assert label_source("def f(:\n") is None
    assert label_source("Once upon a time there was a girl.") is None
    assert label_source("x = '\0'") is None
    empty = label_source("")
    assert all(len(values) == 0 for values in empty.labels.values())


def test_files_of_the_standard_library():
    """Every character of a keyword's label spells a keyword, in real files."""
    import inspect
    import json.decoder
    import keyword
    import re

    source = inspect.getsource(json.decoder)
    labels = label_source(source).labels["token_class"]
    of = ATTRIBUTES["token_class"].index("keyword")
    edges = np.flatnonzero(np.diff(np.concatenate([[0], (labels == of).astype(int), [0]])))
    words = {source[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)}
    assert words
    assert all(keyword.iskeyword(word) for word in words)
    strings = label_source(source).labels["text"] == ATTRIBUTES["text"].index("comment")
    assert not re.search(r"^import ", "".join(c for c, on in zip(source, strings, strict=True) if on), re.M)
