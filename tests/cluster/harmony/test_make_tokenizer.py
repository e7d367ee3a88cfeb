"""The tokenizers that checkpoints are made with."""

import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from cluster.harmony.encoding import HARMONY_TOKENS, HarmonyEncoding
from cluster.harmony.make_tokenizer import MIN_VOCAB_SIZE, write_bpe_tokenizer, write_harmony_tokenizer
from workers.errors import ConfigError

TEXT = 'The weather in Paris is sunny. <|start|> {"a": [1, 2]} 你好 it\'s\n\n  x'


@pytest.mark.parametrize("vocab_size", [MIN_VOCAB_SIZE, 300, 2048, 4096])
def test_has_exactly_the_size_and_the_harmony_tokens_on_top(tmp_path: Path, vocab_size: int) -> None:
    write_bpe_tokenizer(tmp_path, vocab_size)
    encoding = HarmonyEncoding.load(tmp_path, vocab_size)
    assert encoding.vocab_size == vocab_size
    assert all(encoding.encode_with_special(name)[0] >= vocab_size - 9 for name in HARMONY_TOKENS)
    assert encoding.decode(encoding.encode(TEXT)) == TEXT
    used = [i for i in range(vocab_size) if encoding.token_bytes(i) or i in encoding.special_ids]
    assert used == list(range(vocab_size))


def test_the_same_size_gives_the_same_file(tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        write_bpe_tokenizer(tmp_path / name, 2048)
    files = [(tmp_path / name / "tokenizer.json").read_bytes() for name in ("one", "two", "three")]
    assert files[0] == files[1] == files[2]


def test_words_become_tokens(tmp_path: Path) -> None:
    write_bpe_tokenizer(tmp_path, 2048)
    encoding = HarmonyEncoding.load(tmp_path)
    for word in (
        "assistant",
        "analysis",
        "final",
        "commentary",
        "functions",
        "json",
        " to",
        " the",
        " weather",
        "user",
    ):
        assert len(encoding.encode(word)) == 1, word
    text = "The user asks about the weather. We should call the function."
    assert len(encoding.encode(text)) < len(text) / 3


@pytest.mark.parametrize("vocab_size", [0, -5, MIN_VOCAB_SIZE - 1])
def test_too_small(tmp_path: Path, vocab_size: int) -> None:
    with pytest.raises(ConfigError, match=str(MIN_VOCAB_SIZE)):
        write_bpe_tokenizer(tmp_path / "x", vocab_size)
    assert not (tmp_path / "x").exists()


def test_transformers_reads_both(
    small_folder: Path, gpt_oss_folder: Path, small: HarmonyEncoding, gpt_oss: HarmonyEncoding
) -> None:
    for folder, encoding in ((small_folder, small), (gpt_oss_folder, gpt_oss)):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.encode(TEXT, add_special_tokens=False) == encoding.encode_with_special(TEXT)
        assert tokenizer.eos_token_id == encoding.return_
        assert tokenizer.pad_token_id == encoding.endoftext


def test_without_oss_harmony(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai_harmony", None)
    with pytest.raises(ConfigError, match=r"pip install 'cantata\[harmony\]'"):
        write_harmony_tokenizer(tmp_path / "x")
    assert not (tmp_path / "x").exists()
