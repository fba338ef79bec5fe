"""What a generated text must be, as every layer names it. What it means is enforced in `grammar` and `engine`."""

from dataclasses import dataclass
from enum import StrEnum


class ConstraintKind(StrEnum):
    JSON_OBJECT = "json_object"  # any JSON object
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICE = "choice"
    GRAMMAR = "grammar"  # GBNF / EBNF with the rule `root`
    STRUCTURAL_TAG = "structural_tag"  # free text with constrained parts


@dataclass(frozen=True, slots=True)
class Constraint:
    """A kind and its text: the JSON of a schema or a structural tag, the regular expression, the grammar, a JSON array
    of the choices; empty for JSON_OBJECT. Equal constraints have equal grammars."""

    kind: ConstraintKind
    text: str = ""
