"""Jinja for templates that come from strangers: nothing of Python can be reached, and every rendering ends, soon and small.

A template is a program. Here it is one of a small language: its syntax tree may hold only the statements, filters, tests
and methods listed below, attributes are looked up in tables, no data can be changed and none is computed lazily. All that
costs time or memory is paid for out of one budget, before it is done where the cost could be large: a loop pays for its
whole run when it begins, an operation for the characters and items that it makes, a comparison for a walk over what it
compares. So time and memory have a bound that depends on no machine, and no signal, thread or process is needed. A clock
is looked at now and then all the same, should an operation cost more than it pays.

The tree is rewritten before Jinja compiles it: loops, `~`, comparisons, slices and printed values become calls of the
checked filters at the end of this file. No filter, method or operator of a template runs while it is compiled.
"""

import contextlib
import functools
import hashlib
import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
from jinja2 import meta, nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateAssertionError, TemplateRuntimeError, TemplateSyntaxError
from jinja2.filters import FILTERS as JINJA_FILTERS
from jinja2.runtime import Context, LoopContext, Macro, StrictUndefined, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.tests import TESTS as JINJA_TESTS
from jinja2.utils import Cycler, Joiner, Namespace, missing
from jinja2.visitor import NodeTransformer

MAX_CHARACTERS = 1_000_000
"""Bound on the characters (or items) of a rendering, and of every value on the way to it: no example comes near it."""
MAX_WORK = 16_000_000
"""Bound on the work of one rendering: a character made or read counts 1, an item of a list or a step of the template 8 or more."""
MAX_SECONDS = 2.0
"""Processor time after which a rendering is stopped whatever it has paid. Few get so far as to look at the clock."""
MAX_SOURCE = 100_000
"""Bound on the characters of a template."""
MAX_NODES = 10_000
"""Bound on the nodes of a template's syntax tree."""
MAX_DEPTH = 100
"""Bound on the nesting of a template's syntax, and of the lists and mappings that it prints or compares."""
MAX_CALLS = 40
"""Bound on how deeply macros call each other."""
MAX_BITS = 1024
"""Bound on a whole number: beyond any float."""
BAR = "\ufdd0"  # a code point that Unicode keeps for such internal use
"""Stands for each `|` of a printed value in a rendering that is `marked`."""

_ITEM = 8
_LOOK = 1 << 18
"""Work between two looks at the clock."""
_LONG = 1000
"""A shorter text is printed for the price of a step."""
_NEEDLE = 64
"""Bound on what is searched for backwards or stripped: the time of these grows with its length times the text's."""


class Refused(Exception):
    """What a template did that it may not, or its fault: one line, to which the caller adds whose template and which row."""


class _Exhausted(TemplateRuntimeError):
    """The budget is spent."""


class Chance:
    """A stream of random picks that is a pure function of its seed. Nothing is computed before the first pick."""

    __slots__ = ("_random", "_seed")

    def __init__(self, *seed: object) -> None:
        self._seed = seed
        self._random: random.Random | None = None

    def pick(self, options: Sequence[Any]) -> Any:
        """The next pick."""
        if self._random is None:
            self._random = random.Random(hashlib.sha256("/".join(map(str, self._seed)).encode()).digest())
        return self._random.choice(options)


class Program:
    """A template, parsed and checked; it is compiled when it is first rendered."""

    def __init__(self, source: str, lenient: bool, marked: bool) -> None:
        self._environment, self._marked = _environment(lenient), marked
        self._tree: nodes.Template | None = parse(source, lenient=lenient)
        tree = self._tree
        only_text = all(isinstance(each, _TEXT_NODES) for each in tree.find_all(nodes.Node))
        self.constant = "".join(each.data for each in tree.find_all(nodes.TemplateData)) if only_text else None
        """The rendering, where it is the same for every row because nothing in it is Jinja."""

    @functools.cached_property
    def _root(self) -> Callable[..., Iterator[str]]:
        tree, self._tree = self._tree, None  # rewriting changes it
        assert tree is not None
        with _faults():
            rewritten = _Rewriter(self._marked).visit(tree).set_environment(self._environment)
            compiled: Callable[..., Iterator[str]] = self._environment.from_string(rewritten).root_render_func
        return compiled

    def render(self, row: Mapping[str, Any], chance: Chance, more: Mapping[str, Any] | None = None) -> str:
        """Render a row; `more` holds further names, which win over its columns."""
        names = _Names(row)
        if more:
            names.update(more)
        try:
            pieces = list(self._root(_Rendering(self._environment, names, chance)))
            if sum(map(len, pieces)) > MAX_CHARACTERS:
                raise _Exhausted(f"the rendering is longer than {MAX_CHARACTERS:,} characters")
            return "".join(pieces)
        except jinja2.UndefinedError as error:
            columns = ", ".join(str(key) for key in row if key != "answer_choices")
            raise Refused(f"{_line(error)}; columns of the row: {columns}") from error
        except Exception as error:  # a template is a stranger's program: whatever it raises is its own fault
            raise Refused(_line(error)) from error


@functools.lru_cache(maxsize=8192)
def load(source: str, *, lenient: bool = False, marked: bool = False) -> Program:
    """Compile a template, once.

    `lenient`: what is not there prints as nothing (Jinja's own default), rather than being an error. `marked`: each `|`
    of a printed value is printed as `BAR`, so that `|||` in a rendering is the template's own text.
    """
    return Program(source, lenient, marked)


def parse(source: str, *, lenient: bool = False) -> nodes.Template:
    """The syntax tree of a template, after checking that it is of the language above."""
    if len(source) > MAX_SOURCE:
        raise Refused(f"the template is longer than {MAX_SOURCE:,} characters")
    with _faults():
        tree = _environment(lenient).parse(source)
        _check(tree)
    return tree


def variables(tree: nodes.Template) -> frozenset[str]:
    """The names that a row must provide."""
    with _faults():
        return frozenset(meta.find_undeclared_variables(tree))


@contextlib.contextmanager
def _faults() -> Iterator[None]:
    """Whatever goes wrong while a template is compiled becomes a `Refused` with its line."""
    try:
        yield
    except Exception as error:
        line = f" (line {error.lineno})" if isinstance(error, TemplateSyntaxError) and error.lineno else ""
        raise Refused(_line(error) + line) from error


def _line(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "the template is nested too deeply"
    message = str(error.message if isinstance(error, jinja2.TemplateError) else error)[:1000]
    message = " ".join(message.split()) or type(error).__name__
    return message if len(message) <= 300 else message[:297] + "..."


# The language: which syntax, and how the tree is rewritten.

_STATEMENTS = (
    *(nodes.Template, nodes.Output, nodes.For, nodes.If, nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.With),
    *(nodes.Assign, nodes.AssignBlock),
)
_EXPRESSIONS = (
    *(nodes.Name, nodes.NSRef, nodes.Const, nodes.TemplateData, nodes.Tuple, nodes.List, nodes.Dict, nodes.Pair, nodes.Keyword),
    *(nodes.CondExpr, nodes.Filter, nodes.Test, nodes.Call, nodes.Getitem, nodes.Getattr, nodes.Slice, nodes.Concat),
    *(nodes.Compare, nodes.Operand, nodes.Mul, nodes.Div, nodes.FloorDiv, nodes.Add, nodes.Sub, nodes.Mod, nodes.Pow),
    *(nodes.And, nodes.Or, nodes.Not, nodes.Neg, nodes.Pos),
)
_LANGUAGE = frozenset((*_STATEMENTS, *_EXPRESSIONS))
_TAGS = {"FromImport": "import", "Scope": "autoescape", "ScopedEvalContextModifier": "autoescape"}


def _check(tree: nodes.Template) -> None:
    """Refuse a tree that is too large or holds anything else than the language."""
    stack: list[tuple[nodes.Node, int]] = [(tree, 1)]
    count = 0
    while stack:
        node, depth = stack.pop()
        count += 1
        if depth > MAX_DEPTH:
            raise TemplateAssertionError(f"it is nested more than {MAX_DEPTH} deep", node.lineno)
        if count > MAX_NODES:
            raise TemplateAssertionError(f"it has more than {MAX_NODES:,} expressions and statements", node.lineno)
        fault = _fault(node)
        if fault:
            raise TemplateAssertionError(fault, node.lineno)
        stack.extend((child, depth + 1) for child in node.iter_child_nodes())


def _fault(node: nodes.Node) -> str | None:
    """What is wrong with a node, apart from its children."""
    kind = type(node).__name__
    if type(node) not in _LANGUAGE:
        return f"the tag '{_TAGS.get(kind, kind.lower())}' is not allowed"
    if isinstance(node, nodes.Filter | nodes.Test):
        word, known, all_known = ("filter", FILTERS, JINJA_FILTERS) if isinstance(node, nodes.Filter) else ("test", TESTS, JINJA_TESTS)
        if node.name not in known:
            return f"The {word} {node.name!r} is not allowed" if node.name in all_known else f"No {word} named {node.name!r}"
    if isinstance(node, nodes.Filter | nodes.Test | nodes.Call) and (node.dyn_args or node.dyn_kwargs):
        return "arguments with * or ** are not allowed"
    if isinstance(node, nodes.For) and node.recursive:
        return "a recursive loop is not allowed"
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Tuple):
        return "[...] takes one position or name"
    if isinstance(node, nodes.Name) and node.name == "self":
        return "the name 'self' is not allowed"
    if (isinstance(node, nodes.Keyword) and node.key.startswith("_")) or (isinstance(node, nodes.NSRef) and node.attr.startswith("_")):
        return "a name that begins with an underscore is not allowed here"
    if isinstance(node, nodes.Const) and isinstance(node.value, int) and node.value.bit_length() > MAX_BITS:
        return "a number is too large"
    return None


class _Rewriter(NodeTransformer):
    """Replaces what Jinja would compile to bare Python by calls of the checked filters (`_INTERNAL`)."""

    def __init__(self, marked: bool) -> None:
        self.marked = marked

    def visit_For(self, node: nodes.For) -> nodes.Node:
        weight = _weight((*node.body, *((node.test,) if node.test else ())))
        self.generic_visit(node)
        node.iter = _checked("each of", node.iter, nodes.Const(weight))
        return node

    def visit_Macro(self, node: nodes.Macro | nodes.CallBlock) -> nodes.Node:
        weight = _weight((*node.body, *node.defaults))
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_checked("paid", nodes.Const(weight)), lineno=node.lineno))
        return node

    visit_CallBlock = visit_Macro

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        node.nodes = [self._printed(child) for child in node.nodes]
        return node

    def _printed(self, child: nodes.Expr) -> nodes.Expr:
        if isinstance(child, nodes.TemplateData):
            return child
        if isinstance(child, nodes.Const):
            return nodes.Const(str(child.value).replace("|", BAR) if self.marked else str(child.value), lineno=child.lineno)
        cut = _cut(child) if self.marked else None
        if cut is not None:  # stands behind every expression of promptsource's, so it is one call instead of three
            return _checked("marked cut", self.visit(cut[0]), nodes.Const(cut[1]))
        return _checked("marked text" if self.marked else "text", self.visit(child))

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:
        self.generic_visit(node)
        node.filter = _behind(_captured("captured", node), node.filter)
        return node

    def visit_FilterBlock(self, node: nodes.FilterBlock) -> nodes.Node:
        self.generic_visit(node)
        node.filter = _checked("text", _behind(_captured("taken", node), node.filter))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _checked("joined", *node.nodes)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _checked("taken", node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.key, nodes.Const):
            node.key = _checked("key", node.key)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        """A comparison with constants is cheap; anything else may walk over lists that hold each other many times."""
        self.generic_visit(node)
        sides = [node.expr, *(operand.expr for operand in node.ops)]
        for left, operand in zip(sides, node.ops, strict=False):
            if operand.op in ("in", "notin"):
                cheap = isinstance(operand.expr, nodes.List | nodes.Tuple) and all(map(_scalar, operand.expr.items))
            else:
                cheap = _scalar(left) or _scalar(operand.expr)
            if not cheap:
                node.expr = _checked("weighed", node.expr)
                for each in node.ops:
                    each.expr = _checked("weighed", each.expr)
                break
        return node


def _checked(name: str, value: nodes.Node, *arguments: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(value, name, list(arguments), [], None, None, lineno=value.lineno)


def _captured(name: str, block: nodes.Node) -> nodes.Filter:
    return nodes.Filter(None, name, [], [], None, None, lineno=block.lineno)


def _behind(first: nodes.Filter, chain: nodes.Filter | None) -> nodes.Filter:
    """`first`, then the filters of a block's `chain`."""
    if chain is None:
        return first
    chain.node = _behind(first, chain.node)  # type: ignore[arg-type]
    return chain


def _weight(body: Iterable[nodes.Node]) -> int:
    """What one run through `body` costs."""
    weight = _ITEM
    for each in body:
        for node in (each, *each.find_all(nodes.Node)):
            weight += len(node.data) if isinstance(node, nodes.TemplateData) else _ITEM
    return weight


def _cut(node: nodes.Expr) -> tuple[nodes.Expr, int] | None:
    """(VALUE, N) of `VALUE | string | truncate(N)`."""
    if isinstance(node, nodes.Filter) and node.name == "truncate" and len(node.args) == 1 and not node.kwargs:
        length, inner = node.args[0], node.node
        if isinstance(inner, nodes.Filter) and inner.name == "string" and inner.node and not inner.args and not inner.kwargs:
            return (inner.node, length.value) if isinstance(length, nodes.Const) and type(length.value) is int else None
    return None


def _scalar(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Const) or (isinstance(node, nodes.Neg) and isinstance(node.node, nodes.Const))


# What a rendering runs on.


class _Names(dict[str, Any]):
    """What the names of a template mean: columns of the row, what the template sets, then the functions."""

    def __missing__(self, key: str) -> Any:
        return _FUNCTIONS.get(key, missing)


class _Rendering(Context):
    """One rendering: its names, its budget and its chance. Every checked filter gets it as its first argument."""

    left = MAX_WORK
    look = MAX_WORK - _LOOK
    deadline: float | None = None
    calls = 0
    name = None

    def __init__(self, environment: "_Environment", names: _Names, chance: Chance) -> None:
        # Not Jinja's own, which takes as long as a whole rendering: of what it prepares only this is needed here.
        self.environment, self.chance, self.eval_ctx = environment, chance, environment.eval_ctx
        self.parent = self.vars = names
        self.resolve_or_missing = names.__getitem__  # type: ignore[assignment,method-assign]
        self.exported_vars = set()

    def spend(self, work: int) -> None:
        """Pay for work."""
        self.left -= work
        if self.left < self.look:
            self._look()

    def _look(self) -> None:
        if self.left < 0:
            raise _Exhausted(f"the template does too much: more than {MAX_WORK:,} characters and steps")
        now = time.thread_time()
        if self.deadline is None:
            self.deadline = now + MAX_SECONDS
        elif now > self.deadline:
            raise _Exhausted(f"the rendering takes longer than {MAX_SECONDS:g} seconds")
        self.look = self.left - _LOOK

    def make(self, size: int, unit: int = 1) -> None:
        """Pay for a value of `size` characters or items, before it is made."""
        if size > MAX_CHARACTERS:
            raise _Exhausted(f"a value of the template is longer than {MAX_CHARACTERS:,} characters")
        self.spend(size * unit)

    def made(self, value: Any) -> Any:
        """Pay for a value that is not much larger than what it was made of."""
        if isinstance(value, str):
            self.make(len(value))
        elif isinstance(value, list | tuple):
            self.make(len(value), _ITEM)
            self.spend(sum(len(item) for item in value if isinstance(item, str)))
        return value

    def weigh(self, value: Any, depth: int = 0) -> int:
        """Pay for a walk over a value and all that it holds, as often as it holds it; return what was paid."""
        paid, below = 2 * _ITEM, 0
        if isinstance(value, str | range):
            paid += len(value)
        elif isinstance(value, _COLLECTIONS):
            if depth == MAX_DEPTH:
                raise _Exhausted(f"a value of the template is nested more than {MAX_DEPTH} deep")
            for items in (value, value.values()) if isinstance(value, dict) else (value,):
                for item in items:
                    if type(item) is str:
                        paid += _ITEM + len(item)
                    elif type(item) in _PLAIN:
                        paid += _ITEM
                    else:
                        below += self.weigh(item, depth + 1)
        elif isinstance(value, _OWN):
            raise SecurityError(f"a {_kind(value)} cannot be printed or compared")
        self.spend(paid)
        return paid + below

    def small(self, value: Any) -> int:
        """`weigh` a value that something else will make a text of, if only of an error."""
        weight = self.weigh(value)
        if weight > MAX_CHARACTERS:
            self.make(weight)
        return weight

    def hashed(self, keys: Sequence[Any]) -> None:
        """Pay for a set or mapping of `keys`. All numbers may have one hash; texts may not, since Python salts theirs."""
        weight = self.weigh(keys)
        if any(type(key) is not str for key in keys):
            self.spend(len(keys) * weight // (4 * _ITEM))

    def text(self, value: Any) -> str:
        """`str(value)`, bounded."""
        if type(value) is str:
            return value
        if type(value) in _PLAIN or isinstance(value, Undefined):
            return str(value)
        self.small(value)
        text = str(value)
        self.make(len(text))
        return text

    def listed(self, value: Any) -> list[Any]:
        """`list(value)`, bounded."""
        if isinstance(value, _COLLECTIONS):
            self.make(len(value), _ITEM)
            return list(value)
        if isinstance(value, Undefined):
            return list(value)
        raise TypeError(f"a list is needed, not {_kind(value)}")


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with tables in place of its rules. See `_Rewriter` for what never gets here."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))
    context_class = _Rendering

    def __init__(self, undefined: type[Undefined]) -> None:
        super().__init__(undefined=undefined, optimized=False, cache_size=0)
        self.filters = {name: pass_context(run) for name, run in {**FILTERS, **_INTERNAL}.items()}
        self.tests = {name: pass_context(run) for name, run in TESTS.items()}
        self.globals = dict(_FUNCTIONS)
        self.eval_ctx = nodes.EvalContext(self)

    def concat(self, pieces: Iterable[str]) -> str:  # type: ignore[override]
        """Join what a macro or a block has written; whoever takes the text pays for it."""
        pieces = list(pieces)
        if sum(map(len, pieces)) > MAX_CHARACTERS:
            raise _Exhausted(f"a value of the template is longer than {MAX_CHARACTERS:,} characters")
        return "".join(pieces)

    def call_filter(self, name: str, value: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a filter that is named at run time, as `map` does."""
        if name not in FILTERS:
            raise SecurityError(f"No filter named {name!r}, or it is not allowed")
        return super().call_filter(name, value, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An operator, after checking how large its result will be."""
        assert isinstance(context, _Rendering)
        if isinstance(left, _NUMBERS) and isinstance(right, _NUMBERS):
            if isinstance(left, int) and isinstance(right, int):
                if operator == "**" and right > 0:
                    bits = left.bit_length() * right
                else:
                    bits = left.bit_length() + right.bit_length() if operator == "*" else max(left.bit_length(), right.bit_length())
                if bits > MAX_BITS:
                    raise _Exhausted("a number of the template is too large")
        elif operator == "%" and isinstance(left, str):
            return _format(context, left, right)
        elif not isinstance(left, Undefined) and not isinstance(right, Undefined):
            if operator == "*" and isinstance(right, _SEQUENCES):
                left, right = right, left
            if operator == "*" and isinstance(left, _SEQUENCES) and isinstance(right, int):
                context.make(len(left) * max(right, 0), 1 if isinstance(left, str) else _ITEM)
            elif operator == "+" and any(isinstance(left, kind) and isinstance(right, kind) for kind in _SEQUENCES):
                context.make(len(left) + len(right), 1 if isinstance(left, str) else _ITEM)
            else:
                raise TypeError(f"{_kind(left)} {operator} {_kind(right)} cannot be computed")
        return self.binop_table[operator](left, right)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """`obj.attribute`."""
        found = self._attribute(obj, attribute)
        if found is missing:
            try:
                return obj[attribute]
            except (TypeError, LookupError):
                return self.undefined(obj=obj, name=attribute)
        return found

    def getitem(self, obj: Any, argument: Any) -> Any:
        """`obj[argument]`."""
        if not isinstance(argument, _KEYS):  # the error message of what is not there would print it, however large
            raise TypeError(f"[...] takes a position or a name, not {_kind(argument)}")
        try:
            return obj[argument]
        except (TypeError, LookupError):
            if isinstance(argument, Undefined):
                return argument
            found = self._attribute(obj, argument) if isinstance(argument, str) else missing
            return self.undefined(obj=obj, name=argument) if found is missing else found  # type: ignore[arg-type]

    def _attribute(self, obj: Any, name: str) -> Any:
        """What the tables say of an attribute: its value, `missing`, or a refusal."""
        methods = _METHODS.get(type(obj)) or next((table for kind, table in _METHODS.items() if isinstance(obj, kind)), {})
        if name in methods:
            return _Method(obj, name, methods[name])
        if isinstance(obj, Namespace) and not name.startswith("_"):
            return getattr(obj, name, missing)
        if name in _FIELDS.get(type(obj), ()):
            return getattr(obj, name)
        if hasattr(type(obj), name) or (name.startswith("_") and not isinstance(obj, dict | Undefined)):
            raise SecurityError(f"the attribute {name!r} of a {_kind(obj)} is out of bounds")
        return missing

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Call a method, function or macro of the tables; nothing else can be called."""
        assert isinstance(context, _Rendering)
        kwargs.pop("_loop_vars", None)
        kwargs.pop("_block_vars", None)
        if isinstance(obj, _Method):
            return obj.run(context, obj.owner, *args, **kwargs)
        context.spend(8 * _ITEM)
        if isinstance(obj, _Function):
            return obj.run(context, *args, **kwargs)
        if isinstance(obj, Macro):
            if context.calls == MAX_CALLS:
                raise _Exhausted(f"macros call each other more than {MAX_CALLS} deep")
            context.calls += 1
            try:
                return context.made(obj(*args, **kwargs))
            finally:
                context.calls -= 1
        if isinstance(obj, _CALLABLE):
            return obj(*args, **kwargs)
        raise SecurityError(f"a {_kind(obj)} cannot be called")


@functools.cache
def _environment(lenient: bool) -> _Environment:
    return _Environment(Undefined if lenient else StrictUndefined)


class _Method:
    """A method of a value, at hand for a call. Python's own would print its address."""

    __slots__ = ("name", "owner", "run")

    def __init__(self, owner: Any, name: str, run: Callable[..., Any]) -> None:
        self.owner, self.name, self.run = owner, name, run


class _Group(NamedTuple):
    """One group of `groupby`."""

    grouper: Any
    list: Any

    def __repr__(self) -> str:
        return repr(tuple(self))


class _Function:
    """A function that every template knows."""

    __slots__ = ("run",)

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run = run


_PLAIN = frozenset((int, float, bool, type(None)))
_NUMBERS = (int, float)
_SEQUENCES = (str, list, tuple)
_TEXT_NODES = (nodes.Output, nodes.TemplateData)
_COLLECTIONS = (list, tuple, str, dict, range, set, frozenset)
_CALLABLE = (Joiner, Undefined)
_KEYS = (str, int, float, type(None), Undefined)
_OWN = (_Method, _Function, Macro, LoopContext, Namespace, Cycler, Joiner)
"""What templates make that is not data. Namespaces can hold themselves, so none is ever walked over."""


def _kind(value: Any) -> str:
    return type(value).__name__.lstrip("_").lower()


# Functions, methods, tests and filters. Each gets the rendering first, and pays for what it does.


def _zip(context: _Rendering, *lists: Any) -> list[tuple[Any, ...]]:
    columns = [context.listed(each) for each in lists]
    context.make(min(map(len, columns), default=0), _ITEM * (len(columns) + 1))
    return list(zip(*columns, strict=False))


def _dict(context: _Rendering, /, *pairs: Any, **items: Any) -> dict[Any, Any]:
    context.weigh(pairs)
    for given in pairs:
        context.hashed([_key(context, key) for key in given] if isinstance(given, dict) else [_key(context, key) for key, _ in given])
    context.spend(len(items) * _ITEM)
    return dict(*pairs, **items)


_FUNCTIONS = {
    "range": _Function(lambda context, *bounds: safe_range(*bounds)),
    "zip": _Function(_zip),
    "dict": _Function(_dict),
    "namespace": _Function(lambda context, /, *pairs, **items: Namespace(_dict(context, *pairs, **items))),
    "cycler": _Function(lambda context, *items: Cycler(*items)),
    "joiner": _Function(lambda context, separator=", ": Joiner(separator)),
}


def _each(context: _Rendering, value: Any, weight: int) -> Any:
    """What a loop runs over. It pays for all its rounds at once: there is no way out of a loop."""
    if not isinstance(value, _COLLECTIONS):
        value = context.listed(value)
    context.spend(len(value) * weight)
    return value


def _paid(context: _Rendering, weight: int) -> None:
    context.spend(weight)


def _key(context: _Rendering, value: Any) -> Any:
    if not isinstance(value, _KEYS):
        raise TypeError(f"a key must be a text or a number, not {_kind(value)}")
    return value


def _weighed(context: _Rendering, value: Any) -> Any:
    if type(value) is str:
        context.spend(len(value))
    elif type(value) not in _PLAIN:
        context.weigh(value)
    return value


def _joined(context: _Rendering, *values: Any) -> str:
    texts = [context.text(value) for value in values]
    context.make(sum(map(len, texts)))
    return "".join(texts)


def _text(context: _Rendering, value: Any) -> str:
    text = value if type(value) is str else context.text(value)
    if len(text) > _LONG:
        context.spend(len(text))
    return text


def _marked_text(context: _Rendering, value: Any) -> str:
    text = value if type(value) is str else context.text(value)
    if len(text) > _LONG:
        context.spend(len(text))
    return text.replace("|", BAR) if "|" in text else text


def _marked_cut(context: _Rendering, value: Any, length: int) -> str:
    text = value if type(value) is str else context.text(value)
    if len(text) > length:
        text = _truncate(context, text, length)
    return _marked_text(context, text) if len(text) > _LONG or "|" in text else text


_INTERNAL: dict[str, Callable[..., Any]] = {
    "each of": _each,
    "paid": _paid,
    "key": _key,
    "weighed": _weighed,
    "joined": _joined,
    "taken": lambda context, value: context.made(value),
    "captured": lambda context, value: context.made(value.replace(BAR, "|")),
    "text": _text,
    "marked text": _marked_text,
    "marked cut": _marked_cut,
}
"""Filters of the rewritten tree. Their names are no words, or `map` refuses them: no template can ask for one."""


def _linear(name: str) -> Callable[..., Any]:
    """A method of texts whose time and result are about as long as the text."""
    method = getattr(str, name)

    def run(context: _Rendering, text: str, *args: Any, **kwargs: Any) -> Any:
        sought = context.weigh(args) if args else 0
        if kwargs:
            sought += context.weigh(kwargs)
        context.spend(len(text) * (1 + min(sought, 32 * _ITEM) // (4 * _ITEM)))
        return context.made(method(text, *args, **kwargs))

    return run


def _backwards(name: str) -> Callable[..., Any]:
    """A method of texts whose time can be the text's length times that of what it looks for."""
    method = _linear(name)

    def run(context: _Rendering, text: str, sep: Any = None, *args: Any, **kwargs: Any) -> Any:
        if isinstance(sep, str):
            if len(sep) > _NEEDLE:
                raise _Exhausted(f"{name} takes at most {_NEEDLE} characters to look for")
            context.spend(len(text) * len(sep) // 4)
        return method(context, text, *(() if sep is None and not args else (sep,)), *args, **kwargs)

    return run


def _filled(name: str) -> Callable[..., Any]:
    method = getattr(str, name)

    def run(context: _Rendering, text: str, width: int, *fill: str) -> str:
        context.make(max(width, len(text)))
        return str(method(text, width, *fill))

    return run


def _replace(context: _Rendering, value: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, old, new = context.text(value), context.text(old), context.text(new)
    context.spend(len(text) + len(old))
    places = text.count(old)  # of the empty text: one before each character, and one at the end
    if count is not None and count >= 0:
        places = min(places, count)
    context.make(len(text) + places * (len(new) - len(old)))
    return text.replace(old, new, -1 if count is None else count)


def _join_texts(context: _Rendering, separator: str, texts: Any) -> str:
    listed: list[str] = context.listed(texts)
    context.make(sum(map(len, listed)) + len(separator) * len(listed))
    return separator.join(listed)


def _searched(name: str) -> Callable[..., Any]:
    """`index` or `count` of a list."""

    def run(context: _Rendering, values: Any, sought: Any, *bounds: Any) -> Any:
        context.small(sought)
        context.weigh(values)
        return getattr(values, name)(sought, *bounds)

    return run


def _pairs(context: _Rendering, values: dict[Any, Any]) -> list[tuple[Any, Any]]:
    context.make(len(values), 2 * _ITEM)
    return list(values.items())


def _get(context: _Rendering, values: dict[Any, Any], key: Any, default: Any = None) -> Any:
    return values.get(_key(context, key), default)


_LINEAR = (
    *("capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha", "isdecimal", "isdigit", "islower"),
    *("isnumeric", "isspace", "istitle", "isupper", "lower", "partition", "removeprefix", "removesuffix", "split", "splitlines"),
    *("startswith", "swapcase", "title", "upper"),
)
_METHODS: dict[type, dict[str, Callable[..., Any]]] = {
    str: {
        **{name: _linear(name) for name in _LINEAR},
        **{name: _backwards(name) for name in ("lstrip", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "strip")},
        **{name: _filled(name) for name in ("center", "ljust", "rjust", "zfill")},
        "replace": _replace,
        "join": _join_texts,
    },
    dict: {
        "get": _get,
        "items": _pairs,
        "keys": lambda context, values: context.listed(values),
        "values": lambda context, values: [value for _, value in _pairs(context, values)],
    },
    list: {"index": _searched("index"), "count": _searched("count")},
    tuple: {"index": _searched("index"), "count": _searched("count")},
    LoopContext: {"cycle": lambda context, loop, *values: loop.cycle(*values)},
    Cycler: {"next": lambda context, cycler: cycler.next(), "reset": lambda context, cycler: cycler.reset()},
}
_FIELDS: dict[type, tuple[str, ...]] = {
    LoopContext: ("index", "index0", "revindex", "revindex0", "first", "last", "length", "depth", "depth0", "previtem", "nextitem"),
    Cycler: ("current",),
    _Group: ("grouper", "list"),
}


_DIRECTIVE = re.compile(r"%(?:\(\w+\))?[-+ 0#]*(\d{0,3})(?:\.(\d{0,3}))?([diouxXeEfFgGs%])", re.ASCII)


def _format(context: _Rendering, form: Any, values: Any) -> str:
    """`form % values`, for directives whose length can be foretold."""
    form, room = context.text(form), 0
    context.spend(len(form))
    position, taken = 0, 0
    while (position := form.find("%", position)) >= 0:
        directive = _DIRECTIVE.match(form, position)
        if directive is None:
            raise TypeError(f"the format {form[position : position + 20]!r} is not allowed")
        room += 400 + int(directive[1] or 0) + int(directive[2] or 0)  # 400: digits of the largest number
        taken += directive[3] != "%"
        position = directive.end()
    if not taken:
        return str(form % values)

    def plain(value: Any) -> Any:
        return value if type(value) in _PLAIN else context.text(value)

    def length(value: Any) -> int:
        return len(value) if isinstance(value, str) else 0

    if isinstance(values, dict):
        values = {key: plain(value) for key, value in values.items()}
        room += form.count("%") * max(map(length, values.values()), default=0)
    else:
        values = tuple(map(plain, values if isinstance(values, tuple) else (values,)))
        room += sum(map(length, values))
    context.make(len(form) + room)
    return str(form % values)


# Filters: Jinja's own, but for those of HTML (a prompt is no web page), `attr`, `filesizeformat`, `pprint` and `wordwrap`.


def _number(value: Any) -> Any:
    if not isinstance(value, int | float | Undefined):
        raise TypeError(f"a number is needed, not {_kind(value)}")
    return +value  # of what is undefined, an error


def _of_text(name: str, price: int = 1) -> Callable[..., Any]:
    """A filter of Jinja's that makes a text of a text about as long."""
    run: Callable[..., Any] = JINJA_FILTERS[name]

    def filter_(context: _Rendering, value: Any) -> Any:
        text = context.text(value)
        context.spend(len(text) * price)
        return context.made(run(text))

    return filter_


def _of_items(name: str) -> Callable[..., Any]:
    """A filter of Jinja's that does something for each item of a list."""
    run: Callable[..., Any] = JINJA_FILTERS[name]

    def filter_(context: _Rendering, value: Any, *args: Any, **kwargs: Any) -> Any:
        values = context.listed(value)
        context.spend(len(values) * (context.small(args) + context.small(kwargs)))
        return list(run(context, values, *args, **kwargs))

    return filter_


def _of_order(name: str) -> Callable[..., Any]:
    """A filter of Jinja's that compares the items of a list with each other."""
    run: Callable[..., Any] = JINJA_FILTERS[name]

    def filter_(context: _Rendering, value: Any, *args: Any, **kwargs: Any) -> Any:
        values = context.listed(value)
        context.spend(4 * context.weigh(values) + len(values) * (context.small(args) + context.small(kwargs)))
        return run(context.environment, values, *args, **kwargs)

    return filter_


def _groupby(context: _Rendering, value: Any, *args: Any, **kwargs: Any) -> list[_Group]:
    return [_Group(*group) for group in _of_order("groupby")(context, value, *args, **kwargs)]


def _dictsort(context: _Rendering, value: Any, *args: Any, **kwargs: Any) -> list[tuple[Any, Any]]:
    context.spend(4 * context.weigh(value))
    return context.made(JINJA_FILTERS["dictsort"](value, *args, **kwargs))  # type: ignore[no-any-return]


def _batch(context: _Rendering, value: Any, linecount: int, fill_with: Any = None) -> list[list[Any]]:
    values = context.listed(value)
    context.make(len(values) + max(linecount, 0), 4 * _ITEM)
    return list(JINJA_FILTERS["batch"](values, linecount, fill_with))


def _slice(context: _Rendering, value: Any, slices: int, fill_with: Any = None) -> list[list[Any]]:
    values = context.listed(value)
    context.make(len(values) + max(slices, 0), 8 * _ITEM)
    return list(JINJA_FILTERS["slice"](context.eval_ctx, values, slices, fill_with))


def _center(context: _Rendering, value: Any, width: int = 80) -> str:
    return str(_METHODS[str]["center"](context, context.text(value), width))


def _default(context: _Rendering, value: Any, default_value: Any = "", boolean: bool = False) -> Any:
    return default_value if isinstance(value, Undefined) or (boolean and not value) else value


def _first(context: _Rendering, value: Any) -> Any:
    for item in value if isinstance(value, _COLLECTIONS) else context.listed(value):
        return item
    return context.environment.undefined("No first item, sequence was empty.")


def _last(context: _Rendering, value: Any) -> Any:
    for item in reversed(value if isinstance(value, list | tuple | str | dict | range) else context.listed(value)):
        return item
    return context.environment.undefined("No last item, sequence was empty.")


def _int(context: _Rendering, value: Any, default: Any = 0, base: int = 10) -> Any:
    if isinstance(value, str) and len(value) > MAX_BITS:
        return default
    number = JINJA_FILTERS["int"](value, default, base)
    if isinstance(number, int) and number.bit_length() > MAX_BITS:
        raise _Exhausted("a number of the template is too large")
    return number


def _form(context: _Rendering, value: Any, *args: Any, **kwargs: Any) -> str:
    if args and kwargs:
        raise TypeError("format takes values by position or by name, not both")
    return _format(context, value, kwargs or args)


def _indent(context: _Rendering, value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    text = context.text(value)
    context.spend(8 * len(text))
    step = len(width) if isinstance(width, str) else max(width, 0)
    context.make(len(text) + step * (len(text.splitlines()) + 2))
    return str(JINJA_FILTERS["indent"](text, width, first, blank))


def _join(context: _Rendering, value: Any, d: Any = "", attribute: Any = None) -> str:
    values = context.listed(value) if attribute is None else FILTERS["map"](context, value, attribute=attribute)
    separator, texts = context.text(d), [each if type(each) is str else context.text(each) for each in values]
    context.make(sum(map(len, texts)) + len(separator) * len(texts))
    return separator.join(texts)


def _map_items(context: _Rendering, value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, Undefined):
        return []
    if not isinstance(value, dict):
        raise TypeError("Can only get item pairs from a mapping.")
    return _pairs(context, value)


def _most_frequent(context: _Rendering, value: Any) -> Any:
    """promptsource's: the items that occur most often."""
    values = context.listed(value)
    context.hashed(values)
    counts = Counter(values).most_common()
    return [item for item, count in counts if count == counts[0][1]] if counts else None


def _reverse(context: _Rendering, value: Any) -> Any:
    if isinstance(value, str):
        return context.made(value[::-1])
    return context.listed(value)[::-1]


def _round(context: _Rendering, value: Any, precision: int = 0, method: str = "common") -> Any:
    if not -300 <= precision <= 300:
        raise ValueError("a precision of at most 300 is needed")
    return JINJA_FILTERS["round"](_number(value), precision, method)


def _sum(context: _Rendering, value: Any, attribute: Any = None, start: Any = 0) -> Any:
    total = start
    for each in context.listed(value) if attribute is None else FILTERS["map"](context, value, attribute=attribute):
        total = context.environment.call_binop(context, "+", _number(total), _number(each))  # type: ignore[attr-defined]
    return total


def _tojson(context: _Rendering, value: Any) -> str:
    """Unlike Jinja's, without marking what HTML would read as its own."""
    context.small(value)
    return str(context.made(json.dumps(value, sort_keys=True)))


def _trim(context: _Rendering, value: Any, chars: str | None = None) -> str:
    text = context.text(value)
    return text.strip() if chars is None and len(text) < _LONG else str(_METHODS[str]["strip"](context, text, chars))


def _truncate(
    context: _Rendering, value: Any, length: int = 255, killwords: bool = False, end: str = "...", leeway: int | None = None
) -> Any:
    return context.made(JINJA_FILTERS["truncate"](context.environment, value, length, killwords, end, leeway))


def _unique(context: _Rendering, value: Any, *args: Any, **kwargs: Any) -> list[Any]:
    values = context.listed(value)
    context.hashed(values)
    return list(_of_order("unique")(context, values, *args, **kwargs))


def _wordcount(context: _Rendering, value: Any) -> int:
    text = context.text(value)
    context.spend(4 * len(text))
    return sum(1 for _ in re.finditer(r"\w+", text))


def _choice(context: _Rendering, value: Any) -> Any:
    return context.chance.pick(value)


FILTERS: dict[str, Callable[..., Any]] = {
    **{name: _of_text(name) for name in ("capitalize", "lower", "upper")},
    **{name: _of_items(name) for name in ("map", "reject", "rejectattr", "select", "selectattr")},
    **{name: _of_order(name) for name in ("max", "min")},
    "abs": lambda context, value: abs(value),
    "batch": _batch,
    "center": _center,
    "choice": _choice,
    "count": lambda context, value: len(value),
    "d": _default,
    "default": _default,
    "dictsort": _dictsort,
    "first": _first,
    "float": lambda context, value, default=0.0: JINJA_FILTERS["float"](value, default),
    "format": _form,
    "groupby": _groupby,
    "indent": _indent,
    "int": _int,
    "items": _map_items,
    "join": _join,
    "last": _last,
    "length": lambda context, value: len(value),
    "list": lambda context, value: context.listed(value),
    "most_frequent": _most_frequent,
    "random": _choice,
    "replace": _replace,
    "reverse": _reverse,
    "round": _round,
    "slice": _slice,
    "sort": _of_order("sort"),
    "string": lambda context, value: context.text(value),
    "sum": _sum,
    "title": _of_text("title", 8),
    "tojson": _tojson,
    "trim": _trim,
    "truncate": _truncate,
    "unique": _unique,
    "wordcount": _wordcount,
}
"""The filters of a template. `choice` (or `random`) is seeded; it and `most_frequent` are promptsource's."""


def _test(name: str) -> Callable[..., Any]:
    """A test of Jinja's that takes no time."""
    run: Any = JINJA_TESTS[name]
    return lambda context, value, *args: run(value, *args)


def _comparison(name: str) -> Callable[..., Any]:
    run: Any = JINJA_TESTS[name]
    return lambda context, value, other: run(_weighed(context, value), _weighed(context, other))


def _divisible(context: _Rendering, value: Any, number: Any = 2, rest: int = 0) -> bool:
    return bool(_number(value) % _number(number) == rest)


def _case(name: str) -> Callable[..., Any]:
    return lambda context, value: _METHODS[str][name](context, context.text(value))


TESTS: dict[str, Callable[..., Any]] = {
    **{name: _test(name) for name in ("boolean", "defined", "false", "float", "integer", "iterable", "mapping", "none", "number")},
    **{name: _test(name) for name in ("sameas", "sequence", "string", "true", "undefined")},
    **{name: _comparison(name) for name in ("==", "eq", "equalto", "!=", "ne", ">", "gt", "greaterthan", "ge", ">=")},
    **{name: _comparison(name) for name in ("<", "lt", "lessthan", "<=", "le", "in")},
    "divisibleby": lambda context, value, number: _divisible(context, value, number),
    "even": lambda context, value: _divisible(context, value),
    "odd": lambda context, value: _divisible(context, value, 2, 1),
    "lower": _case("islower"),
    "upper": _case("isupper"),
}
"""The tests of a template (`is ...`)."""
