"""Arrays between guards: their content, and where something was written beside them."""

from __future__ import annotations

import numpy as np
import pytest

from runtime.gpu_checks.guarded_memory import GUARD, guarded_memory
from tests.host_device import HostDevice, at

GIVEN = {"x": np.arange(5, dtype=np.float32), "y": np.array([[1, 2]], np.int64)}


@pytest.fixture
def memory():
    device = HostDevice()
    with guarded_memory(device, GIVEN, {"out": 10, "empty": 0}, {"counters": 8}) as found:
        found.reset()
        yield found
    assert device.allocated == 0


def test_arrays_hold_what_they_should(memory):
    snapshot = memory.read()
    assert snapshot.bytes_of("x").view(np.float32).tolist() == [0, 1, 2, 3, 4]
    assert snapshot.bytes_of("y").view(np.int64).tolist() == [1, 2]
    assert (snapshot.bytes_of("out") == 0xFF).all()
    assert snapshot.bytes_of("empty").size == 0
    assert not snapshot.bytes_of("counters").any()
    assert snapshot.broken_guards() == []
    assert not any(snapshot.changed(name) for name in memory.addresses)
    assert all(address % GUARD == 0 for address in memory.addresses.values())


@pytest.mark.parametrize(
    ("name", "offset", "place"),
    [
        ("x", -1, "in front of x"),
        ("x", 20, "between x and y"),
        ("y", -1, "between x and y"),
        ("out", 10, "between out and empty"),
        ("counters", 8, "behind counters"),
        ("counters", 8 + GUARD - 9, "behind counters"),
    ],
)
def test_a_byte_beside_an_array_is_found(memory, name, offset, place):
    at(memory.addresses[name] + offset, 1)[0] = 0
    assert memory.read().broken_guards() == [place]
    memory.reset()
    assert memory.read().broken_guards() == []


def test_a_change_is_seen_until_the_next_reset(memory):
    at(memory.addresses["counters"], 1)[0] = 1
    assert memory.read().changed("counters")
    memory.reset()
    assert not memory.read().changed("counters")
