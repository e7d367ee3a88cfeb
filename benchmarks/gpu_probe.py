"""The first minute on a GPU: whether it computes, and decode steps of one sequence launched one by
one, then from a graph."""

from dataclasses import asdict, replace

import torch

from benchmarks.decode_batches import WARM_UP_STEPS, Batch, Decoder, random_caches
from benchmarks.gpu_attempts import Attempts
from benchmarks.gpu_parts import ChosenModel, Options
from kernels.backend import architecture
from workers.rank.runner import Runner

BATCH = Batch(1, 1024)
STEPS = 20
_NUM_STEPS = WARM_UP_STEPS + STEPS + 1
PRESETS = {"cuda": "20b", "cpu": "tiny"}


def probe(options: Options, attempts: Attempts) -> None:
    """Run three pieces: the device, eager steps, steps from a graph."""
    device = options.device
    result = attempts.begin({"architecture": architecture(device)})

    def compute() -> None:
        ones = torch.ones(256, 256, device=device, dtype=torch.bfloat16)
        assert (ones @ ones).sum().item() == 256**3
        result["product"] = "a bf16 product is right"

    attempts.run("device", compute)
    decode_ways(options, attempts)


def decode_ways(options: Options, attempts: Attempts) -> None:
    """Time the same steps launched one by one and, on a GPU, from a graph."""
    device = options.device
    preset = options.preset or (None if options.model else PRESETS[device.type])
    found = ChosenModel(
        replace(options, preset=preset, batch_sizes=(BATCH.size,), contexts=(BATCH.context,), steps=STEPS)
    )
    caches = random_caches(found.model, [BATCH], _NUM_STEPS)
    result = attempts.begin(found.about, lists=("ways",))

    def decode(way: str) -> None:
        runner = Runner(
            found.model, caches, max_num_seqs=BATCH.size, max_model_len=BATCH.context + _NUM_STEPS
        )
        if way == "graph":
            runner.capture_graphs(lambda phase, done, total: None)
        took = Decoder(runner, found.model.config, STEPS, device).time(BATCH)
        result["ways"].append({"way": way} | asdict(took))

    attempts.run("steps, eager", lambda: decode("eager"))
    if device.type != "cpu":
        attempts.run("steps, from a graph", lambda: decode("graph"))
