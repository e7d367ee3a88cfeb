"""The training run: its schedule, its state on disk, and one step."""

import os
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from cluster.harmony.encoding import HarmonyEncoding
from scripts.demo.checkpoint import TOKENIZER_FILES, demo_config
from scripts.demo.conversations import draw
from scripts.demo.network import Batch, Network, initial_parameters, make_batch
from scripts.demo.optimizer import Optimizer, clip
from scripts.demo.tokenizer import write_tokenizer

STATE_FILE = "state.pt"
_MATRIX_RATE = 4e-3
_OTHER_RATE = 3e-3
_DECAY = 0.1
_WARMUP_STEPS = 50
_COOLDOWN_SHARE = 0.35
_BALANCE_WEIGHT = 0.01
_CLIP = 1.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run is: the same plan gives the same examples in the same order.

    Attributes:
        steps: number of updates.
        batch_tokens: tokens of a step, prompts included, before padding.
    """

    steps: int
    batch_tokens: int
    seed: int


@dataclass(slots=True)
class Run:
    """A run in memory.

    Attributes:
        seconds: time spent in steps so far.
    """

    plan: Plan
    folder: Path
    encoding: HarmonyEncoding
    network: Network
    optimizer: Optimizer
    seconds: float = 0.0


def open_run(folder: Path, plan: Plan) -> Run:
    """Continue the run in the folder, or begin one there.

    Raises:
        ValueError: the folder has a run with another plan.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not all((folder / name).is_file() for name in TOKENIZER_FILES):
        write_tokenizer(folder)
    encoding = HarmonyEncoding.load(folder)
    config = demo_config(encoding)
    network = Network(config, initial_parameters(config, plan.seed))
    matrices, others = _kinds(network)
    run = Run(plan, folder, encoding, network, Optimizer(matrices, others))
    if (folder / STATE_FILE).is_file():
        _restore(run)
    return run


def save(run: Run) -> None:
    """Write the state; a kill at any time leaves the last complete one."""
    state = {
        "plan": asdict(run.plan),
        "step": run.optimizer.step,
        "seconds": run.seconds,
        "weights": {name: tensor.detach() for name, tensor in run.network.named_weights()},
        "moments": run.optimizer.moments,
    }
    unfinished = run.folder / f".{STATE_FILE}.unfinished"
    torch.save(state, unfinished)
    os.replace(unfinished, run.folder / STATE_FILE)


def step(run: Run) -> tuple[float, int]:
    """Train on the next batch. Return its loss and its number of tokens."""
    started = time.perf_counter()
    batch = draw_batch(run)
    output = run.network(batch)
    loss = functional.cross_entropy(output.logits, batch.targets)
    (loss + _BALANCE_WEIGHT * output.balance).backward()
    clip(run.network.parameters(), _CLIP)
    rate = schedule(run.optimizer.step, run.plan.steps)
    run.optimizer.update(_MATRIX_RATE * rate, _OTHER_RATE * rate, _DECAY)
    run.seconds += time.perf_counter() - started
    return loss.item(), len(batch.token_ids)


def draw_batch(run: Run) -> Batch:
    """Draw the examples of the next step."""
    rng = random.Random(f"{run.plan.seed} {run.optimizer.step}")
    examples: list[tuple[list[int], list[int]]] = []
    num_tokens = 0
    while num_tokens < run.plan.batch_tokens:
        example = draw(rng)
        prompt, completion = example.prompt_ids(run.encoding), example.completion_ids(run.encoding)
        examples.append((prompt, completion))
        num_tokens += len(prompt) + len(completion)
    return make_batch(examples)


def schedule(step: int, steps: int) -> float:
    """Return the factor of the learning rates: a short rise, constant, a linear fall to 0."""
    rise = min(1.0, (step + 1) / _WARMUP_STEPS)
    fall = min(1.0, (steps - step) / (steps * _COOLDOWN_SHARE))
    return min(rise, fall)


def _kinds(network: Network) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the matrices inside the model, and all other parameters."""
    outside = ("embed_tokens", "lm_head", "router")
    matrices: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    for name, tensor in network.named_weights():
        is_matrix = not name.endswith("bias") and tensor.ndim > 1
        inside = is_matrix and not any(part in name for part in outside)
        (matrices if inside else others)[name] = tensor
    return matrices, others


@torch.no_grad()
def _restore(run: Run) -> None:
    state = torch.load(run.folder / STATE_FILE)
    if state["plan"] != asdict(run.plan):
        raise ValueError(f"{run.folder} has a run with another plan: {state['plan']}; give another folder")
    for name, tensor in run.network.named_weights():
        tensor.copy_(state["weights"][name])
    run.optimizer.moments = state["moments"]
    run.optimizer.step, run.seconds = state["step"], state["seconds"]
