"""Compiled kernels take torch's place while requests run."""

from __future__ import annotations

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

    The thread that prepares the changes ends with them, so that it leaves no team of OpenMP's (see apart).
    """

    def __init__(self, loaded: LoadedModel, loop: EngineLoop) -> None:
        self._loaded = loaded
        self._loop = loop
        if loaded.pending is not None:
            # What is pending outlives engines, which it must not keep.
            reference = weakref.WeakMethod(self._begin)

            def done(kernels: Future[Kernels]) -> None:
                begin = reference()
                if begin is not None:
                    begin(kernels)

            loaded.pending.kernels.add_done_callback(done)

    def _begin(self, kernels: Future[Kernels]) -> None:
        with suppress(RuntimeError):  # Python is ending and starts no threads any more
            threading.Thread(target=self._run, args=(kernels,), name="midstream-upgrade").start()

    def _run(self, kernels: Future[Kernels]) -> None:
        try:
            for change in changes(self._loaded, kernels.result()):
                self._loop.call(change).result()
        except EngineStopped:
            return  # another engine of this model may go on
        except Exception:
            log.exception("the compiled kernels cannot be used; what runs on torch's goes on so")
