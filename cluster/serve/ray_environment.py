"""Variables that Ray and Serve read when their processes start: a Serve YAML cannot set them, so
whatever starts Ray has to.

`cantata serve` does so itself; `deploy/ray`, the chart and docs/operations.md repeat this table,
and tests compare them with it. Imports nothing of Ray: it must be read before Ray is.
"""

FAST_INGRESS = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
"""Serve's fast ingress: about a quarter of the CPU per token."""

HAPROXY_HARD_STOP_S = 3600
"""A change of the gateways reloads HAProxy, and the process before the reload lives on with the
streams it has, this long at most (Ray's default is 120 s). Serve keeps the ports of gateways that
have ended from reuse for 30 s more than that, since the old process may still send requests
there."""

RAY_ENVIRONMENT = FAST_INGRESS | {
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(HAPROXY_HARD_STOP_S),
    # A hung replica is killed at once. Otherwise Serve asks it to end, which it does not hear, and
    # its GPUs are free when its drain timeout is over.
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
    # Anyone who reaches Ray's ports can run code: they need the token in ~/.ray/auth_token, which
    # Ray makes.
    "RAY_AUTH_MODE": "token",
    # Makes Ray take 127.0.0.1 for this node's address and bind its ports there (named after the
    # systems where that is the default).
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # No load balancer has to notice that this ingress goes away.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0.5",
    # On a busy machine the proxies take longer to start than the 5 s that Serve gives them.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""By name. A value that the operator has set stands."""

ONE_MACHINE_ONLY = frozenset(
    {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"}
)
"""Of these, what holds for a Ray of one machine without a load balancer; a cluster's nodes get the
others."""

CLUSTER_ENVIRONMENT = {name: value for name, value in RAY_ENVIRONMENT.items() if name not in ONE_MACHINE_ONLY}
"""What every node of a cluster is started with."""
