"""`/v1/models`, `/tokenize` and `/detokenize`: facts of the model and its tokenizer, no generation."""

from typing import Any

from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from core.errors import InvalidRequest, ModelNotFound
from router.chat.messages import ChatCall, ToolChoice, ToolChoiceMode
from router.chat.plan import plan_chat
from router.http.door import Door
from router.http.fields import Integer, RequestModel, dump_json, read_fields, rename
from router.http.message_fields import MessageFields, ToolFields, read_message, read_tool
from router.http.while_connected import json_response
from router.intake import Prompt, TextPrompt

_UNSERVED = {
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": ("",),
    "mm_processor_kwargs": ({},),
}
_UNSERVED_CHAT = {**_UNSERVED, "add_special_tokens": (False,)}
_OWNER = "tandem"


class TokenizeRequest(RequestModel):
    """A prompt, or messages as the chat template would write them."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": ["prompt"]}, {"required": ["messages"]}]})

    model: str | None = None
    prompt: str | None = None
    messages: list[MessageFields] | None = None
    tools: list[ToolFields] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = Field(None, description="false: a prompt without the tokenizer's markers")
    return_token_strs: bool | None = None


class DetokenizeRequest(RequestModel):
    model: str | None = None
    tokens: list[Integer] = Field(description="token ids")


class ModelRoutes:
    """What the model is."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._front = door.front
        self._created = int(door.now())

    async def list_models(self, request: Request) -> Response:
        await self._door.admit(request)
        return json_response({"object": "list", "data": [self._card()]})

    async def get_model(self, request: Request) -> Response:
        await self._door.admit(request)
        name = request.path_params["model"]
        if not name:
            raise ModelNotFound("no model is named")
        self._front.check_model(name)
        return json_response(self._card())

    async def tokenize(self, request: Request) -> Response:
        await self._door.admit(request)
        body = await self._door.body(request)
        is_chat = body.get("messages") is not None
        fields = read_fields(TokenizeRequest, body, _UNSERVED_CHAT if is_chat else _UNSERVED)
        try:
            ids = await self._front.tokenize(fields.model or "", self._prompt(fields))
        except InvalidRequest as error:
            raise rename(error, {"text": "prompt", "chat": "messages", "chat.messages": "messages"}) from error
        names = [self._front.tokenizer.token_text(one) for one in ids] if fields.return_token_strs else None
        told = {"count": len(ids), "max_model_len": self._front.max_model_len(), "tokens": ids, "token_strs": names}
        return json_response(told)

    async def detokenize(self, request: Request) -> Response:
        await self._door.admit(request)
        fields = read_fields(DetokenizeRequest, await self._door.body(request), {})
        try:
            text = await self._front.detokenize(fields.model or "", fields.tokens)
        except InvalidRequest as error:
            raise rename(error, {"ids": "tokens"}) from error
        return json_response({"prompt": text})

    def _prompt(self, fields: TokenizeRequest) -> Prompt:
        if (fields.prompt is None) is (fields.messages is None):
            raise InvalidRequest("prompt", "must be there, or messages, and not both")
        if fields.prompt is not None:
            return TextPrompt(fields.prompt, with_markers=fields.add_special_tokens is not False)
        arguments = fields.chat_template_kwargs
        call = ChatCall(
            messages=tuple(read_message(f"messages[{index}]", one) for index, one in enumerate(fields.messages or ())),
            tools=tuple(read_tool(f"tools[{index}]", one) for index, one in enumerate(fields.tools or ())),
            tool_choice=None if fields.tools else ToolChoice(ToolChoiceMode.NONE),
            template_arguments=dump_json("chat_template_kwargs", arguments) if arguments else "",
        )
        return plan_chat(call, self._front.tokenizer.chat_style).prompt

    def _card(self) -> dict[str, Any]:
        name = self._front.config.model_name
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": _OWNER,
            "root": name,
            "parent": None,
            "max_model_len": self._front.max_model_len(),
        }
