"""YAML by the 1.2 core rules, on PyYAML's safe loader.

PyYAML follows YAML 1.1, where `1e-4` is text, `no` is false, `010` is eight and `1:30` is ninety: traps in a file of
learning rates and names. Only the rules for plain scalars differ here; constructing stays PyYAML's safe one.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_CORE: tuple[tuple[str, str, str], ...] = (
    ("null", r"^(?:~|null|Null|NULL|)$", "~nN\0"),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^(?:[-+]?(?:0|[1-9][0-9]*)|0x[0-9a-fA-F]+)$", "-+0123456789"),
    (
        "float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        "-+0123456789.",
    ),
    ("merge", r"^(?:<<)$", "<"),
)


class _Loader(yaml.SafeLoader):
    """Safe constructors, core-schema scalars, no repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that is given twice, where PyYAML would silently take the last."""
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = (key_node.tag, str(key_node.value))
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key_node.value!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes exactly the texts that `_Loader` would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        """Write equal lists out in full: run files are read by people."""
        return True


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # PyYAML would write these raw and read them back as line ends; in double quotes it escapes them.
    style = '"' if any(char in text for char in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _text)
for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {}
    for _tag, _pattern, _first in _CORE:
        _class.add_implicit_resolver(  # type: ignore[no-untyped-call]
            f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), ["" if char == "\0" else char for char in _first]
        )


def read_yaml(text: str) -> Any:
    """Read one YAML document.

    Args:
        text: the document; empty text is null.

    Returns:
        Plain dicts, lists and scalars.

    Raises:
        ValueError: no YAML, several documents, a repeated key, or a tag that is not plain data.
    """
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()  # type: ignore[no-untyped-call]
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ValueError(str(error)) from error


def write_yaml(data: Any) -> str:
    """Write plain data as YAML that `read_yaml` reads back equal, keys in the given order.

    Args:
        data: dicts, lists and scalars, for instance from `core.config.dump`.

    Returns:
        The document.
    """
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
