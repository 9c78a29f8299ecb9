"""The Jinja environment of chat templates: transformers' dialect, sandboxed, with limits and provenance.

The dialect is that of transformers' apply_chat_template: trimmed blocks, loop controls, the generation tag,
tojson without HTML escapes, raise_exception, strftime_now. Beyond it, every literal of the template is marked
as the template's own (`octavo.text.provenance`) and every step is counted (`octavo.text.template_limits`).
Imports Jinja: only `octavo.text.chat` imports this, and only when a template is used.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.compiler
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils
from jinja2.filters import do_join

from octavo.text.provenance import TemplateText, joined
from octavo.text.template_limits import RenderBudget

MAX_TIME_FORMAT_CHARACTERS = 256


class TemplateRefusal(jinja2.TemplateError):
    """The template called raise_exception: these messages are not what it was written for."""


class _MarkingCodeGenerator(jinja2.compiler.CodeGenerator):
    """Compiles literals to `TemplateText`, `~` to a join that keeps account, and loops to counted ones."""

    def visit_Const(self, node: jinja2.nodes.Const, frame: jinja2.compiler.Frame) -> None:  # noqa: N802
        if isinstance(node.value, str):
            self.write(f"environment.own({node.value!r})")
        else:
            super().visit_Const(node, frame)

    def visit_TemplateData(self, node: jinja2.nodes.TemplateData, frame: jinja2.compiler.Frame) -> None:  # noqa: N802
        self.write(f"environment.own({node.data!r})")

    def _output_const_repr(self, group: Iterable[Any]) -> str:
        return f"environment.own({super()._output_const_repr(group)})"

    def visit_Concat(self, node: jinja2.nodes.Concat, frame: jinja2.compiler.Frame) -> None:  # noqa: N802
        self.write("environment.concat((")
        for child in node.nodes:
            self.write("environment.text(")
            self.visit(child, frame)
            self.write("), ")
        self.write("))")

    def visit_For(self, node: jinja2.nodes.For, frame: jinja2.compiler.Frame) -> None:  # noqa: N802
        counted = jinja2.nodes.EnvironmentAttribute("counted", lineno=node.lineno)
        node.iter = jinja2.nodes.Call(counted, [node.iter], [], None, None, lineno=node.lineno)
        super().visit_For(node, frame)


class _GenerationTag(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %} marks assistant text for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012 (declared so by Jinja)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict` without its attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` that stores no underscore names."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # a keyword may be called self
        self, *values = args
        attributes = dict(*values, **kwargs)
        for name in attributes:
            _check_namespace_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_namespace_name(name)
        super().__setitem__(name, value)


def _check_namespace_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot have an attribute {name!r}")


class TemplateEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Compiled templates may be rendered from several threads: the budget of a rendering is its thread's."""

    code_generator_class = _MarkingCodeGenerator
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            # Nothing is computed at compile time, where no limits hold.
            optimized=False,
            finalize=self.text,
            extensions=[_GenerationTag, jinja2.ext.loopcontrols],
        )
        self._thread = threading.local()
        del self.globals["lipsum"]
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "dict": _Dict(),
            "namespace": _Namespace,
        }
        self.filters |= {"tojson": self._to_json, "join": self._join}
        self._limit_filters()

    def render(
        self, template: jinja2.Template, variables: Mapping[str, Any], budget: RenderBudget
    ) -> TemplateText:
        """Raises TemplateRefusal, TemplateLimitError, or whatever goes wrong in the template."""
        self._thread.budget = budget
        try:
            chunks = []
            characters = 0
            for chunk in template.generate(variables):
                budget.step()
                characters += len(chunk)
                budget.length(characters)
                chunks.append(chunk)
            return joined(chunks)
        finally:
            del self._thread.budget

    @property
    def _budget(self) -> RenderBudget:
        """Compiling evaluates constant expressions of outputs; a small budget of their own is enough."""
        budget: RenderBudget = getattr(self._thread, "budget", None) or RenderBudget(0)
        return budget

    # --- called by compiled templates ---

    def concat(self, parts: Iterable[str]) -> TemplateText:
        texts = list(parts)
        self._budget.characters(sum(map(len, texts)))
        return joined(texts)

    @staticmethod
    def own(text: str) -> TemplateText:
        return TemplateText(text)

    def text(self, value: Any) -> str:
        """str(value), within the limits."""
        if not isinstance(value, str):
            self._budget.value(value)
        return str(value)

    def counted(self, values: Iterable[Any]) -> Iterator[Any]:
        return self._budget.counted(values)

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        self._budget.operation(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: jinja2.runtime.Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        return super().call(__context, __obj, *__self._budget.call(__obj, args, kwargs), **kwargs)

    # --- filters ---

    def _to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        self._budget.value(value)
        self._budget.padding([indent])
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    @jinja2.pass_eval_context
    def _join(
        self,
        context: jinja2.nodes.EvalContext,
        value: Iterable[Any],
        d: str = "",
        attribute: str | None = None,
    ) -> str:
        return str(do_join(context, self._budget.joinable(str(d), value), d, attribute))

    def _limit_filters(self) -> None:
        def checked(name: str, check: Callable[..., None]) -> None:
            original = self.filters[name]

            @functools.wraps(original)  # with the attribute by which Jinja passes a context first
            def limited(*args: Any, **kwargs: Any) -> Any:
                passed = 1 if hasattr(original, "jinja_pass_arg") else 0
                check(*args[passed:], **kwargs)
                return original(*args, **kwargs)

            self.filters[name] = limited

        for name in ("center", "indent", "wordwrap", "batch", "slice"):
            checked(name, lambda value, *rest, **named: self._budget.padding([*rest, *named.values()]))
        checked("replace", lambda s, old, new, count=None: self._budget.replacement(str(s), old, new))
        checked(
            "format", lambda text, *rest, **named: self._budget.formatting(text, [*rest, *named.values()])
        )
        checked("sum", lambda values, attribute=None, start=0: self._budget.summing(start))
        for name in ("string", "pprint", "urlize", "xmlattr", "striptags"):
            checked(name, lambda value, *rest, **named: self._budget.value(value))


def _raise_exception(message: str) -> NoReturn:
    raise TemplateRefusal(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format[:MAX_TIME_FORMAT_CHARACTERS])
