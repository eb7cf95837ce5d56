"""Keeps the lease of a run while its worker gets on, in a thread: a step can keep the event loop busy for minutes."""

from __future__ import annotations

import faulthandler
import logging
import threading
from types import TracebackType
from typing import Self

from tether.errors import AbortedError, TetherError
from tether_services.orchestrator.config import OrchestratorSettings
from tether_services.orchestrator.lease import Lease, boot_clock_ns
from tether_services.orchestrator.ledger import Ledger
from tether_services.orchestrator.progress import read_signs
from tether_services.runtime.logging import log_event

__all__ = ["Heartbeat"]

log = logging.getLogger(__name__)

_RENEWALS = 4
"""Times a lease is renewed before it would expire."""


class Heartbeat:
    """Renews a lease until the block ends, and says whether it is still held. A context manager.

    It is not renewed while this process gives no sign of getting on, see `progress`, for `hang_seconds`; nor, once
    CancelRun was called, while it gets nothing done for `cancel_seconds`. The supervisor then ends the process.
    """

    def __init__(self, ledger: Ledger, lease: Lease, settings: OrchestratorSettings) -> None:
        """Prepare.

        Args:
            ledger: Where the lease was taken.
            lease: The lease.
            settings: How long each renewal makes it last, and how long this process may be silent.
        """
        self._ledger = ledger
        self._lease = lease
        self._settings = settings
        self._seconds = settings.lease_seconds
        self._interval = self._seconds / _RENEWALS
        self._signs = read_signs()
        self._silent_seconds = self._idle_seconds = 0.0
        self._stuck = False
        self._lost: AbortedError | None = None
        self._renewing = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def check(self) -> None:
        """Return if this process is still the one writer; to be called before everything that others can see.

        A lease that ran out while the process was stopped is renewed first: nobody may have taken it.

        Raises:
            AbortedError: LEASE_LOST.
            TetherError: It ran out and the ledger cannot be written.
        """
        if self._lost is not None:
            raise self._lost
        if boot_clock_ns() >= self._lease.expires_ns:
            self._renew()

    def _beat(self) -> None:
        while not self._over.wait(self._interval):
            try:
                self._look()
                if not self._stuck:
                    self._renew()
            except AbortedError as error:
                self._lost = error
                log_event(log, "lease lost", level=logging.ERROR, run_id=self._lease.run_id, error=error.message)
                return
            except TetherError as error:  # tried again; `check` raises it if the lease runs out
                log_event(log, "lease not renewed", level=logging.WARNING, run_id=self._lease.run_id, error=str(error))

    def _look(self) -> None:
        """Find out whether this process is stuck.

        Time is counted in beats, so that one in which the whole process or machine stood still is short.
        """
        signs, cancelled = read_signs(), self._ledger.get_run(self._lease.run_id).cancel_requested
        is_silent, is_idle = signs == self._signs, signs.work == self._signs.work and cancelled
        self._silent_seconds = self._silent_seconds + self._interval if is_silent else 0.0
        self._idle_seconds = self._idle_seconds + self._interval if is_idle else 0.0
        self._signs = signs
        hangs = 0 < self._settings.hang_seconds < self._silent_seconds
        stuck = hangs or self._idle_seconds > self._settings.cancel_seconds
        if stuck and not self._stuck:
            idle = max(self._silent_seconds, self._idle_seconds)
            log_event(log, "worker is stuck", level=logging.ERROR, run_id=self._lease.run_id, seconds=idle)
            faulthandler.dump_traceback()
        self._stuck = stuck

    def _renew(self) -> None:
        with self._renewing:
            self._lease = self._ledger.renew_lease(self._lease, seconds=self._seconds)
