"""Keeps the lease of a run while its worker lives, in a thread: a step can keep the event loop busy for minutes."""

from __future__ import annotations

import logging
import threading
from types import TracebackType
from typing import Self

from tether.errors import AbortedError, TetherError
from tether_services.orchestrator.lease import Lease, boot_clock_ns
from tether_services.orchestrator.ledger import Ledger
from tether_services.runtime.logging import log_event

__all__ = ["Heartbeat"]

log = logging.getLogger(__name__)

_RENEWALS = 4
"""Times a lease is renewed before it would expire."""


class Heartbeat:
    """Renews a lease until the block ends, and says whether it is still held. A context manager."""

    def __init__(self, ledger: Ledger, lease: Lease, *, seconds: float) -> None:
        """Prepare.

        Args:
            ledger: Where the lease was taken.
            lease: The lease.
            seconds: How long each renewal makes it last.
        """
        self._ledger = ledger
        self._lease = lease
        self._seconds = seconds
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
        while not self._over.wait(self._seconds / _RENEWALS):
            try:
                self._renew()
            except AbortedError as error:
                self._lost = error
                log_event(log, "lease lost", level=logging.ERROR, run_id=self._lease.run_id, error=error.message)
                return
            except TetherError as error:  # tried again; `check` raises it if the lease runs out
                log_event(log, "lease not renewed", level=logging.WARNING, run_id=self._lease.run_id, error=str(error))

    def _renew(self) -> None:
        with self._renewing:
            self._lease = self._ledger.renew_lease(self._lease, seconds=self._seconds)
