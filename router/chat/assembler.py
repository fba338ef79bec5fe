"""One answer's text to its message: content and tool calls, as soon as they are certain. Pure."""

from collections.abc import Callable
from typing import Literal

from core.request import Finish, FinishReason
from router.chat.events import ChatDelta, ContentDelta
from router.chat.plan import ChatPlan
from router.chat.reader import Parsing, Reader
from router.chat.telling import Telling

ChatFinish = Literal["stop", "length", "tool_calls"]


class ChatAssembler:
    """Feed it an answer's text as it becomes certain; however it was cut, the deltas add up to the same message.

    What turns out to be no call is content, as it was written. A call that was cut off is told as far as it came.

    Args:
        new_id: makes the random part of a call's id: at least 24 letters and digits.
    """

    def __init__(self, plan: ChatPlan, new_id: Callable[[], str]) -> None:
        self._reader = Reader()
        self._telling: Telling | None = None
        self._parsing: Parsing[None] | None = None
        if plan.tools is not None:
            tool_format = plan.tools.tool_format
            self._telling = Telling(
                lambda index, name: tool_format.new_id(new_id(), index, name),
                plan.tools.max_calls,
                is_forced=plan.tools.is_forced,
            )
            self._parsing = tool_format.parse(self._reader, self._telling, plan.tools.offer)

    def push(self, text: str, is_last: bool = False) -> list[ChatDelta]:
        """Add text (`is_last`: the answer is over; call no more); return what became certain, in order."""
        if self._telling is None or self._parsing is None:
            return [ContentDelta(text)] if text else []
        if text or is_last:
            self._reader.feed(text, is_last)
            is_over = next(self._parsing, "over") is not None
            assert is_over == is_last, "a parser ends with the text"
        return self._telling.take()

    def finish_reason(self, finish: Finish) -> ChatFinish:
        """Say why the answer ended, once its last text was pushed."""
        if finish.reason is FinishReason.LENGTH:
            return "length"
        has_calls = self._telling is not None and self._telling.has_calls and self._telling.is_whole
        return "tool_calls" if has_calls else "stop"
