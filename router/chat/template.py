"""A checkpoint's chat template: where it is kept, the environment that templates of the field expect, its bounds.

The environment is a sandbox: a template comes with the weights, from whoever made them, and it runs over what clients
send. Rendering is bounded in characters and seconds.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from core.errors import ConfigError, InvalidRequest

RENDER_TIMEOUT_S = 5.0
_PIECES_PER_LOOK = 256  # at the clock
_TOOL_USE, _DEFAULT = "tool_use", "default"


@dataclass(frozen=True, slots=True)
class TemplateSource:
    """The texts of a checkpoint's template. `tool_use`: of the one for calls with tools, if there is another."""

    default: str
    tool_use: str | None = None

    def text(self, has_tools: bool) -> str:
        return self.tool_use if has_tools and self.tool_use is not None else self.default


def read_template(folder: Path, tokenizer_config: Mapping[str, Any], override: Path | None) -> TemplateSource | None:
    """Find the template of a checkpoint: `override`, else the folder's own files, else its tokenizer's configuration.

    Raises:
        ConfigError: it cannot be read, or there are several and none is the default.
    """
    named: dict[str, str] = {}
    if override is not None:
        return TemplateSource(_read(override))
    kept = tokenizer_config.get("chat_template")
    if isinstance(kept, str):
        named[_DEFAULT] = kept
    elif isinstance(kept, list):
        named |= {str(one["name"]): str(one["template"]) for one in kept if isinstance(one, dict)}
    elif kept is not None:
        raise ConfigError(f"{folder}: chat_template is neither a text nor a list of them")
    if (folder / "chat_template.jinja").is_file():
        named[_DEFAULT] = _read(folder / "chat_template.jinja")
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        named[path.stem] = _read(path)
    if not named:
        return None
    if _DEFAULT not in named:
        raise ConfigError(f"{folder}: of its chat templates ({', '.join(sorted(named))}) none is the default")
    return TemplateSource(named[_DEFAULT], named.get(_TOOL_USE))


class ChatTemplate:
    """Compiled templates.

    Attributes:
        text_for_tools: the text of the one for calls with tools.

    Concurrency: `render` may be called from several threads.
    """

    def __init__(
        self,
        source: TemplateSource,
        variables: Mapping[str, Any],
        *,
        max_characters: int,
        now: Callable[[], datetime] = datetime.now,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            variables: names of special tokens (`bos_token`, ...) and their texts.
            max_characters: of a rendered prompt.
            now: what `strftime_now` tells.

        Raises:
            ConfigError: a template is no valid one.
        """
        environment = _environment(now)
        texts = {source.text(has_tools) for has_tools in (False, True)}
        try:
            self._names = frozenset().union(*(find_undeclared_variables(environment.parse(text)) for text in texts))
            self._templates = {
                has_tools: environment.from_string(source.text(has_tools)) for has_tools in (False, True)
            }
        except TemplateError as error:
            raise ConfigError(f"the chat template is broken: {error}") from error
        self.text_for_tools = source.text(has_tools=True)
        self._variables = dict(variables)
        self._max_characters = max_characters
        self._clock = clock

    def has_variable(self, name: str) -> bool:
        """Return whether a template reads a variable of this name that it does not set."""
        return name in self._names

    def render(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, arguments: Mapping[str, Any]
    ) -> str:
        """Return the prompt, up to where the model begins to answer.

        Args:
            arguments: further variables; they win over those of the checkpoint and over `add_generation_prompt`,
                not over `messages` and `tools`.

        Raises:
            InvalidRequest: the template refuses it, or it becomes too long, or takes too long.
        """
        template = self._templates[bool(tools)]
        values = {**self._variables, "documents": None, "add_generation_prompt": True, **arguments}
        deadline = self._clock() + RENDER_TIMEOUT_S
        pieces: list[str] = []
        room = self._max_characters
        try:
            for piece in template.generate(values | {"messages": messages, "tools": tools}):
                pieces.append(piece)
                room -= len(piece)
                if room < 0:
                    raise InvalidRequest("chat", f"makes a prompt of more than {self._max_characters} characters")
                if len(pieces) % _PIECES_PER_LOOK == 0 and self._clock() > deadline:
                    raise InvalidRequest("chat", f"the chat template took more than {RENDER_TIMEOUT_S:g} s")
        except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise InvalidRequest("chat", f"the chat template refuses it: {_first_line(error)}") from error
        except RecursionError as error:
            raise InvalidRequest("chat", "is nested too deeply for the chat template") from error
        return "".join(pieces)


class _Generation(Extension):
    """`{% generation %}` marks what the model wrote, for training; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012 - the base class's own form

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment(now: Callable[[], datetime]) -> jinja2.Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], autoescape=False
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: now().strftime(form)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As JSON says it: without escapes for HTML, in the order of the keys."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"chat template {path}: cannot read: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
