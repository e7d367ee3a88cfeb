"""What is sealed opens with the same key and context alone, and unchanged."""

import base64
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.assembly import with_secret
from cluster.config import AppConfig, parse_config
from cluster.sealing import BrokenSeal, Sealer, kept_secret, new_secret
from cluster.state.settings import Location
from workers.errors import ConfigError

KEY = bytes(range(32))


@pytest.mark.parametrize("plain", [b"", b"x", "wörld 🎉".encode(), bytes(100_000)])
def test_what_is_sealed_opens(plain: bytes) -> None:
    sealed = Sealer(KEY).seal(plain, "reasoning:me")
    assert Sealer(KEY).open(sealed, "reasoning:me") == plain, "another object of the same key opens it"
    assert sealed.isascii()


def test_a_seal_is_a_function_of_what_is_sealed() -> None:
    assert Sealer(KEY).seal(b"x", "c") == Sealer(KEY).seal(b"x", "c")
    seals = {
        Sealer(key).seal(plain, context)
        for key in (KEY, KEY[::-1])
        for plain, context in ((b"x", "c"), (b"y", "c"), (b"x", "d"), (b"", "cx"), (b"cx", ""), (b"", "c"))
    }
    assert len({seal[:38] for seal in seals}) == 12, "no two share salt and nonce"


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


def test_a_kept_secret_is_drawn_once_and_private(tmp_path: Path) -> None:
    file = tmp_path / "new" / "secret"
    with ThreadPoolExecutor(8) as pool:
        drawn = set(pool.map(kept_secret, [file] * 32))
    assert drawn == {file.read_text()}
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    assert [*file.parent.iterdir()] == [file], "no temporary files are left"
    assert len({new_secret() for _ in range(10)}) == 10


def test_a_file_that_is_no_private_secret_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    kept_secret(file)
    file.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        kept_secret(file)
    file.write_text("short")
    file.chmod(0o600)
    with pytest.raises(ConfigError, match="holds no secret"):
        kept_secret(file)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"set gateway\.secret"):
        kept_secret(tmp_path / "file" / "secret")


def test_beside_a_database_file_the_secret_survives_a_restart(tmp_path: Path) -> None:
    config = parse_config(AppConfig, {"engine": {"model_path": "x"}}, {})
    place = Location(f"sqlite+aiosqlite:///{tmp_path}/state.sqlite3", "SQLite")
    secret = with_secret(config, place).gateway.secret
    assert secret is not None
    assert with_secret(config, place).gateway.secret == secret
    assert with_secret(config, Location(None, "off")).gateway.secret != secret
    given = parse_config(AppConfig, {"engine": {"model_path": "x"}, "gateway": {"secret": "given" * 4}}, {})
    assert with_secret(given, place) is given
