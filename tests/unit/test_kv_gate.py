"""Gates: after `close` calls back, nobody is inside and nobody gets in."""

import threading

from kv_transfer.gate import Gate


def test_a_closed_gate_admits_nobody() -> None:
    gate, told = Gate(), list[str]()
    assert gate.enter()
    gate.leave()
    gate.close(lambda: told.append("empty"))
    assert told == ["empty"]
    assert not gate.enter()


def test_closing_waits_for_the_last_one_inside() -> None:
    gate, told = Gate(), list[str]()
    assert gate.enter()
    assert gate.enter()
    gate.close(lambda: told.append("first"))
    gate.leave()
    gate.close(lambda: told.append("second"))
    assert told == []
    gate.leave()
    assert told == ["first", "second"]


def test_threads_never_overlap_a_closed_gate() -> None:
    gate, start = Gate(), threading.Barrier(5)
    inside, violations, is_empty = [0], list[str](), threading.Event()

    def access() -> None:
        start.wait(5)
        while gate.enter():
            inside[0] += 1
            if is_empty.is_set():
                violations.append("inside after empty")
            inside[0] -= 1
            gate.leave()

    threads = [threading.Thread(target=access) for _ in range(4)]
    for thread in threads:
        thread.start()
    start.wait(5)
    gate.close(is_empty.set)
    assert is_empty.wait(5)
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()
    assert violations == []
