"""Whether two mathematical answers are the same, by math-verify (https://github.com/huggingface/Math-Verify), in a process apart: its own
time limits are alarms, which only a main thread gets and which would put out ours."""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from sympy import Integer, Mul, Number, Pow, UnevaluatedExpr
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean

LONGEST = 1_000
"""Characters; what is longer is no final answer."""
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:/\d+)?%?")
FRACTION = re.compile(r"\d\s*/\s*\d|\\[dt]?frac")
WORD = re.compile(r"(?<![\\\\A-Za-z])[A-Za-z]{2,}")
"""Prose; read as a formula it is a product of letters."""
LATEX, PLAIN = LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()

logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns that the time limit is ours


def answer(said: str, reference: str) -> dict[str, float]:
    """``correct``, and ``parsed``: something that can be compared was found in what was said."""
    found, meant = final(said), final(reference)
    if _plain(found) and _plain(found) == _plain(meant):
        return {"correct": 1.0, "parsed": 1.0}
    gold, target = expressions(meant), expressions(found)
    if not gold or not target or (isinstance(gold[0], Number) and not worked_out(target[0], found, isinstance(gold[0], Integer))):
        return {"correct": 0.0, "parsed": float(bool(target))}
    return {"correct": float(verify(list(gold), list(target), timeout_seconds=None)), "parsed": 1.0}


def worked_out(expression: Any, text: str, whole: bool) -> bool:
    """Whether it is a number, a percentage or one in scientific notation, and no fraction where a whole number is meant. For 4 math-verify
    takes 2+2 and 8/2, and a policy would learn to repeat the problem."""
    if whole and FRACTION.search(text.rpartition("=")[2]):
        return False
    while isinstance(expression, Relational | Boolean) and expression.args:
        expression = expression.args[-1]
    factors = expression.args if isinstance(expression, Mul) else (expression,)
    return sum(isinstance(f, Number) and f != -1 for f in factors) <= 1 and all(_simple(f) for f in factors)


def _simple(factor: Any) -> bool:
    scale = isinstance(factor, Pow) and factor.args[0] == 10 and factor.args[1].is_integer
    return isinstance(factor, Number | UnevaluatedExpr) or scale


def final(text: str) -> str:
    """The answer in a text: the last \\boxed{}, what stands behind "####", the last line; "" if that is too long to be one."""
    found = boxed(text)
    if found is None:
        _, marked, behind = text.rpartition("####")
        lines = [line for line in (behind if marked else text).splitlines() if line.strip()]
        found = lines[-1] if lines else ""
    return found.strip() if len(found) <= LONGEST else ""


def boxed(text: str) -> str | None:
    """What stands in the last \\boxed{}, whose braces balance."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    begin, depth = start + len("\\boxed{"), 1
    for at in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[begin:at]
    return None


@lru_cache(maxsize=1024)
def expressions(text: str) -> tuple[Any, ...]:
    """What math-verify makes of an answer: as a formula, within a sentence, or the last number in it."""
    attempts = [text] if "$" in text else [text, f"${text}$"] if WORD.search(text) else [f"${text}$", text]
    if numbers := NUMBER.findall(text):
        attempts.append(numbers[-1])
    for attempt in attempts:
        if found := parse(attempt, [LATEX, PLAIN], fallback_mode="no_fallback", parsing_timeout=0):
            return tuple(found)
    return ()


def _plain(text: str) -> str:
    return re.sub(r"[\s$]+", "", text).rstrip(".").casefold()
