"""Fields of a body's top level that its schema does not have: typing errors are refused, the rest
is ignored and named in a header of the answer, since clients gain new fields all the time."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from workers.errors import InvalidRequest

HEADER = "x-cantata-ignored-fields"
"""Header of an answer that names the ignored fields."""

NOT_OFFERED: Mapping[str, tuple[object, ...]] = {
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "echo": (False,),
    "ebnf": (),
    "include_stop_str_in_output": (False,),
    "input_ids": (),
    "no_stop_trim": (False,),
    "prompt_embeds": (),
    "regex": (),
    "stop_regex": (),
    "use_beam_search": (False,),
}
"""Fields of vLLM, SGLang and llama.cpp without which the answer would be another than the one
requested: refused, except for null and for these values, which are those servers' defaults."""

KNOWN_ELSEWHERE = frozenset(
    (  # noqa: SIM905 - a line each would be 50 lines
        "bootstrap_host bootstrap_port bootstrap_room chat_template custom_labels "
        "custom_logit_processor custom_params data_parallel_rank disagg_prefill_dp_rank documents "
        "ec_transfer_params extra_key guided_decoding_backend guided_whitespace_pattern images_config "
        "kv_transfer_params length_penalty logits_processors logprob_token_ids lora_path max_dynamic_patch "
        "media_io_kwargs min_dynamic_patch mm_processor_kwargs models ngram_corpus_id repetition_detection "
        "request_id return_cached_tokens_details return_hidden_states return_meta_info return_mm_kwargs "
        "return_prompt_text return_prompt_token_ids return_routed_experts return_token_offsets rid "
        "routed_dp_rank routed_experts_prompt_start routed_experts_start_len separate_reasoning session_id "
        "session_params spaces_between_special_tokens stream_interval stream_reasoning task "
        "use_audio_in_video vllm_xargs watermarking"
    ).split()
)
"""Fields of vLLM and SGLang that have no effect here, and OpenRouter's `models`, which looks like a
typing error. They are ignored even if unknown fields are refused."""

_MAX_EXAMINED = 16
"""Maximum number of unknown fields that are compared with the known ones."""
_MAX_NAME = 64
_MAX_SHOWN = 16
_SHOWN_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def ignored_fields(body: Mapping[str, object], known: Iterable[str], *, refuse: bool) -> list[str]:
    """Return the names of a body's fields that have no effect.

    Args:
        known: the schema's fields.
        refuse: refuse unknown fields.
    Raises:
        InvalidRequest: a name is probably misspelt; the field requests what is not offered; a name
            is unknown, with `refuse`.
    """
    names = set(known)
    others = [name for name in body if name not in names]
    if not others:
        return []
    candidates = sorted(names | NOT_OFFERED.keys())
    ignored = []
    num_examined = 0
    for name in others:
        if name in NOT_OFFERED:
            if body[name] is not None and body[name] not in NOT_OFFERED[name]:
                raise InvalidRequest(f"{name} is not offered by this server: leave it out.", name)
            continue
        if name not in KNOWN_ELSEWHERE:
            num_examined += 1
            meant = misspelt(name, candidates) if num_examined <= _MAX_EXAMINED else None
            if meant is not None or refuse:
                raise _unknown(name, meant)
        if body[name] is not None or name not in KNOWN_ELSEWHERE:
            ignored.append(name)
    return ignored


def _unknown(name: str, meant: str | None) -> InvalidRequest:
    hint = "this server has no such parameter." if meant is None else f"did you mean {meant}?"
    return InvalidRequest(f"Unknown field {name[:100]}: {hint}", name[:100] or None)


def header_value(names: Sequence[str]) -> str:
    """Return the header that names these fields: up to 16 of them, then the number of the others.
    What is no common name is shown as `?`, so that a client's text stays out of the header."""
    shown = [name if _SHOWN_NAME.fullmatch(name) else "?" for name in names[:_MAX_SHOWN]]
    rest = len(names) - len(shown)
    return ", ".join(shown) + (f", and {rest} more" if rest else "")


def misspelt(name: str, known: Iterable[str]) -> str | None:
    """Return the known field that this name is probably a misspelling of, or None.

    Case, underscores and hyphens do not count. In names of 8 characters or more it may take two
    edits, in names of 5 to 7 a missing, an extra or two swapped characters, in shorter ones a
    plural's `s` or the swap: `mode`, `top_a` and `score` are names of their own.
    """
    if len(name) > _MAX_NAME:
        return None
    folded = _fold(name)
    best: tuple[int, str] | None = None
    for field in known:
        edits = _errors(folded, _fold(field))
        if edits is not None and (best is None or edits < best[0]):
            best = (edits, field)
    return None if best is None else best[1]


def _fold(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def _errors(typed: str, field: str) -> int | None:
    """Return the number of typing errors between two folded names; None if they are two names."""
    if typed == field:
        return 0
    length = min(len(typed), len(field))
    allowed = 2 if length >= 8 else 1
    if length < 5 and len(typed) != len(field):
        return 1 if length == 4 and (typed == f"{field}s" or field == f"{typed}s") else None
    if abs(len(typed) - len(field)) > allowed:
        return None
    if length < 8 and len(typed) == len(field) and sorted(typed) != sorted(field):
        return None
    if sum((Counter(typed) - Counter(field)).values()) > allowed:
        return None  # each edit adds one character at most
    return num_edits(typed, field, allowed)


def num_edits(first: str, second: str, most: int) -> int | None:
    """Return how many characters to insert, delete, replace or swap with their neighbour make one
    text the other (optimal string alignment); None if they are more than `most`."""
    before: list[int] = []
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        before, last, row = row, before, [i]
        for j, b in enumerate(second, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (a != b))
            if i > 1 and j > 1 and a == second[j - 2] and first[i - 2] == b:
                cost = min(cost, last[j - 2] + 1)
            row.append(cost)
        if min(row) > most:
            return None
    return row[-1] if row[-1] <= most else None
