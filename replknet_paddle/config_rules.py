"""The rules that values of the configuration must keep, each with the text that messages show."""

import ast
from collections.abc import Callable
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """What a value must be: `read` returns it in its proper type, or raises ValueError."""

    read: Callable[[Any], Any]
    allowed: str


def decoded(value: Any) -> Any:
    """YAML 1.1 reads 4e-3 and None as text, and so do command lines: give them their meaning."""
    if isinstance(value, str):
        try:
            return ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return value
    return value


def interval(low: float, high: float | None) -> str:
    return f">= {low}" if high is None else f"from {low} to {high}"


def integer(low: int, high: int | None = None) -> Rule:
    def read(value):
        value = decoded(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError
        if value < low or (high is not None and value > high):
            raise ValueError
        return value

    return Rule(read, f"an integer {interval(low, high)}")


def number(low: float, high: float | None = None) -> Rule:
    def read(value):
        value = decoded(value)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError
        value = float(value)
        if not low <= value <= (float("inf") if high is None else high) or value == float("inf"):
            raise ValueError
        return value

    return Rule(read, f"a number {interval(low, high)}")


def boolean() -> Rule:
    def read(value):
        value = decoded(value)
        if isinstance(value, str) and value.lower() in ("true", "false"):
            value = value.lower() == "true"
        if not isinstance(value, bool):
            raise ValueError
        return value

    return Rule(read, "True or False")


def text() -> Rule:
    def read(value):
        if not isinstance(value, str) or not value:
            raise ValueError
        return value

    return Rule(read, "text")


def palette() -> Rule:
    def read(value):
        value = f"{value:06d}" if isinstance(value, int) else value  # of one colour
        if not isinstance(value, str) or not value.split():
            raise ValueError
        if not all(len(colour) == 6 and int(colour, 16) >= 0 for colour in value.split()):
            raise ValueError
        return " ".join(value.split()).lower()

    return Rule(read, "colours of six hexadecimal digits each, with spaces between")


def choice(*options: str) -> Rule:
    def read(value):
        if value not in options:
            raise ValueError
        return value

    return Rule(read, " or ".join(repr(option) for option in options))


def several(item: Rule, count: int | None = None) -> Rule:
    def read(value):
        value = decoded(value)
        if not isinstance(value, (list, tuple)) or len(value) != (count or len(value)):
            raise ValueError
        return [item.read(v) for v in value]

    many = f"{count} values" if count else "a list of values"
    return Rule(read, f"{many}, each {item.allowed}")


def optional(rule: Rule) -> Rule:
    def read(value):
        return None if decoded(value) is None else rule.read(value)

    return Rule(read, f"{rule.allowed}, or None")


probability = number(0, 1)
