"""The user's line with an edit written into it, where it can be written there."""

import ast
import linecache

from nanhunt.recorder import Place
from nanhunt.trials.calls import Site
from nanhunt.trials.edits import OTHER_NAMES, Edit

_MODULES = frozenset(["torch", "F", "functional", "nn", "special", "linalg", "fft"])
_SIMPLE = (ast.Name, ast.Attribute, ast.Call, ast.Subscript)


def rewritten(site: Site, edit: Edit) -> tuple[str, str] | None:
    """The line before and after an edit; None where the call does not stand there as such."""
    if not site.is_direct or "{f}" in edit.text:
        return None
    span = _span(site.line)
    if span is None:
        return None
    line, start, end = span
    segment = line[start:end].decode()
    changed = _changed(segment, site.name, edit)
    if changed is None:
        return None
    before, after = line.decode(), line[:start].decode() + changed + line[end:].decode()
    return before.strip(), after.strip()


def _span(place: Place) -> tuple[bytes, int, int] | None:
    """The line of an instruction, and where in it the instruction stands, in bytes."""
    code, offset = place
    positions = list(code.co_positions())
    first, last, start, end = positions[offset // 2]
    if first is None or first != last or start is None or end is None:
        return None
    line = linecache.getline(code.co_filename, first).rstrip("\n").encode()
    return (line, start, end) if end <= len(line) else None


def _changed(segment: str, name: str, edit: Edit) -> str | None:
    try:
        node = ast.parse(f"({segment})", mode="eval").body
    except SyntaxError:
        return None
    operands = _operands(node, name)
    if operands is None:
        return None
    if edit.target == "call":
        x = ast.unparse(operands[0]) if operands else "x"
        call = segment if isinstance(node, _SIMPLE) else f"({segment})"
        return _closed(edit.text.format(call=call, x=x))
    if edit.target == "keyword":
        return _with_keyword(node, edit.text)
    position = ("x", "y").index(edit.target)
    if position >= len(operands):
        return None
    return _spliced(segment, node, operands[position], edit)


def _operands(node: ast.expr, name: str) -> list[ast.expr] | None:
    """The operands of a call in the order of its formula."""
    if isinstance(node, ast.BinOp):
        return [node.left, node.right]
    if not isinstance(node, ast.Call):
        return None
    called = node.func
    own = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
    if not name.endswith(own.strip("_")):
        return None  # the line calls something that calls this
    if isinstance(called, ast.Attribute) and not _is_module(called.value):
        return [called.value, *node.args]
    return [a for a in node.args if not isinstance(a, ast.Constant) or not isinstance(a.value, str)]


def _is_module(node: ast.expr) -> bool:
    last = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
    return last in _MODULES


def _spliced(segment: str, node: ast.expr, operand: ast.expr, edit: Edit) -> str | None:
    text = f"({segment})".encode()
    start, end = operand.col_offset, operand.end_col_offset
    if start is None or end is None:
        return None
    is_argument = isinstance(node, ast.Call) and operand in node.args
    # Brackets around what is no argument are its own.
    is_closed = not is_argument and (text[start - 1 : start], text[end : end + 1]) == (b"(", b")")
    if is_closed:
        start, end = start - 1, end + 1
    own = text[start:end].decode()
    held = own if is_closed or isinstance(operand, _SIMPLE) else f"({own})"
    new = edit.text.format(**{edit.target: held})
    new = new if is_argument else _closed(new)
    return (text[:start] + new.encode() + text[end:]).decode()[1:-1]


def _closed(text: str) -> str:
    """A text that can stand anywhere in an expression."""
    node = ast.parse(text, mode="eval").body
    return text if isinstance(node, _SIMPLE) else f"({text})"


def _with_keyword(node: ast.expr, text: str) -> str | None:
    if not isinstance(node, ast.Call):
        return None
    name, _, value = text.partition("=")
    others = [k for k in node.keywords if k.arg not in (name, OTHER_NAMES.get(name, name))]
    keyword = ast.keyword(name, ast.parse(value, mode="eval").body)
    return ast.unparse(ast.Call(node.func, node.args, [*others, keyword]))
