"""What automata cost the sampler on a CPU: the processor time of sampling with and without them, in
turn, and their ratio.

    python3 -m benchmarks.automaton [--num-rows 1 64 256] [--repeats 15]

Rows of gpt-oss's vocabulary. `body`: all tokens may come but the special ones, as in the body of a
message, where almost all tokens are. `header`: eight tokens may come. One thread; processor time,
so that other programs on the machine count little.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from kernels.sampling import SamplingBatch, select
from workers.constraint.automaton import AutomatonState, TokenAutomaton
from workers.constraint.codec import Constraint
from workers.rank.automata import Automata
from workers.request import SamplingParams
from workers.scheduler.plan import SequenceStart

VOCAB_SIZE = 201_088
FIRST_SPECIAL, LAST_SPECIAL, END = 199_998, 201_087, 200_002
CPU = torch.device("cpu")

STATES = {
    "body": AutomatonState(
        forbidden=tuple(i for i in range(FIRST_SPECIAL, LAST_SPECIAL + 1) if i != END),
        transitions=((END, 0),),
    ),
    "header": AutomatonState(
        allowed=(5, 100, 8_000, 20_000, 90_000, 120_000, 150_000, 200_005),
        transitions=((200_005, 0),),
    ),
}


def constrained(num_rows: int, state: AutomatonState) -> tuple[Automata, Callable[[], torch.Tensor]]:
    """Return automata with a sequence in each slot, and a function that returns the next step's
    rows."""
    automata = Automata(num_rows, CPU)
    constraint = Constraint.of(TokenAutomaton((state,)))
    automata.update([(constraint.id, constraint.body)], [])
    for slot in range(num_rows):
        start = SequenceStart(slot, (1,), 1, SamplingParams(seed=0), constraint=constraint.id)
        automata.start(slot, start)
    slots = np.arange(num_rows)

    def rows() -> torch.Tensor:
        found = automata.rows(slots, slots)
        assert found is not None
        return torch.from_numpy(found)

    return automata, rows


def measure(num_rows: int, state: AutomatonState, repeats: int) -> tuple[float, float, float]:
    """Return milliseconds of processor time: (sampling alone, what automata add to it, what the
    host adds to prepare them)."""
    sampler = select(CPU).run
    automata, next_rows = constrained(num_rows, state)
    logits = torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    numbers = torch.arange(num_rows)
    plain = SamplingBatch(torch.ones(num_rows), numbers, numbers, overwrite_logits=True)
    times: tuple[list[float], ...] = ([], [], [])
    for _ in range(repeats):
        begin = time.thread_time()
        rows = next_rows()
        prepared = time.thread_time()
        sampler.sample(logits, replace(plain, automaton=automata.on_device(rows)))
        sampled = time.thread_time()
        sampler.sample(logits, plain)
        end = time.thread_time()
        for found, seconds in zip(times, (end - sampled, sampled - prepared, prepared - begin), strict=True):
            found.append(1e3 * seconds)
    alone, together, host = (statistics.median(found[1:]) for found in times)
    return alone, together - alone, host


def main() -> None:
    """Parse the flags and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--num-rows", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"sampler: {select(CPU)}\n")
    print("| rows | state | sampling ms | automata ms | ratio | on the host ms |")
    print("| ---: | --- | ---: | ---: | ---: | ---: |")
    for num_rows in options.num_rows:
        for name, state in STATES.items():
            alone, added, host = measure(num_rows, state, options.repeats)
            ratio = (alone + added) / alone
            print(
                f"| {num_rows} | {name} | {alone:.2f} | {added:.3f} | {ratio:.3f} | {host:.3f} |", flush=True
            )


if __name__ == "__main__":
    main()
