"""A YAML document whose values know their lines.

Plain YAML only: no tags, no dates, every key once, bounded in size with aliases followed. PyYAML reads it; what is here
is what a configuration needs besides: lines for messages, and faults that are collected rather than raised one by one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

import yaml

__all__ = ["NULL", "YamlDocument", "YamlError"]

NULL, _TEXT, _LIST, _MAPPING, _MERGE, _DATE = (
    f"tag:yaml.org,2002:{name}" for name in ("null", "str", "seq", "map", "merge", "timestamp")
)
VALUES_MAX: Final = 10_000
DEPTH_MAX: Final = 50
_ENDLESS: Final = (VALUES_MAX + 1, DEPTH_MAX + 1)
_QUOTED: Final = re.compile(r"""'[^']*'|"[^"]*\"""")


class YamlError(Exception):
    """What is wrong with a document, and in which line."""

    def __init__(self, line: int, problem: str) -> None:
        super().__init__(line, problem)
        self.line = line
        self.problem = problem

    @classmethod
    def of(cls, error: yaml.MarkedYAMLError) -> YamlError:
        """The error of a parser, without what the document says."""
        mark = error.problem_mark or error.context_mark
        # PyYAML quotes tokens and single characters, but also names from the text, and those may be of a secret.
        problem = _QUOTED.sub(lambda it: it[0] if len(it[0]) < 4 or it[0][1] in "<\\" else "…", error.problem or "")
        return cls(mark.line + 1 if mark else 1, f"is not YAML: {problem}")


class _Loader(yaml.SafeLoader):
    """The safe loader, with dates left as text: no key is a date."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - declared so by the base class
        first: [(tag, pattern) for tag, pattern in resolvers if tag != _DATE]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class YamlDocument:
    """One document as nodes, which know their lines; `faults` has the line and text of what is not plain YAML.

    Nothing is built before all of it was measured. An alias weighs what it stands for, so that neither a cycle nor
    aliases of aliases get past the bounds. What is faulty is noted and mended, so that the rest can be looked at too.
    """

    def __init__(self, text: str) -> None:
        try:
            self._loader = _Loader(text)
            self.root = self._loader.get_single_node() or yaml.MappingNode(_MAPPING, [])
        except yaml.MarkedYAMLError as error:
            raise YamlError.of(error) from None
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            raise YamlError(line, f"is not YAML: it holds the character U+{error.character:04X}") from None
        except RecursionError:
            raise YamlError(1, "is nested too deeply") from None
        self.faults: list[tuple[int, str]] = []
        self._measured: dict[int, tuple[int, int]] = {}
        values, depth = self._measure(self.root)
        if values > VALUES_MAX or depth > DEPTH_MAX:
            raise YamlError(1, f"holds over {VALUES_MAX} values, aliases followed, or over {DEPTH_MAX} levels")

    def items(self, node: yaml.Node) -> Iterator[tuple[str, int, yaml.Node]]:
        """Key, line and value of each entry of a mapping, or of nothing; what is merged (`<<`) comes first."""
        if node.tag == NULL:
            return  # all that would stand here is commented out
        if not isinstance(node, yaml.MappingNode):
            raise YamlError(node.start_mark.line + 1, "must be a mapping of sections, as in storage: {url: …}")
        try:
            self._loader.flatten_mapping(node)
        except yaml.MarkedYAMLError as error:
            raise YamlError.of(error) from None
        for key, value in node.value:
            yield str(key.value), key.start_mark.line + 1, value

    def value(self, node: yaml.Node) -> object:
        """The node as plain Python objects."""
        try:
            return self._loader.construct_object(node, deep=True)
        except yaml.MarkedYAMLError as error:
            raise YamlError.of(error) from None
        except ValueError:  # a number of thousands of digits
            raise YamlError(node.start_mark.line + 1, "can't be read as a value; quote it if it is text") from None

    def _measure(self, node: yaml.Node, path: str = "") -> tuple[int, int]:
        """How many values a node stands for, how many levels deep; each node is looked at once."""
        if id(node) not in self._measured:
            self._measured[id(node)] = _ENDLESS  # what a node that holds itself comes upon
            children: list[tuple[str, yaml.Node]] = []
            if isinstance(node, yaml.MappingNode):
                self._check_tag(node, _MAPPING)
                self._check_keys(node, path)
                children = [(f"{path}{key.value}.", child) for key, child in node.value]
            elif isinstance(node, yaml.SequenceNode):
                self._check_tag(node, _LIST)
                children = [(path, child) for child in node.value]
            else:
                self._check_tag(node, _TEXT)
            sizes = [self._measure(child, below) for below, child in children]
            self._measured[id(node)] = (1 + sum(n for n, _ in sizes), 1 + max((depth for _, depth in sizes), default=0))
        return self._measured[id(node)]

    def _check_tag(self, node: yaml.Node, plain: str) -> None:
        resolved = self._loader.resolve(type(node), node.value, (True, False))  # type: ignore[no-untyped-call]
        if node.tag not in (plain, resolved):
            self.faults.append((node.start_mark.line + 1, "tags are not accepted; quote a text that begins with !"))
            node.tag = plain

    def _check_keys(self, node: yaml.MappingNode, path: str) -> None:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise YamlError(line, "a key must be text")
            self._check_tag(key, _TEXT)
            if key.value in lines:
                self.faults.append((line, f"{path}{key.value}: stands in line {lines[key.value]} already; remove one"))
            lines.setdefault(key.value, line)
