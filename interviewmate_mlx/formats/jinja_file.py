"""Renders chat templates of strangers: Jinja as transformers has it, within limits.

A template is a program. It is given messages, and can do with them what chat templates of
the Hub do: look at keys, cut and join texts, loop over a list. It reaches no attribute of a
Python object but the few named here. What it makes is counted: each turn of a loop, and the
size of each text or list that an operation gives. So it ends, and its memory is bounded,
whatever is in it.
"""

import json
import operator
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from interviewmate_mlx.errors import brief, one_line

MAX_TEXT_CHARS = 128 << 10  # of a template; the largest on the Hub have some 30,000
_MAX_OUTPUT_CHARS = 4 << 20
_MAX_TURNS = 100_000  # of all loops and macros of one rendering
_MAX_SPENT = 16 << 20  # characters and items made in one rendering, and so many more
_SPENT_PER_CHAR = 64  # for each character that it is given
_ITEM_COST = 16
_MAX_SECONDS = 10.0
_MAX_INDENT = 16
_METHODS = {
    str: "strip lstrip rstrip split rsplit splitlines partition rpartition startswith endswith "
    "upper lower title capitalize casefold swapcase replace join find rfind index rindex count "
    "removeprefix removesuffix isdigit isalpha isalnum isdecimal isnumeric isspace isupper "
    "islower istitle",
    dict: "items keys values get",
    list: "index count",
    tuple: "index count",
}
_FILTERS = (
    "abs capitalize count d default dictsort e escape first float int items last length lower map "
    "max min reject rejectattr reverse round safe select selectattr sort sum title trim unique "
    "upper"
)
_KNOWN: dict[type, frozenset[str]] = {
    kind: frozenset(names.split()) for kind, names in _METHODS.items()
}
_TOO_MUCH = "it makes more than it may"


class TemplateFault(Exception):  # noqa: N818  not an error of the user's, but a value's reason
    """Why a template cannot be read, or cannot show messages: in a few words."""


class Rendering:
    """A template that was read and checked; `render` may be called from several threads."""

    def __init__(self, text: str) -> None:
        """
        Raises:
            TemplateFault: it is not Jinja, or too large.
        """
        if len(text) > MAX_TEXT_CHARS:
            raise TemplateFault(f"it has {len(text)} characters, at most {MAX_TEXT_CHARS} are read")
        try:
            tree = _Meter().visit(_ENVIRONMENT.parse(text))
            code = _ENVIRONMENT.compile(tree)
            self._template = jinja2.Template.from_code(_ENVIRONMENT, code, _ENVIRONMENT.globals)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateFault(f"line {error.lineno}: {one_line(error)}") from error
        # Nested too deeply, for Jinja or for Python.
        except (RecursionError, SyntaxError, MemoryError, ValueError, TypeError) as error:
            raise TemplateFault(f"it is not Jinja: {type(error).__name__}") from error

    def render(self, messages: list[dict[str, Any]], **values: Any) -> str:
        """The text of messages.

        Args:
            messages: of strings only.
            values: for the template's other names.

        Raises:
            TemplateFault: the template refuses them, fails, or takes too much.
        """
        given = sum(len(text) for message in messages for text in message.values())
        spent = _ENVIRONMENT.spent
        spent.room = _MAX_SPENT + _SPENT_PER_CHAR * given
        spent.turns, spent.deadline = _MAX_TURNS, time.monotonic() + _MAX_SECONDS
        try:
            pieces = self._template.generate(messages=messages, **values)
            text, limit = "", _MAX_OUTPUT_CHARS + 4 * given
            text = "".join(pieces)
            if len(text) > limit:
                raise TemplateFault(f"it writes {len(text)} characters, at most {limit} are taken")
            return text
        except TemplateFault:
            raise
        except jinja2.TemplateError as error:
            raise TemplateFault(f"it says: {one_line(error)}") from error
        # Whatever else a stranger's program may come to: a wrong type, a recursion.
        except Exception as error:
            raise TemplateFault(f"it fails: {type(error).__name__}: {one_line(error)}") from error


@lru_cache(maxsize=16)
def read_template(text: str) -> Rendering:
    """Read a template; the last few are kept.

    Raises:
        TemplateFault: it is not Jinja, or too large.
    """
    return Rendering(text)


class _Spent(threading.local):
    """What the rendering of this thread may still do."""

    room = 0
    turns = 0
    deadline = 0.0


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # or operations are done while a template is compiled
            extensions=[_Generation, loopcontrols],
        )
        self.spent = _Spent()
        known = {name: self._counted(self.filters[name]) for name in _FILTERS.split()}
        own = {"join": self.join, "list": self.make_list, "string": self.to_text}
        own |= {"tojson": self.to_json, "replace": self.replace, "indent": self.indent}
        self.filters = {name: _unknown_filter(name) for name in self.filters} | known | own
        self.globals = {
            "range": safe_range,
            "dict": lambda *args, **values: dict(*args, **values),
            "namespace": _namespace,
            "raise_exception": _raise_exception,
            "strftime_now": lambda form: datetime.now().strftime(form),
        }

    # What the compiled template calls, see `_Meter`.

    def turn(self) -> None:
        """Count a turn of a loop, or a call of a macro."""
        self.spent.turns -= 1
        if self.spent.turns < 0:
            raise TemplateFault(f"its loops take more than {_MAX_TURNS} turns")
        self.pay(1)

    def to_text(self, value: Any) -> str:
        """A value as it is written: only a text, a number, or nothing."""
        if not isinstance(value, str | int | float | Undefined | None):
            raise TemplateFault(f"it writes a {type(value).__name__} as text")
        text = str(value)
        self.pay(len(text))
        return text

    def concatenate(self, *values: Any) -> str:
        """What `~` does."""
        return "".join(map(self.to_text, values))

    def weigh(self, value: Any) -> Any:
        """Count all that a list or a dictionary holds, and give it back."""
        waiting = [value]
        while waiting:
            part = waiting.pop()
            if isinstance(part, str):
                self.pay(len(part))
            elif isinstance(part, Mapping):
                waiting += part.keys()
                waiting += part.values()
            elif isinstance(part, list | tuple):
                waiting += part
            self.pay(_ITEM_COST)
        return value

    def pay(self, amount: int) -> None:
        self.spent.room -= amount
        if self.spent.room < 0:
            raise TemplateFault(_TOO_MUCH)
        if time.monotonic() > self.spent.deadline:
            raise TemplateFault(f"it takes more than {_MAX_SECONDS:g} s")

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **values: Any) -> Any:
            return self.weigh(function(*args, **values))

        # Some are given the context, which they are marked for.
        if mark := getattr(function, "jinja_pass_arg", None):
            counted.jinja_pass_arg = mark  # type: ignore[attr-defined]
        return counted

    def join(self, values: Iterable[Any], d: str = "", attribute: Any = None) -> str:
        """The filter `join`."""
        parts = []
        for value in values:
            self.turn()
            parts.append(
                self.to_text(value if attribute is None else self.getitem(value, attribute))
            )
        self.pay(len(d) * len(parts))
        return d.join(parts)

    def make_list(self, values: Iterable[Any]) -> list[Any]:
        """The filter `list`."""
        made = []
        for value in values:
            self.turn()
            made.append(value)
        self.weigh(made)
        return made

    def replace(self, text: Any, old: str, new: str, count: int = -1) -> str:
        """The filter `replace`, and the method."""
        text = self.to_text(text)
        times = text.count(old) if count < 0 else min(count, text.count(old))
        self.pay(len(text) + times * len(new))
        return text.replace(old, new, count)

    def to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        """The filter `tojson`, as transformers has it."""
        self._check_indent(indent)
        text = json.dumps(
            self.weigh(value),
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )
        self.pay(len(text))
        return text

    def indent(
        self, text: str, width: int | str = 4, first: bool = False, blank: bool = False
    ) -> str:
        """The filter `indent`."""
        self._check_indent(width if isinstance(width, int) else len(width))
        space = width if isinstance(width, str) else " " * width
        lines = self.to_text(text).split("\n")
        self.pay(len(space) * len(lines))
        kept = [line if not (line or blank) else space + line for line in lines[1:]]
        return "\n".join([space * first + lines[0], *kept])

    def _check_indent(self, indent: Any) -> None:
        if indent is not None and not 0 <= indent <= _MAX_INDENT:
            raise TemplateFault(f"it indents by {brief(indent)}, at most {_MAX_INDENT} is done")

    # What Jinja asks of a sandbox.

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if attr.startswith("_"):
            return False
        if isinstance(obj, LoopContext | Namespace):
            return True
        return attr in _KNOWN.get(type(obj), ())

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        kind = type(obj).__name__
        raise TemplateFault(f"it reaches for {brief(attribute)} of a {kind}, which is not allowed")

    def wrap_str_format(self, value: Any) -> None:
        return None  # `format` is no method here: a width in it may be any number

    def call_binop(self, context: Context, operator_: str, left: Any, right: Any) -> Any:
        match operator_, left, right:
            case "+", str(), str():
                self.pay(len(left) + len(right))
            case "+", (list() | tuple()), (list() | tuple()):
                self.weigh(left)
                self.weigh(right)
            case "*", str(), int():
                self.pay(len(left) * max(0, right))
            case (("+" | "*" | "%"), (int() | float()), (int() | float())):
                if abs(left) >= 2**31 or abs(right) >= 2**31:
                    raise TemplateFault("it computes with numbers above 2**31")
            case _:
                kinds = f"{type(left).__name__} {operator_} {type(right).__name__}"
                raise TemplateFault(f"it computes {kinds}, which is not done here")
        return _OPERATORS[operator_](left, right)

    def call(self, context: Any, obj: Any, *args: Any, **values: Any) -> Any:
        owner = getattr(obj, "__self__", None)
        if owner is self:  # of what `_Meter` puts in
            return obj(*args)
        if isinstance(owner, str) and obj.__name__ == "replace":
            return self.replace(owner, *args)
        if isinstance(owner, str) and obj.__name__ == "join":
            return self.join(args[0], owner)
        is_method = obj.__name__ in _KNOWN.get(type(owner), ()) if owner is not None else False
        is_given = isinstance(obj, Macro | LoopContext | Undefined)
        is_given = is_given or any(obj is each for each in self.globals.values())
        if not (is_method or is_given or isinstance(owner, LoopContext)):
            raise TemplateFault(f"it calls {brief(type(obj).__name__)}, which is not known here")
        return self.weigh(super().call(context, obj, *args, **values))


class _Generation(Extension):
    """`{% generation %}`, by which some templates mark answers; the text is found without it."""

    tags = {"generation"}  # noqa: RUF012  as in the class above it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Meter(NodeTransformer):
    """Puts into a template the calls that count what it does."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        return self._count_turns(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:  # noqa: N802
        return self._count_turns(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:  # noqa: N802
        return self._count_turns(node)

    def visit_Output(self, node: nodes.Output) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.nodes = [_call("to_text", [self._as_value(child)]) for child in node.nodes]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _call("concatenate", node.nodes)

    def visit_List(self, node: nodes.List) -> nodes.Node:  # noqa: N802
        return self._weighed(node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:  # noqa: N802
        return self._weighed(node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        return self._weighed(node) if node.ctx == "load" else node

    def _weighed(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return _call("weigh", [node])

    def _count_turns(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("turn", []), lineno=node.lineno))
        return node

    @staticmethod
    def _as_value(node: nodes.Expr) -> nodes.Expr:
        return nodes.Const(node.data) if isinstance(node, nodes.TemplateData) else node


def _call(name: str, arguments: list[nodes.Expr]) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None)


def _unknown_filter(name: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise TemplateFault(f"it uses the filter {name!r}, which is not known here")

    return refuse


def _namespace(*args: Any, **values: Any) -> Namespace:
    made = dict(*args, **values)
    if any(str(name).startswith("_") for name in made):
        raise TemplateFault("it names something with an underscore at the beginning")
    return Namespace(made)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


_OPERATORS = {"+": operator.add, "*": operator.mul, "%": operator.mod}
_ENVIRONMENT = _Sandbox()
