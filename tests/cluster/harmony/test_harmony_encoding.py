"""Encoding and decoding against oss-harmony, and tokenizers that must be refused."""

import copy
import json
import platform
import subprocess
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai_harmony as oh
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.harmony import encoding as encoding_module
from cluster.harmony.encoding import HarmonyEncoding, IncrementalDecoder
from cluster.harmony.make_tokenizer import write_bpe_tokenizer
from tests.cluster.harmony.harmony_conversations import TEXTS
from workers.errors import CheckpointError

# Where the tokenizers' regexes and merges are easily wrong: runs of one character, blanks,
# contractions, scripts, case folding.
CORPUS = [
    *TEXTS,
    *(
        character * count
        for character in "a= \n\t-1é中A.\u0301"
        for count in (1, 2, 3, 5, 7, 16, 31, 64, 129)
    ),
    *(" " * count + "x\n" + "\n" * count + "  y" for count in range(6)),
    "don't DON'T I'll I'LL ſ'ſ 'S K's İi",
    "١٢٣٤٥ ⅷ² 12345678901234567890 1,000.00",
    "ǅ ǲ ʰ ª º ة ﷺ Ⅷ",
    "if(x){return y;}//\n\n///\r\n\t\tfoo_bar.baz->qux::quux",
    "\x00\x01\x7f\x80\xa0\xad\u2028\u2029\u3000\ufeff\U0010ffff",
    Path(__file__).read_text(encoding="utf-8"),
]
MIXED = st.text(
    alphabet=st.sampled_from("aAbZ '\n\r\t/-_=.,:1９²ßſéあ中。、\u0301\u00a0\u200b😀<|>"), max_size=60
)
RELAXED = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def test_encodes_as_oss_harmony(gpt_oss: HarmonyEncoding, oracle: oh.HarmonyEncoding) -> None:
    for text in CORPUS:
        ids = gpt_oss.encode(text)
        assert ids == oracle.encode(text, disallowed_special=()), repr(text[:80])
        assert gpt_oss.decode(ids) == text


@RELAXED
@given(text=st.text(max_size=60) | MIXED)
def test_any_text_encodes_as_in_oss_harmony(
    gpt_oss: HarmonyEncoding, oracle: oh.HarmonyEncoding, text: str
) -> None:
    ids = gpt_oss.encode(text)
    assert ids == oracle.encode(text, disallowed_special=())
    assert gpt_oss.decode(ids) == text


@RELAXED
@given(text=st.text(max_size=60) | MIXED)
def test_demo_vocabulary_loses_nothing(small: HarmonyEncoding, text: str) -> None:
    ids = small.encode(text)
    assert small.decode(ids) == text
    assert not small.special_ids.intersection(ids)


def test_special_tokens_in_raw_prompts(gpt_oss: HarmonyEncoding, oracle: oh.HarmonyEncoding) -> None:
    for text in (
        *CORPUS,
        "<|start|>assistant<|channel|>",
        "<|nothing|><|end|><|reserved_201000|>x<|<|call|>|>",
        "<|start|><|start|>",
    ):
        ids = gpt_oss.encode_with_special(text)
        assert ids == oracle.encode(text, allowed_special="all")
        assert gpt_oss.decode(ids, skip_special_tokens=False) == text


def test_bytes_of_every_token(gpt_oss: HarmonyEncoding, oracle: oh.HarmonyEncoding) -> None:
    assert gpt_oss.vocab_size == 201_088
    for token_id in range(199_998):
        assert gpt_oss.token_bytes(token_id) == bytes(oracle._inner.decode_bytes([token_id]))
    assert all(
        gpt_oss.token_bytes(token_id) == b"" for token_id in [*range(199_998, 201_088), 201_088, -1, 10**12]
    )


def test_special_tokens_are_found_by_name(gpt_oss: HarmonyEncoding, small: HarmonyEncoding) -> None:
    assert (gpt_oss.return_, gpt_oss.constrain, gpt_oss.channel, gpt_oss.start) == (
        200_002,
        200_003,
        200_005,
        200_006,
    )
    assert (gpt_oss.end, gpt_oss.message, gpt_oss.call, gpt_oss.endoftext) == (
        200_007,
        200_008,
        200_012,
        199_999,
    )
    assert set(gpt_oss.stop_token_ids) == {200_002, 200_012, 199_999}
    assert small.decode([small.start, small.return_], skip_special_tokens=False) == "<|start|><|return|>"
    assert small.start < 4096


def test_lone_surrogates_are_replaced(gpt_oss: HarmonyEncoding) -> None:
    assert gpt_oss.decode(gpt_oss.encode("a\ud800b\udfffc")) == "a\ufffdb\ufffdc"
    assert gpt_oss.decode(gpt_oss.encode("\ud83d\ude00")) == "😀"


@RELAXED
@given(ids=st.lists(st.integers(0, 4095), max_size=40))
def test_incremental_decoding_is_decoding(small: HarmonyEncoding, ids: list[int]) -> None:
    decoder = IncrementalDecoder(small)
    pieces = [decoder.push(token_id) for token_id in ids]
    data = b"".join(map(small.token_bytes, ids))
    assert "".join(pieces) + decoder.flush() == data.decode("utf-8", "replace") == small.decode(ids)
    assert decoder.flush() == ""


def test_a_character_appears_with_its_last_byte(small: HarmonyEncoding) -> None:
    byte_ids = {small.token_bytes(token_id): token_id for token_id in range(4096)}
    decoder = IncrementalDecoder(small)
    assert [decoder.push(byte_ids[bytes([byte])]) for byte in "é😀".encode()] == ["", "é", "", "", "", "😀"]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=MIXED
    | st.lists(st.sampled_from(["word ", "it's\n", " \n", "12 ", "中文 ", ", ", "x"]), max_size=40).map(
        "".join
    ),
    size=st.integers(1, 9),
)
def test_pieces_of_a_long_text_encode_as_the_whole(gpt_oss: HarmonyEncoding, text: str, size: int) -> None:
    pieces = list(encoding_module._chunks(text, size, 1000))
    assert "".join(pieces) == text
    assert [i for piece in pieces for i in gpt_oss.encode(piece)] == gpt_oss.encode(text)


def test_long_texts_are_cut(gpt_oss: HarmonyEncoding, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "Some words, and\nsome more words. " * 100
    whole = gpt_oss.encode(text)
    assert len(list(encoding_module._chunks(text, 100, 1000))) > 20
    monkeypatch.setattr(encoding_module, "CHUNK_CHARS", 100)
    assert gpt_oss.encode(text) == whole


def test_a_text_without_a_place_to_cut_is_cut_anyway() -> None:
    pieces = list(encoding_module._chunks("中" * 1050, 10, 100))
    assert "".join(pieces) == "中" * 1050
    assert max(map(len, pieces)) == 100


def test_encoding_stops_at_its_limit(gpt_oss: HarmonyEncoding) -> None:
    text = "Some words, and\nsome more words. " * 40_000
    ids = gpt_oss.encode(text, limit=1000)
    assert 1000 < len(ids) < 100_000
    assert gpt_oss.encode(text[:1000], limit=1000) == gpt_oss.encode(text[:1000])


def test_threads_may_share_an_encoding(small: HarmonyEncoding) -> None:
    texts = [text * 20 for text in CORPUS[:40]]
    alone = [small.encode(text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        for together in pool.map(lambda _: [small.encode(text) for text in texts], range(16)):
            assert together == alone


THREADS = """
import os, sys
from pathlib import Path
from cluster.harmony.encoding import HarmonyEncoding
encoding = HarmonyEncoding.load(Path(sys.argv[1]))
before = len(os.listdir("/proc/self/task"))
encoding.encode("Hello")
print(before, len(os.listdir("/proc/self/task")))
"""


def test_the_librarys_threads_are_there_before_the_first_request(tmp_path: Path) -> None:
    """The library tries once: if it finds no memory for them then, no text is encoded any more."""
    write_bpe_tokenizer(tmp_path, 2048)
    child = subprocess.run(
        [sys.executable, "-c", THREADS, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    before, after = map(int, child.stdout.split())
    assert before == after > 1


def test_a_panic_of_the_library_is_an_exception_without_the_text(small: HarmonyEncoding) -> None:
    class PanicException(BaseException): ...

    class Panicking:
        def encode_batch_fast(self, texts: list[str], **_: object) -> None:
            raise PanicException(texts[0])

    encoding = copy.copy(small)
    encoding._tokenizer = Panicking()
    text = str(2**70)
    with pytest.raises(RuntimeError, match="the tokenizer panicked") as caught:
        encoding.encode(text)
    assert text not in "".join(traceback.format_exception(caught.value))


def edited(folder: Path, target: Path, change: Callable[[dict], object]) -> Path:
    description = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    change(description)
    target.mkdir(exist_ok=True)
    (target / "tokenizer.json").write_text(json.dumps(description), encoding="utf-8")
    return target


@pytest.mark.parametrize("name", encoding_module.HARMONY_TOKENS)
def test_a_missing_harmony_token_is_named(small_folder: Path, tmp_path: Path, name: str) -> None:
    def rename(description: dict) -> None:
        for token in description["added_tokens"]:
            if token["content"] == name:
                token["content"] = "<|other|>"

    with pytest.raises(CheckpointError, match=r"tokenizer\.json has no special token") as caught:
        HarmonyEncoding.load(edited(small_folder, tmp_path, rename))
    assert name in str(caught.value)


def test_files_that_are_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read: No such file"):
        HarmonyEncoding.load(tmp_path)
    for content in ("", "{", "{}", "[1, 2]", '"text"', '{"model": {"type": "Nonsense"}}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a tokenizer: .+") as caught:
            HarmonyEncoding.load(tmp_path)
        assert "\n" not in str(caught.value)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="not UTF-8"):
        HarmonyEncoding.load(tmp_path)


def test_a_tokenizer_that_is_not_byte_level(small_folder: Path, tmp_path: Path) -> None:
    def add_word(description: dict) -> None:
        description["model"]["vocab"]["▁word 中"] = 5000

    with pytest.raises(CheckpointError, match="not a byte-level BPE"):
        HarmonyEncoding.load(edited(small_folder, tmp_path, add_word))


def test_ids_beyond_the_models_vocabulary(small_folder: Path) -> None:
    assert HarmonyEncoding.load(small_folder, 4096).vocab_size == 4096
    assert HarmonyEncoding.load(small_folder, 5000).vocab_size == 4096
    with pytest.raises(CheckpointError, match="ids up to 4095, but the model's vocab_size is 4095"):
        HarmonyEncoding.load(small_folder, 4095)


def test_truncation_in_the_file_is_ignored(small_folder: Path, tmp_path: Path) -> None:
    def truncate(description: dict) -> None:
        description["truncation"] = {
            "direction": "Right",
            "max_length": 3,
            "strategy": "LongestFirst",
            "stride": 0,
        }

    folder = edited(small_folder, tmp_path, truncate)
    assert (
        HarmonyEncoding.load(folder).decode(HarmonyEncoding.load(folder).encode("one two three four five"))
        == "one two three four five"
    )


_LOAD = """
import sys
from pathlib import Path
from cluster.harmony.encoding import HarmonyEncoding

def anonymous_kib():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

before = anonymous_kib()
encoding = HarmonyEncoding.load(Path(sys.argv[1]))
print(anonymous_kib() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what others do with freed memory is theirs")
def test_what_the_parser_of_the_file_leaves_is_given_back(gpt_oss_folder: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", _LOAD, str(gpt_oss_folder)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert int(run.stdout) < 150 * 1024, "kept are 75 MiB, the parser takes 330"
