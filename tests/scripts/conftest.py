"""The demo model's tokenizer, made once."""

from pathlib import Path

import pytest

from cluster.harmony.encoding import HarmonyEncoding
from scripts.demo.tokenizer import write_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def encoding(tokenizer_folder: Path) -> HarmonyEncoding:
    return HarmonyEncoding.load(tokenizer_folder)
