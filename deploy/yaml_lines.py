"""YAML with line numbers: a schema error names file, line and field.

msgspec says *where* by a path (``$.steps[3].dma.iova``); the composed YAML nodes know the lines. This module joins
the two: ``boot.yaml:12: steps[3].dma.iova: Expected int, got str``. A check of a schema's own names the field in its
message, ``steps[3].dma: …``, relative to the object that has the check. Duplicate keys, which YAML loaders pass over
silently, are errors. Floats are left as strings: ``02.0`` is a PCI address here, and nothing else needs a fraction
but seconds, which are parsed later.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import msgspec
import yaml
from msgspec import inspect

from deploy.quantity import dec_hook
from vfio_model.errors import ConfigError

T = TypeVar("T")

_PATH = re.compile(r"^(?P<what>.*) - at `(?P<where>(?:key in )?`?\$[^`]*)`$", re.DOTALL)
_TOKEN = re.compile(r"\.([^.\[\]]+)|\[([0-9]+|\.\.\.)\]")
_NAMED = re.compile(r"[a-z_]\w*(?:\.\w+|\[[0-9]+\])*(?=: )")
"""A field at the beginning of a message."""
_ONE_OF_FEW = re.compile(r"Invalid (?:enum )?value '")
_FIELD = re.compile(r"(?:unknown|missing required) field `([^`]+)`")
_FLOAT = "tag:yaml.org,2002:float"


class _Loader(yaml.SafeLoader):
    """SafeLoader whose plain scalars never become floats or base-60 integers."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$") if tag.endswith(":int") else pattern)
        for tag, pattern in resolvers
        if tag != _FLOAT
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def load(path: Path, kind: type[T]) -> T:
    """Read ``path`` and convert it to ``kind``.

    :raise ConfigError: when the file cannot be read, is not YAML, or does not fit; ``where`` is file and line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(f"cannot be read: {reason}", where=str(path)) from error
    return parse(text, str(path), kind)


def parse(text: str, name: str, kind: type[T]) -> T:
    """Convert the YAML document ``text``, called ``name`` in errors, to ``kind``, which may ``prepare`` it. Errors as
    :func:`load`.
    """
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            raise ConfigError("the file is empty", where=f"{name}:1")
        _refuse_duplicates(root, name, "")
        value = loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise ConfigError(f"not YAML: {error.problem or error.context}", where=f"{name}:{line}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"not YAML: {error}", where=f"{name}:1") from error
    finally:
        loader.dispose()
    prepare = getattr(kind, "prepare", None)
    if prepare is not None:
        prepare(value)
    try:
        return msgspec.convert(value, kind, dec_hook=dec_hook)
    except msgspec.ValidationError as error:
        raise _located(str(error), root, name, kind) from error


def _located(message: str, root: yaml.Node, name: str, kind: object) -> ConfigError:
    match = _PATH.match(message)
    what, path = (match["what"], match["where"]) if match else (message, "$")
    tokens = _tokens(path.split("$", 1)[1])
    named, own = _FIELD.search(what), _NAMED.match(what)
    inner = [named[1]] if named and "unknown" in named[0] else _tokens(f".{own[0]}") if own else []
    mark = _mark(root, [*tokens, *inner])
    field = path.split("$", 1)[1].lstrip(".").replace("[...]", "")
    known = ", ".join(_known(kind, tokens)) if _ONE_OF_FEW.match(what) else ""
    text = (f"{field}: " if field else "") + what.replace("`", "")
    return ConfigError(text, where=f"{name}:{mark.line + 1}", hint=f"known: {known}" if known else "")


def _tokens(path: str) -> list[str]:
    return [field or int_or_dots for field, int_or_dots in _TOKEN.findall(path)]


def _known(kind: object, tokens: list[str]) -> list[str]:
    """The words that may stand at ``tokens`` in a ``kind``."""
    types = list(_alternatives(inspect.type_info(kind)))
    for token in tokens:
        types = [deeper for one in types for below in _below(one, token) for deeper in _alternatives(below)]
    return sorted({str(word) for one in types if isinstance(one, inspect.LiteralType) for word in one.values})


def _alternatives(one: inspect.Type) -> Iterator[inspect.Type]:
    if isinstance(one, inspect.UnionType):
        yield from one.types
    else:
        yield one


def _below(one: inspect.Type, token: str) -> Iterator[inspect.Type]:
    """The type of the value at ``token`` in a value of type ``one``."""
    if isinstance(one, inspect.StructType):
        if token == one.tag_field:
            yield inspect.LiteralType((one.tag,))
        yield from (field.type for field in one.fields if field.encode_name == token)
    elif isinstance(one, inspect.ListType):
        yield one.item_type


def _mark(node: yaml.Node, tokens: list[str]) -> yaml.Mark:
    """Where the value at ``tokens`` stands; the nearest enclosing one when the path goes on where the file does not."""
    mark = node.start_mark
    for token in tokens:
        child: yaml.Node | None = None
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value == token:
                    mark, child = key.start_mark, value
        elif isinstance(node, yaml.SequenceNode) and token.isdigit() and int(token) < len(node.value):
            child = node.value[int(token)]
            mark = child.start_mark
        if child is None:
            break
        node = child
    return mark


def _refuse_duplicates(node: yaml.Node, name: str, field: str) -> None:
    if isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            _refuse_duplicates(child, name, f"{field}[{index}]")
    elif isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, child in node.value:
            text = str(key.value)
            path = f"{field}.{text}".lstrip(".")
            if text in seen:
                raise ConfigError(f"{path}: given twice", where=f"{name}:{key.start_mark.line + 1}")
            seen.add(text)
            _refuse_duplicates(child, name, path)
