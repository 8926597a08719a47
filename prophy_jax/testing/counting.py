"""Counts the programs that JAX compiles."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax


@contextlib.contextmanager
def count_compiles() -> Iterator[list[str]]:
    """The list grows by one entry for every program that JAX compiles, or takes from its cache."""
    compiled: list[str] = []

    def note(event: str, *_: Any, **__: Any) -> None:
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
