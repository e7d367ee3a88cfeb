"""A small gpt-oss checkpoint that gives, greedily, the answers that a test wrote for it: real
weights, real forward passes, known answers.

All weights but the output head are random. The scripts are run through the random model with their
own tokens as input; the last hidden states at the positions of the answers are then the inputs of a
ridge regression whose targets are the next tokens, one-hot. Its solution is the output head.
Different contexts have different hidden states, so with fewer positions than the hidden size every
script can be met; a margin that survives bfloat16 is checked before the checkpoint is kept.

The states come from transformers' GptOssForCausalLM, which knows nothing of our model code: an
error there shows as a broken script.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file
from transformers import GptOssForCausalLM, Mxfp4Config

from cluster.harmony.encoding import HarmonyEncoding
from cluster.harmony.make_tokenizer import write_bpe_tokenizer
from cluster.harmony.render import Conversation, render
from workers.config import ModelConfig
from workers.model.make_checkpoint import write_checkpoint
from workers.model.safetensors_files import SINGLE_FILE
from workers.model.tensor_specs import LM_HEAD

VOCAB_SIZE = 2048
GAIN = 40.0
"""Logit of the right token; all others are near 0, so that sampling at temperature 1 follows the
script as well."""
MIN_MARGIN = 0.3 * GAIN
"""Least distance of the right token to the next best one, over all positions, in float32 and in
bfloat16."""
_RIDGE = 1.0


@dataclass(frozen=True, slots=True)
class Script:
    """One prompt and the model's answer to it.

    Attributes:
        prompt: a conversation, rendered as the gateway renders it, or token ids.
        completion: the text after `<|start|>assistant`, with the names of special tokens in it and
            with its end token; or token ids.
    """

    prompt: Conversation | tuple[int, ...]
    completion: str | tuple[int, ...]

    def prompt_ids(self, encoding: HarmonyEncoding) -> list[int]:
        return render(self.prompt, encoding) if isinstance(self.prompt, Conversation) else list(self.prompt)

    def completion_ids(self, encoding: HarmonyEncoding) -> list[int]:
        if isinstance(self.completion, str):
            return encoding.encode_with_special(self.completion)
        return list(self.completion)


def scripted_encoding(vocab_size: int = VOCAB_SIZE) -> HarmonyEncoding:
    """Return the tokenizer of a scripted checkpoint with this vocabulary; building it needs no
    checkpoint."""
    with TemporaryDirectory() as folder:
        write_bpe_tokenizer(Path(folder), vocab_size)
        return HarmonyEncoding.load(Path(folder))


def write_scripted_checkpoint(
    path: Path,
    scripts: Sequence[Script],
    *,
    vocab_size: int = VOCAB_SIZE,
    hidden_size: int = 1024,
    seed: int = 0,
) -> float:
    """Write a checkpoint (MXFP4 experts, one sliding and one full layer, tokenizer included) that
    answers each prompt with its completion.

    Args:
        path: the folder to make; must not exist or be empty.
        hidden_size: the positions of all completions together should stay under half of it.
    Returns:
        the least margin between the right token's logit and the next best, over all positions, in
        float32 and bfloat16.
    Raises:
        ValueError: no or an empty script, two scripts that want different tokens in the same
            context, or more positions than the hidden size can tell apart.
    """
    encoding = scripted_encoding(vocab_size)
    runs = [(script.prompt_ids(encoding), script.completion_ids(encoding)) for script in scripts]
    _check_runs(runs)
    write_checkpoint(
        path,
        _config(vocab_size, hidden_size, encoding),
        seed=seed,
        add_files=lambda folder: write_bpe_tokenizer(folder, vocab_size),
    )
    try:
        model = GptOssForCausalLM.from_pretrained(
            path, dtype=torch.float32, quantization_config=Mxfp4Config(dequantize=True)
        )
        exact = _hidden_states(model, runs)
        _round_activations(model)
        rough = _hidden_states(model, runs)
        targets = torch.tensor([token for _, completion in runs for token in completion])
        head = _solve_head(torch.cat([exact, rough]), targets.repeat(2), vocab_size)
        margin = min(_least_margin(rows, targets, head) for rows in (exact, rough))
        if margin < MIN_MARGIN:
            raise ValueError(
                f"{len(targets)} positions with hidden_size {hidden_size} leave a margin of {margin:.1f}, "
                f"wanted is {MIN_MARGIN:.1f}: "
                "use fewer or shorter scripts, or a larger hidden_size"
            )
        weights = load_file(path / SINGLE_FILE)
        weights[LM_HEAD] = head
        save_file(weights, path / SINGLE_FILE, metadata={"format": "pt"})
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise
    return margin


def _config(vocab_size: int, hidden_size: int, encoding: HarmonyEncoding) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=256,
        num_layers=2,
        num_heads=8,
        num_kv_heads=2,
        head_dim=64,
        num_experts=8,
        num_experts_per_token=4,
        layer_windows=(128, None),
        max_context_len=131_072,
        stop_token_ids=encoding.stop_token_ids,
    )


def _check_runs(runs: Sequence[tuple[list[int], list[int]]]) -> None:
    wanted: dict[tuple[int, ...], tuple[int, int]] = {}
    if not runs:
        raise ValueError("scripts must have at least one script")
    for number, (prompt, completion) in enumerate(runs):
        if not prompt or not completion:
            raise ValueError(f"scripts[{number}] has an empty prompt or completion")
        for position, token in enumerate(completion):
            context = (*prompt, *completion[:position])
            other, other_token = wanted.setdefault(context, (number, token))
            if other_token != token:
                raise ValueError(
                    f"scripts[{other}] and scripts[{number}] want different tokens at position {position} "
                    f"of the same context"
                )


@torch.inference_mode()
def _hidden_states(model: GptOssForCausalLM, runs: Sequence[tuple[list[int], list[int]]]) -> torch.Tensor:
    """Return [positions, hidden_size] float32: the final-normed state from which each completion
    token is predicted."""
    rows = []
    for prompt, completion in runs:
        output = model.model(torch.tensor([prompt + completion[:-1]]))
        rows.append(output.last_hidden_state[0, len(prompt) - 1 :])
    return torch.cat(rows)


def _round_activations(model: GptOssForCausalLM) -> None:
    """Make every module's output what bfloat16 can hold. Real bfloat16 products take minutes on
    CPUs without such instructions."""

    def rounded(module: torch.nn.Module, arguments: object, output: object) -> object:
        return output.bfloat16().float() if isinstance(output, torch.Tensor) else output

    for module in model.modules():
        module.register_forward_hook(rounded)


def _solve_head(states: torch.Tensor, targets: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Return [vocab_size, hidden_size] bfloat16, minimising |states @ head.T - GAIN *
    one_hot(targets)|² + a ridge."""
    rows = states.double()
    system = rows.T @ rows + _RIDGE * torch.eye(rows.shape[1], dtype=torch.float64)
    tokens, columns = targets.unique(return_inverse=True)
    moments = torch.zeros(len(tokens), rows.shape[1], dtype=torch.float64).index_add_(0, columns, rows)
    head = torch.zeros(vocab_size, rows.shape[1], dtype=torch.bfloat16)
    head[tokens] = (GAIN * torch.cholesky_solve(moments.T, torch.linalg.cholesky(system)).T).to(
        torch.bfloat16
    )
    return head


def _least_margin(states: torch.Tensor, targets: torch.Tensor, head: torch.Tensor) -> float:
    logits = states @ head.float().T
    right = logits.gather(1, targets[:, None])[:, 0]
    others = logits.scatter(1, targets[:, None], -torch.inf).amax(1)
    return float((right - others).min())
