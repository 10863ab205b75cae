"""A calculator that an agent may be given: arithmetic, and nothing else of Python."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from typing import Annotated

from pydantic import Field

from midstream.flows.tools import tool

Number = int | float

_MAX_CHARACTERS = 100
_MAX_DIGITS = 100
_BOUND = 10**_MAX_DIGITS
_MAX_EXPONENT = 1000
_MAX_PLACES = 50


def evaluate(expression: str) -> Number:
    """The value of an arithmetic expression. Raises ValueError for all that is none, or too large.

    Every number that comes up stays below 10**100, so each of the at most 100 characters costs next to nothing.
    """
    if len(expression) > _MAX_CHARACTERS:
        raise ValueError(f"the expression has {len(expression)} characters, at most {_MAX_CHARACTERS} are read")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ValueError(f"{expression!r} is no arithmetic expression") from error
    return _value(tree.body)


@tool
def calculator(expression: Annotated[str, Field(min_length=1, max_length=_MAX_CHARACTERS)]) -> Number:
    """Compute arithmetic: + - * / // % ** ( ) abs round sqrt min max."""
    return evaluate(expression)


def _value(node: ast.expr) -> Number:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return _bounded(value)
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _UNARY[type(op)](_value(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _applied(_BINARY[type(op)], _value(left), _value(right))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
            return _applied(_FUNCTIONS[name], *map(_value, arguments))
    raise ValueError(f"{ast.unparse(node)} is no arithmetic")


def _applied(function: Callable[..., Number], *values: Number) -> Number:
    try:
        return _bounded(function(*values))
    except ZeroDivisionError as error:
        raise ValueError("division by zero") from error
    except (TypeError, OverflowError) as error:
        raise ValueError(str(error)) from error


def _bounded(value: Number) -> Number:
    if isinstance(value, complex) or not math.isfinite(value):
        raise ValueError("the result is no real number")
    if abs(value) >= _BOUND:
        raise ValueError(f"a number has more than {_MAX_DIGITS} digits")
    return value


def _power(base: Number, exponent: Number) -> Number:
    # Checked before it is computed: this is where a short expression could cost hours.
    if abs(exponent) > _MAX_EXPONENT:
        raise ValueError(f"an exponent is over {_MAX_EXPONENT}")
    if base and abs(exponent) * math.log10(abs(base)) > _MAX_DIGITS:
        raise ValueError(f"a number has more than {_MAX_DIGITS} digits")
    return base**exponent


def _round(value: Number, places: Number = 0) -> Number:
    if not isinstance(places, int) or abs(places) > _MAX_PLACES:
        raise ValueError(f"round takes a whole number of places up to {_MAX_PLACES}")
    return round(value, places) if places else round(value)


_UNARY: dict[type[ast.unaryop], Callable[[Number], Number]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_BINARY: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
}
_FUNCTIONS: dict[str, Callable[..., Number]] = {
    "abs": abs,
    "max": max,
    "min": min,
    "round": _round,
    "sqrt": math.sqrt,
}
