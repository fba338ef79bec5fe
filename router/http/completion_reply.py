"""`/v1/completions`: an answer as one object, or as chunks of the same shape, the last of which tells how the call was
served. Pure."""

from collections.abc import Sequence
from typing import Any

from core.request import TokenOutput
from router.generation.answer import Answer, ChoicePiece
from router.http.completion_request import CompletionOrder
from router.http.logprobs import CompletionLogprobs, TokenNames, prompt_logprobs
from router.http.reply_head import ReplyHead
from router.http.sse import encode, event
from router.http.usage import UsageCount


class _Choices:
    """What whole replies and chunks have in common.

    Args:
        echoes: the text of every prompt, to come first in its answers; None: it does not.
    """

    def __init__(
        self, answer: Answer, head: ReplyHead, order: CompletionOrder, names: TokenNames, echoes: Sequence[str] | None
    ) -> None:
        fields = order.fields
        self.answer = answer
        self.head = head
        self.fields = fields
        self.order = order
        self.names = names
        self.echoes = echoes
        self.num_choices = len(order.prompts) * fields.num_choices
        self.usage = UsageCount(answer, fields.num_choices, is_prompt_only=order.is_prompt_only)
        self.logprobs = (
            [CompletionLogprobs(names, fields.logprobs) for _ in range(self.num_choices)]
            if fields.logprobs is not None
            else None
        )

    def prompt_of(self, choice: int) -> int:
        return choice // self.fields.num_choices

    def echo(self, choice: int) -> str:
        return self.echoes[self.prompt_of(choice)] if self.echoes is not None else ""

    def echoed_logprobs(self, choice: int) -> dict[str, Any] | None:
        """Of the prompt, where it is echoed and scored. To be asked before those of the answer."""
        if self.echoes is None or self.logprobs is None:
            return None
        return self.logprobs[choice].of(self.answer.prompt_tokens[self.prompt_of(choice)])

    def told_tokens(self, tokens: Sequence[TokenOutput]) -> Sequence[TokenOutput]:
        return () if self.order.is_prompt_only else tokens

    def finish_reason(self, piece: ChoicePiece) -> str | None:
        if piece.completion is None:
            return None
        return "length" if self.order.is_prompt_only else str(piece.completion.finish.reason)

    def of_prompt(self, choice: int) -> dict[str, Any]:
        """Further fields of a choice about its prompt."""
        told: dict[str, Any] = {}
        prompt = self.prompt_of(choice)
        if self.fields.prompt_logprobs is not None:
            scored = self.answer.prompt_tokens[prompt]
            told["prompt_logprobs"] = prompt_logprobs(scored, self.names, self.fields.prompt_logprobs)
        if self.fields.return_token_ids:
            told["prompt_token_ids"] = self.answer.requests[prompt].prompt_token_ids
        return told


class CompletionChunks:
    """The chunks of one call. First one per choice with what is told of the prompt, where something is."""

    def __init__(
        self, answer: Answer, head: ReplyHead, order: CompletionOrder, names: TokenNames, echoes: Sequence[str] | None
    ) -> None:
        self._choices = _Choices(answer, head, order, names, echoes)
        self._fields = order.fields
        self._head_text = encode(head.told("text_completion"))[:-1]
        self._tail = "}]" + (',"usage":null}' if order.fields.includes_usage else "}")

    def begin(self) -> str:
        """To be asked once the answer gave its first pieces."""
        choices, texts = self._choices, []
        for choice in range(choices.num_choices):
            text, logprobs, extra = choices.echo(choice), choices.echoed_logprobs(choice), choices.of_prompt(choice)
            if text or extra:
                more = "".join(f",{encode(name)}:{encode(value)}" for name, value in extra.items())
                texts.append(self._chunk(choice, text, encode(logprobs), "null", more))
        return "".join(texts)

    def of(self, pieces: Sequence[ChoicePiece]) -> str:
        """What tells of these pieces."""
        return "".join(self._piece(piece) for piece in pieces)

    def end(self) -> str:
        """What follows the last piece."""
        if not self._fields.includes_usage:
            return ""
        usage, account = encode(self._choices.usage.told()), encode(self._choices.usage.account())
        return event(f'{self._head_text},"choices":[],"usage":{usage},"tandem":{account}}}')

    def _piece(self, piece: ChoicePiece) -> str:
        choices = self._choices
        choices.usage.add(piece.choice, len(piece.tokens), piece.completion)
        tokens = choices.told_tokens(piece.tokens)
        text = "" if choices.order.is_prompt_only else piece.text
        logprobs, more = "null", ""
        if tokens and choices.logprobs is not None:
            logprobs = encode(choices.logprobs[piece.choice].of(tokens))
        if tokens and self._fields.return_token_ids:
            more = f',"token_ids":{encode([token.token_id for token in tokens])}'
        if not text and logprobs == "null" and not more and piece.completion is None:
            return ""  # tokens that are no text yet
        return self._chunk(piece.choice, text, logprobs, encode(choices.finish_reason(piece)), more)

    def _chunk(self, choice: int, text: str, logprobs: str, finish: str, more: str = "") -> str:
        tail = self._tail
        if self._fields.has_continuous_usage:
            tail = f'}}],"usage":{encode(self._choices.usage.told())}}}'
        elif finish != "null" and self._choices.usage.is_complete and not self._fields.includes_usage:
            tail = f'}}],"tandem":{encode(self._choices.usage.account())}}}'
        return (
            f'data: {self._head_text},"choices":[{{"index":{choice},"text":{encode(text)},'
            f'"logprobs":{logprobs},"finish_reason":{finish}{more}{tail}\n\n'
        )


class CompletionWhole:
    """All of a call in one object."""

    def __init__(
        self, answer: Answer, head: ReplyHead, order: CompletionOrder, names: TokenNames, echoes: Sequence[str] | None
    ) -> None:
        self._choices = _Choices(answer, head, order, names, echoes)
        self._texts: list[list[str]] = [[] for _ in range(self._choices.num_choices)]
        self._tokens: list[list[TokenOutput]] = [[] for _ in range(self._choices.num_choices)]
        self._finishes: list[str | None] = [None] * self._choices.num_choices

    def add(self, pieces: Sequence[ChoicePiece]) -> None:
        choices = self._choices
        for piece in pieces:
            choices.usage.add(piece.choice, len(piece.tokens), piece.completion)
            self._tokens[piece.choice] += choices.told_tokens(piece.tokens)
            if not choices.order.is_prompt_only:
                self._texts[piece.choice].append(piece.text)
            self._finishes[piece.choice] = choices.finish_reason(piece)

    def told(self) -> dict[str, Any]:
        return {
            **self._choices.head.told("text_completion"),
            "choices": [self._choice(index) for index in range(self._choices.num_choices)],
            "usage": self._choices.usage.told(),
            "tandem": self._choices.usage.account(),
        }

    def _choice(self, index: int) -> dict[str, Any]:
        choices, tokens = self._choices, self._tokens[index]
        told = {
            "index": index,
            "text": choices.echo(index) + "".join(self._texts[index]),
            "logprobs": self._logprobs(index),
            "finish_reason": self._finishes[index],
            **choices.of_prompt(index),
        }
        if choices.fields.return_token_ids:
            told["token_ids"] = [token.token_id for token in tokens]
        return told

    def _logprobs(self, index: int) -> dict[str, Any] | None:
        choices = self._choices
        if choices.logprobs is None:
            return None
        echoed = choices.echoed_logprobs(index)
        own = choices.logprobs[index].of(self._tokens[index])
        return {name: echoed[name] + own[name] for name in own} if echoed is not None else own
