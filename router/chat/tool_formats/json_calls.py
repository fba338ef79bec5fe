"""Calls written as JSON objects with a name and arguments: what hermes, Llama 3, Mistral and others have in common."""

from router.chat.reader import Parsing, Reader, Take, TooLong, at_most, ignore
from router.chat.telling import Telling
from router.chat.tool_formats.format import Offer

MAX_NAME_CHARACTERS = 1024
_NAME = "name"
_ARGUMENTS = ("arguments", "parameters")
_KEYS = (_NAME, *_ARGUMENTS, "id", "type")
_MAX_HELD_CHARACTERS = 65_536  # of what comes before the name


def read_calls(reader: Reader, telling: Telling, offer: Offer, *, known_only: bool = False) -> Parsing[bool]:
    """Take an object, or a list of objects; return whether there was a call. The reader has an anchor; if it still has
    one afterwards, what was taken since is no part of a call.

    Args:
        known_only: an object with another name than those on offer is no call.
    """
    if not (yield from reader.literal("[")):
        return (yield from read_call(reader, telling, offer, known_only=known_only))
    has_calls = False
    while True:
        yield from reader.space()
        if not (yield from read_call(reader, telling, offer, known_only=known_only)):
            return has_calls
        has_calls = True
        reader.anchor()
        yield from reader.space()
        if (yield from reader.literal(",", "]")) != ",":
            break
    reader.let_go()
    return True


def read_call(reader: Reader, telling: Telling, offer: Offer, *, known_only: bool = False) -> Parsing[bool]:
    """Take one object, otherwise as `read_calls`."""
    if not (yield from reader.literal("{")):
        return False
    held: list[str] = []
    hold, skip = at_most(_MAX_HELD_CHARACTERS, held.append), at_most(_MAX_HELD_CHARACTERS, ignore)
    is_told = has_arguments = False
    while True:
        yield from reader.space()
        if (yield from reader.literal("}")):
            break
        key = yield from reader.json_string(MAX_NAME_CHARACTERS)
        if key not in _KEYS and not is_told:
            return False
        yield from reader.space()
        if not (yield from reader.literal(":")):
            return is_told
        yield from reader.space()
        if key == _NAME and not is_told:
            name = yield from reader.json_string(MAX_NAME_CHARACTERS)
            if not name or (known_only and not offer.knows(name)):
                return False
            telling.call(name)
            is_told = True
            reader.let_go()
            telling.arguments("".join(held))
        else:
            try:
                if key in _ARGUMENTS and not has_arguments:
                    has_arguments = True
                    is_whole = yield from read_arguments(reader, telling.arguments if is_told else hold)
                else:
                    is_whole = yield from reader.json_value(ignore if is_told else skip)
            except TooLong:
                return False
            if not is_whole:
                return is_told
        yield from reader.space()
        if (closing := (yield from reader.literal(",", "}"))) != ",":
            if not closing and not has_arguments:
                return is_told
            break
    if is_told:
        if not has_arguments:
            telling.arguments("{}")
        telling.end_call()
    return is_told


def read_arguments(reader: Reader, take: Take) -> Parsing[bool]:
    """Take the value of a call's arguments; return whether it is whole. Some models write the object as a string, or
    null."""
    first = yield from reader.peek()
    if first == '"':
        text = yield from reader.json_string()
        take(text or "")
        return text is not None
    if first in ("{", "["):
        return (yield from reader.json_value(take))
    parts: list[str] = []
    is_whole = yield from reader.json_value(parts.append)
    value = "".join(parts)
    take("{}" if value == "null" else value)
    return is_whole
