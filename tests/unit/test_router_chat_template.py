"""Chat templates: rendered as transformers renders them, and bounded."""

import json
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from core.errors import ConfigError, InvalidRequest
from router.chat.messages import ChatMessage, Tool, ToolCall, chat_size
from router.chat.template import ChatTemplate, TemplateSource
from router.chat.template_values import template_messages
from router.tokenizer import GatewayTokenizer
from tests.fakes.checkpoint import write_checkpoint
from tests.model_matrix import TINY_PATH

SCHEMA = {
    "type": "object",
    "properties": {"b": {"type": "string", "description": "<ä & 'b'>"}, "a": {"enum": [1, None]}},
}
TOOLS = (Tool("find", 'Finds "things"\n', json.dumps(SCHEMA)), Tool("now"))
AS_TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "find", "description": 'Finds "things"\n', "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]
ARGUMENTS = {"b": "x", "a": {"c": [1, 2.5, None, True]}, "ü": "<&>"}


def turn(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def called(content: str | None, *calls: tuple[str, str, dict[str, Any]], as_text: bool = False) -> dict[str, Any]:
    functions = [
        {
            "id": call_id,
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(given, ensure_ascii=False) if as_text else given},
        }
        for call_id, name, given in calls
    ]
    return turn("assistant", content, tool_calls=functions)


def ours(messages: list[dict[str, Any]]) -> list[ChatMessage]:
    """What a client would have sent for these messages."""
    return [
        ChatMessage(
            one["role"],
            one["content"],
            one.get("name"),
            tuple(
                ToolCall(
                    call["id"],
                    call["function"]["name"],
                    json.dumps(call["function"]["arguments"], ensure_ascii=False)
                    if isinstance(call["function"]["arguments"], dict)
                    else call["function"]["arguments"],
                )
                for call in one.get("tool_calls", ())
            ),
            one.get("tool_call_id"),
        )
        for one in messages
    ]


# Texts of our own, with the means that the families' templates use.
CHATML = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools>\\nAnswer with <tool_call></tool_call>.<|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1, searching=true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" and not (message.content.startswith('<tool_response>')) %}
        {%- set ns.searching = false %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{%- set content = message.content %}
    {%- else %}{%- set content = '' %}{%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
            {%- if loop.index0 > ns.last %}{%- set content = '(' ~ thought ~ ')' ~ content %}{%- endif %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' + content }}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if (loop.first and content) or (not loop.first) %}{{- '\\n' }}{%- endif %}
            {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '<tool_call>\\n{"name": "' ~ tool_call.name ~ '", "arguments": ' }}
            {%- if tool_call.arguments is string %}{{- tool_call.arguments }}
            {%- else %}{{- tool_call.arguments | tojson }}{%- endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' }}{{- content }}{{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""
LLAMA = """
{{- bos_token }}
{%- if not tools_in_user_message is defined %}{%- set tools_in_user_message = true %}{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%Y") %}
    {%- else %}{%- set date_string = "then" %}{%- endif %}
{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|system|>\\n\\n" }}{{- "Date: " + date_string + "\\n" }}{{- system_message }}{{- "<|eot|>" }}
{%- if tools_in_user_message and not tools is none %}
    {%- if messages | length != 0 %}
        {%- set first = messages[0]['content']|trim %}{%- set messages = messages[1:] %}
    {%- else %}{{- raise_exception("There is no first user message") }}{%- endif %}
    {{- '<|user|>\\n\\nRespond as {"name": function, "parameters": dictionary}. No <|python_tag|>.\\n' }}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
    {{- first + "<|eot|>"}}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|' + message['role'] + '|>\\n\\n'+ message['content'] | trim + '<|eot|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}{{- raise_exception("Only one call at once") }}{%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|assistant|>\\n\\n{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- (tool_call.arguments | tojson) + "}" }}{{- "<|eot|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|ipython|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}
        {%- else %}{{- message.content }}{%- endif %}
        {{- "<|eot|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n\\n' }}{%- endif %}
"""
MISTRAL = """
{%- macro system() -%}[SYS]{{ messages[0]["content"] }}[/SYS]{%- endmacro %}
{%- if messages[0]["role"] == "system" %}{%- set loop_messages = messages[1:] %}
{%- else %}{%- set loop_messages = messages %}{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- set is_call = message.role == "assistant" and message.tool_calls is defined %}
    {%- if message.role == "tool" or is_call %}{%- continue %}{%- endif %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("After the optional system message, roles must alternate") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}{{- '"' + key + '": "' + val + '"' }}
                    {%- else %}{{- '"' + key + '": ' + val|tojson }}{%- endif %}
                    {%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}
                {{- "}}" }}{%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" }}{%- endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.first and messages[0]["role"] == "system" %}{{- system() }}{%- endif %}
        {{- "[INST] " + message["content"] + "[/INST]" }}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}{{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id|length != 9 %}
                {{- raise_exception("Tool call IDs should have 9 characters") }}
            {%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}
            {%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" + eos_token }}{%- endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}{{- " " + message["content"]|trim + eos_token }}
    {%- elif message["role"] == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content|string }}
        {{- ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}{{- raise_exception("Only user and assistant roles are supported") }}{%- endif %}
{%- endfor %}
"""
DEEPSEEK = (
    "{% set ns = namespace(is_first=false, is_tool=false, system='', is_first_sp=true) %}"
    "{%- for message in messages %}{%- if message['role'] == 'system' %}"
    "{%- if ns.is_first_sp %}{% set ns.system = ns.system + message['content'] %}{% set ns.is_first_sp = false %}"
    "{%- else %}{% set ns.system = ns.system + '\\n\\n' + message['content'] %}{%- endif %}{%- endif %}{%- endfor %}"
    "{{ bos_token }}{{ ns.system }}{% if tools %}{{ tools | tojson(indent=2, sort_keys=True) }}{% endif %}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}"
    "{{ '<｜User｜>' + message['content'] }}{%- endif %}"
    "{%- if message['role'] == 'assistant' and message['content'] is none %}{%- set ns.is_tool = false -%}"
    "{%- for tool in message['tool_calls'] %}{%- if not ns.is_first %}"
    "{{ '<｜Assistant｜><｜tool▁calls▁begin｜>' + tool['function']['name'] }}"
    "{{ '\\n```json\\n' + tool['function']['arguments'] + '\\n```' }}{%- set ns.is_first = true -%}{%- else %}"
    "{{ '\\n' + tool['function']['name'] + '\\n```json\\n' ~ tool['function']['arguments'] ~ '\\n```' }}{%- endif %}"
    "{%- endfor %}{%- endif %}"
    "{%- if message['role'] == 'assistant' and message['content'] is not none %}"
    "{%- generation %}{{ '<｜Assistant｜>' + message['content'] + '<｜end｜>' }}{%- endgeneration %}{%- endif %}"
    "{%- if message['role'] == 'tool' %}{{ '<｜tool▁output｜>' + message['content'] }}{%- set ns.is_tool = true -%}"
    "{%- endif %}{%- endfor %}{% if add_generation_prompt and not ns.is_tool %}{{ '<｜Assistant｜>' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama": LLAMA, "mistral": MISTRAL, "deepseek": DEEPSEEK}
FORMATS = {"chatml": "hermes", "llama": "llama3_json", "mistral": "mistral", "deepseek": "deepseek_v3"}

ID = "abcdefghi"
PLAIN = [
    turn("system", "Be  brief. "),
    turn("user", " Hé\n<|im_end|> 漢🙂 "),
    turn("assistant", "Ja"),
    turn("user", "?"),
]
THOUGHT = [turn("user", "a"), turn("assistant", "<think>\nhm\n</think>\n\nYes"), turn("user", "b")]
ANSWERED = [
    turn("user", "Find it"),
    called(None, (ID, "find", ARGUMENTS)),
    turn("tool", '{"found": 1}', tool_call_id=ID, name="find"),
    turn("assistant", "Here."),
    turn("user", "Thanks"),
]
SEVERAL = [
    turn("system", "S"),
    turn("user", "Find them"),
    called(None, (ID, "find", ARGUMENTS), (ID[::-1], "now", {})),
    turn("tool", "12", tool_call_id=ID),
    turn("tool", "13", tool_call_id=ID[::-1]),
]
CONVERSATIONS = {"plain": PLAIN, "thought": THOUGHT, "answered": ANSWERED, "several": SEVERAL}


def checkpoint(folder: Path, template: str) -> Path:
    write_checkpoint(folder)
    (folder / "chat_template.jinja").write_text(template)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"bos_token": {"content": "<user>", "__type": "AddedToken"}}
    config.pop("chat_template", None)
    path.write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", params=TEMPLATES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, GatewayTokenizer, Any]:
    folder = checkpoint(tmp_path_factory.mktemp(request.param), TEMPLATES[request.param])
    reference = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return request.param, GatewayTokenizer.load(folder), reference


def expected(name: str, reference: Any, messages: list[dict[str, Any]], **arguments: Any) -> str:
    if name == "deepseek":  # this one takes the arguments as text
        messages = json.loads(json.dumps(messages))
        for one in messages:
            for call in one.get("tool_calls", ()):
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        # Their outer layer leaves out content that is None, and this template asks for it.
        given = {**reference.special_tokens_map, **arguments}
        texts, _ = render_jinja_template([messages], chat_template=DEEPSEEK, add_generation_prompt=True, **given)
        return str(texts[0])
    return str(reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **arguments))


@pytest.mark.parametrize("with_tools", [False, True], ids=["no-tools", "tools"])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_it_is_what_transformers_renders(
    both: tuple[str, GatewayTokenizer, Any], conversation: str, with_tools: bool
) -> None:
    name, tokenizer, reference = both
    messages, tools = CONVERSATIONS[conversation], TOOLS if with_tools else ()
    if name == "llama" and conversation == "several":
        with pytest.raises(InvalidRequest, match="the chat template refuses it: Only one call at once"):
            tokenizer.render_chat(ours(messages), tools)
        return
    text = tokenizer.render_chat(ours(messages), tools)
    assert text == expected(name, reference, messages, tools=AS_TOOLS if with_tools else None)
    assert tokenizer.encode_chat(ours(messages), tools) == reference.encode(text, add_special_tokens=False)


def test_variables_of_the_call_reach_the_template(both: tuple[str, GatewayTokenizer, Any]) -> None:
    name, tokenizer, reference = both
    given = {"enable_thinking": False, "date_string": "1999", "tools_in_user_message": False, "unused": {"a": [None]}}
    text = tokenizer.render_chat(ours(PLAIN), (), json.dumps(given))
    assert text == expected(name, reference, PLAIN, **given)
    seen = {one for one in given if tokenizer.has_template_variable(one)}
    assert seen == {"chatml": {"enable_thinking"}, "llama": {"date_string", "tools_in_user_message"}}.get(name, set())
    hidden = tokenizer.render_chat(ours(PLAIN), TOOLS, '{"messages": [], "tools": null}')
    assert hidden == tokenizer.render_chat(ours(PLAIN), TOOLS), "what the client said elsewhere stays"


def test_its_way_of_writing_calls_is_found(both: tuple[str, GatewayTokenizer, Any]) -> None:
    name, tokenizer, _ = both
    assert tokenizer.chat_style.tool_format is not None
    assert tokenizer.chat_style.tool_format.name == FORMATS[name]
    assert tokenizer.chat_style.shows_tools


def test_tandem_tinys_template_is_what_transformers_renders() -> None:
    tokenizer = GatewayTokenizer.load(TINY_PATH)
    reference = AutoTokenizer.from_pretrained(TINY_PATH, local_files_only=True)
    for messages in CONVERSATIONS.values():
        for tools, as_tools in ((), None), (TOOLS, AS_TOOLS):
            text = tokenizer.render_chat(ours(messages), tools)
            assert text == expected("tiny", reference, messages, tools=as_tools)
            assert tokenizer.encode_chat(ours(messages), tools) == reference.encode(text, add_special_tokens=False)
    plain = tokenizer.render_chat([ChatMessage("system", "S"), ChatMessage("user", "U"), ChatMessage("assistant", "A")])
    assert plain == "<|begin|><|system|>\nS<|end|>\n<|user|>\nU<|end|>\n<|assistant|>\nA<|end|>\n<|assistant|>\n"


NAMED = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools[0].function.name }}"}]


def test_a_template_is_found_wherever_it_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer_config.json"
    write_checkpoint(tmp_path)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads(path.read_text())
    config.pop("chat_template", None)
    asked = [ChatMessage("user", "a")]

    def shown(**override: Path) -> list[str]:
        tokenizer = GatewayTokenizer.load(tmp_path, **override)  # type: ignore[arg-type]
        return [tokenizer.render_chat(asked), tokenizer.render_chat(asked, TOOLS)]

    path.write_text(json.dumps(config))
    assert not GatewayTokenizer.load(tmp_path).has_chat_template
    with pytest.raises(InvalidRequest, match="no chat template"):
        shown()
    path.write_text(json.dumps(config | {"chat_template": "in the config"}))
    assert shown() == ["in the config"] * 2
    path.write_text(json.dumps(config | {"chat_template": NAMED}))
    assert shown() == ["plain", "find"]
    path.write_text(json.dumps(config | {"chat_template": NAMED[1:]}))
    with pytest.raises(ConfigError, match="none is the default"):
        shown()
    (tmp_path / "chat_template.jinja").write_text("in a file")
    assert shown() == ["in a file", "find"]
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("another file")
    assert shown() == ["in a file", "another file"]
    (tmp_path / "mine.jinja").write_text("mine")
    assert shown(chat_template=tmp_path / "mine.jinja") == ["mine"] * 2
    for text, problem in (("{% if %}", "broken"), (None, "cannot read")):
        (tmp_path / "mine.jinja").unlink()
        if text is not None:
            (tmp_path / "mine.jinja").write_text(text)
        else:
            (tmp_path / "mine.jinja").mkdir()
        with pytest.raises(ConfigError, match=problem):
            shown(chat_template=tmp_path / "mine.jinja")


def render(text: str, *, max_characters: int = 1000, seconds_per_look: float = 0.0, **values: Any) -> str:
    looks = count()
    template = ChatTemplate(
        TemplateSource(text),
        {"bos_token": "<s>"},
        max_characters=max_characters,
        now=lambda: datetime(2026, 2, 3),
        clock=lambda: next(looks) * seconds_per_look,
    )
    return template.render([{"role": "user", "content": "a"}], None, values)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{{ raise_exception('no\\nmore') }}", "refuses it: no$"),
        ("{% set _ = messages.append(1) %}", "refuses it"),
        ("{{ ''.__class__.__mro__ }}", "refuses it"),
        ("{{ messages[0].update({}) }}", "refuses it"),
        ("{{ messages[5].content }}", "refuses it"),
        ("{{ 'a' + 1 }}", "refuses it"),
        ("{{ 1 // 0 }}", "refuses it"),
        ("{% for _ in range(10000000) %}x{% endfor %}", "refuses it: Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "too deeply"),
        ("{% for _ in range(2000) %}x{% endfor %}", "more than 1000 characters"),
        ("{% include 'x' %}", "refuses it"),
    ],
)
def test_what_goes_wrong_in_a_template_is_the_requests_fault(text: str, problem: str) -> None:
    with pytest.raises(InvalidRequest, match=problem) as error:
        render(text)
    assert error.value.field == "chat"
    assert "\n" not in str(error.value)


def test_rendering_has_a_deadline() -> None:
    text = "{% for _ in range(1000) %}{{ '' }}{% endfor %}"
    assert render(text, seconds_per_look=0.1) == ""
    with pytest.raises(InvalidRequest, match="more than 5 s"):
        render(text, seconds_per_look=6.0)


def test_the_clock_is_what_the_template_is_told() -> None:
    assert render("{{ bos_token }}{{ strftime_now('%d %b %Y') }}") == "<s>03 Feb 2026"


def test_what_a_model_wrote_badly_stays_as_it_is() -> None:
    for text in ('{"a": ', "[1]", "x", '{"a":' * 100 + "1" + "}" * 100):
        message = ChatMessage("assistant", None, tool_calls=(ToolCall("1", "f", text),))
        for with_none in (False, True):
            (values,) = template_messages([message], with_none=with_none)
            assert values["tool_calls"][0]["function"]["arguments"] == text
            assert values["content"] is (None if with_none else "")
    empty = ChatMessage("assistant", None, tool_calls=(ToolCall("1", "f", " "),))
    (values,) = template_messages([empty], with_none=False)
    assert values["tool_calls"][0]["function"]["arguments"] == {}
    assert str(values["tool_calls"][0]["function"]["arguments"]) == "{}"


def test_the_size_of_a_chat_counts_all_that_the_template_goes_through() -> None:
    messages = [ChatMessage("user", "é" * 10, name="n" * 5)] * 3
    assert chat_size(messages, TOOLS, '{"a": 1}') >= 3 * 25 + len(json.dumps(SCHEMA))
    assert chat_size(messages * 100, (), "") > 100 * chat_size(messages, (), "") - 100
    with pytest.raises(InvalidRequest, match="Unicode"):
        chat_size([ChatMessage("user", "\ud800")], (), "")
