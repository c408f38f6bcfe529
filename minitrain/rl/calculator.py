"""A calculator for arithmetic on numbers."""

import ast
import operator
from fractions import Fraction

BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
MAX_CHARACTERS = 200


def calculate(expression: str) -> str:
    """Return the value of an arithmetic expression of numbers, + - * / // % and parentheses.

    Raises:
        ValueError: It is something else, too long, or divides by zero.
    """
    if len(expression) > MAX_CHARACTERS:
        raise ValueError("the expression is too long")
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ZeroDivisionError, RecursionError) as error:
        raise ValueError(f"{expression.strip()}: {type(error).__name__}") from None
    return str(value) if value.denominator == 1 else f"{float(value):.10g}"


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in BINARY:
        return Fraction(BINARY[type(node.op)](_value(node.left), _value(node.right)))
    raise ValueError(f"{ast.unparse(node)} is not arithmetic")
