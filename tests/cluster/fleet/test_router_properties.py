"""A gateway's choice of replicas under any sequence of events, against a plain account of what
happened."""

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cluster.fleet.directory import ReplicaSet
from cluster.fleet.prefixes import PrefixIndex
from cluster.fleet.table import LoadTable, Replica, RoutingHint
from workers.errors import NoReplica

NAMES = "abcd"
MAX_BLOCKS = 12
PENALTY_S = 2.0
PROMPTS = st.text("xy", max_size=9).map(
    lambda text: tuple(text[: end + 1].encode() for end in range(len(text)))
)


class Gateway:
    """A replica set on a clock of its own."""

    def __init__(self, seed: int) -> None:
        self.now = 0.0
        self.prefixes = PrefixIndex(MAX_BLOCKS)
        self.gone: list[Replica] = []
        self.loads = LoadTable(clock=lambda: self.now, penalty_s=PENALTY_S, seed=seed, prefixes=self.prefixes)
        self.replicas = ReplicaSet(self.loads)
        self.replicas.on_gone(self.gone.append)

    def choose(self, prompt: tuple[bytes, ...], excluded: frozenset[str]) -> Replica | None:
        try:
            self.replicas.choose(RoutingHint(prompt), excluded).send(None)
        except NoReplica:
            return None
        except StopIteration as done:
            replica: Replica = done.value
            return replica
        raise AssertionError("it waited")


class RouterMachine(RuleBasedStateMachine):
    """Two gateways with the same seed see the same events and must do the same."""

    def __init__(self) -> None:
        super().__init__()
        self.gateway, self.twin = Gateway(7), Gateway(7)
        self.listed: dict[str, Replica] = {}
        self.num_started = 0
        self.open: list[Replica] = []
        self.suspect_until: dict[str, float] = {}
        self.sent: dict[str, Counter[bytes]] = {}
        self.gone: list[Replica] = []

    def _publish(self) -> None:
        for gateway in (self.gateway, self.twin):
            gateway.replicas.replace(list(self.listed.values()))

    def _left(self, replica: Replica) -> None:
        self.sent.pop(replica.id, None)
        if replica not in self.open:
            self.gone.append(replica)

    @rule(name=st.sampled_from(NAMES))
    def start_or_restart(self, name: str) -> None:
        """Start a new process under this name, at an address of its own."""
        before = self.listed.get(name)
        self.num_started += 1
        self.listed[name] = Replica(name, f"host:{self.num_started}")
        self._publish()
        if before is not None:
            self._left(before)

    @precondition(lambda self: self.listed)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        replica = self.listed.pop(data.draw(st.sampled_from(sorted(self.listed))))
        self._publish()
        self._left(replica)

    @rule(prompt=PROMPTS, excluded=st.frozensets(st.sampled_from(NAMES), max_size=2))
    def choose(self, prompt: tuple[bytes, ...], excluded: frozenset[str]) -> None:
        chosen = self.gateway.choose(prompt, excluded)
        assert chosen == self.twin.choose(prompt, excluded)
        possible = [replica for replica in self.listed.values() if replica.id not in excluded]
        if not possible:
            assert chosen is None
            return
        assert chosen in possible
        healthy = [
            replica for replica in possible if self.suspect_until.get(replica.id, 0) <= self.gateway.now
        ]
        assert chosen in (healthy or possible), (
            "a replica that has just failed was taken although there is another"
        )
        self.open.append(chosen)
        self.sent.setdefault(chosen.id, Counter()).update(prompt)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), died=st.booleans())
    def end(self, data: st.DataObject, died: bool) -> None:
        """End a sequence, also because its replica is found dead."""
        replica = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        for gateway in (self.gateway, self.twin):
            if died:
                gateway.replicas.failed(replica)
            gateway.replicas.release(replica)
        if died:
            self.suspect_until[replica.id] = self.gateway.now + PENALTY_S
            self.sent.pop(replica.id, None)
        if replica not in self.open and replica not in self.listed.values():
            self.gone.append(replica)

    @rule(seconds=st.sampled_from([0.5, 1.0, 2.0, 5.0]))
    def wait(self, seconds: float) -> None:
        for gateway in (self.gateway, self.twin):
            gateway.now += seconds

    @precondition(lambda self: self.listed)
    @rule(data=st.data())
    def report(self, data: st.DataObject) -> None:
        loads = {name: data.draw(st.integers(0, 40)) for name in sorted(self.listed)}
        for gateway in (self.gateway, self.twin):
            gateway.replicas.report(loads)

    @invariant()
    def memory_is_bounded(self) -> None:
        held = self.gateway.prefixes.num_blocks
        assert set(held) <= set(self.listed), "a replica that left is still remembered"
        for name, count in held.items():
            assert count <= min(MAX_BLOCKS, len(self.sent.get(name, ())))

    @invariant()
    def what_is_matched_was_sent(self) -> None:
        for name in NAMES:
            for block in (b"x", b"y"):
                assert self.gateway.prefixes.match(name, [block]) <= (block in self.sent.get(name, ()))

    @invariant()
    def every_sequence_is_counted_once(self) -> None:
        counts = Counter(replica.id for replica in self.open)
        for name in NAMES:
            assert self.gateway.loads.in_flight(Replica(name, "")) == counts[name]

    @invariant()
    def gone_is_said_once(self) -> None:
        assert self.gateway.gone == self.twin.gone == self.gone


TestRouter = RouterMachine.TestCase
TestRouter.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
