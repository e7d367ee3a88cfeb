"""Health checks by which Serve finds a hung engine after exactly `engine.heartbeat_timeout_s`, as
standalone serving does.

Serve replaces a replica after FAILED_CHECKS consecutive checks that raised or timed out.
"""

from dataclasses import dataclass

FAILED_CHECKS = 3
"""Consecutive failures after which Serve declares a replica unhealthy (Ray 2.60)."""
LONGEST_PERIOD_S = 2.0
"""Maximum seconds between two checks."""
_SHORTEST_WAIT = 0.9
"""Shortest wait between two checks, in periods: Serve waits a random 0.9 to 1.1 periods."""


@dataclass(frozen=True, slots=True)
class HealthChecks:
    """How often Serve checks an engine, and which answers count as failures.

    Attributes:
        period_s: seconds between the starts of two checks.
        timeout_s: seconds after which a check without an answer has failed. The next check starts
            at once, since this is not below period_s.
        stalled_s: seconds after which a stalled step loop makes a check raise, chosen so that the
            last failure comes when the heartbeat timeout expires.
    """

    period_s: float
    timeout_s: float
    stalled_s: float


def health_checks(heartbeat_timeout_s: float) -> HealthChecks:
    """Return checks of which the last one fails `heartbeat_timeout_s` seconds after the engine's
    last heartbeat."""
    timeout_s = heartbeat_timeout_s / FAILED_CHECKS
    period_s = min(LONGEST_PERIOD_S, timeout_s)
    return HealthChecks(
        period_s, timeout_s, heartbeat_timeout_s - (FAILED_CHECKS - 1) * _SHORTEST_WAIT * period_s
    )
