"""One answer's text to its message: content and tool calls, as soon as they are certain. Pure."""

from collections.abc import Callable
from typing import Literal

from core.request import Finish, FinishReason
from router.chat.events import ChatDelta, ContentDelta
from router.chat.plan import ChatPlan

ChatFinish = Literal["stop", "length", "tool_calls"]


class ChatAssembler:
    """Feed it an answer's text as it becomes certain; however it was cut, the deltas add up to the same message.

    What turns out to be no call is content, as it was written. A call that was cut off is told as far as it came.

    Args:
        new_id: makes the random part of a call's id: at least 24 letters and digits.
    """

    def __init__(self, plan: ChatPlan, new_id: Callable[[], str]) -> None:
        self._plan = plan
        self._new_id = new_id

    def push(self, text: str, is_last: bool = False) -> list[ChatDelta]:
        """Add text (`is_last`: the answer is over; call no more); return what became certain, in order."""
        return [ContentDelta(text)] if text else []

    def finish_reason(self, finish: Finish) -> ChatFinish:
        """Say why the answer ended, once its last text was pushed."""
        if finish.reason is FinishReason.LENGTH:
            return "length"
        return "stop"
