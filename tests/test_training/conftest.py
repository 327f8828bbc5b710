"""What the tests of this folder share."""

import pytest

from saisa_jax.training.telemetry import goodput, meter


@pytest.fixture
def time(monkeypatch):
    """A clock that the test moves."""

    class Time:
        now = 100.0

        def monotonic(self):
            return self.now

    time = Time()
    for module in (goodput, meter):
        monkeypatch.setattr(module, "time", time)
    return time
