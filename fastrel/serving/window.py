"""The batching window: requests that come while others are worked on wait for each other, for some milliseconds at most."""

from __future__ import annotations

import asyncio


class Window:
    """Lets those who wait go on together: `seconds` after the first of them came, or when `size` of them are there."""

    def __init__(self, seconds: float, size: int) -> None:
        self._seconds, self._size = seconds, size
        self._waiting: list[asyncio.Future[None]] = []
        self._timer: asyncio.TimerHandle | None = None

    async def wait(self) -> None:
        """Until the window closes."""
        loop = asyncio.get_running_loop()
        self._waiting.append(loop.create_future())
        own = self._waiting[-1]
        if len(self._waiting) >= self._size:
            self._close()
        elif self._timer is None:
            self._timer = loop.call_later(self._seconds, self._close)
        await own

    def _close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        waiting, self._waiting, self._timer = self._waiting, [], None
        for one in waiting:
            if not one.done():  # its client may have hung up
                one.set_result(None)
