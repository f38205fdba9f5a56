"""The arithmetic of a case worked by hand: "1000*4/M + 2*10/K", to the last digit."""

from __future__ import annotations

import ast
import operator
from fractions import Fraction

# What the book must agree with: a pico-dollar.
PICO = Fraction(1, 10**12)
_UNITS = {"M": 1_000_000, "K": 1000}
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def exactly(text: str) -> Fraction:
    """The value of an expression in numbers, M (a million) and K (a thousand)."""
    return _value(ast.parse(text, mode="eval").body)


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=value):
            return Fraction(str(value))
        case ast.Name(id=name):
            return Fraction(_UNITS[name])
        case ast.BinOp(left=left, op=op, right=right):
            return _OPERATORS[type(op)](_value(left), _value(right))
    raise ValueError(ast.dump(node))
