"""The scripted checkpoint gives its scripts' answers: through transformers, and through our engine
with all scripts in one batch."""

from pathlib import Path

import pytest
import torch
from transformers import GptOssForCausalLM, Mxfp4Config

from cluster.frontend.chat_messages import ChatMessage, ToolCall, harmony_messages
from cluster.harmony.render import Conversation
from cluster.harmony.tools import ToolDefinition
from tests.support.scripted_checkpoint import MIN_MARGIN, Script, scripted_encoding, write_scripted_checkpoint
from workers.config import Dtype
from workers.engine.llm import LLM
from workers.request import SamplingParams

WEATHER = ToolDefinition(
    "get_weather",
    "Weather now.",
    {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
)
THOUGHT = "The user wants the weather."
ASK = ChatMessage("user", "How is the weather in Paris?")
CALL = ChatMessage(
    "assistant", reasoning=THOUGHT, tool_calls=(ToolCall("call_1", "get_weather", '{"city":"Paris"}'),)
)
RESULT = ChatMessage("tool", "sunny", tool_call_id="call_1")
SCRIPTS = (
    Script(
        Conversation(harmony_messages((ASK,)), tools=(WEATHER,)),
        f"<|channel|>analysis<|message|>{THOUGHT}<|end|><|start|>assistant<|channel|>commentary "
        f"to=functions.get_weather "
        '<|constrain|>json<|message|>{"city":"Paris"}<|call|>',
    ),
    Script(
        Conversation(harmony_messages((ASK, CALL, RESULT)), tools=(WEATHER,)),
        "<|channel|>final<|message|>Sunny — 21 °C 😀.<|return|>",
    ),
    Script(
        Conversation(harmony_messages((ChatMessage("user", "Hello"),))),
        "<|channel|>final<|message|>Hello! Hello! Hello!<|return|>",
    ),
    Script(
        Conversation(harmony_messages((ChatMessage("user", "Hello!"),))),
        "<|channel|>final<|message|>Hello! Hello! Goodbye.<|return|>",
    ),
    Script((7, 8, 9), (10, 10, 10, 11)),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scripted") / "checkpoint"
    assert write_scripted_checkpoint(path, SCRIPTS) >= MIN_MARGIN
    return path


def test_transformers_follows_the_scripts(checkpoint: Path) -> None:
    model = GptOssForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, quantization_config=Mxfp4Config(dequantize=True)
    )
    encoding = scripted_encoding()
    for script in SCRIPTS:
        prompt, expected = script.prompt_ids(encoding), script.completion_ids(encoding)
        output = model.generate(torch.tensor([prompt]), max_new_tokens=len(expected), do_sample=False)
        assert output[0, len(prompt) :].tolist() == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_our_engine_follows_the_scripts(checkpoint: Path, dtype: Dtype) -> None:
    encoding = scripted_encoding()
    runs = [(script.prompt_ids(encoding), script.completion_ids(encoding)) for script in SCRIPTS]
    # The last script has no end token. Greedy and sampled sequences share each step.
    sampling = [
        SamplingParams(max_tokens=len(completion), temperature=temperature, seed=7)
        for temperature in (0.0, 1.0)
        for _, completion in runs
    ]
    with LLM(checkpoint, dtype=dtype, max_model_len=1024, kv_cache_bytes=32 << 20) as llm:
        outputs = llm.generate([prompt for prompt, _ in runs] * 2, sampling, use_tqdm=False)
        assert [list(output.outputs[0].token_ids) for output in outputs] == [
            completion for _, completion in runs
        ] * 2
        for prompt, completion in runs:
            logits = llm.logits(prompt + completion[:-1])[len(prompt) - 1 :]
            right = logits.gather(1, torch.tensor(completion)[:, None])[:, 0]
            others = logits.scatter(1, torch.tensor(completion)[:, None], -torch.inf).amax(1)
            assert (right - others).min() >= MIN_MARGIN / 2


def test_contradicting_scripts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"scripts\[0\] and scripts\[1\] want different tokens at position 1"
    ):
        write_scripted_checkpoint(tmp_path / "checkpoint", [Script((1, 2), (3, 4)), Script((1, 2), (3, 5))])
    assert list(tmp_path.iterdir()) == []


def test_more_positions_than_can_be_told_apart_are_refused(tmp_path: Path) -> None:
    tokens = torch.randint(0, 256, (8, 40), generator=torch.Generator().manual_seed(0)).tolist()
    scripts = [Script((number,), tuple(row)) for number, row in enumerate(tokens)]
    with pytest.raises(ValueError, match="320 positions with hidden_size 128"):
        write_scripted_checkpoint(tmp_path / "checkpoint", scripts, hidden_size=128)
    assert list(tmp_path.iterdir()) == []
