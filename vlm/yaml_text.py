"""YAML read with care: it says nothing twice, and a small file cannot make a large value."""

import re
from typing import Any

import yaml

from vlm.errors import reason

MAX_DEPTH = 40
_MAX_VALUES = 100_000
_STR = "tag:yaml.org,2002:str"
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_MERGE = "tag:yaml.org,2002:merge"


def parse_yaml(text: str) -> Any:
    """The value that a YAML text describes, without what YAML does to surprise.

    Raises yaml.YAMLError, also for a key that comes twice or is no text, for more than 40 levels or 100,000 values,
    and for numbers and dates that Python cannot hold.
    """
    loader = _Loader(text)
    try:
        return _copied(loader.get_single_data())
    finally:
        loader.dispose()


def _without_base_60(pattern: re.Pattern[str]) -> re.Pattern[str]:
    """The pattern of numbers, without those that have a colon."""
    return re.compile(f"(?!.*:)(?:{pattern.pattern})", pattern.flags)


# 1:30 is no 90: what looks like a number to the base 60 is text.
_RESOLVERS = {
    first: [(tag, _without_base_60(pattern) if tag in _NUMBERS else pattern) for tag, pattern in resolvers]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Loader(yaml.SafeLoader):
    """YAML in which every key comes once, and aliases cannot make a small file large."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.yaml_implicit_resolvers = _RESOLVERS
        self._depth = 0
        self._sizes: dict[int, tuple[int, int]] = {}  # values in a node, aliases followed, and its levels

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """One node, whose size and depth are known before the next is read."""
        mark, is_alias = self.peek_event().start_mark, self.check_event(yaml.AliasEvent)  # type: ignore[no-untyped-call]
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"nested more than {MAX_DEPTH} deep", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is None:
            return None
        if id(node) not in self._sizes:
            if is_alias:
                raise yaml.composer.ComposerError(None, None, "an alias to what it lies in", mark)
            self._sizes[id(node)] = self._measure(node)
        size, levels = self._sizes[id(node)]
        if size > _MAX_VALUES:
            raise yaml.composer.ComposerError(None, None, f"more than {_MAX_VALUES:,} values, aliases followed", mark)
        if levels > MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"nested more than {MAX_DEPTH} deep", mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """A mapping whose keys are texts, each once."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        first: dict[str, int] = {}
        for key, _ in node.value:
            if key.tag == _MERGE:
                continue
            if not isinstance(key, yaml.ScalarNode) or key.tag != _STR:
                raise yaml.composer.ComposerError(
                    None, None, f"the key {getattr(key, 'value', '')!r:.60} is no text; quote it", key.start_mark
                )
            line = key.start_mark.line + 1
            if key.value in first:
                words = f"the key {key.value!r:.60} comes twice (before in line {first[key.value]})"
                raise yaml.composer.ComposerError(None, None, words, key.start_mark)
            first[key.value] = line
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """The value of a node; what Python cannot hold ends like other mistakes."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError) as error:
            raise yaml.constructor.ConstructorError(None, None, reason(error), node.start_mark) from None

    def _measure(self, node: yaml.Node) -> tuple[int, int]:
        if isinstance(node, yaml.ScalarNode):
            return 1, 1
        inner = node.value if isinstance(node, yaml.SequenceNode) else [child for pair in node.value for child in pair]
        sizes = [self._sizes[id(child)] for child in inner]
        return 1 + sum(size for size, _ in sizes), 1 + max((levels for _, levels in sizes), default=0)


def _copied(value: Any) -> Any:
    """The same value with nothing shared: an override of one place must not change another that an alias ties to it."""
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list) else value
