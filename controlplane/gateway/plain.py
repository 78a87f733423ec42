"""Whether a chat template's work grows with the conversation alone: read off its syntax, once a template.

The sandbox bounds what a template may reach, not what it computes; a clock that is looked at between pieces
cannot stop a loop that yields none. Such a template belongs in a thread. What nearly every model ships (one
loop over the messages, conditions, string methods) has no way to be slow, and may run where a short
conversation is cheaper to render than to hand over. What is not known here to be harmless is not plain.
"""

from __future__ import annotations

from jinja2 import nodes

_STATEMENTS = (
    nodes.Template, nodes.Output, nodes.TemplateData, nodes.For, nodes.If, nodes.Assign, nodes.ExprStmt,
    nodes.Continue, nodes.Break, nodes.ScopedEvalContextModifier, nodes.Scope,
)  # fmt: skip
_EXPRESSIONS = (
    nodes.Name, nodes.NSRef, nodes.Const, nodes.Getattr, nodes.Getitem, nodes.Slice, nodes.List, nodes.Tuple,
    nodes.Dict, nodes.Pair, nodes.Keyword, nodes.Add, nodes.Sub, nodes.Concat, nodes.Compare, nodes.Operand,
    nodes.And, nodes.Or, nodes.Not, nodes.Neg, nodes.Pos, nodes.Mod, nodes.CondExpr, nodes.Filter, nodes.Test,
    nodes.Call,
)  # fmt: skip
_FILTERS = frozenset(
    {"trim", "length", "count", "join", "tojson", "string", "default", "d", "first", "last", "list", "items"}
    | {"lower", "upper", "capitalize", "title", "int", "safe", "selectattr", "rejectattr", "reverse"}
)
_FUNCTIONS = frozenset({"raise_exception", "namespace", "strftime_now", "dict"})
_METHODS = frozenset(
    {"strip", "lstrip", "rstrip", "split", "rsplit", "startswith", "endswith", "removeprefix", "removesuffix"}
    | {"lower", "upper", "title", "items", "keys", "values", "get"}
)


def is_plain(template: nodes.Template) -> bool:
    """No loop but over what the conversation holds, no call that can make much of little, nothing that grows
    on itself."""
    if not all(map(_harmless, template.find_all(nodes.Node))):
        return False
    return not _loops_within(template) and not _grows(template)


def _harmless(node: nodes.Node) -> bool:
    if isinstance(node, nodes.Filter):
        return node.name in _FILTERS
    if isinstance(node, nodes.Call):
        called = node.node
        if isinstance(called, nodes.Name):
            return called.name in _FUNCTIONS
        return isinstance(called, nodes.Getattr) and called.attr in _METHODS
    if isinstance(node, nodes.For):
        return not node.recursive
    if isinstance(node, nodes.Mod):
        return False  # of strings it formats, to any width
    return isinstance(node, _STATEMENTS + _EXPRESSIONS)


def _loops_within(template: nodes.Template) -> bool:
    """A loop in a loop, but for a message's tool calls: two over the characters of one text are too slow."""
    return any(
        inner is not loop and not _over_tool_calls(inner.iter)
        for loop in template.find_all(nodes.For)
        for inner in loop.find_all(nodes.For)
    )


def _over_tool_calls(node: nodes.Node) -> bool:
    if isinstance(node, nodes.Getattr):
        return node.attr == "tool_calls"
    return (
        isinstance(node, nodes.Getitem)
        and isinstance(node.arg, nodes.Const)
        and node.arg.value == "tool_calls"
    )


def _grows(template: nodes.Template) -> bool:
    """An assignment that adds two assigned values: in a loop it could double a text at every turn."""
    assigned: set[str] = set()
    for assign in template.find_all(nodes.Assign):
        target = assign.target
        assigned |= {
            item.name for item in (target, *target.find_all(nodes.Name)) if isinstance(item, nodes.Name)
        }
        if isinstance(target, nodes.NSRef):
            assigned.add(target.name)
    return any(
        sum(name.name in assigned for name in assign.node.find_all(nodes.Name)) > 1
        and any(
            isinstance(item, (nodes.Add, nodes.Concat))
            for item in (assign.node, *assign.node.find_all(nodes.Node))
        )
        for loop in template.find_all(nodes.For)
        for assign in loop.find_all(nodes.Assign)
    )
