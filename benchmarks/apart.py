"""One side of a comparison in a process of its own, with the memory and the threads that its users give it."""

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from typing import Any, NamedTuple
from unittest import mock

Calls = Mapping[str, Callable[[], Any]]


class Answer(NamedTuple):
    value: Any
    seconds: float


@contextlib.contextmanager
def apart(
    make: Callable[..., Calls], *arguments: Any, environment: Mapping[str, str]
) -> Iterator[Callable[[str], Answer]]:
    """`make(*arguments)` in a new process with these variables; yields what runs one of its calls there, by name.

    Raises:
      EOFError, OSError: the process ended; it has printed why.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, make, arguments), daemon=True)
    with mock.patch.dict(os.environ, environment):
        process.start()
    there.close()

    def ask(name: str) -> Answer:
        here.send(name)
        return here.recv()

    try:
        yield ask
    finally:
        here.close()
        process.join()


def _serve(connection: Connection, make: Callable[..., Calls], arguments: tuple[Any, ...]) -> None:
    calls = make(*arguments)
    while True:
        try:
            call = calls[connection.recv()]
        except EOFError:
            # The other end is closed.
            return
        begin = time.perf_counter()
        value = call()
        connection.send(Answer(value, time.perf_counter() - begin))
