"""Requests that are wrong, or right at the edge: every field with values of every kind, malformed
bodies, other routes."""

import random
from collections.abc import Iterator

from tests.golden.before.calls import CHAT, COMPLETIONS
from tests.golden.before.compare import Json
from tests.golden.before.conversations import TOOLS, USER

KINDS: tuple[Json, ...] = (None, True, "x", -1, 0, 3, 1.5, 2**70, [], ["x"], {"x": 1})
_SHARED = (
    *(
        "model",
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
    ),
    *(
        "repetition_penalty",
        "logit_bias",
        "seed",
        "stop",
        "stop_token_ids",
        "min_tokens",
        "ignore_eos",
        "n",
        "stream",
    ),
    *("stream_options", "return_token_ids", "user", "logprobs", "nonsense"),
)
_CHAT = (
    *("messages", "max_completion_tokens", "tools", "tool_choice", "parallel_tool_calls", "top_logprobs"),
    *(
        "reasoning_effort",
        "reasoning",
        "include_reasoning",
        "chat_template_kwargs",
        "response_format",
        "modalities",
    ),
    *(
        "functions",
        "function_call",
        "metadata",
        "store",
        "service_tier",
        "prediction",
        "prompt_cache_key",
        "safety_identifier",
    ),
)
_COMPLETION = ("prompt", "echo", "add_special_tokens", "skip_special_tokens", "best_of", "suffix")
_LIMITS: dict[str, tuple[Json, ...]] = {
    "temperature": (2, 2.01, 1e-6, 1e-5, -0.001),
    "top_p": (0, 1, 1.001, 1e-9),
    "top_k": (-2, 2**31, 2**40),
    "min_p": (1, 1.01, -0.1),
    "presence_penalty": (-2, -2.1, 2, 2.1),
    "frequency_penalty": (-2, -2.1, 2, 2.1),
    "repetition_penalty": (0.009, 0.01, 100, 100.1),
    "logit_bias": (
        {"5": 100},
        {"5": 101},
        {"2047": 1},
        {"2048": 1},
        {"05": 1},
        {"-1": 1},
        {str(i): 1 for i in range(400)},
    ),
    "seed": (-1, 2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1),
    "stop": (["a"] * 4, ["a"] * 5, ["a", "a"], ["a", ""], "y" * 3000, ["a"] * 200),
    "stop_token_ids": ([2047], [2048], [-1], [0] * 200, ["5"], [1.5]),
    "min_tokens": (5, 1023, 1024, 2000),
    "max_tokens": (1, 900, 1023, 1024, 2**31),
    "n": (2, 129, 1025),
    "logprobs": (5, 20, 21),
    "stream_options": ({"include_usage": True}, {"include_usage": "yes"}, {"x": 1}),
}
_TOGETHER: tuple[dict[str, Json], ...] = (
    {"min_tokens": 8, "max_tokens": 7},
    {"min_tokens": 8, "ignore_eos": True, "max_tokens": 8},
    {"max_tokens": 5, "max_completion_tokens": 6},
    {"max_tokens": 5, "max_completion_tokens": 5},
    {"max_completion_tokens": 1024},
    {"top_logprobs": 3},
    {"logprobs": False, "top_logprobs": 3},
    {"logprobs": True, "top_logprobs": 20},
    {"logprobs": True, "top_logprobs": 21},
    {"tool_choice": "required", "tools": TOOLS},
    {"tool_choice": "auto"},
    {"tool_choice": "none", "tools": TOOLS},
    {"tool_choice": "auto", "tools": TOOLS},
    {"tool_choice": {"type": "function", "function": {"name": "f"}}, "tools": TOOLS},
    {"response_format": {"type": "text"}},
    {"response_format": {"type": "json_object"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}},
    {"reasoning_effort": "none"},
    {"reasoning_effort": "max"},
    {"reasoning_effort": "low", "reasoning": {"effort": "high"}},
    {"reasoning": {"effort": "low"}},
    {"reasoning": {"effort": "minimal"}},
    {"chat_template_kwargs": {"reasoning_effort": "low"}, "reasoning_effort": "high"},
    {"chat_template_kwargs": {"nonsense": 1}},
    {"stream_options": {"include_usage": True}, "stream": True},
    {"modalities": ["text", "audio"]},
    {"temperature": 0, "n": 3},
    {"tools": [{"type": "web_search"}]},
    {
        "tools": [
            {"type": "function", "function": {"name": "f", "strict": True, "parameters": {"type": "object"}}}
        ]
    },
    {"functions": [{"name": "f"}]},
    {"metadata": {"a": "b"}, "store": False, "user": "u", "prompt_cache_key": "k"},
)
_PROMPTS: tuple[Json, ...] = (
    *(
        "Once",
        "",
        ["One", "Two"],
        ["One", ""],
        [5, 6, 7],
        [[5], [6, 7]],
        [[]],
        [5, "x"],
        [True],
        [2047],
        [2048],
        [-1],
    ),
    *(
        "<|start|>user<|message|>Hi<|end|>",
        ["x"] * 129,
        "word " * 1100,
        [5] * 1023,
        [5] * 1024,
        [5] * 1000,
        [[5] * 1100, [6]],
    ),
)
_BODIES: tuple[bytes, ...] = (
    *(
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"5",
        b"\xff\xfe{}",
        b'{"messages": 1}',
        b"[" * 5000,
        b'{"a":' * 3000 + b"1" + b"}" * 3000,
    ),
    b'{"messages": [{"role": "user", "content": "\xff"}]}',
    b'{"temperature": NaN, "messages": [{"role": "user", "content": "x"}]}',
    b'{"logit_bias": {"5": Infinity}, "messages": [{"role": "user", "content": "x"}]}',
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"messages": [{"role": "user", "content": "x"}], "seed": 1, "seed": 2}',
    b'{"messages": [{"role": "user", "content": "x"}]} trailing',
    b'{"messages": [' + b",".join([b'{"role": "user", "content": "x"}'] * 20_000) + b"]}",
)
ROUTES: tuple[tuple[str, str], ...] = (
    *(
        ("GET", "/health"),
        ("GET", "/ready"),
        ("GET", "/version"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/gpt-oss-test"),
    ),
    *(
        ("GET", "/v1/models/gpt-4"),
        ("GET", "/nothing"),
        ("GET", CHAT),
        ("DELETE", CHAT),
        ("POST", "/health"),
        ("POST", "/v1/nothing"),
    ),
    *(
        ("GET", "/v1/chat/completions/"),
        ("PUT", "/tokenize"),
        ("OPTIONS", CHAT),
        ("HEAD", "/health"),
        ("POST", "/v1/responses"),
    ),
)
TOKENS: tuple[tuple[str, Json], ...] = (
    ("/tokenize", {"prompt": "Hello 🎉 <|end|>"}),
    ("/tokenize", {"prompt": "Hello 🎉", "return_token_strs": True}),
    ("/tokenize", {"messages": [USER], "tools": TOOLS, "return_token_strs": True}),
    ("/tokenize", {"prompt": "x", "messages": [USER]}),
    ("/tokenize", {}),
    ("/tokenize", {"prompt": 5}),
    ("/tokenize", {"messages": [USER], "add_generation_prompt": False}),
    ("/tokenize", {"prompt": "x", "model": "gpt-4"}),
    ("/tokenize", {"prompt": ""}),
    ("/tokenize", {"messages": [USER], "reasoning_effort": "none"}),
    ("/detokenize", {"tokens": [1, 2, 3, 2044, 2047]}),
    ("/detokenize", {"tokens": []}),
    ("/detokenize", {"tokens": [2048]}),
    ("/detokenize", {"tokens": ["x"]}),
    ("/detokenize", {"tokens": [1], "model": "gpt-4"}),
    ("/detokenize", {}),
)


def edges() -> Iterator[tuple[str, str, Json]]:
    """Yield (name, path, body); each is sent once, without `stream` unless it says so."""
    for path, base, names in (
        (CHAT, {"messages": [USER]}, _CHAT),
        (COMPLETIONS, {"prompt": "Once"}, _COMPLETION),
    ):
        kind = "chat" if path == CHAT else "completion"
        for name in (*_SHARED, *names):
            for number, value in enumerate((*KINDS, *_LIMITS.get(name, ()))):
                if (name, value) != ("stream", True):
                    yield f"{kind}: {name}: {_shown(value, number)}", path, {**base, name: value}
        for number, fields in enumerate(_TOGETHER):
            yield f"{kind}: {_shown(fields, number)}", path, {**base, **fields}
        for number, body in enumerate(_BODIES):
            yield f"{kind}: {number}: body {body[:30]!r}", path, body
    for number, prompt in enumerate(_PROMPTS):
        for fields in ({}, {"echo": True}, {"n": 2, "logprobs": 1}, {"best_of": 2, "n": 2, "suffix": ""}):
            yield f"prompt {_shown(prompt, number)} {fields}", COMPLETIONS, {"prompt": prompt, **fields}
    draw = random.Random(8)
    for number in range(60):
        name_values = {
            name: draw.choice((*_LIMITS[name], 1, None)) for name in draw.sample(sorted(_LIMITS), 3)
        }
        yield (
            f"random {number}",
            draw.choice((CHAT, COMPLETIONS)),
            {"messages": [USER], **name_values} if number % 2 else {"prompt": "Once", **name_values},
        )


def _shown(value: Json, number: int) -> str:
    return f"{number}: {str(value)[:40]}".replace(".", "·")
