"""How large a constraint may be, and what compiling and following it may cost."""

from pydantic import Field

from core.config import ConfigModel


class GrammarLimits(ConfigModel):
    """What is refused unread, or after counting."""

    max_bytes: int = Field(65_536, ge=16, le=131_072, description="of a constraint's text")
    max_depth: int = Field(32, ge=1, le=200, description="of a schema or a structural tag; of groups in a regex")
    max_schema_nodes: int = Field(4096, ge=1, description="schemas within a schema")
    max_alternatives: int = Field(4096, ge=1, description="choices; values of an enum")
    max_regex_bytes: int = Field(4096, ge=1)
    max_repeats: int = Field(
        4096, ge=1, description="the largest count in a {m,n} of a regex or a grammar, and the product of nested ones"
    )


class GrammarConfig(ConfigModel):
    """Constraints of generated text."""

    limits: GrammarLimits = GrammarLimits()
    compile_timeout_s: float = Field(10.0, gt=0, description="a constraint that takes longer to compile is refused")
    start_timeout_s: float = Field(60.0, gt=0, description="of the compiling process: it reads the tokenizer")
    max_memory_bytes: int = Field(
        512 * 2**20, ge=2**24, description="that compiling or following one constraint may need"
    )
    max_compiling: int = Field(2, ge=1, description="constraints that are compiled at once")
    max_waiting: int = Field(64, ge=0, description="constraints that wait to be compiled; more are refused")
    max_verdicts: int = Field(4096, ge=1, description="gateway: constraints whose verdict is remembered")
    max_grammars: int = Field(
        32, ge=1, description="worker: constraints kept ready, least recently used first out; each is a small process"
    )
    token_timeout_s: float = Field(
        0.5, gt=0, description="a constraint that takes longer to say what may come next, in a trial, is refused"
    )
