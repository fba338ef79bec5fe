"""What a compiling process may cost is bounded by the system, whatever it does."""

import os
import resource

import pytest

from grammar.server import _restrict


@pytest.mark.parametrize(("num_bytes", "is_refused"), [(2**22, False), (2**27, True)])
def test_memory_beyond_the_bound_is_refused(num_bytes: int, is_refused: bool) -> None:
    pid = os.fork()
    if pid == 0:
        status = 2
        try:
            _restrict(2**25)
            try:
                bytearray(num_bytes)
                status = 0
            except MemoryError:
                status = 1
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == int(is_refused)
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY, "only of the process itself"
