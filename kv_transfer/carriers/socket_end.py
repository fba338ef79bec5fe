"""What both ends of every link over a socket have in common: how it ends."""

import socket
import threading

from kv_transfer.carriers.link_door import shut
from kv_transfer.link import LinkError


class SocketEnd:
    """One end of a connection. `abort` from any thread, the rest for the owner's."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._is_aborted = False

    def abort(self) -> None:
        with self._lock:
            if not self._is_aborted:
                self._is_aborted = True
                shut(self._connection)

    def close(self) -> None:
        self.abort()
        self._connection.close()

    def _broken(self, detail: str) -> LinkError:
        """End the link; return what to raise: the detail, unless it was ended here before."""
        is_own = self._is_aborted
        self.abort()
        return LinkError("the link was aborted" if is_own else detail)
