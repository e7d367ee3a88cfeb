"""Figures and table of the comparison with llama.cpp; the servers themselves need minutes and a
compiler."""

import argparse
import json
import os
import subprocess
import sys
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from benchmarks import llama_cpp, peers
from benchmarks.peers import CANTATA, LLAMA_CPP, Figures, Step
from benchmarks.processor_time import OthersMeter, machine_s, tree_s
from workers.errors import ConfigError


def figures(tokens_per_s: float, ttft_s: float = 1.0) -> Figures:
    return Figures(tokens_per_s, ttft_s, 0.02, 3.0, 0.125)


def test_ratios_are_taken_within_a_round() -> None:
    """A machine that is twice as slow in one round changes no ratio."""
    results = {
        Step(CANTATA, "bf16", 4): [figures(90, 0.4), figures(45, 0.8), figures(100, 0.5)],
        Step(LLAMA_CPP, "bf16", 4): [figures(30, 0.8), figures(15, 1.6), figures(50, 0.5)],
    }
    assert peers.ratio(results, Step(CANTATA, "bf16", 4)) == pytest.approx(3.0)
    assert peers.ratio(results, Step(CANTATA, "bf16", 4), "ttft_p50_s") == pytest.approx(0.5)
    ours, theirs = peers.table(results, 128).splitlines()[2:]
    assert ours.startswith("| bf16 | 4 | Cantata | 90.0 | 3.00 | 500 | 0.50 |")
    assert theirs.startswith("| bf16 | 4 | llama.cpp | 30.0 | 1.00 | 800 | 1.00 |")


def test_formats_are_compared_each_with_its_own() -> None:
    results = {Step(server, dense, 1): [figures(speed)] for server, dense, speed in
               ((CANTATA, "bf16", 30), (LLAMA_CPP, "bf16", 20),
                 (CANTATA, "int8", 90), (LLAMA_CPP, "int8", 45))}  # fmt: skip
    assert [peers.ratio(results, Step(CANTATA, dense, 1)) for dense in ("bf16", "int8")] == [1.5, 2.0]


def test_prompts_are_the_same_for_all_servers_and_differ_between_rounds(tmp_path: Path) -> None:
    files = [tmp_path / name for name in "abc"]
    for file, seed in zip(files, ("0/4", "0/4", "1/4"), strict=True):
        peers.write_prompts(file, 5, 17, 1000, seed)
    first, again, later = (file.read_text() for file in files)
    prompts = [json.loads(line)["prompt"] for line in first.splitlines()]
    assert first == again != later
    assert [len(prompt) for prompt in prompts] == [17] * 5
    assert len({tuple(prompt) for prompt in prompts}) == 5
    assert all(256 <= token < 1000 for prompt in prompts for token in prompt)


def test_servers_take_turns_in_both_orders_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 1000}')
    running: list[str] = []
    order: list[str] = []

    @contextmanager
    def fake(name: str):  # type: ignore[no-untyped-def]
        running.append(name)
        assert running == [name]
        order.append(name)
        yield name
        running.clear()

    def servers(*_: object) -> dict[tuple[str, str], AbstractContextManager[str]]:
        return {(name, "bf16"): fake(name) for name in (CANTATA, LLAMA_CPP)}

    monkeypatch.setattr(peers, "servers", servers)
    monkeypatch.setattr(llama_cpp, "server_program", lambda cache: cache)
    monkeypatch.setattr(
        peers,
        "measure",
        lambda url, clients, prompts, options: figures(clients * (2.0 if url == CANTATA else 1.0)),
    )
    monkeypatch.setattr(peers, "first_tokens", lambda url, prompts: [url, "same"])
    options = argparse.Namespace(
        model=tmp_path, cache=tmp_path, rounds=2, min_requests=8, clients=[1, 3], input_len=5, output_len=2
    )
    results, tokens = peers.run(options)
    assert order == [CANTATA, LLAMA_CPP, LLAMA_CPP, CANTATA]
    assert {step: len(rounds) for step, rounds in results.items()} == {
        Step(name, "bf16", clients): 2 for name in (CANTATA, LLAMA_CPP) for clients in (1, 3)
    }
    assert peers.ratio(results, Step(CANTATA, "bf16", 3)) == 2
    assert tokens == {(CANTATA, "bf16"): [CANTATA, "same"], (LLAMA_CPP, "bf16"): [LLAMA_CPP, "same"]}


def test_a_server_that_ends_is_said_with_its_log(tmp_path: Path) -> None:
    program = tmp_path / "llama-server"
    program.write_text("#!/bin/sh\nexit 3\n")
    program.chmod(0o755)
    log = tmp_path / "log"
    with (
        pytest.raises(ConfigError, match=f"llama-server ended with 3; {log} may say why"),
        llama_cpp.server(program, tmp_path, 1, 1, 8, log),
    ):
        pass


def test_what_we_and_our_children_use_is_not_others() -> None:
    """A child that takes a second of a processor changes our part by it, and the machine's by at
    least as much."""
    meter, ours, machine = OthersMeter(), tree_s(os.getpid()), machine_s()
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.5: pass"], check=True)
    used = tree_s(os.getpid()) - ours
    assert used >= 0.45
    assert machine_s() - machine >= used - 0.05
    assert 0 <= meter.share() <= 1
