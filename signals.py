"""SIGINT and SIGTERM: the first asks a run to stop in good order, the second stops it at once."""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
STOPPING = (
    "\nstopping: the update in hand is finished and a checkpoint written; a second signal stops at "
    "once."
)


@contextlib.contextmanager
def stop_requests(quiet: bool = False) -> Iterator[threading.Event]:
    """Yield an event that is set by the first signal; the second ends the process there and then.

    A thread of its own listens, because a handler in Python waits until the main thread is back
    from whatever it is computing, or from a collective that another rank will never join. Outside
    the main thread no handler can be set, and the event stays as it is.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    listening, signalling = socket.socketpair()
    signalling.setblocking(False)
    thread = threading.Thread(target=_listen, args=(listening, asked, quiet), daemon=True)
    thread.start()
    # With a handler the system's own way with a signal, death, is off; the number goes through the
    # socket, written by the part of Python that does not wait.
    handlers = {number: signal.signal(number, _ignore) for number in STOP_SIGNALS}
    descriptor = signal.set_wakeup_fd(signalling.fileno(), warn_on_full_buffer=False)
    try:
        yield asked
    finally:
        signal.set_wakeup_fd(descriptor)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signalling.close()
        thread.join()
        listening.close()


def _ignore(number: int, frame: object) -> None:
    pass


def _listen(listening: socket.socket, asked: threading.Event, quiet: bool) -> None:
    # Other signals' numbers come through the same socket, and nothing at all when it is closed.
    while received := listening.recv(1):
        if received[0] not in STOP_SIGNALS:
            continue
        if asked.is_set():
            os._exit(128 + received[0])
        asked.set()
        if not quiet:
            print(STOPPING, flush=True)
