"""What a parser found, as deltas: numbers the calls, names them, joins what comes in one piece. Pure."""

from collections.abc import Callable

from router.chat.events import ChatDelta, ContentDelta, ToolCallDelta


class Telling:
    """Collects what is certain.

    White space around calls belongs to them: it is held back until it is known what follows.

    Args:
        new_id: (index among the calls, name) -> the id of a call.
        max_calls: calls beyond are left out; None: no bound.
        is_forced: there is nothing but calls; what is not is one that was cut off before it had a name.
    """

    def __init__(self, new_id: Callable[[int, str], str], max_calls: int | None, *, is_forced: bool) -> None:
        self._new_id = new_id
        self._max_calls = max_calls
        self._is_forced = is_forced
        self._deltas: list[ChatDelta] = []
        self._space = ""
        self._ids: set[str] = set()
        self._index = -1
        self._is_open = False
        self.has_calls = False
        self.is_whole = True  # no call is half written

    def content(self, text: str) -> None:
        text = self._space + text
        shown = text.rstrip()
        self._space = text[len(shown) :]
        self._add_content(shown)

    def leftover(self, text: str, is_cut: bool) -> None:
        """What is no part of a call is content. But where the text was cut, what follows a call is the beginning of
        another one."""
        if not (is_cut and self.has_calls):
            self.content(text)

    def cut_mark(self, text: str) -> None:
        """The text ended with this beginning of a mark."""
        self.leftover(text, is_cut=True)

    def call(self, name: str, call_id: str = "") -> None:
        """A call begins; `call_id`: as the model gave it, and not used if it gave it before."""
        self._space = ""
        self._index += 1
        self._is_open = self._max_calls is None or self._index < self._max_calls
        if self._is_open:
            self.has_calls, self.is_whole = True, False
            if not call_id or call_id in self._ids:
                call_id = self._new_id(self._index, name)
            while call_id in self._ids:
                call_id += "0"
            self._ids.add(call_id)
            self._deltas.append(ToolCallDelta(self._index, call_id, name, ""))

    def arguments(self, text: str) -> None:
        """The next piece of the JSON text of the call's arguments."""
        if not self._is_open or not text:
            return
        last = self._deltas[-1] if self._deltas else None
        if isinstance(last, ToolCallDelta) and last.index == self._index:
            joined = last.arguments + text
            self._deltas[-1] = ToolCallDelta(last.index, last.id, last.name, joined)
        else:
            self._deltas.append(ToolCallDelta(self._index, "", "", text))

    def end_call(self) -> None:
        """The call's arguments are whole."""
        self._is_open, self.is_whole = False, True

    def end(self) -> None:
        """The text is over."""
        if not self.has_calls:
            self._add_content(self._space)
        self._space = ""

    def take(self) -> list[ChatDelta]:
        """Return what was told since the last time."""
        deltas, self._deltas = self._deltas, []
        return deltas

    def _add_content(self, text: str) -> None:
        if not text or self._is_forced:
            return
        last = self._deltas[-1] if self._deltas else None
        if isinstance(last, ContentDelta):
            self._deltas[-1] = ContentDelta(last.text + text)
        else:
            self._deltas.append(ContentDelta(text))
