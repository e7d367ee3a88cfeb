"""moe_activation_dtype mxfp8: its effects, where it is reported, and where it is refused. Kernels
and reference have tests of their own."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.tiny_model import TINY, write_tiny_checkpoint
from workers.engine.llm import LLM
from workers.errors import ConfigError
from workers.model.make_checkpoint import write_checkpoint
from workers.rank import rank

TOKENS = [(7 * i) % 200 for i in range(60)]


def test_it_changes_the_logits_a_little_and_the_table_says_so(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path)
    with (
        LLM(path, dtype="float32", kv_cache_bytes=4 << 20) as exact,
        LLM(path, dtype="float32", kv_cache_bytes=4 << 20, moe_activation_dtype="mxfp8") as rounded,
    ):
        error = (rounded.logits(TOKENS) - exact.logits(TOKENS)).norm() / exact.logits(TOKENS).norm()
        assert "MXFP8" in rounded.info.kernels["experts"]
        assert "MXFP8" not in exact.info.kernels["experts"]
    # e4m3 keeps 4 bits: up to 1/16 of a value, a part of which reaches the logits.
    assert 1e-4 < error < 0.1


def test_it_is_refused_where_it_would_lose_and_not_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path / "bf16", replace(TINY, experts_format="bf16"), seed=0)
    with pytest.raises(ConfigError, match=r"^engine.moe_activation_dtype mxfp8 needs experts in MXFP4"):
        LLM(tmp_path / "bf16", moe_activation_dtype="mxfp8", kv_cache_bytes=4 << 20)
    LLM(tmp_path / "bf16", moe_activation_dtype="mxfp8", quantize="mxfp4", kv_cache_bytes=4 << 20).shutdown()
    path = write_tiny_checkpoint(tmp_path)
    for target in ("sm_80", "sm_90", "sm_120", "gfx942"):
        monkeypatch.setattr(rank, "architecture", lambda device, target=target: target)
        with pytest.raises(ConfigError, match=rf"this GPU is {target}"):
            LLM(path, moe_activation_dtype="mxfp8", kv_cache_bytes=4 << 20)
