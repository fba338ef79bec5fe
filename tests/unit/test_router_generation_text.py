"""The gateway's text of a generation and the engine's search for its end see the same, however tokens were batched."""

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from core.ids import RequestId
from core.request import Finish, FinishReason, GenerateRequest, SamplingParams, TokenOutput
from core.vocabulary import Vocabulary
from engine.stops import StopChecker, TextStops
from router.generation.text import GenerationText
from tests.model_matrix import TINY_PATH

VOCABULARY = Vocabulary.load(TINY_PATH / "tokenizer.json")
PROMPT = tuple(VOCABULARY.encode("Say é", with_markers=True))
USER, ASSISTANT = (VOCABULARY.special_tokens[name] for name in ("<|user|>", "<|assistant|>"))
SPOKEN = {USER: "<|user|>"}

parts = st.lists(
    st.text(alphabet="ab é漢🙂\n", max_size=6).map(lambda text: VOCABULARY.encode(text, with_markers=False))
    | st.sampled_from([[USER], [ASSISTANT]]),
    max_size=8,
)
stops = st.lists(st.text(alphabet="ab é漢🙂\n", min_size=1, max_size=3), max_size=3).map(tuple)


def engine_end(ids: Sequence[int], params: SamplingParams) -> tuple[int, Finish]:
    """Return after how many tokens the engine ends, and why."""
    text = TextStops(VOCABULARY.detokenizer, PROMPT) if params.stop else None
    checker = StopChecker(params, max_new_tokens=len(ids), end_token_ids=(), text=text)
    for number, one in enumerate(ids, start=1):
        if (finish := checker.push(one)) is not None:
            return number, finish
    raise AssertionError("max_tokens ends it")


def gateway_text(
    ids: Sequence[int], sizes: Sequence[int], params: SamplingParams, finish: Finish, spoken: dict[int, str]
) -> str:
    text = GenerationText(VOCABULARY.detokenizer, GenerateRequest(RequestId("r"), PROMPT, params), spoken)
    tokens = [TokenOutput(index, one) for index, one in enumerate(ids)]
    shown, at = "", 0
    for size in sizes:
        if at + size < len(tokens):
            shown += text.push(tokens[at : at + size], None)
            at += size
    return shown + text.push(tokens[at:], finish)


@settings(max_examples=300, deadline=None)
@given(parts, stops, st.lists(st.integers(0, 4), max_size=20))
def test_stop_strings_end_the_text_where_the_engine_ended(
    given_parts: list[list[int]], stop: tuple[str, ...], sizes: list[int]
) -> None:
    ids = [one for part in given_parts for one in part]
    if not ids:
        return
    params = SamplingParams(stop=stop)
    number, finish = engine_end(ids, params)
    whole = VOCABULARY.decode(ids[:number])
    shown = gateway_text(ids[:number], sizes, params, finish, {})
    if finish.reason is FinishReason.LENGTH:
        assert shown == whole
        assert not any(one in whole for one in stop)
    else:
        assert isinstance(finish.matched_stop, str)
        assert shown == whole[: whole.index(finish.matched_stop)]
        assert not any(one in shown for one in stop)
    spoken = gateway_text(ids[:number], sizes, params, finish, SPOKEN)
    assert spoken.replace("<|user|>", "") == shown, "special tokens come beside the text, they do not change it"


@settings(deadline=None)
@given(parts, st.lists(st.integers(0, 4), max_size=20))
def test_special_tokens_are_spoken_at_their_place(given_parts: list[list[int]], sizes: list[int]) -> None:
    ids = [one for part in given_parts for one in part]
    expected = "".join("<|user|>" if part == [USER] else VOCABULARY.decode(part) for part in given_parts)
    finish = Finish(FinishReason.LENGTH)
    assert gateway_text(ids, sizes, SamplingParams(), finish, SPOKEN) == expected
    stop = ("never there",)
    assert gateway_text(ids, sizes, SamplingParams(stop=stop), finish, SPOKEN) == expected


def test_what_comes_after_a_stop_string_is_not_spoken() -> None:
    ids = [USER, *VOCABULARY.encode("ab stop", with_markers=False), USER]
    params = SamplingParams(stop=("stop",))
    assert gateway_text(ids, [1, 1], params, Finish(FinishReason.STOP, "stop"), SPOKEN) == "<|user|>ab "
