"""`cantata inspect`, as a user runs it: on a checkpoint of the large model's size that takes no
disk, and on broken ones."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from cluster.cli import main
from cluster.commands.gpus import GIB, GPUS
from tests.support.checkpoint_formats import write_bf16, write_original
from tests.support.hollow_checkpoint import write_hollow_checkpoint
from tests.support.tiny_model import TINY, write_tiny_checkpoint
from workers.config import BLOCK_SIZE, DenseDtype, EngineConfig
from workers.executor.inline import InlineExecutor
from workers.model.make_checkpoint import preset_config, write_checkpoint
from workers.model_config import checkpoint_warnings


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with all files of gpt-oss-120b: exact headers and sizes, and holes where the
    weights would be."""
    return write_hollow_checkpoint(tmp_path_factory.mktemp("large") / "gpt-oss-120b", preset_config("120b"))


def inspect(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["inspect", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def as_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, object]:
    code, out, _ = inspect(capsys, *arguments, "--json")
    found: dict[str, object] = json.loads(out)
    return found | {"code": code}


def test_the_large_model_is_described_without_reading_it(
    large: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    on_disk = sum(file.stat().st_blocks * 512 for file in large.iterdir())
    assert on_disk < 50 * 2**20 < 60 * 10**9 < sum(file.stat().st_size for file in large.iterdir())
    code, out, err = inspect(capsys, large, "--gpu", "h100")
    assert (code, err) == (0, "")
    assert "116.83 B, 5.13 B active per token" in out
    assert "Hugging Face layout, experts in MXFP4" in out
    assert "64 query heads, 8 key-value heads, dimension 64" in out
    assert "479.43 MiB in each engine's process (engine.grammars.load)" in out
    table = [
        line.split() for line in out.splitlines() if line.strip() and line.split()[0] in ("1", "2", "4", "8")
    ]
    assert [row[:2] for row in table] == [[size, size] for size in ("1", "2", "4", "8")]
    tokens = [int(row[-1].replace(",", "")) for row in table]
    # One H100 holds about ten thousand million bytes of KV beside the weights: 36 KiB a token.
    assert 131_072 < tokens[0] < 400_000
    assert tokens == sorted(tokens)


def test_one_plan_as_json(large: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, large, "--tp", 4, "--ep", 1, "--gpu", "h200")
    assert found["code"] == 0
    assert found["parameters"] == 116_829_156_672
    assert found["grammar_tokenizer_bytes"] == 201_088 * 2500
    (plan,) = found["plans"]  # type: ignore[misc]
    assert (plan["tensor"], plan["expert"], plan["refusal"]) == (4, 1, None)
    # 90 groups of columns over 4 ranks: 23 each, two of them with one group of zeros.
    assert plan["rank"]["experts"] > 36 * 128 * 3 * 2880 * 22 * 17
    assert plan["kv"] == {"per_token": 9 * 1024, "per_sequence": 18 * 512 * 128}


def test_what_does_not_fit_is_refused_with_what_does(
    large: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "cluster.commands.inspect.GPUS", {"h100": replace(GPUS["h100"], memory_bytes=38 * GIB)}
    )
    code, out, err = inspect(capsys, large, "--tp", 1, "--gpu", "h100")
    assert code == 1
    assert "does not fit" in out
    assert err.startswith(
        "cantata: tensor=1 on H100 (38.00 GiB, 90% of it used), 60.79 GiB of weights on a rank: the model "
        "does not fit"
    )
    assert "KV cache" not in err
    assert err.endswith("; tensor=4 would fit\n")
    # In the table of all plans the reason stands below it.
    code, out, err = inspect(capsys, large, "--gpu", "h100")
    assert (code, err) == (0, "")
    refusals = [line for line in out.splitlines() if line.endswith("; tensor=4 would fit")]
    assert [line.split()[0] for line in refusals] == ["tensor=1"]
    assert out.count("does not fit\n") == 1
    # Two ranks hold the weights and a part of the context, four all of it.
    contexts = {
        row[0]: row[-2]
        for row in (line.split() for line in out.splitlines())
        if row and row[0] in ("2", "4", "8")
    }
    assert 2048 <= int(contexts["2"].replace(",", "")) < 131_072
    assert contexts["4"] == contexts["8"] == "131,072"


@pytest.mark.parametrize("cpu_dense_dtype", ["bf16", "int8"])
@pytest.mark.parametrize("quantize", [None, "mxfp4"])
@pytest.mark.parametrize("experts_format", ["mxfp4", "bf16"])
def test_an_engine_has_what_was_said(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    experts_format: Literal["mxfp4", "bf16"],
    quantize: Literal["mxfp4"] | None,
    cpu_dense_dtype: DenseDtype,
) -> None:
    model = replace(TINY, experts_format=experts_format)
    write_checkpoint(tmp_path / "model", model, seed=0)
    flags = ("--cpu-dense-dtype", cpu_dense_dtype, *(() if quantize is None else ("--quantize", quantize)))
    (plan,) = as_json(capsys, tmp_path / "model", "--tp", 1, "--gpu", "cpu", *flags)["plans"]  # type: ignore[misc]
    config = EngineConfig(tmp_path / "model", quantize=quantize, cpu_dense_dtype=cpu_dense_dtype)
    executor = InlineExecutor(config, model)
    info = executor.start()
    executor.shutdown()
    assert sum(size for kind, size in plan["rank"].items() if kind != "padding") == info.weight_bytes
    assert plan["kv_tokens"] == (info.num_full_blocks - 1) * BLOCK_SIZE


def test_int8_layers_are_of_a_cpu(capsys: pytest.CaptureFixture[str], large: Path) -> None:
    for device in ((), ("--gpu", "h100")):
        code, out, err = inspect(capsys, large, "--cpu-dense-dtype", "int8", *device)
        assert (code, out, err) == (1, "", "cantata: --cpu-dense-dtype int8 needs --gpu cpu\n")
    _, out, _ = inspect(capsys, large, "--cpu-dense-dtype", "int8", "--gpu", "cpu")
    assert "\nEach rank, experts in MXFP4, all else in bf16, attention and lm_head in int8, on " in out


def test_an_fp8_cache_holds_twice_the_tokens(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path)
    (bf16,), (fp8,) = (
        as_json(capsys, path, "--tp", 1, "--gpu", "h100", *flags)["plans"]
        for flags in ((), ("--kv-cache-dtype", "fp8"))
    )
    for kind, num_bytes in bf16["kv"].items():
        assert num_bytes == 2 * fp8["kv"][kind] > 0
    assert (
        "Each rank, experts in MXFP4, all else in bf16, the KV cache in fp8, on H100"
        in inspect(capsys, path, "--gpu", "h100", "--kv-cache-dtype", "fp8")[1]
    )
    out = inspect(capsys, path)[1]
    assert re.search(r"parameters +[1-9]\d*\.\d\d [KM], [1-9]\d*\.\d\d [KM] active per token\n", out)
    code, _, err = inspect(capsys, path, "--tp", 1, "--gpu", "mi300x", "--kv-cache-dtype", "fp8")
    assert code == 1
    assert err.startswith("cantata: gfx942 has no instructions for float8_e4m3fn")
    assert err.endswith("; leave out --kv-cache-dtype\n")


@pytest.mark.parametrize(
    ("flags", "said"),
    [(("--tp", 0), "engine.parallel.tensor must be 1 to 16, got 0"), (("--ep", 2), "engine.parallel.expert")],
)
def test_numbers_of_ranks_that_cannot_be(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, flags: tuple[object, ...], said: str
) -> None:
    code, out, err = inspect(capsys, write_tiny_checkpoint(tmp_path), *flags)
    assert (code, out) == (1, "")
    assert said in err


def test_a_plan_that_cannot_work_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path)
    code, out, err = inspect(capsys, path, "--tp", 4)
    assert code == 1
    assert "refused" in out
    assert (
        "6 query heads cannot be split evenly over 4 ranks; the nearest that can: tensor=3, expert=3" in err
    )
    # In the table the others stand beside it.
    code, out, _ = inspect(capsys, path)
    assert code == 0
    assert out.count("refused") == 3


def test_openais_layout_and_this_machine(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = write_original(write_tiny_checkpoint(tmp_path), tmp_path / "download" / "original", TINY)
    code, out, _ = inspect(capsys, folder.parent, "--gpu", "cpu")
    assert code == 0
    assert "OpenAI's own layout" in out
    assert str(folder) in out
    assert "on this machine (" in out


def test_a_broken_checkpoint_is_the_loaders_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = write_tiny_checkpoint(tmp_path)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    code, out, err = inspect(capsys, path)
    assert (code, out) == (1, "")
    assert err.startswith(f"cantata: {file} is truncated: tensor lm_head.weight")


def test_what_has_no_effect_is_warned_of(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    packed = write_tiny_checkpoint(tmp_path)
    path = write_bf16(packed, tmp_path / "merged", TINY)
    (path / "config.json").write_bytes((packed / "config.json").read_bytes())
    (path / "adapter_config.json").write_text("{}")
    code, out, err = inspect(capsys, path)
    assert code == 0
    assert "experts in bf16" in out
    warnings = checkpoint_warnings(path)
    assert len(warnings) == 2
    assert err == "".join(f"cantata: warning: {sentence}\n" for sentence in warnings)
    assert as_json(capsys, path)["warnings"] == warnings


@pytest.mark.parametrize("gpu", GPUS)
def test_every_gpu_of_the_list_can_be_named(
    gpu: str, capsys: pytest.CaptureFixture[str], large: Path
) -> None:
    (plan,) = as_json(capsys, large, "--tp", 8, "--gpu", gpu)["plans"]  # type: ignore[misc]
    assert (plan["refusal"], plan["max_model_len"]) == (None, 131_072)


def test_a_model_that_fits_nowhere_is_refused_with_its_size(
    capsys: pytest.CaptureFixture[str], large: Path
) -> None:
    code, out, err = inspect(capsys, large, "--tp", 1, "--gpu", "l40s")
    assert code == 1
    assert "experts in MXFP4, all else in bf16" in out
    assert err.startswith(
        "cantata: tensor=1 on L40S (44.99 GiB, 90% of it used), 60.79 GiB of weights on a rank: the model "
        "does not fit"
    )
    assert err.endswith("; tensor=2 would fit\n")
