"""Which JSON schemas can be enforced whole. Pure.

The compiler drops what it does not know, or only warns. A text that breaks the caller's schema is worse than a refusal,
so what is not known to be enforced is refused here, by name: a keyword, or a combination of two of which one would win.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from core.errors import InvalidRequest
from grammar.config import GrammarLimits
from grammar.patterns import check_regex

ANNOTATIONS = frozenset(
    {
        *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"),
        *("$schema", "$id", "$comment", "$defs", "definitions", "discriminator", "uniqueItems"),
    }
)
OF_TYPE: Mapping[str, frozenset[str]] = {
    "object": frozenset(
        {
            *("properties", "required", "additionalProperties", "patternProperties", "propertyNames"),
            *("minProperties", "maxProperties"),
        }
    ),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems"}),
    "string": frozenset({"minLength", "maxLength", "pattern", "format"}),
    "number": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}),
    "integer": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}),
    "boolean": frozenset(),
    "null": frozenset(),
}
FORMATS = (
    *("date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"),
    *("uri-reference", "uri-template", "json-pointer", "relative-json-pointer"),
)
_WHOLE = ("$ref", "enum", "const", "anyOf", "oneOf", "allOf")  # each says all there is to say of its schema
_INFERRED = {"properties": "object", "items": "array", "prefixItems": "array"}
_KNOWN = frozenset().union(ANNOTATIONS, _WHOLE, {"type"}, *OF_TYPE.values())
_PYTHON_TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "null": (type(None),),
}


class SchemaCheck:
    """One walk over one schema.

    Args:
        field: of the request, in whose name things are refused.
        root: the whole schema, for what ``$ref`` points at.
    """

    def __init__(self, field: str, root: Any, limits: GrammarLimits) -> None:
        self._field = field
        self._root = root
        self._limits = limits
        self._num_nodes = 0
        self._checked: set[int] = set()  # identities of the schemas that were walked over
        self._references: list[tuple[str, str]] = []  # with their places
        self._one_ofs: list[tuple[str, Sequence[Any]]] = []

    def run(self) -> None:
        """Raises: InvalidRequest, naming the place within the schema."""
        if self._root is False:
            self._refuse("", "false allows nothing")
        self._check(self._root, "", 0)
        for path, reference in self._references:
            target = self._target(reference)
            if isinstance(target, dict | list) and id(target) not in self._checked:  # a default, say: anything at all
                self._refuse(path, "$ref: what it refers to is no schema that is known as one")
        for path, parts in self._one_ofs:  # now that every reference leads to a schema
            if not self._are_apart(parts):
                self._refuse(path, "oneOf whose schemas may overlap is not supported; anyOf is")

    def _refuse(self, path: str, problem: str) -> None:
        raise InvalidRequest(self._field, f"{path}: {problem}" if path else problem)

    def _check(self, schema: Any, path: str, depth: int) -> None:
        self._num_nodes += 1
        if self._num_nodes > self._limits.max_schema_nodes:
            self._refuse("", f"has more than {self._limits.max_schema_nodes} schemas in it")
        if depth > self._limits.max_depth:
            self._refuse(path, f"is more than {self._limits.max_depth} schemas deep")
        if schema is True:
            return
        if not isinstance(schema, dict):
            self._refuse(path, "a schema is an object, or true")
        self._checked.add(id(schema))
        for keyword in schema:
            if keyword not in _KNOWN:
                self._refuse(path, f"{keyword} is not supported")
        if schema.get("uniqueItems"):
            self._refuse(path, "uniqueItems is not supported")
        for name in ("$defs", "definitions"):
            for key, part in self._object(schema.get(name, {}), path, name).items():
                self._check(part, f"{path}/{name}/{key}", depth + 1)
        whole = [keyword for keyword in _WHOLE if keyword in schema]
        if whole:
            self._check_whole(schema, whole, path, depth)
        else:
            self._check_typed(schema, path, depth)

    def _check_whole(self, schema: dict[str, Any], whole: Sequence[str], path: str, depth: int) -> None:
        keyword = whole[0]
        others = [key for key in schema if key != keyword and key not in ANNOTATIONS]
        if "type" in others and self._type_says_nothing(schema, keyword):
            others.remove("type")
        if others:
            self._refuse(path, f"{others[0]} beside {keyword} is not supported")
        value = schema[keyword]
        match keyword:
            case "$ref":
                if not isinstance(value, str) or not (value == "#" or value.startswith("#/")):
                    self._refuse(path, "$ref: only references within the schema are supported")
                if "~" in value or "%" in value:
                    self._refuse(path, "$ref: escapes are not supported")
                self._references.append((path, value))
            case "enum":
                if not isinstance(value, list) or not value:
                    self._refuse(path, "enum must be a list that is not empty")
                if len(value) > self._limits.max_alternatives:
                    self._refuse(
                        path, f"enum has {len(value)} values, at most {self._limits.max_alternatives} are allowed"
                    )
            case "anyOf" | "oneOf" | "allOf":
                if not isinstance(value, list) or not value:
                    self._refuse(path, f"{keyword} must be a list that is not empty")
                for at, part in enumerate(value):
                    self._check(part, f"{path}/{keyword}/{at}", depth + 1)
                if keyword == "allOf" and len(value) > 1:
                    self._refuse(path, "allOf of several schemas is not supported")
                if keyword == "oneOf":
                    self._one_ofs.append((path, value))

    def _type_says_nothing(self, schema: dict[str, Any], keyword: str) -> bool:
        """Whether everything that `keyword` allows is of the schema's own type."""
        types = self._types(schema["type"], "")
        if keyword in ("enum", "const"):
            values = schema["enum"] if keyword == "enum" and isinstance(schema["enum"], list) else [schema.get("const")]
            return all(any(_is_of(value, name) for name in types) for value in values)
        if keyword in ("anyOf", "oneOf", "allOf") and isinstance(schema[keyword], list):
            return all(isinstance(part, dict) and part.get("type") in types for part in schema[keyword])
        return False

    def _check_typed(self, schema: dict[str, Any], path: str, depth: int) -> None:
        given = [key for key in schema if key != "type" and key not in ANNOTATIONS]
        if "type" in schema:
            types = self._types(schema["type"], path)
        else:
            types = sorted({_INFERRED[key] for key in given if key in _INFERRED})
            if given and len(types) != 1:
                self._refuse(path, f'{given[0]} without "type" is not supported')
        for keyword in given:
            if not any(keyword in OF_TYPE[name] for name in types):
                self._refuse(path, f"{keyword} does not go with type {', '.join(types)}")
            if keyword == "multipleOf" and "number" in types:
                self._refuse(path, "multipleOf is supported of integers only")
        if "object" in types:
            self._check_object(schema, path, depth)
        if "array" in types:
            self._check_array(schema, path, depth)
        if "string" in types:
            self._check_string(schema, path)

    def _check_object(self, schema: dict[str, Any], path: str, depth: int) -> None:
        properties = self._object(schema.get("properties", {}), path, "properties")
        for name, part in properties.items():
            self._check(part, f"{path}/properties/{name}", depth + 1)
        required = schema.get("required", [])
        if not isinstance(required, list):
            self._refuse(path, "required must be a list")
        for name in required:
            if not isinstance(name, str) or name not in properties:
                self._refuse(path, f"required: {name!r} is not among the properties")
        patterns = self._object(schema.get("patternProperties", {}), path, "patternProperties")
        others = [key for key in ("patternProperties", "propertyNames", "additionalProperties") if schema.get(key)]
        has_pattern = "patternProperties" in others or "propertyNames" in others
        if has_pattern and (properties or len(patterns) > 1 or len(others) > 1):
            self._refuse(path, f"{others[0]} beside other properties is not supported")
        for pattern, part in patterns.items():
            check_regex(self._field, pattern, self._limits)
            self._check_json_text(pattern, path)
            self._check(part, f"{path}/patternProperties/{pattern}", depth + 1)
        if "propertyNames" in schema:
            names = schema["propertyNames"]
            if not isinstance(names, dict) or names.get("type", "string") != "string":
                self._refuse(path, "propertyNames must be a schema of strings")
            self._check(
                {**names, "type": "string"} if "enum" not in names else names, f"{path}/propertyNames", depth + 1
            )
        if schema.get("additionalProperties") not in (None, False):
            self._check(schema["additionalProperties"], f"{path}/additionalProperties", depth + 1)
        minimum = schema.get("minProperties", 0)
        if not isinstance(minimum, int) or minimum > len(required):
            self._refuse(path, "minProperties above the number of required properties is not supported")

    def _check_array(self, schema: dict[str, Any], path: str, depth: int) -> None:
        prefix = schema.get("prefixItems", [])
        if not isinstance(prefix, list):
            self._refuse(path, "prefixItems must be a list")
        for at, part in enumerate(prefix):
            self._check(part, f"{path}/prefixItems/{at}", depth + 1)
        items = schema.get("items", False)
        if isinstance(items, list):
            self._refuse(path, "items as a list is not supported; prefixItems is")
        if items is not False:
            self._check(items, f"{path}/items", depth + 1)
        for keyword in ("minItems", "maxItems"):
            self._check_count(schema, keyword, path)

    def _check_string(self, schema: dict[str, Any], path: str) -> None:
        ways = [key for key in ("pattern", "format", "minLength", "maxLength") if key in schema]
        if ("pattern" in ways or "format" in ways) and len(ways) > 1:
            self._refuse(path, f"{ways[0]} beside {ways[1]} is not supported")
        for keyword in ("minLength", "maxLength"):
            self._check_count(schema, keyword, path)
        if "pattern" in schema:
            pattern = schema["pattern"]
            if not isinstance(pattern, str):
                self._refuse(path, "pattern must be a string")
            check_regex(f"{self._field}", pattern, self._limits)
            self._check_json_text(pattern, path)
        if "format" in schema and schema["format"] not in FORMATS:
            self._refuse(path, f"format {schema['format']!r} is not supported")

    def _check_json_text(self, pattern: str, path: str) -> None:
        """A pattern is matched with the JSON text as it stands; what would have to be escaped there cannot be told."""
        if '"' in pattern or r"\\" in pattern or any(ord(character) < 32 for character in pattern):
            self._refuse(path, "a pattern with quotes, backslashes or control characters is not supported")

    def _check_count(self, schema: dict[str, Any], keyword: str, path: str) -> None:
        count = schema.get(keyword, 0)
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            self._refuse(path, f"{keyword} must be a natural number")
        if count > self._limits.max_repeats:
            self._refuse(path, f"{keyword} is {count}, at most {self._limits.max_repeats} is allowed")

    def _types(self, value: Any, path: str) -> list[str]:
        types = value if isinstance(value, list) else [value]
        for name in types:
            if not isinstance(name, str) or name not in OF_TYPE:
                self._refuse(path, f"type {name!r} is not one of JSON's")
        if not types:
            self._refuse(path, "type must not be empty")
        return types

    def _object(self, value: Any, path: str, keyword: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            self._refuse(path, f"{keyword} must be an object")
        members: dict[str, Any] = value
        return members

    def _are_apart(self, parts: Sequence[Any]) -> bool:
        """Whether no value can satisfy two of these: by their types, or by a required property of one value each."""
        seen: list[dict[str, Any]] = []
        for part in parts:
            part = self._resolved(part)
            if not isinstance(part, dict) or any(not _exclude(part, other) for other in seen):
                return False
            seen.append(part)
        return True

    def _resolved(self, part: Any) -> Any:
        for _ in range(self._limits.max_depth):
            if not isinstance(part, dict) or "$ref" not in part:
                return part
            part = self._target(part["$ref"])
        return None

    def _target(self, reference: str) -> Any:
        """Return what it refers to, as the compiler finds it; None: nothing."""
        target = self._root
        for step in filter(None, reference.removeprefix("#").split("/")):
            target = target.get(step) if isinstance(target, dict) else None
        return target


def _exclude(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two schemas are sure to have no value in common."""
    types = [_type_set(schema) for schema in (one, other)]
    if types[0] is not None and types[1] is not None and not types[0] & types[1]:
        return True
    values = [_values(schema) for schema in (one, other)]
    if values[0] is not None and values[1] is not None:
        return all(value not in values[1] for value in values[0])
    shared = set(one.get("required", ())) & set(other.get("required", ()))
    for name in shared:
        parts = [schema.get("properties", {}).get(name, {}) for schema in (one, other)]
        tags = [_values(part) if isinstance(part, dict) else None for part in parts]
        if tags[0] is not None and tags[1] is not None and all(value not in tags[1] for value in tags[0]):
            return True
    return False


def _type_set(schema: dict[str, Any]) -> set[str] | None:
    if "type" not in schema:
        values = _values(schema)
        if values is None:
            return None
        return {name for value in values for name in OF_TYPE if _is_of(value, name)}
    types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    return {*types, *(("integer",) if "number" in types else ())}


def _values(schema: dict[str, Any]) -> list[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    values = schema.get("enum")
    return values if isinstance(values, list) else None


def _is_of(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    return isinstance(value, _PYTHON_TYPES[name])
