"""Pieces of structural tags: the grammars that hold calls to a format and to their tools' schemas. Pure."""

import json
import re
from collections.abc import Callable, Mapping, Sequence

from router.chat.messages import Tool, tool_schema
from router.chat.tool_formats.format import Offer, Structure

MAX_WHITESPACE = 32  # in a row: a model that may go on with blanks for ever does


def sequence(*elements: Structure) -> Structure:
    flat = [inner for one in elements for inner in (one["elements"] if one["type"] == "sequence" else [one])]
    return {"type": "sequence", "elements": flat}


def either(choices: Sequence[Structure]) -> Structure:
    return choices[0] if len(choices) == 1 else {"type": "or", "elements": list(choices)}


def text(exact: str, special_tokens: Mapping[str, int]) -> Structure:
    """Exactly this text; what is a special token in it is named as a token. A sequence, empty for no text."""
    marks = sorted((mark for mark in special_tokens if mark in exact), key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, marks))})", exact) if marks else [exact]
    return sequence(
        *(
            {"type": "token", "token": special_tokens[part]}
            if part in special_tokens
            else {"type": "const_string", "value": part}
            for part in parts
            if part
        )
    )


def arguments(tool: Tool, *, is_free: bool) -> Structure:
    """The JSON of a tool's arguments; `is_free`: any object."""
    schema = {"type": "object"} if is_free else tool_schema(tool)
    return {"type": "json_schema", "json_schema": schema, "max_whitespace_cnt": MAX_WHITESPACE}


def one_call(
    offer: Offer, before: Callable[[str], str], after: str, *, is_forced: bool, skipped: str = ""
) -> Structure:
    """A call of any tool on offer: `before`, with its name in it, its arguments, `after`.

    Args:
        is_forced: arguments follow their schemas; otherwise those of strict tools only.
        skipped: what of `before` was written already.
    """
    special = offer.special_tokens
    return either(
        [
            sequence(
                text(before(tool.name).removeprefix(skipped), special),
                arguments(tool, is_free=not is_forced and not tool.strict),
                text(after, special),
            )
            for tool in offer.tools
        ]
    )


def calls(call: Structure, separator: Structure, offer: Offer) -> Structure:
    """One call, or as many as the model wants where they may be parallel."""
    if not offer.is_parallel:
        return call
    return sequence(call, {"type": "star", "content": sequence(separator, call)})


def dispatched(trigger: str, content: Structure, offer: Offer) -> Structure:
    """Free text in which `content` must follow `trigger`."""
    is_token = trigger in offer.special_tokens
    return {
        "type": "token_dispatch" if is_token else "dispatch",
        "rules": [[offer.special_tokens[trigger] if is_token else trigger, content]],
        "loop": offer.is_parallel,
    }


def text_not_beginning(characters: str) -> Structure:
    """Any text whose first character that is no space is none of these."""
    first = {"type": "regex", "pattern": f"\\s*[^\\s{re.escape(characters)}]"}
    return sequence(first, {"type": "any_text"})


def quoted(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)
