"""Trains the demo model from nothing, and measures its answers.

    .venv/bin/python -m scripts.train_demo train runs/demo
    .venv/bin/python -m scripts.train_demo evaluate runs/demo/checkpoint [--url http://127.0.0.1:8000]

Training can be stopped at any time (SIGTERM, Ctrl-C, kill) and goes on where it was when it is
started again with the same arguments; its state is written every few minutes. The checkpoint in
the run's folder is the newest.
"""

import argparse
import fcntl
import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import TextIO

import torch

from scripts.demo import evaluation, training
from scripts.demo.checkpoint import save_checkpoint

STEPS = 2000
BATCH_TOKENS = 6144
SEED = 18
_SAVE_EVERY_S = 180.0
_REPORT_EVERY = 10


def main() -> None:
    arguments = _arguments()
    if arguments.command == "train":
        plan = training.Plan(arguments.steps, arguments.batch_tokens, arguments.seed)
        train(arguments.folder, plan, arguments.evaluate_every, arguments.questions, arguments.threads)
    else:
        evaluate(arguments)


def train(folder: Path, plan: training.Plan, evaluate_every: int, questions: int, threads: int) -> None:
    """Train until the plan's last step or SIGTERM."""
    torch.set_num_threads(threads)
    asked_to_stop = []

    def stop(number: int, frame: FrameType | None) -> None:
        asked_to_stop.append(number)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    lock = claim(folder)
    run = training.open_run(folder, plan)
    num_parameters = sum(tensor.numel() for tensor in run.network.parameters())
    _say(f"{num_parameters:,} parameters, step {run.optimizer.step} of {plan.steps}")
    saved = time.monotonic()
    losses: list[float] = []
    tokens, seconds = 0, run.seconds
    while run.optimizer.step < plan.steps and not asked_to_stop:
        loss, num_tokens = training.step(run)
        losses.append(loss)
        tokens += num_tokens
        step = run.optimizer.step
        if step % _REPORT_EVERY == 0:
            rate = tokens / (run.seconds - seconds)
            left = (plan.steps - step) * run.seconds / step
            loss = sum(losses) / len(losses)
            _say(f"step {step}: loss {loss:.4f}, {rate:.0f} tokens/s, {left / 60:.0f} min left")
            losses, tokens, seconds = [], 0, run.seconds
        if step % evaluate_every == 0 or step == plan.steps:
            training.save(run)
            saved = time.monotonic()
            save_checkpoint(run.network, folder / "checkpoint", folder)
            counts = evaluation.exactness(
                evaluation.InProcess(folder / "checkpoint"), evaluation.questions(questions)
            )
            _say(f"step {step}, held out: {evaluation.report(counts)}")
        if time.monotonic() - saved > _SAVE_EVERY_S:
            training.save(run)
            saved = time.monotonic()
    training.save(run)
    save_checkpoint(run.network, folder / "checkpoint", folder)
    _say(f"stopped after step {run.optimizer.step}, {run.seconds / 60:.1f} min of training")
    lock.close()


def claim(folder: Path) -> TextIO:
    """Return the run's file `pid`, locked and with this process's number in it.

    Raises:
        SystemExit: another process trains in this folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / "pid").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise SystemExit(f"process {file.read().strip()} is training in {folder}; end it first") from None
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def evaluate(arguments: argparse.Namespace) -> None:
    """Print the exactness of a checkpoint, by skill."""
    examples = evaluation.questions(arguments.questions, arguments.split, arguments.seed)
    answers: evaluation.Answers
    if arguments.url is None:
        answers = evaluation.InProcess(arguments.checkpoint)
    else:
        answers = evaluation.OverHttp(arguments.url, arguments.model, arguments.harmony_constraint)
    counts = evaluation.exactness(answers, examples)
    for skill, (right, asked) in counts.items():
        print(f"{skill:12} {right:5} of {asked:5}  {right / asked:.1%}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train the demo model from nothing, and measure its answers."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train, or go on")
    train.add_argument("folder", type=Path, help="folder of the run's state and checkpoint")
    train.add_argument("--steps", type=int, default=STEPS)
    train.add_argument("--batch-tokens", type=int, default=BATCH_TOKENS)
    train.add_argument("--seed", type=int, default=SEED)
    train.add_argument("--threads", type=int, default=os.cpu_count())
    train.add_argument("--evaluate-every", type=int, default=200, metavar="STEPS")
    train.add_argument("--questions", type=int, default=30, help="questions of each skill in an evaluation")
    test = commands.add_parser("evaluate", help="ask questions that were held out of training, greedily")
    test.add_argument("checkpoint", type=Path)
    test.add_argument("--questions", type=int, default=300, help="questions of each skill")
    test.add_argument("--split", choices=("held_out", "train"), default="held_out")
    test.add_argument("--seed", type=int, default=1)
    test.add_argument("--url", help="ask a running server instead of an engine in this process")
    test.add_argument("--model", default="demo", help="name of the model on the server")
    test.add_argument("--harmony-constraint", choices=("off", "headers"), default="off")
    return parser.parse_args()


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


if __name__ == "__main__":
    main()
