"""Mutants of a Python file: one arithmetic, comparison, constant or call node of its syntax tree, changed.

    sites(file, source)   all nodes that may change, each with its possible changes
    draw(sites, count)    the same nodes for the same seed; an edit in one file does not move the draw in others

A mutant replaces the text of one node, so line numbers and comments stay. Not drawn, since no test should see them:

    docstrings and other bare texts, annotations, type aliases, `cast`     they do nothing at run time
    everything below `raise`, and the message of an assert                 wording of errors
    calls of loggers, `warnings.warn` and `print`                          wording of notices
    `__all__`, `__version__`, `if TYPE_CHECKING`, `if __name__`            names for readers and tools
    decorators                                                             forms of dataclasses, sizes of caches
    parts of f-strings                                                     Python 3.11 does not know their place
    None, `...`, bytes                                                     another value has another type: mypy's task
"""

from __future__ import annotations

import ast
import copy
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

ARITHMETIC: dict[type[ast.operator], tuple[type[ast.operator], ...]] = {
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div, ast.Add),
    ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Mult, ast.Div),
    ast.Mod: (ast.FloorDiv, ast.Mult),
    ast.Pow: (ast.Mult,),
    ast.MatMult: (ast.Mult,),
    ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,),
    ast.BitXor: (ast.BitOr,),
    ast.LShift: (ast.RShift,),
    ast.RShift: (ast.LShift,),
}
"""Other operators that take the place of one."""

COMPARISON: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
"""Other comparisons that take the place of one."""

NOTICES = {"warn", "debug", "info", "warning", "error", "exception", "print"}
"""Names of functions that only tell the user something."""

ALIASES = {"Literal", "Callable", "Annotated"}
"""Subscripts with these names are types."""


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One change of one node.

    Attributes:
        file: path under the top of the checkout.
        kind: "arithmetic", "comparison", "constant" or "call".
        lines: first and last line of the statement around the node; of a compound statement, its head only.
        at_import: whether the statement runs when the module is imported, not inside a function.
        start, stop: place of the node's text in the source, in characters.
        line: first line of the node, without indentation.
        old, new: text of the node before and after.
        number: of this mutant among those with the same file, line, old and new.
    """

    file: str
    kind: str
    lines: tuple[int, int]
    at_import: bool
    start: int
    stop: int
    line: str
    old: str
    new: str
    number: int = 0

    @property
    def change(self) -> str:
        """The change on one line."""
        return f"{' '.join(self.old.split())} -> {self.new}"

    @property
    def key(self) -> str:
        """Identity that survives edits of other lines."""
        return "\n".join((self.file, self.line, self.change, str(self.number)))

    def apply(self, source: str) -> str:
        """Return the source with the change."""
        return source[: self.start] + self.new + source[self.stop :]


@dataclass(kw_only=True)
class Site:
    """One node with its possible changes."""

    mutants: list[Mutant] = field(default_factory=list)


def sites(file: str, source: str) -> list[Site]:
    """Return the nodes of a file that may change, in the order of the text, each with at least one change."""
    tree = ast.parse(source)
    places = _Places(source)
    modules = _modules(tree)
    seen: dict[tuple[str, str, str], int] = {}
    nodes: list[Site] = []
    for node, statement, at_import, alone in _nodes(tree):
        kind, texts = _changes(node, modules, alone)
        start, stop = places.span(node)
        line = source.splitlines()[node.lineno - 1].strip()
        site = Site()
        for text in texts:
            old = source[start:stop]
            if text.isdecimal() and source[stop : stop + 1] == ".":  # 0.round() is no program, and (0).round() is one
                text = f"({text})"
            same = (line, old, text)
            seen[same] = seen.get(same, -1) + 1
            site.mutants.append(
                Mutant(
                    file=file,
                    kind=kind,
                    lines=_head(statement),
                    at_import=at_import,
                    start=start,
                    stop=stop,
                    line=line,
                    old=old,
                    new=text,
                    number=seen[same],
                )
            )
        if site.mutants:
            nodes.append(site)
    return sorted(nodes, key=lambda one: (one.mutants[0].start, one.mutants[0].stop))


def draw(nodes: Sequence[Site], count: int, seed: int) -> list[Mutant]:
    """Return `count` mutants of different nodes. Each node has the same chance, and so has each change of a node.

    A node's rank is a hash of its own text and the seed: a larger draw contains a smaller one, and most of a draw
    stays when the code changes.

    Raises:
        ValueError: there are fewer nodes than `count`.
    """
    if count > len(nodes):
        raise ValueError(f"only {len(nodes)} nodes for {count} mutants")
    ranked = sorted((_digest(seed, site.mutants[0].key), index) for index, site in enumerate(nodes))
    chosen = (nodes[index].mutants for _, index in ranked[:count])
    return [mutants[_digest(seed, "change", mutants[0].key) % len(mutants)] for mutants in chosen]


def named_mutant(file: str, source: str, old: str, new: str) -> Mutant:
    """Return the mutant that replaces `old` by `new`.

    Raises:
        ValueError: `old` does not occur exactly once.
    """
    if source.count(old) != 1:
        raise ValueError(f"{file}: {old!r} occurs {source.count(old)} times instead of once")
    start = source.index(old)
    first = source.count("\n", 0, start) + 1
    last = first + old.rstrip("\n").count("\n")
    around = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.stmt) and not hasattr(node, "body") and node.lineno <= last
        and first <= (node.end_lineno or node.lineno)
    ]  # fmt: skip
    lines = min([first, *(n.lineno for n in around)]), max([last, *(n.end_lineno or n.lineno for n in around)])
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = any(n.body[0].lineno <= last and first <= (n.end_lineno or n.lineno) for n in functions)
    line = source.splitlines()[first - 1].strip()
    return Mutant(
        file=file,
        kind="named",
        lines=lines,
        at_import=not inside,
        start=start,
        stop=start + len(old),
        line=line,
        old=old,
        new=new,
    )


def _digest(*parts: int | str) -> int:
    text = "\n".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


class _Places:
    """Places of nodes in characters; the syntax tree counts bytes of UTF-8 in each line."""

    def __init__(self, source: str) -> None:
        self.lines = source.splitlines(keepends=True)
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line))

    def span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        """First character of a node, and the one after its last."""
        assert node.end_lineno is not None and node.end_col_offset is not None
        return self._place(node.lineno, node.col_offset), self._place(node.end_lineno, node.end_col_offset)

    def _place(self, line: int, column: int) -> int:
        return self.starts[line - 1] + len(self.lines[line - 1].encode()[:column].decode())


def _modules(tree: ast.AST) -> set[str]:
    """Names that are modules in this file: `torch` is no receiver of `torch.sqrt(x)`."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.asname or alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.update(
                alias.asname or alias.name for alias in node.names if (alias.asname or alias.name)[0].islower()
            )
            names.update(name for name in ("F",) if any(alias.asname == name for alias in node.names))
    return names


def _head(statement: ast.stmt) -> tuple[int, int]:
    """Lines of a statement without its body."""
    last = statement.end_lineno or statement.lineno
    body = getattr(statement, "body", None)
    if body:
        last = max(statement.lineno, body[0].lineno - 1)
    return statement.lineno, last


Place = tuple[ast.expr | ast.stmt, ast.stmt, bool, bool]


def _nodes(tree: ast.Module) -> Iterator[Place]:
    """Yield each node that may change, its statement, whether that runs at import, whether the node is all of it."""
    for statement in tree.body:
        yield from _in_statement(statement, at_import=True)


def _in_statement(statement: ast.stmt, *, at_import: bool) -> Iterator[Place]:
    if isinstance(statement, ast.Raise | ast.Import | ast.ImportFrom | ast.Global | ast.Nonlocal | ast.Pass):
        return
    if isinstance(statement, ast.If):
        test = ast.unparse(statement.test)
        if test.endswith("TYPE_CHECKING") or "__name__" in test:
            return
    if isinstance(statement, ast.Assign | ast.AnnAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        if any(isinstance(one, ast.Name) and one.id in {"__all__", "__version__"} for one in targets):
            return
    if isinstance(statement, ast.AugAssign):
        yield statement, statement, at_import, False
    inside = isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef)
    for name, value in ast.iter_fields(statement):
        if name in {"annotation", "returns", "decorator_list", "msg", "type_comment", "type_params"}:
            continue
        if name == "value" and isinstance(statement, ast.Expr) and isinstance(value, ast.Constant):
            continue  # a docstring
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.stmt):
                yield from _in_statement(child, at_import=at_import and not inside)
            elif isinstance(child, ast.ExceptHandler | ast.match_case):
                for part in ast.iter_child_nodes(child):
                    if isinstance(part, ast.stmt):
                        yield from _in_statement(part, at_import=at_import and not inside)
                    else:
                        yield from _in_expression(part, statement, at_import)
            elif isinstance(child, ast.AST):
                alone = isinstance(statement, ast.Expr)
                for node, _, _, _ in _in_expression(child, statement, at_import):
                    yield node, statement, at_import, alone and node is child


def _in_expression(node: ast.AST, statement: ast.stmt, at_import: bool) -> Iterator[Place]:
    if isinstance(node, ast.JoinedStr):
        return
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id in ALIASES:
        return
    if isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in NOTICES:
            return
        if name == "cast":
            yield from _in_expression(node.args[1], statement, at_import)
            return
    if isinstance(node, ast.BinOp | ast.UnaryOp | ast.BoolOp | ast.Compare | ast.Constant | ast.Call):
        yield node, statement, at_import, False
    for child in ast.iter_child_nodes(node):
        if not (isinstance(node, ast.arg) and child is node.annotation):
            yield from _in_expression(child, statement, at_import)


def _changes(node: ast.expr | ast.stmt, modules: set[str], alone: bool) -> tuple[str, list[str]]:
    """Return the kind of a node, and the texts that may take its place."""
    if isinstance(node, ast.AugAssign):
        return "arithmetic", [_with(node, op=other()) for other in ARITHMETIC[type(node.op)]]
    if isinstance(node, ast.BinOp):
        return "arithmetic", [_with(node, op=other()) for other in ARITHMETIC[type(node.op)]]
    if isinstance(node, ast.UnaryOp):
        kind = "comparison" if isinstance(node.op, ast.Not) else "arithmetic"
        return kind, [_text(node.operand)] if isinstance(node.op, ast.USub | ast.Not) else []
    if isinstance(node, ast.BoolOp):
        return "comparison", [_with(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())]
    if isinstance(node, ast.Compare):
        texts = []
        for place, operator in enumerate(node.ops):
            for other in COMPARISON[type(operator)]:
                texts.append(_with(node, ops=[*node.ops[:place], other(), *node.ops[place + 1 :]]))
        return "comparison", texts
    if isinstance(node, ast.Constant):
        return "constant", [repr(value) for value in _other_values(node.value)]
    assert isinstance(node, ast.Call)
    return "call", _other_calls(node, modules, alone)


def _other_values(value: object) -> list[object]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value - 1]
    if isinstance(value, float):
        return [value + 1, value * 2] if value else [1.0]
    if isinstance(value, str):
        return ["XX" + value]
    return []


def _other_calls(node: ast.Call, modules: set[str], alone: bool) -> list[str]:
    """A call leaves out its work (its receiver or its first argument is the result), an option, or swaps arguments."""
    texts: list[str] = []
    first = node.args[0] if node.args and not isinstance(node.args[0], ast.Starred) else None
    method = isinstance(node.func, ast.Attribute) and _root(node.func) not in modules
    if alone:
        texts.append("None")
    elif method:
        assert isinstance(node.func, ast.Attribute)
        texts.append(_text(node.func.value))
    elif first is not None:
        texts.append(_text(first))
    else:
        texts.append("None")
    for place, keyword in enumerate(node.keywords):
        if keyword.arg:
            texts.append(_with(node, keywords=[*node.keywords[:place], *node.keywords[place + 1 :]]))
    second = node.args[1] if len(node.args) > 1 and not isinstance(node.args[1], ast.Starred) else None
    if first is not None and second is not None and ast.dump(first) != ast.dump(second):
        texts.append(_with(node, args=[second, first, *node.args[2:]]))
    return texts


def _root(node: ast.expr) -> str:
    while isinstance(node, ast.Attribute):
        node = node.value
    return getattr(node, "id", "")


def _with(node: ast.expr | ast.stmt, **fields: object) -> str:
    other = copy.copy(node)
    for name, value in fields.items():
        setattr(other, name, value)
    return ast.unparse(other) if isinstance(other, ast.stmt) else _text(other)


def _text(node: ast.AST) -> str:
    """Text of an expression that keeps its meaning in any place."""
    text = ast.unparse(node)
    return text if isinstance(node, ast.Name | ast.Attribute | ast.Constant | ast.Call) else f"({text})"
