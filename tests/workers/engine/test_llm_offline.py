"""The offline API on a checkpoint with a tokenizer."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from cluster.harmony.make_tokenizer import write_bpe_tokenizer
from kernels.cpu import native
from tests.support.tiny_model import TINY
from workers.config import CpuIsa
from workers.engine.llm import END_TOKENS, LLM, SamplingParams
from workers.errors import CheckpointError, ConfigError, ContextLengthExceeded, InvalidRequest
from workers.model.make_checkpoint import write_checkpoint

VOCAB = 600


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "with-tokenizer"
    write_checkpoint(
        path,
        replace(TINY, vocab_size=VOCAB, stop_token_ids=()),
        seed=3,
        add_files=lambda out: write_bpe_tokenizer(out, VOCAB),
    )
    return path


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[LLM]:
    with LLM(checkpoint, dtype="float32", max_model_len=128, max_num_seqs=4, kv_cache_bytes=4 << 20) as llm:
        yield llm


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_file(str(checkpoint / "tokenizer.json"))


def test_texts_and_ids_are_answered_in_order(
    llm: LLM, tokenizer: Tokenizer, capfd: pytest.CaptureFixture[str]
) -> None:
    greedy = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
    texts = ["one", "two words", "<|start|>user<|message|>three"]
    outputs = llm.generate([*texts, [1, 2, 3]], greedy)
    assert "Processed prompts" in capfd.readouterr().err
    assert [output.prompt for output in outputs] == [*texts, None]
    for output in outputs[:3]:
        assert output.prompt_token_ids == tuple(tokenizer.encode(output.prompt).ids)
        [answer] = output.outputs
        assert answer.text == tokenizer.decode(answer.token_ids)
        assert (len(answer.token_ids), answer.finish_reason, answer.logprobs) == (5, "length", None)
    assert outputs[2].prompt_token_ids[0] == tokenizer.token_to_id("<|start|>"), (
        "special tokens in a prompt's text are parsed"
    )
    again = llm.generate(outputs[1].prompt_token_ids, greedy, use_tqdm=False)
    assert again[0].outputs[0].token_ids == outputs[1].outputs[0].token_ids
    assert capfd.readouterr().err == ""
    assert len({output.request_id for output in (*outputs, *again)}) == 5


@pytest.mark.parametrize("name", ["portable", "reference"])
def test_every_instruction_set_gives_the_same_greedy_tokens(llm: LLM, checkpoint: Path, name: CpuIsa) -> None:
    greedy = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    prompts = [[1, 2, 3], list(range(40))]
    expected = [output.outputs[0].token_ids for output in llm.generate(prompts, greedy, use_tqdm=False)]
    try:
        with LLM(
            checkpoint,
            dtype="float32",
            max_model_len=128,
            max_num_seqs=4,
            kv_cache_bytes=4 << 20,
            cpu_isa=name,
        ) as other:
            found = [
                output.outputs[0].token_ids for output in other.generate(prompts, greedy, use_tqdm=False)
            ]
            # The first one, with weights as they were packed for it, goes on.
            again = [output.outputs[0].token_ids for output in llm.generate(prompts, greedy, use_tqdm=False)]
            assert other.info.kernels["attention"] == (
                "torch reference (cpu_isa is reference)"
                if name == "reference"
                else f"C++ {name} (as cpu_isa says)"
            )
    finally:
        native.choose("auto")
    assert found == again == expected


def test_an_instruction_set_that_cannot_be_had(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match=r"^cpu_isa is avx3, which this processor or this build does not have: "
    ):
        LLM(checkpoint, cpu_isa="avx3")  # type: ignore[arg-type]
    monkeypatch.setattr(native, "runs", lambda: False)
    with pytest.raises(
        ConfigError,
        match=r"^this processor cannot run the C\+\+ kernels for .*SIGILL: set --cpu-isa or CANTATA_CPU_ISA",
    ):
        LLM(checkpoint)


def test_n_choices_have_seeds_of_their_own(llm: LLM) -> None:
    sampling = SamplingParams(max_tokens=6, temperature=1.5, seed=40, n=3, ignore_eos=True)
    [output] = llm.generate([[1, 2]], sampling, use_tqdm=False)
    assert [answer.index for answer in output.outputs] == [0, 1, 2]
    singles = llm.generate(
        [[1, 2]] * 3, [replace(sampling, n=1, seed=40 + index) for index in range(3)], use_tqdm=False
    )
    assert [answer.token_ids for answer in output.outputs] == [
        single.outputs[0].token_ids for single in singles
    ]
    assert len({answer.token_ids for answer in output.outputs}) == 3
    [wrapped] = llm.generate([[1, 2]], replace(sampling, seed=2**64 - 1, n=2), use_tqdm=False)
    [first] = llm.generate([[1, 2]], replace(sampling, seed=0, n=1), use_tqdm=False)
    assert wrapped.outputs[1].token_ids == first.outputs[0].token_ids


def test_a_missing_seed_is_drawn_anew(llm: LLM) -> None:
    sampling = SamplingParams(max_tokens=8, temperature=1.5, ignore_eos=True)
    outputs = llm.generate([[1, 2]] * 4, sampling, use_tqdm=False)
    assert len({output.outputs[0].token_ids for output in outputs}) == 4


def test_stop_tokens(llm: LLM, tokenizer: Tokenizer) -> None:
    [free] = llm.generate(
        [[1, 2]], SamplingParams(max_tokens=6, temperature=0, ignore_eos=True), use_tqdm=False
    )
    tokens = free.outputs[0].token_ids
    wanted = tokens[3]
    [output] = llm.generate(
        [[1, 2]], SamplingParams(max_tokens=6, temperature=0, stop_token_ids=(wanted,)), use_tqdm=False
    )
    answer = output.outputs[0]
    end = tokens.index(wanted) + 1
    assert (answer.token_ids, answer.finish_reason, answer.stop_reason) == (tokens[:end], "stop", wanted)
    assert answer.text == tokenizer.decode(tokens[: end - 1])


@pytest.mark.parametrize("name", END_TOKENS)
def test_the_tokenizers_end_tokens_end(llm: LLM, tokenizer: Tokenizer, name: str) -> None:
    token_id = tokenizer.token_to_id(name)
    sampling = SamplingParams(max_tokens=6, temperature=0, logit_bias=((token_id, 100.0),))
    ended, ignored = llm.generate(
        [[1, 2]] * 2, [sampling, replace(sampling, ignore_eos=True)], use_tqdm=False
    )
    assert (ended.outputs[0].token_ids, ended.outputs[0].finish_reason, ended.outputs[0].stop_reason) == (
        (token_id,),
        "stop",
        None,
    )
    assert ended.outputs[0].text == ""
    assert ignored.outputs[0].finish_reason == "length"


def test_logprobs_are_the_models(llm: LLM) -> None:
    [output] = llm.generate(
        [[1, 2, 3]],
        SamplingParams(max_tokens=4, temperature=0.7, seed=1, logprobs=2, ignore_eos=True),
        use_tqdm=False,
    )
    [answer] = output.outputs
    expected = llm.logits((1, 2, 3, *answer.token_ids[:-1]))[2:].log_softmax(-1)
    assert answer.logprobs is not None
    for token_id, entry, row in zip(answer.token_ids, answer.logprobs, expected, strict=True):
        # float32 through two forwards that split the work differently.
        assert entry.logprob == pytest.approx(float(row[token_id]), abs=1e-4)
        assert [value for _, value in entry.top] == pytest.approx(row.topk(2).values.tolist(), abs=1e-4)


def test_logits_have_a_row_for_each_token(llm: LLM) -> None:
    logits = llm.logits([5, 6, 7, 8])
    assert (tuple(logits.shape), logits.dtype) == ((4, VOCAB), torch.float32)
    # A prefix's rows do not depend on what follows; 1e-5 for another order of additions.
    torch.testing.assert_close(llm.logits([5, 6]), logits[:2], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("prompts", "sampling", "param"),
    [
        ([[VOCAB]], SamplingParams(), "prompt"),
        ([[]], SamplingParams(), "prompt"),
        ([[1], []], SamplingParams(), "prompt"),
        ([1, "two"], SamplingParams(), "prompt"),
        ([[1.5]], SamplingParams(), "prompt"),
        ([[1]], SamplingParams(temperature=float("nan")), "temperature"),
        ([[1]], SamplingParams(n=0), "n"),
        ([[1]], [SamplingParams(), SamplingParams()], "sampling"),
    ],
)
def test_bad_input_names_the_field(llm: LLM, prompts: object, sampling: object, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        llm.generate(prompts, sampling, use_tqdm=False)
    assert caught.value.param == param


def test_one_prompt_too_long_stops_the_others_and_leaves_a_working_engine(llm: LLM) -> None:
    with pytest.raises(ContextLengthExceeded):
        llm.generate([[1], [1] * 200], SamplingParams(max_tokens=60), use_tqdm=False)
    with pytest.raises(InvalidRequest):
        llm.logits([1] * 129)
    assert llm.generate([[1]], SamplingParams(max_tokens=1), use_tqdm=False)[0].outputs[0].finish_reason


def test_a_foreign_tokenizer_file_is_a_checkpoint_error(checkpoint: Path, tmp_path: Path) -> None:
    for file in checkpoint.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "tokenizer.json").unlink()
    with LLM(tmp_path, dtype="float32", max_model_len=64, kv_cache_bytes=1 << 20) as llm:
        with pytest.raises(InvalidRequest, match="no tokenizer"):
            llm.generate("text", use_tqdm=False)
        assert llm.generate([1, 2], use_tqdm=False)[0].outputs[0].text == ""
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        LLM(tmp_path)


def test_a_cache_too_small_is_a_config_error(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="KV cache"):
        LLM(checkpoint, dtype="float32", max_model_len=128, kv_cache_bytes=1000)
