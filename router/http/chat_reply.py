"""`/v1/chat/completions`: an answer as one object, or as chunks. Pure.

Chunks are put together as text, not as objects: all but a few bytes of one is the same for every chunk of a choice.
First comes each choice's role, then pieces of content and of tool calls, a finish for each choice, and, if asked for,
the usage in a chunk without choices. The last of all tells how the call was served."""

from collections.abc import Sequence
from typing import Any

from core.request import TokenOutput
from router.chat.events import ChatDelta, ContentDelta, ToolCallDelta
from router.generation.answer import Answer
from router.generation.chat_answer import ChatPiece
from router.http.chat_request import ChatRequest
from router.http.logprobs import TokenNames, chat_logprobs, prompt_logprobs
from router.http.reply_head import ReplyHead
from router.http.sse import encode, event
from router.http.usage import UsageCount

_ROLE = {"role": "assistant", "content": "", "refusal": None}


class ChatChunks:
    """The chunks of one call."""

    def __init__(self, answer: Answer, head: ReplyHead, fields: ChatRequest, names: TokenNames) -> None:
        self._answer = answer
        self._fields = fields
        self._names = names
        self._usage = UsageCount(answer, fields.num_choices)
        head_text = encode(head.told("chat.completion.chunk"))[:-1]
        self._starts = [f'{head_text},"choices":[{{"index":{index},"delta":' for index in range(fields.num_choices)]
        self._empty_start = f'{head_text},"choices":[]'
        self._tail = "}]" + (',"usage":null}' if fields.includes_usage else "}")

    def begin(self) -> str:
        """The role of every choice. To be asked once the answer gave its first pieces."""
        role = encode(_ROLE)
        extra = ""
        if self._fields.prompt_logprobs is not None:
            scores = [
                prompt_logprobs(one, self._names, self._fields.prompt_logprobs) for one in self._answer.prompt_tokens
            ]
            extra = f',"prompt_logprobs":{encode(scores[0] if scores else None)}'
        if self._fields.return_token_ids:
            extra += f',"prompt_token_ids":{encode(self._answer.requests[0].prompt_token_ids)}'
        texts = [self._chunk(index, role) for index in range(len(self._starts))]
        if extra:
            texts[0] = texts[0].replace("data: {", "data: {" + extra[1:] + ",", 1)
        return "".join(texts)

    def of(self, pieces: Sequence[ChatPiece]) -> str:
        """What tells of these pieces."""
        return "".join(self._piece(piece) for piece in pieces)

    def end(self) -> str:
        """What follows the last piece."""
        if not self._fields.includes_usage:
            return ""
        usage, account = encode(self._usage.told()), encode(self._usage.account())
        return event(f'{self._empty_start},"usage":{usage},"tandem":{account}}}')

    def _piece(self, piece: ChatPiece) -> str:
        self._usage.add(piece.choice, len(piece.tokens), piece.completion)
        extra = self._of_tokens(piece.tokens) if piece.tokens and self._tells_tokens else ""
        texts = []
        for delta in piece.deltas:
            texts.append(self._chunk(piece.choice, _delta_json(delta), extra))
            extra = ""
        if extra:
            texts.append(self._chunk(piece.choice, "{}", extra))
        if piece.completion is not None:
            texts.append(self._chunk(piece.choice, "{}", finish=encode(piece.finish_reason)))
        return "".join(texts)

    @property
    def _tells_tokens(self) -> bool:
        return bool(self._fields.logprobs or self._fields.return_token_ids)

    def _of_tokens(self, tokens: Sequence[TokenOutput]) -> str:
        """The fields of a choice that tell of tokens, `logprobs` first."""
        text = encode({"content": chat_logprobs(tokens, self._names)}) if self._fields.logprobs else "null"
        if self._fields.return_token_ids:
            text += f',"token_ids":{encode([token.token_id for token in tokens])}'
        return text

    def _chunk(self, index: int, delta: str, logprobs: str = "null", finish: str = "null") -> str:
        tail = self._tail
        if self._fields.has_continuous_usage:
            tail = f'}}],"usage":{encode(self._usage.told())}}}'
        elif finish != "null" and self._usage.is_complete and not self._fields.includes_usage:
            tail = f'}}],"tandem":{encode(self._usage.account())}}}'
        return f'data: {self._starts[index]}{delta},"logprobs":{logprobs or "null"},"finish_reason":{finish}{tail}\n\n'


class ChatWhole:
    """All of a call in one object."""

    def __init__(self, answer: Answer, head: ReplyHead, fields: ChatRequest, names: TokenNames) -> None:
        self._answer = answer
        self._head = head
        self._fields = fields
        self._names = names
        self._usage = UsageCount(answer, fields.num_choices)
        self._choices = [_Message() for _ in range(fields.num_choices)]

    def add(self, pieces: Sequence[ChatPiece]) -> None:
        for piece in pieces:
            self._usage.add(piece.choice, len(piece.tokens), piece.completion)
            self._choices[piece.choice].add(piece)

    def told(self) -> dict[str, Any]:
        reply = {
            **self._head.told("chat.completion"),
            "choices": [self._choice(index, choice) for index, choice in enumerate(self._choices)],
            "usage": self._usage.told(),
            "tandem": self._usage.account(),
        }
        if self._fields.prompt_logprobs is not None:
            scored = self._answer.prompt_tokens[0]
            reply["prompt_logprobs"] = prompt_logprobs(scored, self._names, self._fields.prompt_logprobs)
        if self._fields.return_token_ids:
            reply["prompt_token_ids"] = self._answer.requests[0].prompt_token_ids
        return reply

    def _choice(self, index: int, choice: "_Message") -> dict[str, Any]:
        logprobs = {"content": chat_logprobs(choice.tokens, self._names)} if self._fields.logprobs else None
        told = {
            "index": index,
            "message": choice.told(),
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
        }
        if self._fields.return_token_ids:
            told["token_ids"] = [token.token_id for token in choice.tokens]
        return told


class _Message:
    """One choice, as it grows."""

    def __init__(self) -> None:
        self.finish_reason: str | None = None
        self.tokens: list[TokenOutput] = []
        self._content: list[str] = []
        self._calls: dict[int, tuple[str, str, list[str]]] = {}

    def add(self, piece: ChatPiece) -> None:
        self.tokens += piece.tokens
        self.finish_reason = piece.finish_reason or self.finish_reason
        for delta in piece.deltas:
            if isinstance(delta, ContentDelta):
                self._content.append(delta.text)
            else:
                _, _, arguments = self._calls.setdefault(delta.index, (delta.id, delta.name, []))
                arguments.append(delta.arguments)

    def told(self) -> dict[str, Any]:
        content = "".join(self._content)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if self._calls and not content else content,
            "refusal": None,
        }
        if self._calls:
            message["tool_calls"] = [
                {"id": call_id, "type": "function", "function": {"name": name, "arguments": "".join(arguments)}}
                for call_id, name, arguments in self._calls.values()
            ]
        return message


def _delta_json(delta: ChatDelta) -> str:
    if isinstance(delta, ContentDelta):
        return f'{{"content":{encode(delta.text)}}}'
    return f'{{"tool_calls":[{_call_json(delta)}]}}'


def _call_json(delta: ToolCallDelta) -> str:
    if not delta.id:
        return encode({"index": delta.index, "function": {"arguments": delta.arguments}})
    function = {"name": delta.name, "arguments": delta.arguments}
    return encode({"index": delta.index, "id": delta.id, "type": "function", "function": function})
