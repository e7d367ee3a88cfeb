"""Tables of the results of `benchmarks/gpu_check.py`, in Markdown, as in `docs/performance.md`."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.gpu_timing import GRAPH_LAUNCHES

Result = Mapping[str, Any]

_LAUNCHES = {
    ("linear", 0): "QKV projection",
    ("linear", 1): "output projection",
    ("_rope_and_store", 0): "RoPE, KV store",
    ("_attend", 0): "attention",
    ("_merge_splits", 0): "attention, splits together",
    ("add_rms_norm_kernel", 0): "residual, norm",
    ("narrow_linear_kernel", 0): "gate",
    ("choose_experts", 0): "choice, routing",
    ("place_tokens", 0): "routing, places",
    ("expert_matmul_wgmma", 0): "experts, gate_up",
    ("expert_matmul_wgmma", 1): "experts, down",
    ("expert_matmul_natural", 0): "experts, gate_up",
    ("expert_matmul_natural", 1): "experts, down",
    ("add_slots_rms_norm", 0): "combine, residual, norm",
}
"""The purpose of a launch, by its name and the number of launches of that name before it in a
layer."""
_SAMPLING_IN_L2 = (
    "`in L2`: the logits fit into twice the second-level cache, as in a step, where they have just "
    "been computed."
)


def report(found: Mapping[str, Result]) -> str:
    """Return the tables of all parts that are there.

    Args:
        found: results by name of the part in `gpu_parts.PARTS`, and of the tests; a part that did
            not end has `failed`.
    """
    sections = {
        "machine": _machine,
        "probe": _probe,
        "device": _device,
        "step": _step,
        "kernels": _kernels,
        "prefill": _prefill,
        "sampling": _sampling,
        "llm": _llm,
        "tests": _tests,
    }
    parts = []
    for name, section in sections.items():
        if name in found:
            body = [] if "skipped" in found[name] else section(found[name])
            body += [
                f"- failed: {failure['what']}: {failure['error']}"
                for failure in found[name].get("failures", ())
            ]
            body += [f"- {found[name]['triton_cache']}"] if "triton_cache" in found[name] else []
            parts.append(
                "\n".join(
                    body
                    + [
                        f"**{name}: {found[name][word]}**"
                        for word in ("skipped", "failed")
                        if word in found[name]
                    ]
                )
            )
    return "\n\n".join(part for part in parts if part) + "\n"


def _machine(result: Result) -> list[str]:
    lines = [", ".join(f"{name}: {value}" for name, value in result["machine"].items())]
    return [*lines, "", result["cache"]] if "cache" in result else lines


def _probe(result: Result) -> list[str]:
    lines = [
        f"Probe, {result.get('model', 'no model yet')}: {result.get('product', 'no product of matrices')}."
    ]
    rows = [
        (row["way"], f"{row['seconds'] * 1e3:.2f}", f"{row['launch_s'] * 1e3:.2f}")
        for row in result.get("ways", ())
    ]
    return (
        [*lines, "", *_table(("decode steps of one sequence", "ms a step", "ms to launch"), rows)]
        if rows
        else lines
    )


def _device(result: Result) -> list[str]:
    if "name" not in result:
        return []
    return [
        f"{result['name']} ({result['architecture']}, {result['memory_bytes'] / 2**30:.1f} GiB), driver "
        f"{result['driver']}, "
        f"torch {result['torch']}, Triton {result['triton']}. {_card(result)}"
    ]


def _tests(result: Result) -> list[str]:
    lines = [f"Tests: {result['summary']}"] if "summary" in result else []
    lines += [f"- {line}" for line in (*result.get("problems", ()), *result.get("advice", ()))]
    if result.get("printed"):
        lines += ["", "```", *result["printed"], "```"]
    return lines


def _step(result: Result) -> list[str]:
    rows = [
        (
            f"{step['size']}",
            f"{step['context']}",
            f"{step['seconds'] * 1e3:.2f}",
            f"{step['median_s'] * 1e3:.2f}",
            f"{step['launch_s'] * 1e3:.2f}",
            f"{step['size'] / step['seconds']:.0f}",
            f"{step['least_bytes'] / 1e9:.2f}",
            f"{step['share']:.0%}",
        )
        for step in result.get("steps", ())
    ]
    if not rows:
        return []
    return [
        f"Decode steps of {result['model']} ({result['weight_bytes'] / 1e9:.1f} GB), greedy, each launched "
        f"before the tokens of the one "
        f"before were taken. Graphs: {result['graphs']}. Times are means over a run of steps, of the best "
        f"run and of the median one. "
        "`share` is the time to read the weights and keys that a step must read, at the bandwidth of a "
        "copy, over the time of the step. "
        f"{_card(result)}{_left_out(result)}",
        "",
        *_table(
            ("sequences", "context", "ms a step", "median", "ms to launch", "tok/s", "GB to read", "share"),
            rows,
        ),
        "",
        *(f"- {operation}: {kernel}" for operation, kernel in result["kernels"].items()),
    ]


def _kernels(result: Result) -> list[str]:
    lines: list[str] = []
    for batch in result.get("batches", ()):
        if not batch["launches"]:
            continue
        rows = []
        for window in dict.fromkeys(row["window"] for row in batch["launches"]):
            layer = [row for row in batch["launches"] if row["window"] == window]
            total = {name: sum(row[name] for row in layer) for name in ("seconds", "median_s", "bytes")}
            total["in_l2"] = False
            total["share"] = total["bytes"] / result["bandwidth"] / total["seconds"]
            named = [(_LAUNCHES.get((row["name"], row["occurrence"]), row["name"]), row) for row in layer]
            for name, row in [*named, (f"**layer, {len(layer)} launches**", total)]:
                times = (f"{row[time] * 1e6:.1f}" for time in ("seconds", "median_s"))
                cells = (*times, f"{row['bytes'] / 1e6:.2f}", f"{row['share']:.0%}{' in L2' * row['in_l2']}")
                rows.append(("all" if window is None else str(window), name, *cells))
        around = ", ".join(f"{row['name']} {row['seconds'] * 1e6:.1f}" for row in batch["around"])
        lines += [
            f"A decode layer of {result['model']}, {batch['size']} sequences of {batch['context']} tokens: "
            f"each launch alone, in graphs of "
            f"{GRAPH_LAUNCHES} or more, in turn over the weights and caches of {batch['layers_timed']} "
            f"layers. Bytes as "
            f"`benchmarks/decode_traffic.py` counts them. {_card(result)}",
            "",
            *_table(("window", "launch", "us", "median", "MB", "share of a copy's bandwidth"), rows),
            "",
            *_about_l2(result, batch["launches"]),
            f"Around the layers, us, each over and over on the same tensors: {around}.",
            "",
        ]
    left_out = _left_out(result).strip()
    return [*lines, left_out] if left_out else lines[:-1]


def _prefill(result: Result) -> list[str]:
    rows = [
        (
            f"{row['tokens']}",
            f"{row['seconds'] * 1e3:.1f}",
            f"{row['median_s'] * 1e3:.1f}",
            f"{row['tokens'] / row['seconds']:.0f}",
            _tflops(row["flops"] / row["seconds"]),
            f"{row['share']:.0%}",
        )
        for row in result.get("prompts", ())
    ]
    if not rows:
        return []
    intro = (
        f"Prompts of one sequence in one step, {result['model']}; `share` is that of torch's "
        f"product. {_card(result)}"
    )
    return [intro, "", *_table(("tokens", "ms", "median", "tok/s", "TFLOP/s", "share"), rows)]


def _card(result: Result) -> str:
    """Return a sentence on the rates that the device reached in the process that measured the
    rest."""
    return f"A copy reads and writes {result['bandwidth'] / 1e9:.0f} GB/s, {_gemm(result)}."


def _about_l2(result: Result, rows: Sequence[Result]) -> list[str]:
    """Return why some shares exceed the memory's bandwidth; empty if none does."""
    if not any(row["in_l2"] for row in rows):
        return []
    return [
        f"`in L2`: what these launches read in turn fits into twice the second-level cache "
        f"({result['l2_bytes'] / 1e6:.0f} MB), so that "
        "they find some of it there and can be faster than memory. In a step most of it comes from memory.",
        "",
    ]


def _gemm(result: Result) -> str:
    gemm = result["gemm"]
    return (
        f"a {gemm['dtype']} product of {gemm['size']} x {gemm['size']} matrices reaches "
        f"{_tflops(gemm['flops_per_s'])} TFLOP/s"
    )


def _tflops(flops_per_s: float) -> str:
    """Return a rate in 10^12 a second; of a CPU, which is slower than ten, with two more digits."""
    return f"{flops_per_s / 1e12:.0f}" if flops_per_s >= 1e13 else f"{flops_per_s / 1e12:.2f}"


def _sampling(result: Result) -> list[str]:
    ways = result.get("ways", ())
    if not ways:
        return []
    columns = list(dict.fromkeys(row["rows"] for row in ways))
    cells = {
        (
            row["way"],
            row["rows"],
        ): f"{row['seconds'] * 1e6:.0f}, {row['median_s'] * 1e6:.0f} "
        f"({row['passes']:.1f}{' in L2' * row['in_l2']})"
        for row in ways
    }
    rows = [
        (way, *(cells.get((way, size), "") for size in columns))
        for way in dict.fromkeys(row["way"] for row in ways)
    ]
    intro = (
        f"Sampling from {result['vocab']} logits, us by rows, of the best round and the median one; in "
        f"brackets the best, in passes over "
        f"the logits at a copy's bandwidth. {_card(result)}"
    )
    table = _table(("way", *map(str, columns)), rows)
    return [intro, "", *table, *(["", _SAMPLING_IN_L2] if any(row["in_l2"] for row in ways) else [])]


def _llm(result: Result) -> list[str]:
    rows = [
        (
            row["way"],
            f"{row['sequences']}",
            f"{row['tokens']}",
            f"{row['seconds']:.2f}",
            f"{row['tokens_per_s']:.0f}",
        )
        for row in result.get("ways", ())
    ]
    if not rows:
        return []
    agreements = [
        f"- {row['what']}: of {row['sequences']} sequences {row['same']} the same, {row['near_ties']} part "
        f"at a near tie, {row['others']} "
        f"differ; log probabilities before that by {row['worst']:.3f} nats at most"
        for row in result["agreements"]
    ]
    return [
        f"`LLM` with {result['model']}, greedy, prompts of 1 to 400 tokens; the time of prompts and answers "
        f"together.",
        "",
        *_table(("way", "sequences", "tokens", "s", "tok/s"), rows),
        "",
        f"Answers, token by token; in bf16 log probabilities may differ by {result['tolerance']} nats, and "
        f"tokens where they are nearer:",
        "",
        *agreements,
    ]


def _left_out(result: Result) -> str:
    left_out = ", ".join(f"{batch['size']} x {batch['context']}" for batch in result.get("left_out", ()))
    return f" No room for {left_out}." if left_out else ""


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table, with cells that look like numbers to the right."""
    numeric = [all(row[column][:1].isdigit() for row in rows) for column in range(len(header))]
    separator = ["---:" if right else "---" for right in numeric]
    return ["| " + " | ".join(cells) + " |" for cells in (header, separator, *rows)]
