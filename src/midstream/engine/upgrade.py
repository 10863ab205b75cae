"""Compiled kernels take torch's place while requests run."""

from __future__ import annotations

import atexit
import logging
import threading
import weakref
from concurrent.futures import Future
from contextlib import suppress

from midstream.engine.loop import EngineLoop
from midstream.errors import EngineStopped
from midstream.models.kernels import Kernels
from midstream.models.load import LoadedModel
from midstream.models.upgrade import changes

log = logging.getLogger(__name__)


class KernelUpgrade:
    """Waits for a model's pending kernels, if it has some, and changes it between the steps of the engine's thread.

    The thread that prepares the changes ends with them, so that it leaves no team of OpenMP's (see apart). `close`
    waits for it: Python would end with it in the middle of a library's work otherwise, which libraries in C++ answer
    with an abort.
    """

    def __init__(self, loaded: LoadedModel, loop: EngineLoop) -> None:
        self._loaded = loaded
        self._loop = loop
        self._lock = threading.Lock()
        self._closed = False
        self._thread: threading.Thread | None = None
        if loaded.pending is not None:
            atexit.register(self.close)
            # What is pending outlives engines, which it must not keep.
            reference = weakref.WeakMethod(self._begin)

            def done(kernels: Future[Kernels]) -> None:
                begin = reference()
                if begin is not None:
                    begin(kernels)

            loaded.pending.kernels.add_done_callback(done)

    def close(self) -> None:
        """Begin no further change, and wait for the one that is being prepared. May be called again."""
        atexit.unregister(self.close)
        with self._lock:
            self._closed = True
        if self._thread is not None:
            self._thread.join()

    def _begin(self, kernels: Future[Kernels]) -> None:
        with self._lock, suppress(RuntimeError):  # Python is ending and starts no threads any more
            if not self._closed:
                thread = threading.Thread(target=self._run, args=(kernels,), name="midstream-upgrade")
                thread.start()
                self._thread = thread

    def _run(self, kernels: Future[Kernels]) -> None:
        try:
            for change in changes(self._loaded, kernels.result()):
                if self._closed:
                    return  # another engine of this model may go on
                self._loop.call(change).result()
        except EngineStopped:
            return
        except Exception:
            log.exception("the compiled kernels cannot be used; what runs on torch's goes on so")
