"""The demo model's tokenizer."""

import random
from pathlib import Path

from transformers import AutoTokenizer

from cluster.harmony.encoding import HarmonyEncoding
from cluster.harmony.message import Message
from cluster.harmony.render import Conversation, render
from scripts.demo import words
from scripts.demo.tokenizer import write_tokenizer


def test_any_text_comes_back(encoding: HarmonyEncoding) -> None:
    for text in ("Hello! 47 + 38", "Grüße, 你好 🙂\r\n\tx", '{"a": [1, 2]}', "<|start|>", "  two  blanks "):
        assert encoding.decode(encoding.encode(text)) == text


def test_digits_are_tokens_of_their_own(encoding: HarmonyEncoding) -> None:
    assert [encoding.decode([token]) for token in encoding.encode("12+345")] == ["1", "2", "+", "3", "4", "5"]


def test_names_have_the_same_tokens_wherever_they_stand(encoding: HarmonyEncoding) -> None:
    rng = random.Random(3)
    for _ in range(100):
        name, value = words.tool_name(rng, "held_out"), words.text_value(rng, "held_out")
        for text in (name, value):
            alone = encoding.encode(text)
            for before, after in (
                ("type ", " = (_: {\n"),
                (" to=functions.", ""),
                ('{"', '":'),
                ("in ", "."),
            ):
                ids = encoding.encode(f"{before}{text}{after}")
                assert any(ids[at : at + len(alone)] == alone for at in range(len(ids))), (before, text)


def test_the_constant_part_of_a_prompt_is_short(encoding: HarmonyEncoding) -> None:
    prompt = render(Conversation((Message("user", "Hello!"),), current_date="2026-05-01"), encoding)
    assert len(prompt) < 25
    header = "<|channel|>final<|message|>"
    assert len(encoding.encode_with_special(header)) == 3


def test_is_the_same_on_every_run_and_is_read_by_transformers(tokenizer_folder: Path, tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (tokenizer_folder / name).read_bytes()
    text = "Hello! What is 47 + 38?"
    ids = AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"]
    assert ids == HarmonyEncoding.load(tmp_path).encode(text)
