"""SIGINT and SIGTERM: the first asks a run to stop in good order, the second stops it at once."""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# A batch system signals all processes of a job, torchrun among them, which passes it on to its own:
# to those, what comes so soon after the first is the same request once more.
ECHO_SECONDS = 5.0
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
    Under torchrun, what comes within ECHO_SECONDS of the first counts as the same.
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
    echo = ECHO_SECONDS if "TORCHELASTIC_RUN_ID" in os.environ else 0.0
    first = 0.0
    # Other signals' numbers come through the same socket, and nothing at all when it is closed.
    while received := listening.recv(1):
        if received[0] not in STOP_SIGNALS:
            continue
        if asked.is_set():
            if time.monotonic() - first < echo:
                continue
            os._exit(128 + received[0])
        first = time.monotonic()
        asked.set()
        if not quiet:
            print(STOPPING, flush=True)
