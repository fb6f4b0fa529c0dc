"""A connection to our own server, which nobody can hold by being slow: uvicorn's, with the two time limits it lacks."""

import asyncio
from typing import ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 10  # that the headers of a request may take to arrive; idle connections have uvicorn's 5 s
ANSWER_SECONDS = 10  # in which a client takes at least ANSWER_BYTES of an answer that waits for it
ANSWER_BYTES = 100_000


class Connection(H11Protocol):
    """Closed where headers do not arrive in time, or where an answer is not taken.

    `unsent` bytes of answers wait for clients, on all connections together.
    """

    unsent: ClassVar[int] = 0
    own_unsent = 0
    arrival: asyncio.TimerHandle | None = None  # runs while headers are to come
    leaving: asyncio.TimerHandle | None = None  # runs while an answer waits for the client

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.arrival = self.loop.call_later(HEADER_SECONDS, transport.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:  # the headers are there
            self.arrival = cancel(self.arrival)
        elif not self.arrival:
            self.arrival = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.count_unsent(self.transport.get_write_buffer_size())
        self.leaving = self.loop.call_later(ANSWER_SECONDS, self.check)

    def check(self) -> None:
        """Close the connection if the client has hardly taken anything of what waits for it."""
        before, after = self.own_unsent, self.transport.get_write_buffer_size()
        if after > before - ANSWER_BYTES:
            self.transport.abort()
        else:
            self.count_unsent(after)
            self.leaving = self.loop.call_later(ANSWER_SECONDS, self.check)

    def resume_writing(self) -> None:
        self.leaving = cancel(self.leaving)
        self.count_unsent(0)
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self.arrival, self.leaving = cancel(self.arrival), cancel(self.leaving)
        self.count_unsent(0)
        super().connection_lost(exc)

    def count_unsent(self, size: int) -> None:
        Connection.unsent += size - self.own_unsent
        self.own_unsent = size


def cancel(timer: asyncio.TimerHandle | None) -> None:
    """Stop `timer`, if there is one; returns None, which takes its place."""
    if timer:
        timer.cancel()
