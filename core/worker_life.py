"""The life of one worker incarnation, as the shared store is told of it and as its owner waits for its end.

STARTING (the process is up), LOADING (with what and how far), READY, DRAINING, STOPPED. Two things end it from outside:
a failure that the worker cannot outlive, and a newer incarnation, which fences this one.
"""

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Mapping

from core.clock import Clock
from core.errors import InvalidTransition, ServingError, WorkerLost
from core.ids import Epoch
from core.kv_events import KvEventBatch
from core.layout import KvLayout
from core.membership import Role, WorkerIdentity, WorkerRecord, WorkerState
from core.registration import Registration, RegistrationConfig
from core.store import Store
from core.version import engine_version

_log = logging.getLogger(__name__)

EDGES: Mapping[WorkerState, frozenset[WorkerState]] = {
    WorkerState.STARTING: frozenset({WorkerState.LOADING, WorkerState.STOPPED}),
    WorkerState.LOADING: frozenset({WorkerState.READY, WorkerState.STOPPED}),  # loaded and listening
    WorkerState.READY: frozenset({WorkerState.DRAINING, WorkerState.STOPPED}),
    WorkerState.DRAINING: frozenset({WorkerState.DRAINING, WorkerState.STOPPED}),
    WorkerState.STOPPED: frozenset({WorkerState.STOPPED}),
}


class WorkerLife:
    """State of one worker and its registration.

    Args:
        on_failed: called once on the event loop when the worker may not go on: give everything up, accept nothing.

    Concurrency: the event loop's thread only.
    """

    def __init__(
        self,
        store: Store,
        identity: WorkerIdentity,
        role: Role,
        config: RegistrationConfig,
        clock: Clock,
        *,
        model: str,
        encode: Callable[[KvEventBatch], bytes],
        on_failed: Callable[[ServingError], None],
    ) -> None:
        record = WorkerRecord(
            worker_id=identity.worker_id,
            role=role,
            epoch=identity.epoch,
            state=WorkerState.STARTING,
            host=socket.gethostname(),
            pid=os.getpid(),
            model=model,
        )
        self.registration = Registration(
            store,
            identity.cluster,
            record,
            config,
            clock,
            encode=encode,
            on_fenced=self._on_fenced,
            on_failed=self.fail,
        )
        self._identity = identity
        self._state = WorkerState.STARTING
        self._on_failed = on_failed
        self._failure: ServingError | None = None
        self._ended = asyncio.Event()

    @property
    def state(self) -> WorkerState:
        return self._state

    @property
    def failure(self) -> ServingError | None:
        """Why the worker may not go on; None while it may."""
        return self._failure

    def move(self, state: WorkerState, detail: str = "", /, **facts: str | int) -> None:
        """Enter `state` and tell the store, with other fields of the record.

        Raises:
            InvalidTransition: there is no edge; nothing changed.
        """
        if state not in EDGES[self._state]:
            raise InvalidTransition("worker life", self._state, state)
        self._state = state
        self.registration.update(state=state, detail=detail, **facts)
        _log.info("%s epoch %d: %s %s", self._identity.worker_id, self._identity.epoch, state, detail)

    def describe(self, detail: str) -> None:
        """Say what is going on, in one line for people."""
        self.registration.update(detail=detail)

    def fail(self, error: ServingError) -> None:
        """End this life with an error. Only the first one counts."""
        if self._failure is not None or self._ended.is_set():
            return
        _log.error("%s fails: %s", self._identity.worker_id, error)
        self._failure = error
        self._state = WorkerState.STOPPED
        self._on_failed(error)
        self._ended.set()

    def end(self) -> None:
        """End this life well."""
        self._ended.set()

    async def until_end(self) -> None:
        """Return after `end`.

        Raises:
            ServingError: the failure that ended it instead.
        """
        await self._ended.wait()
        if self._failure is not None:
            raise self._failure

    def _on_fenced(self, newer: Epoch) -> None:
        self.fail(WorkerLost(f"epoch {self._identity.epoch} of {self._identity.worker_id} was fenced by {newer}"))


def layout_facts(layout: KvLayout, max_model_len: int) -> dict[str, str | int]:
    """Return the fields of a worker record that tell of its model, and of what computes it."""
    return {
        "layout_fingerprint": layout.fingerprint,
        "weights_version": layout.weights_version,
        "engine_version": engine_version(),
        "dtype": layout.dtype,
        "kv_bytes_per_token": layout.bytes_per_token,
        "block_size": layout.block_size,
        "max_model_len": max_model_len,
    }
