"""What grammars cost an engine, against an executor that pretends a GPU step.

    python3 -m benchmarks.constraints --model PATH [--sequences 256] [--steps 100] [--step-ms 15]

PATH is a folder with config.json and tokenizer.json; weights are not read, so `cantata
make-checkpoint --preset tiny --tokenizer harmony` makes one with gpt-oss's vocabulary. The executor
sleeps for each step, then waits for its masks, and returns the tokens of a JSON text. Printed are:

- the engine thread's processor time a step: without constraints, with the automaton of a chat's
  headers, and with half of the sequences inside the body of a schema; the largest number of plans
  in flight; and the time that a step, once its forward pass had ended, waited for its masks;
- the processor time of a step's masks beside that of llguidance alone, which consumes the same
  tokens and fills the same masks, in turns;
- the time to compile schemas, beside llguidance's alone, and what a request costs whose schema is
  known.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor, LLMatcher

from benchmarks.pretended_executor import PretendedExecutor
from cluster.harmony.automaton import TurnAutomata
from cluster.harmony.encoding import HarmonyEncoding
from cluster.harmony.turn_grammar import TurnGrammar
from workers.config import EngineConfig, GrammarConfig, ModelConfig, SchedulerConfig
from workers.constraint.automaton import AutomatonState, TokenAutomaton
from workers.constraint.codec import Constraint
from workers.constraint.compiler import GrammarCompiler, PreparedConstraint
from workers.constraint.parser_limits import parser_limits
from workers.engine.engine import Engine
from workers.engine.grammars import GrammarSteps
from workers.engine.masks import MaskThread, mask_threads
from workers.engine.stream import ThreadReader
from workers.model_config import load_model_config
from workers.request import EngineRequest, SamplingParams
from workers.scheduler.plan import StepPlan

PROMPT = tuple(range(100, 132))
MAX_MODEL_LEN = 8192
SCHEMA: dict[str, object] = {
    "type": "array",
    "minItems": 100_000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "count": {"type": "integer"},
            "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}},
        },
        "required": ["name", "count", "tags"],
        "additionalProperties": False,
    },
}
SCHEMAS: dict[str, dict[str, object]] = {
    "3 fields": {**SCHEMA, "minItems": 2},
    "formats, nested arrays": {
        "type": "object",
        "properties": {
            "at": {"type": "string", "format": "date-time"},
            "id": {"type": "string", "format": "uuid"},
            "matrix": {"type": "array", "items": {"type": "array", "items": {"type": "number"}}},
        },
        "required": ["at", "id", "matrix"],
    },
    "200 fields": {
        "type": "object",
        "properties": {f"field_{index}": {"type": ["string", "integer"]} for index in range(200)},
        "required": [f"field_{index}" for index in range(200)],
        "additionalProperties": False,
    },
}


class PretendedGpu(PretendedExecutor):
    """A GPU on which every sequence writes the same text.

    Args:
        trace: its tokens.
    """

    def __init__(self, step_s: float, trace: Sequence[int]) -> None:
        super().__init__(max_model_len=MAX_MODEL_LEN, num_blocks=200_000, step_s=step_s)
        self._trace = trace

    def draw(self, seq_id: int, position: int, bits: npt.NDArray[np.uint8] | None) -> int:
        return self._trace[position]


def json_trace(encoding: HarmonyEncoding, num_tokens: int) -> list[int]:
    """Return the tokens of a text of SCHEMA, from its beginning."""
    item = {"name": "A hammer, 300 g", "count": 12, "tags": ["red", "blue"]}
    tokens: list[int] = []
    count = 16
    while len(tokens) < num_tokens:
        count *= 2
        items = [item | {"count": index, "name": f"Item number {index}, boxed"} for index in range(count)]
        tokens = list(encoding.encode(json.dumps(items, separators=(",", ":"))))
    return tokens[:num_tokens]


def schema_grammar(schema: object) -> str:
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides={"whitespace_flexible": False})


def body_automaton(encoding: HarmonyEncoding, vocab_size: int, grammar: str) -> TokenAutomaton:
    """Return an automaton that begins in a body of the grammar."""
    no_text = tuple(i for i in range(vocab_size) if i != encoding.return_ and not encoding.token_bytes(i))
    body = AutomatonState(forbidden=no_text, transitions=((encoding.return_, 1),), grammar=0)
    return TokenAutomaton((body, AutomatonState(allowed=(encoding.return_,))), grammars=(grammar,))


def measure_steps(
    model_path: Path,
    model: ModelConfig,
    constraints: Sequence[Constraint | None],
    trace: Sequence[int],
    options: argparse.Namespace,
) -> tuple[float, PretendedGpu, float]:
    """Return (processor seconds of the engine's thread a step, the executor, seconds a step)."""
    executor = PretendedGpu(options.step_ms / 1e3, trace)
    config = EngineConfig(
        model_path,
        max_model_len=MAX_MODEL_LEN,
        scheduler=SchedulerConfig(max_num_seqs=2 * len(constraints), max_num_batched_tokens=16384),
    )
    engine = Engine(config, model, executor)
    engine.start()
    reader = ThreadReader()
    sampling = SamplingParams(max_tokens=options.steps, seed=0, ignore_eos=True)
    ready = [None if each is None else engine.prepare(each).result(600) for each in constraints]
    usage = f"/proc/self/task/{engine._loop._thread.native_id}/schedstat"
    try:
        before, started = _thread_s(usage), time.perf_counter()
        streams = [
            engine.submit(EngineRequest(str(index), PROMPT, sampling, constraint=each), reader, prepared)
            for index, (each, prepared) in enumerate(zip(constraints, ready, strict=True))
        ]
        for _ in reader.read(streams):
            pass
        spent, elapsed = _thread_s(usage) - before, time.perf_counter() - started
    finally:
        engine.shutdown()
    return spent / executor.num_steps, executor, elapsed / executor.num_steps


def _thread_s(path: str) -> float:
    return int(Path(path).read_text().split()[0]) / 1e9


def measure_masks(
    prepared: PreparedConstraint,
    grammar: str,
    compiler: GrammarCompiler,
    trace: list[int],
    options: argparse.Namespace,
    vocab_size: int,
) -> tuple[float, float]:
    """Return processor seconds of a step's masks: (ours, llguidance's alone), medians of steps that
    take turns."""
    num_rows = options.sequences // 2
    num_threads = mask_threads(2)
    ours = MaskThread(compiler, vocab_size, num_threads)
    steps = GrammarSteps(ours)
    requests = [EngineRequest(str(i), PROMPT, SamplingParams(seed=0)) for i in range(num_rows)]
    for index, request in enumerate(requests):
        steps.begin(index, request, prepared)
    executor = LLExecutor(num_threads)
    first = LLMatcher(compiler.load().tokenizer, grammar, log_level=0, limits=parser_limits())
    matchers = [first.deep_copy() for _ in range(num_rows)]
    words = np.zeros((num_rows, -(-vocab_size // 32)), dtype=np.uint32)
    found: tuple[list[float], list[float]] = ([], [])
    everyone = tuple(range(num_rows))
    for step, token_id in enumerate(trace[: options.steps]):
        for turn in ((0, 1), (1, 0))[step % 2]:
            began = time.process_time()
            if turn == 0:
                plan = StepPlan(
                    step,
                    seq_ids=everyone,
                    num_computed_tokens=(len(PROMPT) + step - 1,) * num_rows,
                    num_scheduled_tokens=(1,) * num_rows,
                    samples=(True,) * num_rows,
                )
                _, job = steps.plan(plan)
                assert job is not None
                job.result.result(60)
                for index in everyone:
                    steps.push(index, (token_id,))
            else:
                executor.unsafe_compute_mask_ptr(
                    [(matcher, index) for index, matcher in enumerate(matchers)],
                    words.ctypes.data,
                    words.shape[1] * words.itemsize,
                    num_rows,
                )
                executor.consume_token_par([(matcher, token_id) for matcher in matchers])
            found[turn].append(time.process_time() - began)
    assert not any(matcher.is_error() for matcher in matchers)
    ours.close()
    return statistics.median(found[0]), statistics.median(found[1])


def print_steps(
    model_path: Path,
    model: ModelConfig,
    constraints: dict[str, Sequence[Constraint | None]],
    trace: Sequence[int],
    options: argparse.Namespace,
) -> None:
    """Print what a step costs the engine's thread with each of these mixes of constraints."""
    print("| constraints | engine thread a step | step | plans in flight | waited for masks, p50 / max |")
    print("| --- | --- | --- | --- | --- |")
    for name, mix in constraints.items():
        spent_s, executor, step_s = measure_steps(model_path, model, mix, trace, options)
        waits = [wait_s * 1e3 for wait_s in executor.waits_s] or [0.0]
        print(
            f"| {name} | {spent_s * 1e3:.2f} ms | {step_s * 1e3:.1f} ms | {executor.most_in_flight} | "
            f"{statistics.median(waits):.2f} / {max(waits):.2f} ms |",
            flush=True,
        )


def print_compilation(compiler: GrammarCompiler, encoding: HarmonyEncoding, vocab_size: int) -> None:
    """Print what schemas cost to compile, and a request whose schema is known."""
    tokenizer = compiler.load().tokenizer
    print("\n| schema | prepared | llguidance alone | ratio | known again |")
    print("| --- | --- | --- | --- | --- |")
    for name, schema in SCHEMAS.items():
        grammar = schema_grammar(schema)
        alone = []
        for _ in range(3):
            began = time.process_time()
            LLMatcher(tokenizer, grammar, log_level=0, limits=parser_limits())
            alone.append(time.process_time() - began)
        constraint = Constraint.of(body_automaton(encoding, vocab_size, grammar))
        began = time.process_time()
        compiler.prepare(constraint).result(600)
        first_s = time.process_time() - began
        again = []
        for _ in range(20):
            began = time.process_time()
            compiler.prepare(constraint).result(600)
            again.append(time.process_time() - began)
        alone_s = statistics.median(alone)
        print(
            f"| {name} | {first_s * 1e3:.1f} ms | {alone_s * 1e3:.1f} ms | {first_s / alone_s:.2f} | "
            f"{statistics.median(again) * 1e3:.3f} ms |",
            flush=True,
        )


def processor_name() -> str:
    """Return the processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def main() -> None:
    """Parse the flags and run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of config.json and tokenizer.json")
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--step-ms", type=float, default=15.0)
    options = parser.parse_args()
    model = load_model_config(options.model)
    encoding = HarmonyEncoding.load(options.model, model.vocab_size)
    load = " ".join(Path("/proc/loadavg").read_text().split()[:3])
    print(f"{time.strftime('%Y-%m-%d')}, {processor_name()}, load {load}, {model.vocab_size} tokens\n")
    grammar = schema_grammar(SCHEMA)
    body = Constraint.of(body_automaton(encoding, model.vocab_size, grammar))
    headers = Constraint.of(TurnAutomata(encoding, model.vocab_size).of(TurnGrammar()))
    trace = json_trace(encoding, options.steps + 8)
    half = options.sequences // 2
    mixes: dict[str, Sequence[Constraint | None]] = {
        "off": [None] * options.sequences,
        "headers": [headers] * options.sequences,
        "half in a schema": [body] * half + [None] * (options.sequences - half),
    }
    print_steps(options.model, model, mixes, trace, options)
    compiler = GrammarCompiler(options.model, model.vocab_size, GrammarConfig())
    prepared = compiler.prepare(body).result(600)
    ours_s, alone_s = measure_masks(prepared, grammar, compiler, trace, options, model.vocab_size)
    print(
        f"\nmasks of {half} rows, processor time of a step: {ours_s * 1e3:.2f} ms, llguidance alone "
        f"{alone_s * 1e3:.2f} ms, ratio {ours_s / alone_s:.2f}"
    )
    print_compilation(compiler, encoding, model.vocab_size)
    compiler.close()


if __name__ == "__main__":
    main()
