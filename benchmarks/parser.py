"""The parser of turns beside openai_harmony's StreamableParser, on the same tokens in turns.

    python3 -m benchmarks.parser --tokenizer PATH [--tokens 20000] [--rounds 15]

PATH is a folder with gpt-oss's tokenizer.json; `cantata make-checkpoint --preset tiny --tokenizer
harmony` makes one. Printed is the processor time a token of each, the least of the rounds.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import openai_harmony

from cluster.harmony.encoding import HarmonyEncoding
from cluster.harmony.parse import HarmonyParser


def turn(encoding: HarmonyEncoding, text: str, num_tokens: int) -> list[int]:
    """Return a turn with reasoning, a preamble and an answer of about this many tokens."""
    body = encoding.encode(text)
    body = (body * (num_tokens // (2 * len(body)) + 1))[: num_tokens // 2]
    parts = ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>commentary<|message|>")
    analysis, commentary = map(encoding.encode_with_special, parts)
    final = encoding.encode_with_special("I will.<|end|><|start|>assistant<|channel|>final<|message|>")
    return [*analysis, *body, *commentary, *final, *body, encoding.return_]


def ours(encoding: HarmonyEncoding, ids: Sequence[int]) -> None:
    """Parse with Cantata, which returns events with the text of each token."""
    parser = HarmonyParser(encoding)
    for token_id in ids:
        parser.push(token_id)
    parser.finish()


def theirs(harmony: openai_harmony.HarmonyEncoding, ids: Sequence[int]) -> None:
    """Parse with oss-harmony, and read the text of each token."""
    parser = openai_harmony.StreamableParser(harmony, role=openai_harmony.Role.ASSISTANT)
    for token_id in ids:
        parser.process(token_id)
        _ = parser.last_content_delta


def processor_time(job: Callable[[], None]) -> float:
    """Return the processor seconds of this process that the job takes."""
    started = time.process_time()
    job()
    return time.process_time() - started


def main() -> None:
    """Run as a program."""
    arguments = argparse.ArgumentParser(prog="python3 -m benchmarks.parser", description=__doc__)
    arguments.add_argument("--tokenizer", type=Path, required=True, metavar="PATH")
    arguments.add_argument("--tokens", type=int, default=20_000)
    arguments.add_argument("--rounds", type=int, default=15)
    args = arguments.parse_args()
    encoding = HarmonyEncoding.load(args.tokenizer)
    harmony = openai_harmony.load_harmony_encoding("HarmonyGptOss")
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    ids = turn(encoding, text, args.tokens)
    times = [
        (processor_time(lambda: ours(encoding, ids)), processor_time(lambda: theirs(harmony, ids)))
        for _ in range(args.rounds)
    ]
    own, other = (min(pair[side] for pair in times) / len(ids) * 1e6 for side in (0, 1))
    print(f"{len(ids)} tokens: {own:.2f} µs a token, openai_harmony {other:.2f} µs: ratio {own / other:.2f}")


if __name__ == "__main__":
    main()
