"""The two tokenizers, made once per run, and oss-harmony as the oracle."""

from pathlib import Path

import openai_harmony
import pytest

from cluster.harmony.encoding import HarmonyEncoding
from cluster.harmony.make_tokenizer import HARMONY_VOCAB_SIZE, write_bpe_tokenizer, write_harmony_tokenizer


@pytest.fixture(scope="session")
def oracle() -> openai_harmony.HarmonyEncoding:
    return openai_harmony.load_harmony_encoding("HarmonyGptOss")


@pytest.fixture(scope="session")
def gpt_oss_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt_oss_tokenizer")
    write_harmony_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def gpt_oss(gpt_oss_folder: Path) -> HarmonyEncoding:
    """Return gpt-oss's own vocabulary."""
    return HarmonyEncoding.load(gpt_oss_folder, HARMONY_VOCAB_SIZE)


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small_tokenizer")
    write_bpe_tokenizer(folder, 4096)
    return folder


@pytest.fixture(scope="session")
def small(small_folder: Path) -> HarmonyEncoding:
    """Return the demo vocabulary."""
    return HarmonyEncoding.load(small_folder, 4096)
