"""Environment variables that Ray and Serve read when their processes start. A Serve YAML cannot set
them, so whatever starts Ray has to.

`cantata serve` sets them itself; `deploy/ray`, the chart and docs/operations.md repeat this table,
and tests compare them with it. This module imports nothing of Ray, since it must be read before Ray
is imported.
"""

FAST_INGRESS = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
"""Variables of Serve's fast ingress, which takes about a quarter of the CPU per token."""

HAPROXY_HARD_STOP_S = 3600
"""Seconds for which a HAProxy process lives on with its streams after a reload, which each change
of the gateways causes (Ray's default is 120 s). Serve keeps the ports of ended gateways from reuse
for 30 s longer, since the old process may still send requests there."""

RAY_ENVIRONMENT = FAST_INGRESS | {
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(HAPROXY_HARD_STOP_S),
    # Kills a hung replica at once. Otherwise Serve asks it to end, which it cannot do, and its GPUs
    # stay taken until the drain timeout.
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
    # Access to Ray's ports allows running code: clients need the token in ~/.ray/auth_token, which
    # Ray creates.
    "RAY_AUTH_MODE": "token",
    # Makes Ray use 127.0.0.1 as this node's address and bind its ports there (named after the
    # systems where that is the default).
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # There is no load balancer that has to notice that this ingress is going away.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0.5",
    # On a busy machine the proxies take longer to start than Serve's 5 s.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Variables by name, as set for Ray on one machine. A value that the operator has set takes
precedence."""

ONE_MACHINE_ONLY = frozenset(
    {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"}
)
"""Names of the variables that apply only to Ray on one machine without a load balancer."""

CLUSTER_ENVIRONMENT = {name: value for name, value in RAY_ENVIRONMENT.items() if name not in ONE_MACHINE_ONLY}
"""Variables with which every node of a cluster is started."""
