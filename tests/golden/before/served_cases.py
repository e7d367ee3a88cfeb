"""Requests for a real model with random weights, greedy or with a seed, so that every answer is
known."""

from collections.abc import Iterator

from tests.golden.before.calls import CHAT, COMPLETIONS
from tests.golden.before.compare import Json
from tests.golden.before.conversations import HISTORIES, TOOLS, USER, user

LONG = "The river runs from the mountains to the sea. " * 8
_SAMPLING: dict[str, dict[str, Json]] = {
    "greedy": {"temperature": 0},
    "seeded": {},
    "top_p, top_k": {"top_p": 0.6, "top_k": 30},
    "min_p": {"min_p": 0.3, "temperature": 0.7},
    "penalties": {"presence_penalty": 1.5, "frequency_penalty": 0.8, "repetition_penalty": 1.3},
    "repetition, greedy": {"temperature": 0, "repetition_penalty": 1.8},
    "logit_bias": {"temperature": 0, "logit_bias": {"300": 30, "301": 29}, "frequency_penalty": 1},
    "ban": {"temperature": 0, "logit_bias": {"1684": -100}},
    "logprobs": {"temperature": 0, "logprobs": True, "top_logprobs": 3},
    "chosen logprobs": {"logprobs": True},
    "n": {"n": 3},
    "n, greedy, logprobs": {"n": 2, "temperature": 0, "logprobs": True, "top_logprobs": 1},
    "stop string": {"stop": ["e", "zzz"], "max_tokens": 24},
    "stop token": {"temperature": 0, "logit_bias": {"500": 40}, "stop_token_ids": [500]},
    "min_tokens": {"temperature": 0, "logit_bias": {"500": 40}, "stop_token_ids": [500], "min_tokens": 5},
    "end at once": {"temperature": 0, "logit_bias": {"<|return|>": 90}},
    "ignore_eos": {"temperature": 0, "logit_bias": {"<|return|>": 90}, "ignore_eos": True},
    "one token": {"max_tokens": 1},
    "large seed": {"seed": 2**64 - 1},
    "negative seed": {"seed": -5},
    "unknown model": {"model": "gpt-4"},
    "wrong temperature": {"temperature": 3},
}
_CHAT: dict[str, dict[str, Json]] = {
    "tools": {"tools": TOOLS},
    "tools none": {"tools": TOOLS, "tool_choice": "none"},
    "effort": {"reasoning_effort": "high"},
    "max_completion_tokens": {"max_completion_tokens": 4, "max_tokens": None},
    # Pushed towards harmony's tokens and words, of which the parser makes something.
    "markup": {
        "max_tokens": 40,
        "logit_bias": {"<|channel|>": 7, "<|message|>": 7, "<|start|>": 6, "<|end|>": 6},
    },
    "markup again": {
        "max_tokens": 40,
        "logit_bias": {"<|channel|>": 7, "<|message|>": 8, "<|end|>": 6, "<|call|>": 3},
    },
    "markup, logprobs": {
        "max_tokens": 30,
        "logprobs": True,
        "logit_bias": {"<|channel|>": 7, "<|message|>": 8, "<|end|>": 6},
    },
}


def served(token_ids: dict[str, int]) -> Iterator[tuple[str, str, dict[str, Json]]]:
    """Yield (name, path, body).

    Args:
        token_ids: of the special tokens, by name.
    """
    made: list[tuple[str, str, dict[str, Json]]] = []
    for name, fields in (_SAMPLING | _CHAT).items():
        made.append((f"chat, {name}", CHAT, {"messages": [USER], **fields}))
    for name in (
        "turns",
        "call, call",
        "system, developer",
        "unicode",
        "results out of order",
        "no messages",
    ):
        made.append((f"history {name}", CHAT, {"messages": HISTORIES[name], "tools": TOOLS}))
    made.append(("long", CHAT, {"messages": [user(LONG)]}))
    made.append(("long, again", CHAT, {"messages": [user(LONG + "And then?")], "temperature": 0}))
    made.append(
        ("full context", CHAT, {"messages": [user("word " * 120)], "ignore_eos": True, "max_tokens": None})
    )
    made.append(("too long", CHAT, {"messages": [user("word " * 600)]}))
    for name, fields in _SAMPLING.items():
        fields = dict(fields)
        if "logprobs" in fields:
            fields["logprobs"] = fields.pop("top_logprobs", 0)
        made.append((f"completion, {name}", COMPLETIONS, {"prompt": "Once", **fields}))
    made.append(("ids", COMPLETIONS, {"prompt": [5, 6, 7, 2044, 9]}))
    made.append(("prompts", COMPLETIONS, {"prompt": ["One", "Two words"], "n": 2}))
    made.append(("echo", COMPLETIONS, {"prompt": "Once <|end|>", "echo": True}))
    made.append(
        (
            "special tokens",
            COMPLETIONS,
            {"prompt": [7], "skip_special_tokens": False, "logit_bias": {"<|end|>": 7}},
        )
    )
    made.append(("default length", COMPLETIONS, {"prompt": "Once", "max_tokens": None}))
    made.append(("prefix", COMPLETIONS, {"prompt": list(range(100, 180)), "temperature": 0}))
    made.append(("prefix, again", COMPLETIONS, {"prompt": [*range(100, 180), 5, 6], "temperature": 0}))
    for number, (name, path, body) in enumerate(made):
        whole = {"seed": number, "max_tokens": 8, "return_token_ids": True} | body
        if "logit_bias" in whole:
            whole["logit_bias"] = {
                str(token_ids.get(key, key)): bias for key, bias in whole["logit_bias"].items()
            }
        yield name, path, whole
