"""Two engine loops and copying threads between them, all at once, with aborts: every token right, every block back."""

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest

from core.ids import RequestId
from core.request import GenerateRequest, SamplingParams
from engine.engine import Engine
from engine.handoff import NoSuchHandoff
from engine.loop import EngineLoop, Failure, StepResult
from tests.fake_model import fake_engine, reference_tokens

DEADLINE_S = 30.0
Part = tuple[range, range] | None


@dataclass
class Stream:
    """One request's way: parts for its copier, tokens of both engines."""

    request: GenerateRequest
    parts: "queue.SimpleQueue[Part]" = field(default_factory=queue.SimpleQueue)
    tokens: list[int] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def on_kv_ready(self, request_id: RequestId, layers: range, tokens: range) -> None:
        self.parts.put((layers, tokens))


class Pair:
    """A prefill and a decode engine, each under its loop."""

    def __init__(self) -> None:
        self.streams: dict[str, Stream] = {}
        self.failures: list[Failure] = []
        self.engines = [
            fake_engine(num_blocks=60, block_size=4, max_batch_tokens=9, max_num_requests=16),
            fake_engine(num_blocks=600, block_size=3, max_batch_tokens=32, max_num_requests=60),
        ]
        self.source, self.target = (
            EngineLoop(engine, self.on_step, self.failures.append, name=name)
            for engine, name in zip(self.engines, ("prefill", "decode"), strict=True)
        )

    def on_step(self, result: StepResult) -> None:
        for output in result.outputs:
            stream = self.streams[output.request_id]
            stream.tokens.extend(token.token_id for token in output.tokens)
            if output.finish is not None:
                stream.ended.set()
            if len(stream.tokens) == 1:
                stream.parts.put(None)

    def hand_over(self, stream: Stream, *, abort_after: int | None) -> None:
        """Runs on a copier's thread; ends with the request or its abort."""
        request = stream.request
        request_id = request.request_id

        def begin(engine: Engine) -> int:
            return engine.add_prefill(request, stream)

        held = self.target.call(lambda engine: engine.reserve(request)).result(DEADLINE_S).held_tokens
        self.source.call(begin).result(DEADLINE_S)
        count = 0
        while (part := stream.parts.get(timeout=DEADLINE_S)) is not None:
            layers, tokens = part[0], range(max(part[1].start, held), part[1].stop)
            aborts = []
            if count == abort_after:
                aborts = [loop.call(lambda engine: engine.abort(request_id)) for loop in (self.target, self.source)]
            count += 1
            try:
                if tokens:
                    self.engines[1].write_kv(
                        request_id, layers, tokens, self.engines[0].read_kv(request_id, layers, tokens)
                    )
            except NoSuchHandoff:
                assert aborts or request.sampling.max_tokens == 1
            if aborts:
                for abort in aborts:
                    abort.result(DEADLINE_S)
                stream.ended.set()
                return
        if request.sampling.max_tokens == 1:
            stream.ended.set()
            self.target.call(lambda engine: engine.abort(request_id)).result(DEADLINE_S)
            return
        self.target.call(lambda engine: engine.activate(request_id, stream.tokens[:1])).result(DEADLINE_S)
        self.source.call(lambda engine: engine.release(request_id)).result(DEADLINE_S)


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    for loop in (pair.source, pair.target):
        loop.start()
    yield pair
    for loop in (pair.source, pair.target):
        assert loop.stop(DEADLINE_S)
    assert not pair.failures
    for engine in pair.engines:
        engine.check()
        load = engine.load_report()
        assert load.free_blocks == load.total_blocks


def test_hand_offs_and_aborts_from_many_threads(pair: Pair) -> None:
    for at in range(60):
        prompt = tuple((at % 5 + position) % 90 for position in range(5 + at % 23))
        params = SamplingParams(seed=at, max_tokens=(1, 6, 18)[at % 3], ignore_eos=True, frequency_penalty=0.3)
        stream = Stream(GenerateRequest(RequestId(f"r{at}"), prompt, params))
        pair.streams[stream.request.request_id] = stream
    with ThreadPoolExecutor(4) as copiers:
        done = [
            copiers.submit(pair.hand_over, stream, abort_after=at % 4 if at % 6 == 5 else None)
            for at, stream in enumerate(pair.streams.values())
        ]
        for future in done:
            future.result(DEADLINE_S)
    for at, stream in enumerate(pair.streams.values()):
        assert stream.ended.wait(DEADLINE_S)
        right = reference_tokens(stream.request)
        if at % 6 == 5:
            assert stream.tokens == right[: len(stream.tokens)]
        else:
            assert stream.tokens == right
