"""What the demo asks: two waves of concurrent requests of every kind.

The second wave repeats a long prefix of the first with other endings, so that prefix hits appear, and one seeded
request as it was, so that its text must come again word for word.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from tandem_client import Message, Sampling

_PREFIX = (
    "The standard library is distributed with Python. It offers data types, text processing, file and directory "
    "access, numeric and mathematical modules, functional programming, data persistence, compression, file formats, "
    "operating system services, concurrent execution, networking, interprocess communication, internet data handling, "
    "development tools, debugging and profiling. This manual describes every module of it in turn: what it is for, "
    "which classes and functions it defines, what arguments they take, what they return, and which exceptions they "
    "raise when an argument is wrong or a resource cannot be had. Modules are grouped by purpose, and within a group "
    "they are ordered from the general to the particular. Examples are given where a description alone would be hard "
    "to follow, and every example can be typed into the interactive interpreter as it stands.\n\n"
)


@dataclass(frozen=True, slots=True)
class DemoRequest:
    """One request. `same_as` names an earlier one whose tokens it must repeat."""

    name: str
    prompt: str | Sequence[Message]
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0.0, max_tokens=32))
    same_as: str = ""


def _greedy(max_tokens: int = 40) -> Sampling:
    return Sampling(temperature=0.0, max_tokens=max_tokens)


_SEEDED = Sampling(temperature=0.8, top_p=0.95, seed=42, max_tokens=40)

WAVES: tuple[tuple[DemoRequest, ...], ...] = (
    (
        DemoRequest("shared-1", _PREFIX + "The json module", _greedy()),
        DemoRequest("shared-2", _PREFIX + "The os.path module", _greedy()),
        DemoRequest("greedy", "def join(", _greedy()),
        DemoRequest("seeded", "Return a copy of the", _SEEDED),
        DemoRequest("sampled", "The socket module", Sampling(temperature=1.0, top_k=50, max_tokens=40)),
        DemoRequest("chat", [Message("user", "What does json.dumps do?")], _greedy(48)),
        DemoRequest("stop", "Raise ValueError if", Sampling(temperature=0.0, max_tokens=64, stop=["\n"])),
        DemoRequest("one-token", "import os, sys, ", _greedy(1)),
    ),
    (
        DemoRequest("shared-3", _PREFIX + "The threading module", _greedy()),
        DemoRequest("shared-4", _PREFIX + "The re module", _greedy()),
        DemoRequest("shared-5", _PREFIX + "The math module", _SEEDED),
        DemoRequest("again", _PREFIX + "The json module", _greedy(), same_as="shared-1"),
        DemoRequest("reseeded", "Return a copy of the", _SEEDED, same_as="seeded"),
        DemoRequest(
            "chat-2",
            [Message("system", "You explain Python."), Message("user", "What does os.listdir do?")],
            _greedy(48),
        ),
        DemoRequest("penalised", "class Queue:", Sampling(temperature=0.0, max_tokens=40, repetition_penalty=1.3)),
        DemoRequest("long", _PREFIX * 3 + "In short,", _greedy()),
    ),
)
