"""Renders a checkpoint's own chat template in a child process, which is killed where it goes on for ever.

What the child does is `octavo.server.template_child`'s.
"""

from __future__ import annotations

import dataclasses
import json

from octavo.errors import OctavoError
from octavo.server import wire
from octavo.server.settings import LinkName
from octavo.server.warm_children import ChildLostError, WarmChildren
from octavo.text.provenance import TemplateText
from octavo.text.template_rendering import Rendering, broken_template

_SECONDS = 5.0
_MOST_CHILDREN = 4
"""So many renderings that take their whole time hold up none but the next; a child takes 13 MB."""
_COMMAND = ("-m", "octavo.server.template_child")


class ChildRenderer:
    """A `Renderer` whose work is done elsewhere. `close` it."""

    def __init__(self, source: str, *, link: LinkName = "auto") -> None:
        """Starts the first child. Raises ChatTemplateError for a template that does not compile."""
        self.children = WarmChildren(
            _COMMAND, wire.Template(source), seconds=_SECONDS, most=_MOST_CHILDREN, link=link
        )
        try:
            self.children.warm()
        except ChildLostError as error:
            self.close()
            raise broken_template(error.reason) from None
        except BaseException:
            self.close()
            raise

    def render(self, asked: Rendering) -> TemplateText:
        """As `Renderer.render`; NoChildError, and ClosedError after `close`."""
        # JSON, since a definition of a tool may have numbers that are too long for msgpack.
        fields = {each.name: getattr(asked, each.name) for each in dataclasses.fields(asked)}
        said = json.dumps(fields, default=dict)
        try:
            answer = self.children.ask(wire.Render(said))
        except ChildLostError as lost:
            raise broken_template(lost.reason) from None
        match answer:
            case wire.Rendered():
                return TemplateText(answer.text, answer.spans)
            case wire.Refused():
                error = wire.error_from(answer.fault)
                raise broken_template(error.message) if type(error) is OctavoError else error
            case _:
                raise broken_template("its process answered something else")

    def close(self) -> None:
        self.children.close()
