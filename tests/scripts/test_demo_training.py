"""The demo model's network against the engine, its training and its evaluation."""

import os
import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cluster.frontend.chat_messages import ChatMessage, ToolCall, harmony_messages
from cluster.harmony.encoding import HarmonyEncoding
from cluster.harmony.render import render
from scripts import train_demo
from scripts.demo import evaluation, training
from scripts.demo.checkpoint import as_stored, demo_config, save_checkpoint
from scripts.demo.conversations import draw, draw_skill
from scripts.demo.examples import Example
from scripts.demo.network import Network, initial_parameters, make_batch
from scripts.demo.optimizer import orthogonalized
from scripts.demo.sink_attention import causal_mask, sink_attention
from workers.engine.llm import LLM

LARGEST_CHECKPOINT_BYTES = 8_000_000


@pytest.fixture
def network(encoding: HarmonyEncoding) -> Network:
    """A random network, with biases and sinks that are not zero."""
    config = demo_config(encoding)
    network = Network(config, initial_parameters(config, seed=1))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, tensor in network.named_weights():
            if name.endswith(("bias", "sinks")):
                tensor.normal_(std=0.3, generator=generator)
    return network


def test_gives_the_logits_of_the_engine(
    network: Network, encoding: HarmonyEncoding, tokenizer_folder: Path, tmp_path: Path
) -> None:
    rng = random.Random(1)
    examples = [draw_skill(rng, skill, "train") for skill in ("sum", "tool call", "tool result", "memory")]
    pairs = [(example.prompt_ids(encoding), example.completion_ids(encoding)) for example in examples]
    pairs.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
    assert len(pairs[-1][0]) > 128, "longer than the window"
    save_checkpoint(network, tmp_path / "checkpoint", tokenizer_folder)
    size = sum(file.stat().st_size for file in (tmp_path / "checkpoint").iterdir())
    assert size < LARGEST_CHECKPOINT_BYTES
    with torch.no_grad():
        logits = as_stored(network)(make_batch(pairs)).logits
    with LLM(tmp_path / "checkpoint", dtype="float32", kv_cache_bytes=16 << 20) as llm:
        engine = torch.cat(
            [llm.logits(prompt + completion[:-1])[len(prompt) - 1 :] for prompt, completion in pairs]
        )
    # Both compute in fp32, and sum in different orders.
    torch.testing.assert_close(logits, engine, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [None, 3])
def test_sink_attention_and_its_gradient(window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    inputs = draw(2, 5, 2, 3, 4), draw(2, 5, 2, 4), draw(2, 5, 2, 4), draw(6)
    q, k, v, sinks = inputs
    scores = torch.einsum("nqhgd,nkhd->nhgqk", q, k) / 2 + causal_mask(5, window)
    columns = torch.cat([scores, sinks.view(1, 2, 3, 1, 1).expand(2, 2, 3, 5, 1)], -1)
    expected = torch.einsum("nhgqk,nkhd->nqhgd", columns.softmax(-1)[..., :-1], v)
    torch.testing.assert_close(sink_attention(*inputs, window), expected)
    assert torch.autograd.gradcheck(lambda *tensors: sink_attention(*tensors, window), inputs)


def test_examples_of_a_batch_do_not_see_each_other(network: Network, encoding: HarmonyEncoding) -> None:
    rng = random.Random(4)
    pairs = [(e.prompt_ids(encoding), e.completion_ids(encoding)) for e in (draw(rng) for _ in range(4))]
    pairs.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
    with torch.no_grad():
        together = network(make_batch(pairs)).logits
        alone = torch.cat([network(make_batch([pair])).logits for pair in pairs])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_directions_of_matrices_have_equal_singular_values() -> None:
    matrices = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(orthogonalized(matrices))
    assert float(singular.min()) > 0.6
    assert float(singular.max()) < 1.3


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path: Path, tokenizer_folder: Path) -> None:
    plan = training.Plan(steps=2, batch_tokens=150, seed=3)

    def opened(name: str) -> training.Run:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        for file in tokenizer_folder.iterdir():
            shutil.copy(file, folder)
        return training.open_run(folder, plan)

    whole, first = opened("whole"), opened("stopped")
    losses = [training.step(whole)[0] for _ in range(2)]
    resumed = [training.step(first)[0]]
    training.save(first)
    second = opened("stopped")
    assert second.optimizer.step == 1
    resumed += [training.step(second)[0]]
    assert resumed == losses
    # The second update depends on the moments after the first.
    weights = dict(whole.network.named_weights())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in second.network.named_weights())
    with pytest.raises(ValueError, match="another plan"):
        training.open_run(tmp_path / "stopped", replace(plan, steps=3))


def test_the_learning_rate_rises_stays_and_falls_to_nothing() -> None:
    rates = [training.schedule(step, 1000) for step in range(1001)]
    assert 0 < rates[0] < rates[10] < rates[100] == rates[600] == 1 > rates[900] > rates[1000] == 0


class _Scripted:
    """Answers that are right for all skills but one."""

    def __init__(self, wrong: str) -> None:
        self._wrong = wrong

    def ask(self, examples: Sequence[Example]) -> list[evaluation.Answer | None]:
        return [
            evaluation.Answer("other", "{}") if e.skill == self._wrong else evaluation.expected_answer(e)
            for e in examples
        ]


def test_exactness_counts_right_answers_by_skill() -> None:
    questions = evaluation.questions(3)
    counts = evaluation.exactness(_Scripted("tool call"), questions)
    assert counts.pop("tool call") == (0, 3)
    assert set(counts.values()) == {(3, 3)}
    assert questions == evaluation.questions(3)


def test_chat_messages_are_rendered_as_the_conversation(encoding: HarmonyEncoding) -> None:
    rng = random.Random(6)
    for example in (draw(rng) for _ in range(200)):
        conversation = example.conversation
        # Reasoning within an unfinished tool loop is not sent over HTTP.
        messages = tuple(m for m in conversation.messages if m.channel != "analysis")
        sent = tuple(map(_chat_message, evaluation.chat_messages(messages)))
        actual, expected = (
            render(replace(conversation, messages=part), encoding)
            for part in (harmony_messages(sent), messages)
        )
        assert actual == expected


def _chat_message(message: dict[str, object]) -> ChatMessage:
    calls = message.pop("tool_calls", [])
    assert isinstance(calls, list)
    tool_calls = tuple(ToolCall(call["id"], **call["function"]) for call in calls)
    return ChatMessage(**message, tool_calls=tool_calls)  # type: ignore[arg-type]


def test_a_run_belongs_to_one_process(tmp_path: Path) -> None:
    first = train_demo.claim(tmp_path)
    assert (tmp_path / "pid").read_text() == f"{os.getpid()}\n"
    with pytest.raises(SystemExit, match=f"process {os.getpid()} is training"):
        train_demo.claim(tmp_path)
    first.close()
    train_demo.claim(tmp_path).close()
