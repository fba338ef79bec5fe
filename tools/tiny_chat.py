"""The chat format of tandem-tiny: its role markers, its template, and conversations made from docstrings.

A conversation is a sequence of turns `<|role|>\n text <|end|>\n`. The marker that ends a turn is also the model's
end-of-sequence token, so a model that learned the format stops by itself, and a server needs one stop id only.
The template and `render` must agree: the template is what a server applies, `render` what the model is trained on.
"""

from collections.abc import Callable, Iterator

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
ROLE_MARKERS = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
SPECIAL_TOKENS = [PAD, BEGIN, END, *ROLE_MARKERS.values()]

# Tools are told of and called in the way of hermes: JSON between tags, which are plain text to this vocabulary.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% if tools %}"
    "{{ '<|system|>\n' }}"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\n\n' }}{% endif %}"
    "{{ 'You can call these functions:\n<tools>\n' }}"
    "{% for tool in tools %}{{ (tool | tojson) + '\n' }}{% endfor %}"
    '{{ \'</tools>\nA call is written as <tool_call>\n{"name": name, "arguments": object}\n</tool_call>\' }}'
    "{{ '<|end|>\n' }}"
    "{% endif %}"
    "{% for message in messages %}"
    "{% if tools and loop.first and message['role'] == 'system' %}"
    "{% elif message['role'] == 'tool' %}"
    "{{ '<|user|>\n<tool_response>\n' + message['content'] + '\n</tool_response><|end|>\n' }}"
    "{% elif message['tool_calls'] %}"
    "{{ '<|assistant|>\n' + (message['content'] or '') }}"
    "{% for call in message['tool_calls'] %}"
    "{{ '<tool_call>\n{\"name\": ' + (call['function']['name'] | tojson) + ', \"arguments\": ' }}"
    "{{ (call['function']['arguments'] | tojson) + '}\n</tool_call>' }}"
    "{% if not loop.last %}{{ '\n' }}{% endif %}"
    "{% endfor %}"
    "{{ '<|end|>\n' }}"
    "{% else %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

Described = tuple[str, str, str]  # name, signature ("" for a module or topic), docstring
Turn = tuple[str, str]  # role, content
Choose = Callable[[str], int]  # a stable hash: the corpus uses no random generator

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You answer questions about Python and its standard library.",
    "You are tandem-tiny, a small model that knows Python's documentation. Answer briefly.",
)
QUESTIONS = (
    ("What does {name} do?", "{doc}"),
    ("Explain {name}.", "{doc}"),
    ("What is {name}?", "{doc}"),
    ("Tell me about {name}.", "{doc}"),
    ("Can you describe {name} in Python?", "{doc}"),
    ("{name}", "{doc}"),
)
QUESTIONS_OF_CALLABLES = (
    ("How do I use {name}?", "Use it as `{signature}`.\n\n{doc}"),
    ("How do I call {name}?", "Call it as `{signature}`.\n\n{doc}"),
    ("Show me the signature of {name}.", "```python\n{signature}\n```\n\n{summary}"),
    ("What are the parameters of {name}?", "```python\n{signature}\n```\n\n{doc}"),
    ("Which part of the standard library fits this description? {summary}", "That is `{name}`.\n\n{doc}"),
)
SMALL_TALK = (
    ("Hello!", "Hello! I can answer questions about Python's standard library. What would you like to know?"),
    ("Hi, how are you?", "I am fine, thank you. Ask me about a module, a class or a function of Python."),
    ("Who are you?", "I am tandem-tiny, a very small language model trained on the documentation of Python."),
    ("What can you do?", "I can describe modules, classes and functions of Python's standard library."),
    ("Thank you.", "You are welcome. Ask me if you have another question about Python."),
)
SMALL_TALK_REPEATS = 12


def render(turns: list[Turn]) -> str:
    """Pure. The text of a finished conversation, without the begin marker that every document gets."""
    return "".join(f"{ROLE_MARKERS[role]}\n{content}{END}\n" for role, content in turns).rstrip("\n")


def conversations(described: list[Described], choose: Choose) -> Iterator[str]:
    """Yields conversations of one to three questions about consecutive objects of one page, each object twice.

    Args:
        described: The public objects of one page, in the order of the page.
        choose: Stable hash; picks the question, the system prompt and the number of questions.
    """
    for variant in ("first", "second"):
        rest = described
        while rest:
            pick = choose(f"{variant} {rest[0][0]}")
            num_questions = (1, 1, 1, 2, 3)[pick % 5]
            turns: list[Turn] = []
            if pick // 5 % 2:
                turns.append(("system", SYSTEM_PROMPTS[pick // 10 % len(SYSTEM_PROMPTS)]))
            for name, signature, doc in rest[:num_questions]:
                turns.extend(_turns_about(name, signature, doc, choose(f"question {variant} {name}")))
            yield render(turns)
            rest = rest[num_questions:]


def small_talk() -> list[str]:
    """Pure. The few conversations that no docstring gives, repeated so that the model keeps them."""
    plain = [render([("user", question), ("assistant", answer)]) for question, answer in SMALL_TALK]
    with_system = [SYSTEM_PROMPTS[i % len(SYSTEM_PROMPTS)] for i in range(len(SMALL_TALK))]
    guided = [render([("system", prompt), *_pair(pair)]) for prompt, pair in zip(with_system, SMALL_TALK, strict=True)]
    return (plain + guided) * SMALL_TALK_REPEATS


def _pair(pair: tuple[str, str]) -> list[Turn]:
    return [("user", pair[0]), ("assistant", pair[1])]


def _turns_about(name: str, signature: str, doc: str, pick: int) -> list[Turn]:
    templates = QUESTIONS + QUESTIONS_OF_CALLABLES if signature else QUESTIONS
    question, answer = templates[pick % len(templates)]
    values = {
        "name": name,
        "signature": signature,
        "doc": _shorten(doc),
        "summary": " ".join(doc.split("\n\n")[0].split()),
    }
    return _pair((question.format(**values), answer.format(**values)))


def _shorten(doc: str, limit_chars: int = 900) -> str:
    """Whole paragraphs up to the limit, and always the first one: an answer ends where a thought ends."""
    kept: list[str] = []
    for paragraph in doc.split("\n\n"):
        if kept and sum(map(len, kept)) + len(paragraph) > limit_chars:
            break
        kept.append(paragraph)
    return "\n\n".join(kept)
