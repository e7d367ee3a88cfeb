"""Log-probabilities of prompt tokens, against the logits of the whole prompt."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.support.tiny_model import write_tiny_checkpoint
from workers.engine.llm import LLM, RequestOutput, SamplingParams
from workers.engine.stream import MAX_PROMPT_LOGPROBS, OutputStream, ThreadReader
from workers.request import TokenLogprobs

PROMPTS = [[(7 * i + 3 * j) % 200 for j in range(length)] for i, length in enumerate((1, 2, 16, 17, 33, 90))]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("models"))


def check(llm: LLM, prompt: Sequence[int], output: RequestOutput, num_top: int) -> None:
    found = output.prompt_logprobs
    assert found is not None
    assert len(found) == len(prompt)
    assert found[0] is None
    expected = llm.logits(prompt).log_softmax(-1)
    for position, entry in enumerate(found[1:], start=1):
        assert entry is not None
        row = expected[position - 1]
        # fp32: the same sums in another order
        assert entry.logprob == pytest.approx(float(row[prompt[position]]), abs=1e-5)
        assert len(entry.top) == num_top
        values = torch.tensor([value for _, value in entry.top])
        assert torch.allclose(values, row.topk(num_top).values, rtol=0, atol=1e-5)
        assert all(value == pytest.approx(float(row[token]), abs=1e-5) for token, value in entry.top)


@pytest.mark.parametrize("chunk", [7, 300])
def test_they_are_those_of_the_logits(checkpoint: Path, chunk: int) -> None:
    """Chunks that end anywhere, also beside decoding sequences, and prompts that are in the prefix
    cache."""
    plain = SamplingParams(max_tokens=4, temperature=0)
    with LLM(
        checkpoint, dtype="float32", max_num_batched_tokens=chunk, max_num_seqs=4, kv_cache_bytes=8 << 20
    ) as llm:
        expected = llm.generate(PROMPTS, plain, use_tqdm=False)
        assert all(output.prompt_logprobs is None for output in expected)
        sampling = [
            SamplingParams(max_tokens=4, temperature=0, prompt_logprobs=num_top, n=1 + num_top % 2)
            for num_top in (0, 1, 3, 0, 2, 5)
        ]
        for _ in range(2):
            outputs = llm.generate(PROMPTS, sampling, use_tqdm=False)
            for prompt, entry, output, other in zip(PROMPTS, sampling, outputs, expected, strict=True):
                assert entry.prompt_logprobs is not None
                check(llm, prompt, output, entry.prompt_logprobs)
                assert [choice.token_ids for choice in output.outputs] == [
                    other.outputs[0].token_ids
                ] * entry.n


def test_many_come_in_several_outputs_in_front_of_the_first_token() -> None:
    reader = ThreadReader()
    stream = OutputStream("r", 0, reader)
    entries = tuple(TokenLogprobs(-float(position)) for position in range(2 * MAX_PROMPT_LOGPROBS + 3))
    stream.push_prompt(entries[:5])
    stream.push_prompt(entries[5:])
    stream.push((7,), (), 0)
    stream.end("length")
    reader.notify([stream])
    outputs = [output for _, output in reader.read([stream])]
    assert [len(output.prompt_logprobs) for output in outputs] == [MAX_PROMPT_LOGPROBS] * 2 + [3]
    assert sum((output.prompt_logprobs for output in outputs), ()) == entries
    assert [output.token_ids for output in outputs] == [(), (), (7,)]
    assert [output.finish_reason for output in outputs] == [None, None, "length"]
