"""Counts in regular expressions and grammars: how long, how deep, how often repeated. Pure; finds no syntax errors.

Repetition is what makes a short text a huge automaton: ``((a{100}){100}){100}`` stands for a million states.
"""

import re

from core.errors import InvalidRequest
from grammar.config import GrammarLimits

_COUNTS = re.compile(r"\{\s*(\d*)\s*(,)?\s*(\d*)\s*\}")


def check_regex(field: str, pattern: str, limits: GrammarLimits) -> None:
    """Refuse a regular expression that is too long, too deep, or repeats too often.

    Raises:
        InvalidRequest: naming `field`.
    """
    num_bytes = len(pattern.encode())
    if num_bytes > limits.max_regex_bytes:
        raise InvalidRequest(field, f"has {num_bytes} bytes, at most {limits.max_regex_bytes} are allowed")
    check_repeats(field, pattern, limits, opens="(", closes=")", literals="")


def check_grammar_text(field: str, text: str, limits: GrammarLimits) -> None:
    """As `check_regex`, of an EBNF grammar."""
    check_repeats(field, text, limits, opens="(", closes=")", literals='"')


def check_repeats(field: str, text: str, limits: GrammarLimits, *, opens: str, closes: str, literals: str) -> None:
    """Walk once over `text`, keeping for every open group the product of the counts within it.

    Args:
        literals: what quotes text in which nothing counts; empty: nothing does.
    """
    products = [1]  # of the largest chain of nested counts in each open group
    last = 1  # of the item just read: what a count multiplies
    at = 0
    while at < len(text):
        character = text[at]
        if character == "\\":
            at, last = at + 2, 1
            continue
        if character == "[":
            at, last = _after_class(text, at), 1
            continue
        if literals and character == literals:
            at, last = _after_literal(text, at, literals), 1
            continue
        if character == opens:
            products.append(1)
            if len(products) - 1 > limits.max_depth:
                raise InvalidRequest(field, f"has groups more than {limits.max_depth} deep")
        elif character == closes and len(products) > 1:
            last = products.pop()
            products[-1] = max(products[-1], last)
        elif character == "{" and (counts := _COUNTS.match(text, at)):
            last *= _largest(counts, field, limits)
            if last > limits.max_repeats:
                raise InvalidRequest(field, f"repeats more than {limits.max_repeats} times, nested counts multiplied")
            products[-1] = max(products[-1], last)
            at = counts.end()
            continue
        elif not character.isspace():
            last = 1
        at += 1


def _largest(counts: re.Match[str], field: str, limits: GrammarLimits) -> int:
    low, high = counts.group(1), counts.group(3)
    if max(len(low), len(high)) > len(str(limits.max_repeats)):
        raise InvalidRequest(field, f"repeats more than {limits.max_repeats} times")
    return max(int(low or 1), int(high or 1), 1)


def _after_class(text: str, at: int) -> int:
    """Return the place after a character class that begins at `at`."""
    at += 1
    while at < len(text) and text[at] != "]":
        at += 2 if text[at] == "\\" else 1
    return at + 1


def _after_literal(text: str, at: int, quote: str) -> int:
    at += 1
    while at < len(text) and text[at] != quote:
        at += 2 if text[at] == "\\" else 1
    return at + 1
