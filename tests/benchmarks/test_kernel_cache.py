"""Kernels compiled for a GPU that is not here: a driver that launches nothing, the parts of a GPU
check on it, and the cache in a file."""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

triton = pytest.importorskip("triton")

import torch  # noqa: E402
import triton.language as tl  # noqa: E402

from benchmarks import gpu_check, kernel_cache  # noqa: E402
from benchmarks.absent_gpu import META, can_build_launchers, fake_driver  # noqa: E402
from benchmarks.absent_parts import launch_parts  # noqa: E402
from benchmarks.gpu_parts import Options  # noqa: E402
from benchmarks.kernel_cache import CompileCounter, Manifest, pack, unpack  # noqa: E402

TARGET = "sm_90"


@triton.jit
def add_one(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n) + 1, mask=at < n)


def launch(cache: Path | None = None) -> None:
    """Two variants of three launches: what matters of an address is whether 16 divides it."""
    x, y = (torch.empty(100, device=META) for _ in range(2))
    for view in (x, x[1:], x[4:]):
        add_one[(4,)](view, y, 100, BLOCK=32)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Path]:
    """Return Triton's cache, for this test."""
    with triton.knobs.cache.scope(), triton.knobs.compilation.scope():
        triton.knobs.cache.dir = str(tmp_path / "triton")
        yield tmp_path / "triton"


def test_kernels_are_compiled_and_not_launched(cache: Path) -> None:
    before = triton.runtime.driver._active
    with fake_driver(TARGET) as launches:
        launch()
    assert launches.count == 3
    assert launches.loaded == ["add_one", "add_one"]
    targets = [json.loads(file.read_text())["target"] for file in cache.rglob("add_one.json")]
    assert [target["arch"] for target in targets] == [90, 90]
    assert triton.runtime.driver._active is before
    assert not add_one.device_caches, "a real driver must not be given what this one has loaded"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a packed cache, compiled in a folder that is gone."""
    file = tmp_path_factory.mktemp("packed") / "kernels.xz"
    assert pack(file, TARGET, launch).startswith(
        f"{file}: 2 kernels for sm_90 of Triton {triton.__version__}, 0.0 MB"
    )
    return file


def test_what_was_packed_is_found_elsewhere(packed: Path, cache: Path) -> None:
    """The folder in which it was compiled is gone."""
    assert unpack(packed, cache, TARGET) == f"{packed}: 2 kernels for sm_90 are in {cache}"
    suffixes = {path.suffix for path in cache.rglob("*") if path.is_file()}
    assert suffixes == {".cubin", ".json"} | ({".so"} if can_build_launchers() else set())
    counter = CompileCounter()
    with fake_driver(TARGET) as launches:
        launch()
        assert (counter.found, counter.compiled) == (2, 0)
        add_one[(1,)](torch.empty(8, device=META), torch.empty(8, device=META), 7, BLOCK=8)
    assert launches.count == 4
    assert (counter.found, counter.compiled) == (2, 1)
    assert counter.sentence().startswith("2 kernels were in Triton's cache, 1 were compiled in ")


def test_what_does_not_fit_is_said_and_left(
    packed: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Manifest.of_this_machine(TARGET)
    said = unpack(packed, cache, "sm_100")
    assert (
        said == f"{packed} was packed for sm_90, here is sm_100: nothing of it is taken, kernels are compiled"
    )
    monkeypatch.setattr(Manifest, "of_this_machine", lambda target: replace(here, triton="3.0.0 (abc)"))
    said = unpack(packed, cache, None)
    assert (
        said
        == f"{packed} was packed with Triton {here.triton}, here is 3.0.0 (abc): nothing of it is taken, "
        f"kernels are compiled"
    )
    assert not cache.exists()


def test_changed_kernels_and_another_python_are_said_and_the_rest_is_taken(
    packed: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Manifest.of_this_machine(TARGET)
    kernels = {**here.kernels, "moe/routing.py": "another"}
    monkeypatch.setattr(
        Manifest, "of_this_machine", lambda target: replace(here, kernels=kernels, python=".cpython-399.so")
    )
    said = unpack(packed, cache, TARGET)
    assert "for another Python" in said
    assert said.endswith(
        "; moe/routing.py changed since: what is launched from there may have to be compiled"
    )
    assert {path.suffix for path in cache.rglob("*") if path.is_file()} == {".cubin", ".json"}


def test_a_file_that_is_no_cache_costs_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, other = tmp_path / "file", tmp_path / "other.xz"
    file.write_bytes(b"not a cache")
    with tarfile.open(other, "w:xz"):
        pass
    for path in (file, other):
        with pytest.raises(ValueError, match="is not a cache that --pack-cache wrote"):
            unpack(path, tmp_path / "triton", TARGET)
    monkeypatch.setattr(gpu_check, "run_part", lambda *args: {"skipped": "here"})
    for path in (file, tmp_path / "missing"):
        assert (
            gpu_check.main(
                ["--device", "cpu", "--only", "device", "--out", str(tmp_path / "out"), "--cache", str(path)]
            )
            == 0
        )
        printed = capsys.readouterr().out
        assert str(path) in printed
        assert "kernels are compiled" in printed
        assert "kernels are compiled" in (tmp_path / "out/gpu_check.md").read_text()


def test_a_cache_is_unpacked_to_where_parts_look_for_it(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setattr(gpu_check, "triton_target", lambda: TARGET)
    seen: list[Path] = []

    def run_part(
        name: str, command: list[str], out: Path, timeout_s: float, env: dict[str, str]
    ) -> dict[str, str]:
        seen.extend(Path(env["TRITON_CACHE_DIR"]).rglob("*.cubin"))
        return {"skipped": "here"}

    monkeypatch.setattr(gpu_check, "run_part", run_part)
    assert (
        gpu_check.main(
            ["--device", "cpu", "--only", "device", "--out", str(tmp_path / "out"), "--cache", str(packed)]
        )
        == 0
    )
    assert len(seen) == 2
    assert all(path.is_relative_to(tmp_path / "out") for path in seen)


class _Compiled:
    """A kernel that took no time to compile."""

    function = packed_metadata = None

    def launch_metadata(self, *args: object) -> None: ...

    def run(self, *args: object) -> None: ...


def test_parts_launch_their_kernels_on_a_gpu_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts launch in all their ways, graphs among them, on tensors without memory."""
    compiled: list[str] = []

    def compile_source(source: SimpleNamespace, **options: object) -> _Compiled:
        compiled.append(source.fn.__name__)
        return _Compiled()

    monkeypatch.setattr(triton.compiler, "compile", compile_source)
    options = Options(META, None, "20b", batch_sizes=(1, 3), contexts=(40,), steps=2, prompts=(300,))
    with fake_driver(TARGET):
        assert launch_parts(TARGET, options) == []
    assert {
        "expert_matmul_wgmma",
        "_attend",
        "_merge_splits",
        "choose_experts",
        "read_slots_kernel",
        "yarn_kernel",
    } <= set(compiled)
    assert {"greedy_kernel", "pick_kernel", "penalties_kernel", "bias_kernel", "logprobs_kernel"} <= set(
        compiled
    )
    assert "expert_matmul_natural" not in compiled, "the layout is sm_90's"


def test_packing_is_one_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import absent_parts, absent_tests

    file, asked, tests = tmp_path / "kernels.xz", [], []

    def launch_some(target: str, options: Options) -> list[str]:
        asked.append((target, options.preset, options.batch_sizes))
        launch()
        return ["measure_step: 8 x 40: out of registers"] if options.preset == "120b" else []

    monkeypatch.setattr(absent_parts, "launch_parts", launch_some)
    assert (
        gpu_check.main(
            ["--pack-cache", str(file), "--only", "step", "--preset", "20b", "--batch-sizes", "1,8"]
        )
        == 0
    )
    assert f"gpu-check: {file}: 2 kernels for sm_90" in capsys.readouterr().out
    monkeypatch.setattr(
        absent_tests,
        "launch_tests",
        lambda target, processes, cache: tests.append((target, cache.is_dir())) or "some",
    )
    assert gpu_check.main(["--pack-cache", str(file)]) == 1
    assert tests == [(TARGET, True)], "only where they are asked for, and by default"
    assert "not packed: measure_step: 8 x 40: out of registers" in capsys.readouterr().err
    assert [preset for _, preset, _ in asked] == ["20b", "20b", "120b"]
    assert asked[0] == (TARGET, "20b", (1, 8))
    assert kernel_cache.unpack(file, tmp_path / "cache", TARGET).startswith(
        f"{file}: 2 kernels for sm_90 are in "
    )


def test_tests_launch_their_kernels_on_a_gpu_that_is_not_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the repository's, whose assertions cannot hold."""
    from benchmarks import absent_tests, gpu_tests

    folder = "tests/gpu/test_step_kernels_on_gpu.py::test_embedding"
    monkeypatch.setattr(absent_tests, "run_tests", partial(gpu_tests.run_tests, folder=folder))
    said = absent_tests.launch_tests(TARGET, 1, tmp_path)
    assert said == "tests that were followed to their end: 1 passed of 1"
    assert [path.name for path in tmp_path.rglob("*.cubin")] == ["embed_kernel.cubin"]
