"""Chat templates: Jinja templates of a checkpoint that turn messages into the prompt's text.

The environment is the one of transformers (whitespace control, loop controls, `tojson`,
`raise_exception`, `strftime_now`, the `generation` tag), so that a template renders the same.
A template comes with the checkpoint and is not trusted: it runs in Jinja's sandbox, sees plain data
only, and is stopped when it runs too long or writes too much.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_CHARACTERS = 16_000_000  # of one rendered prompt, and of one repeated string inside
MAX_SECONDS = 10.0  # for one rendering
_MAX_POWER_BITS = 4096


class ChatTemplate:
    """One compiled template; raises ValueError of one line if it cannot be compiled."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._environment = _Environment()
        try:
            self._template = self._environment.from_string(source)
        except Exception as error:  # Jinja's parser lets RecursionError and others through
            raise ValueError(f"chat template: {_reason(error)}") from None

    def render(self, variables: Mapping[str, Any]) -> str:
        """The prompt's text; whatever the template raises becomes a ValueError of one line.

        variables: plain data only (see chat_messages.plain_data)
        """
        blocks: list[str] = []
        length = 0
        self._environment.start_clock()
        try:
            for block in self._template.generate(**variables):
                blocks.append(block)
                length += len(block)
                if length > MAX_CHARACTERS:
                    raise jinja2.TemplateError(f"it writes over {MAX_CHARACTERS:,} characters")
        except Exception as error:  # a template's code can fail in any way
            raise ValueError(f"chat template: {_reason(error)}") from None
        return "".join(blocks)


class _Environment(ImmutableSandboxedEnvironment):
    """Transformers' environment for chat templates, with a clock that calls and loops look at."""

    intercepted_binops = frozenset(["*", "**"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, jinja2.ext.loopcontrols],
        )
        self._deadline = 0.0
        self.filters["tojson"] = _to_json
        self.filters["_on_the_clock"] = self._on_the_clock
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.globals["dict"] = _DictMaker()
        self.globals["namespace"] = _SafeNamespace
        del self.globals["lipsum"]

    def start_clock(self) -> None:
        """Give the next rendering its time."""
        self._deadline = time.monotonic() + MAX_SECONDS

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Sandboxed call; macros that call themselves twice would run for ever."""
        __self._check_clock()
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Multiplication and power, unless the result would be enormous."""
        if operator == "**":
            if _bits(left) * abs(right) > _MAX_POWER_BITS:
                raise jinja2.TemplateError("it raises a number to an enormous power")
        elif max(_size(left) * _count(right), _size(right) * _count(left)) > MAX_CHARACTERS:
            raise jinja2.TemplateError("it repeats a text or a list too often")
        return super().call_binop(context, operator, left, right)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = Parser(self, source, name, filename).parse()
        return _LoopsOnTheClock().visit(template)

    def _on_the_clock(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._check_clock()
            yield item

    def _check_clock(self) -> None:
        if time.monotonic() > self._deadline:
            raise jinja2.TemplateError(f"it runs for over {MAX_SECONDS:g} seconds")


class _LoopsOnTheClock(NodeTransformer):
    """Makes every loop look at the clock: nested ranges would run for hours."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "_on_the_clock", [], [], None, None, lineno=node.lineno)
        return node


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` marks the assistant's text for training."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        """The body as a block of its own: names set inside stay inside, as in transformers."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render_body"), [], [], body).set_lineno(line)

    def _render_body(self, caller: Callable[[], str]) -> str:
        return caller()


class _DictMaker:
    """`dict(...)` in a template, without the type's attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """dict.fromkeys, which templates use to make a set."""
        return dict.fromkeys(*args)


class _SafeNamespace(Namespace):
    """`namespace(...)` in a template; names that begin with an underscore are refused."""

    # `self` is positional so that a template may use the name: namespace(self=...)
    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *positional = args
        attributes = dict(*positional, **kwargs)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which a prompt must not hold.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 64


def _size(value: Any) -> int:
    return len(value) if isinstance(value, (str, list, tuple)) else 0


def _count(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _reason(error: Exception) -> str:
    """What a template's failure was, in one line."""
    if isinstance(error, jinja2.TemplateSyntaxError):
        text = f"line {error.lineno}: {error.message}"
    elif isinstance(error, jinja2.TemplateError):
        text = str(error.message or error)
    else:
        text = f"{type(error).__name__}: {error}"
    text = " ".join(text.split())
    return text if len(text) <= 300 else text[:297] + "..."
