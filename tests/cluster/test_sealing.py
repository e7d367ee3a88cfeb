"""What is sealed opens with the same key and context alone, and unchanged."""

import base64

import pytest

from cluster.sealing import BrokenSeal, Sealer

KEY = bytes(range(32))


@pytest.mark.parametrize("plain", [b"", b"x", "wörld 🎉".encode(), bytes(100_000)])
def test_what_is_sealed_opens(plain: bytes) -> None:
    sealed = Sealer(KEY).seal(plain, "reasoning:me")
    assert Sealer(KEY).open(sealed, "reasoning:me") == plain, "another object of the same key opens it"
    assert sealed.isascii()


def test_two_seals_of_one_text_differ() -> None:
    assert len({Sealer(KEY).seal(b"x", "c") for _ in range(20)}) == 20


def test_another_key_or_context_does_not_open_it() -> None:
    sealed = Sealer(KEY).seal(b"secret", "reasoning:me")
    with pytest.raises(BrokenSeal):
        Sealer(KEY[::-1]).open(sealed, "reasoning:me")
    with pytest.raises(BrokenSeal):
        Sealer(KEY).open(sealed, "reasoning:you")


def test_a_changed_byte_anywhere_breaks_it() -> None:
    sealer = Sealer(KEY)
    raw = base64.urlsafe_b64decode(sealer.seal(b"secret", "c"))
    for position in range(len(raw)):
        changed = raw[:position] + bytes([raw[position] ^ 1]) + raw[position + 1 :]
        with pytest.raises(BrokenSeal):
            sealer.open(base64.urlsafe_b64encode(changed).decode(), "c")
    for length in range(len(raw)):
        with pytest.raises(BrokenSeal):
            sealer.open(base64.urlsafe_b64encode(raw[:length]).decode(), "c")


@pytest.mark.parametrize("sealed", ["", "x", "!!!!", "gAAAA", "é", "\ud800", "AQ==" * 30, "a b c d"])
def test_what_was_never_sealed_is_refused(sealed: str) -> None:
    with pytest.raises(BrokenSeal):
        Sealer(KEY).open(sealed, "c")


def test_a_short_key_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 16 bytes"):
        Sealer(b"short")
