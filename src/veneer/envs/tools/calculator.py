"""The tool ``calculator``: exact arithmetic, read by a grammar of its own and never evaluated."""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction

from veneer.envs.tools.tool import Tool, ToolError

LONGEST, DEEPEST = 200, 20
"""Characters of an expression, parentheses in each other."""
LARGEST = 2**256
"""Of numerators and denominators on the way."""
HIGHEST = 64
"""Exponent."""
DIGITS = 12
"""Of a result that no decimal number writes exactly."""
_TOKEN = re.compile(r"\s*(?:(\d+(?:\.\d*)?|\.\d+)|(\*\*|[-+*/^()]))", re.ASCII)


def evaluate(expression: str) -> str:
    """The value of + - * / ** and parentheses over whole and decimal numbers, in decimal.

    Raises:
        ToolError: it is no such expression, has no value, or is too large.
    """
    if len(expression) > LONGEST:
        raise ToolError(f"the expression is longer than {LONGEST} characters")
    reader = _Reader(expression)
    value = reader.sum(0)
    if reader.next is not None:
        raise ToolError(f"unexpected {reader.next!r} in {expression!r}")
    return _decimal(value)


class _Reader:
    """Recursive descent: a sum of products of signed powers of numbers and parentheses."""

    def __init__(self, expression: str) -> None:
        self._tokens = _tokens(expression)
        self.next: str | None = next(self._tokens, None)

    def sum(self, depth: int) -> Fraction:
        value = self._product(depth)
        while (sign := self._take("+", "-")) is not None:
            term = self._product(depth)
            value = _bounded(value + term if sign == "+" else value - term)
        return value

    def _product(self, depth: int) -> Fraction:
        value = self._signed(depth)
        while (sign := self._take("*", "/")) is not None:
            factor = self._signed(depth)
            if sign == "/" and factor == 0:
                raise ToolError("division by zero")
            value = _bounded(value * factor if sign == "*" else value / factor)
        return value

    def _signed(self, depth: int) -> Fraction:
        """A sign binds less than a power, as in mathematics: -2**2 is -4."""
        negative = False
        while (sign := self._take("+", "-")) is not None:
            negative ^= sign == "-"
        value = self._power(depth)
        return -value if negative else value

    def _power(self, depth: int) -> Fraction:
        base = self._atom(depth)
        if self._take("**", "^") is None:
            return base
        if depth > DEEPEST:
            raise ToolError("too many powers and parentheses in each other")
        exponent = self._signed(depth + 1)
        if exponent.denominator != 1 or abs(exponent) > HIGHEST:
            raise ToolError(f"an exponent must be a whole number from -{HIGHEST} to {HIGHEST}")
        if base == 0 and exponent < 0:
            raise ToolError("division by zero")
        return _bounded(base**exponent.numerator)

    def _atom(self, depth: int) -> Fraction:
        if self._take("(") is not None:
            if depth > DEEPEST:
                raise ToolError("too many powers and parentheses in each other")
            value = self.sum(depth + 1)
            if self._take(")") is None:
                raise ToolError("a parenthesis is not closed")
            return value
        token = self.next
        if token is None or not (token[0].isdigit() or token[0] == "."):
            raise ToolError("a number is missing" + ("" if token is None else f" before {token!r}"))
        self.next = next(self._tokens, None)
        return _bounded(Fraction(token))

    def _take(self, *wanted: str) -> str | None:
        token = self.next
        if token not in wanted:
            return None
        self.next = next(self._tokens, None)
        return token


def _tokens(expression: str) -> Iterator[str]:
    at, end = 0, len(expression.rstrip())
    while at < end:
        found = _TOKEN.match(expression, at)
        if found is None:
            raise ToolError(f"unexpected {expression[at:].lstrip()[:10]!r}; write numbers, + - * / ** and parentheses")
        yield found[1] or found[2]
        at = found.end()


def _bounded(value: Fraction) -> Fraction:
    if max(abs(value.numerator), value.denominator) > LARGEST:
        raise ToolError("the numbers are too large")
    return value


def _decimal(value: Fraction) -> str:
    """Exactly if that takes no more than ``DIGITS`` places, else rounded to so many digits."""
    if value.denominator == 1:
        return str(value.numerator)
    scaled = value * 10**DIGITS
    if scaled.denominator == 1:
        sign, digits = "-" * (scaled < 0), str(abs(scaled.numerator)).rjust(DIGITS + 1, "0")
        return f"{sign}{digits[:-DIGITS]}.{digits[-DIGITS:].rstrip('0')}"
    return f"{Decimal(value.numerator) / Decimal(value.denominator):.{DIGITS}g}"


CALCULATOR = Tool(
    "calculator",
    "Evaluate an arithmetic expression.",
    {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
    evaluate,
)
"""Shown to the model as in the environment ``calculator``."""
