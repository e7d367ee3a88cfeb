"""Health checks by which Serve finds a hung engine: after `engine.heartbeat_timeout_s`, as
standalone serving does, and not before.

Serve replaces a replica after FAILED_CHECKS checks in a row that raised, or gave no answer in time.
"""

from dataclasses import dataclass

FAILED_CHECKS = 3
"""Consecutive failures after which Serve calls a replica unhealthy (Ray 2.60)."""
LONGEST_PERIOD_S = 2.0
"""Seconds between two checks at most."""
_SHORTEST_WAIT = 0.9
"""Serve waits 0.9 to 1.1 periods, by chance."""


@dataclass(frozen=True, slots=True)
class HealthChecks:
    """How often Serve asks an engine for its health, and which answers are a failure.

    Attributes:
        period_s: seconds between the starts of two checks.
        timeout_s: seconds after which a check without an answer has failed. The next one starts at
            once, since it is not below period_s.
        stalled_s: seconds after which a stalled step loop makes a check raise: the last of the
            failures comes when the heartbeat timeout is over.
    """

    period_s: float
    timeout_s: float
    stalled_s: float


def health_checks(heartbeat_timeout_s: float) -> HealthChecks:
    """Return the checks of which the last fails `heartbeat_timeout_s` seconds after the engine's
    last sign of life."""
    timeout_s = heartbeat_timeout_s / FAILED_CHECKS
    period_s = min(LONGEST_PERIOD_S, timeout_s)
    return HealthChecks(
        period_s, timeout_s, heartbeat_timeout_s - (FAILED_CHECKS - 1) * _SHORTEST_WAIT * period_s
    )
