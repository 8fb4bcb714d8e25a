"""Whether a text of a `.pt2` file is an expression of sizes, and nothing else.

Torch evaluates such texts: sizes by way of `sympy.sympify`, conditions on inputs as Python. So no
more is let through than numbers, names, arithmetic, comparisons and known functions.
"""

from __future__ import annotations

import ast
import re

from rmfx.errors import RmfxError

_SYNTAX = (
    *(ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.Tuple),
    *(ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.Load),
)
_NUMBERS = ("Integer", "Rational", "Float")
_POWERS = ("Pow", "PowByNatural", "FloatPow", "LShift")
_SIZE_FUNCTIONS = {
    *("FloorDiv", "ModularIndexing", "Where", "PythonMod", "Mod", "CleanDiv", "CeilToInt", "Add"),
    *("FloorToInt", "CeilDiv", "RShift", "FloatTrueDiv", "IntTrueDiv", "TruncToFloat", "Mul"),
    *("IsNonOverlappingAndDenseIndicator", "TruncToInt", "RoundToInt", "RoundDecimal", "ToFloat"),
    *("Identity", "Max", "Min", "Abs", "floor", "ceiling", "sqrt", "Piecewise", "ExprCondPair"),
    *("Eq", "Ne", "Gt", "Ge", "Lt", "Le", "Equality", "Unequality", "StrictGreaterThan"),
    *("StrictLessThan", "GreaterThan", "LessThan", "And", "Or", "Not", "Xor", "Symbol", "Tuple"),
    *("BitwiseFn_bitwise_and", "BitwiseFn_bitwise_or", "BitwiseFn_bitwise_xor"),
    *(*_NUMBERS, *_POWERS),
}
_UNARY = re.compile(r"OpaqueUnaryFn_\w+")
_CONDITION_FUNCTIONS = {
    *("abs", "max", "min", "round", "IsNonOverlappingAndDenseIndicator", "torch._sym_sqrt"),
    *(f"torch.sym_{name}" for name in ("float", "int", "max", "min", "ite", "not", "sqrt")),
    *(f"math.{name}" for name in ("trunc", "floor", "ceil", "isnan", "sqrt", "log2", "cos")),
    *(f"math.{name}" for name in ("cosh", "acos", "sin", "sinh", "asin", "tan", "tanh", "atan")),
    "cast_symbool_to_symint_guardless",
}
_CONDITION_VALUES = {"L", "inf", "math.inf", "math.nan", "math", "torch"}
_METHODS = ("size", "stride", "storage_offset", "dim", "numel", "item")
_HIGHEST_POWER = 64
_HIGHEST_NUMBER = 1e300


class UnsafeFileError(RmfxError):
    """A file holds what could run code while it is opened; the text names the entry."""


def quoted(text: str) -> str:
    """The beginning of a text, for messages."""
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def check_size(text: str) -> None:
    """Refuse what is no expression of sizes, as `sympy.sympify` evaluates them.

    Raises:
        UnsafeFileError: it holds other things than numbers, names and functions of sizes, or a
            power that could take for ever.
    """
    tree = _tree(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            fits = _is_size_function(node.func)
        elif isinstance(node, ast.keyword):
            fits = _is_number(node.value) and node.value.value <= _HIGHEST_POWER  # type: ignore[attr-defined]
        elif isinstance(node, ast.Name):
            fits = not node.id.startswith("__")
        else:
            fits = isinstance(node, _SYNTAX) or _is_number(node) or _is_word(node)
        _demand(fits and _is_bounded(node), text)


def check_condition(text: str) -> None:
    """Refuse what is no condition on inputs `L`, as an exported program runs them.

    Raises:
        UnsafeFileError: it holds other things than comparisons and arithmetic of sizes.
    """
    tree = _tree(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            fits = not node.keywords and _is_condition_function(node.func)
        elif isinstance(node, (ast.Name, ast.Attribute)):
            fits = ast.unparse(node) in _CONDITION_VALUES or _is_condition_function(node)
        else:
            known = isinstance(node, (*_SYNTAX, ast.Subscript))
            fits = known or _is_number(node) or _is_word(node)
        _demand(fits and _is_bounded(node), text)


def _is_size_function(node: ast.expr) -> bool:
    if not isinstance(node, ast.Name):
        return False
    return node.id in _SIZE_FUNCTIONS or _UNARY.fullmatch(node.id) is not None


def _is_condition_function(node: ast.expr) -> bool:
    if isinstance(node, ast.Attribute) and node.attr in _METHODS:
        return True
    return ast.unparse(node) in _CONDITION_FUNCTIONS


def _is_number(node: ast.AST) -> bool:
    if not isinstance(node, ast.Constant) or not isinstance(node.value, (int, float)):
        return False
    return node.value <= _HIGHEST_NUMBER or node.value == float("inf")


def _is_word(node: ast.AST) -> bool:
    """Whether a node is None or a text that is no code: a name, or a number in digits."""
    if not isinstance(node, ast.Constant) or not isinstance(node.value, (str, type(None))):
        return False
    word = node.value or ""
    if re.fullmatch(r"[+-]?[\d.]+(e[+-]?\d+)?", word):
        return len(word) <= 60 and abs(float(word)) <= _HIGHEST_NUMBER
    return re.fullmatch(r"[A-Za-z_][\w.-]*|", word) is not None


def _is_bounded(node: ast.AST) -> bool:
    """Whether a node is no power, or one of a small number of something that has none.

    Powers of powers of numbers would take for ever.
    """
    if not _is_power(node):
        return True
    parts = node.args if isinstance(node, ast.Call) else [node.left, node.right]  # type: ignore[attr-defined]
    if len(parts) != 2 or any(_is_power(inner) for inner in ast.walk(parts[0])):
        return False
    return all(_is_small(inner) for inner in ast.walk(parts[1]))


def _is_power(node: ast.AST) -> bool:
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, (ast.Pow, ast.LShift))
    return isinstance(node, ast.Call) and ast.unparse(node.func) in _POWERS


def _is_small(node: ast.AST) -> bool:
    """Whether a node may stand in an exponent: a small number, written in whatever way."""
    if isinstance(node, ast.Constant):
        number = _is_number(node) or (isinstance(node.value, str) and _is_word(node))
        return number and abs(float(node.value)) <= _HIGHEST_POWER  # type: ignore[arg-type]
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.Div)
    written = (ast.UnaryOp, ast.USub, ast.Div, ast.Call, ast.keyword, ast.Load)
    return isinstance(node, written) or (isinstance(node, ast.Name) and node.id in _NUMBERS)


def _tree(text: str) -> ast.Expression:
    """A text as an expression, without what torch and sympy would read as something else."""
    _demand(not re.search(r'[#\\"\n]', text), text)
    try:
        return ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UnsafeFileError(f"{quoted(text)} is no expression of sizes") from error


def _demand(fits: bool, text: str) -> None:
    if not fits:
        raise UnsafeFileError(f"{quoted(text)} does more than compute with sizes")
