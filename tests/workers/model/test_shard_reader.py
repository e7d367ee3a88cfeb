"""Reading by pieces: what is planned arrives, in the order of the files, with bounded read-ahead; a
file that fails is named."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from workers.errors import CheckpointError
from workers.model import mapped_files, shard_reader
from workers.model.mapped_files import Extent, MappedTensors
from workers.model.safetensors_files import StoredTensor, read_header
from workers.model.shard_reader import ShardReader, copy_values


def stored(folder: Path, **tensors: Tensor) -> dict[str, StoredTensor]:
    save_file(tensors, folder / "weights.safetensors")
    return {tensor.name: tensor for tensor in read_header(folder / "weights.safetensors")}


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_reader, "_PIECE_BYTES", 64)
    monkeypatch.setattr(shard_reader, "_AHEAD_BYTES", 256)


@pytest.mark.parametrize("to_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("stored_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rows_and_columns_arrive(
    tmp_path: Path, small_pieces: None, stored_dtype: torch.dtype, to_dtype: torch.dtype
) -> None:
    weight = torch.randn(37, 11).to(stored_dtype)
    reader = ShardReader(stored(tmp_path, weight=weight))
    rows, columns = torch.zeros(20, 11, dtype=to_dtype), torch.full((37, 9), 7, dtype=to_dtype)
    reader.copy(rows, "weight", 5)
    reader.copy(columns[:, 2:6], "weight", columns=slice(3, 7))
    reader.run()
    assert torch.equal(rows, weight[5:25].to(to_dtype))
    assert torch.equal(columns[:, 2:6], weight[:, 3:7].to(to_dtype))
    assert (columns[:, :2] == 7).all()
    assert (columns[:, 6:] == 7).all()


@pytest.mark.parametrize("shape", [(1, 70_000), (3, 40_000), (70, 1_000)])
@pytest.mark.parametrize("to_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_values_above_the_size_at_which_torch_takes_threads(
    shape: tuple[int, int], to_dtype: torch.dtype
) -> None:
    values = torch.randn(shape).bfloat16()
    straight, turned = torch.zeros(shape, dtype=to_dtype), torch.zeros(shape[::-1], dtype=to_dtype)
    copy_values(straight, values)
    copy_values(turned, values.T)
    assert torch.equal(straight, values.to(to_dtype))
    assert torch.equal(turned, values.T.to(to_dtype))


def test_empty_tensors_are_nothing_to_read(tmp_path: Path) -> None:
    reader = ShardReader(stored(tmp_path, empty=torch.zeros(0, 3), rows=torch.ones(2, 3)))
    to = torch.zeros(2, 3)
    reader.copy(torch.zeros(0, 3), "empty")
    reader.copy(to, "rows")
    reader.run()
    assert torch.equal(to, torch.ones(2, 3))


def test_misaligned_tensors_are_read(tmp_path: Path) -> None:
    # Other writers pack the bytes as they come: here 3 of the one before.
    header = (
        b'{"odd":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},'
        b'"w":{"dtype":"BF16","shape":[4,2],"data_offsets":[3,19]}}'
    )
    values = torch.arange(8).bfloat16().view(4, 2)
    content = len(header).to_bytes(8, "little") + header + b"abc" + values.view(torch.uint8).numpy().tobytes()
    (tmp_path / "odd.safetensors").write_bytes(content)
    reader = ShardReader({tensor.name: tensor for tensor in read_header(tmp_path / "odd.safetensors")})
    to = torch.zeros(2, 2, dtype=torch.bfloat16)
    reader.copy(to, "w", 1)
    reader.run()
    assert torch.equal(to, values[1:3])


def test_order_read_ahead_and_release(
    tmp_path: Path, small_pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = stored(tmp_path, first=torch.zeros(64, 4), second=torch.zeros(64, 4))
    seen: list[tuple[str, int]] = []

    def watch(name: str) -> None:
        original = getattr(MappedTensors, name)

        def call(files: MappedTensors, extent: Extent) -> None:
            seen.append((name, extent.start))
            original(files, extent)

        monkeypatch.setattr(MappedTensors, name, call)

    for name in ("read_ahead", "fetch", "release"):
        watch(name)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    reader = ShardReader(tensors)
    targets = {name: torch.ones(64, 4) for name in ("second", "first")}
    for name, to in targets.items():
        reader.copy(to, name)
    progress: list[tuple[int, int]] = []
    reader.run(lambda done, total: progress.append((done, total)))
    assert all(torch.equal(to, torch.zeros(64, 4)) for to in targets.values())
    fetched = [start for name, start in seen if name == "fetch"]
    assert fetched == [extent.start for extent in reader.extents] == sorted(fetched)
    assert sum(extent.num_bytes for extent in reader.extents) == 2 * 64 * 16
    assert fetched == [start for name, start in seen if name == "release"]
    # All but the first are asked for before they are waited for, and none further ahead than is
    # allowed.
    assert [start for name, start in seen if name == "read_ahead"] == fetched[1:]
    for start in fetched[1:]:
        assert seen.index(("read_ahead", start)) < seen.index(("fetch", start))
    reached = fetched[0]
    for name, start in seen:
        if name == "read_ahead":
            # A piece of 64 bytes was finished since, the next is being begun, and 256 bytes lie
            # ahead of that.
            assert start < reached + 64 + 64 + 256
        elif name == "fetch":
            reached = start
    assert progress == [(done, len(fetched)) for done in range(1, len(fetched) + 1)]


def test_a_file_that_is_cut_off_while_it_is_loaded(tmp_path: Path) -> None:
    tensors = stored(tmp_path, weight=torch.ones(4096, 16), other=torch.ones(4096, 16))
    reader = ShardReader(tensors)
    for name in tensors:
        reader.copy(torch.zeros(4096, 16), name)
    reader.files.view("weight", 0, 1)  # is mapped now
    (tmp_path / "weights.safetensors").open("r+b").truncate(tensors["other"].offset + 1000)
    with pytest.raises(CheckpointError) as caught:
        reader.run()
    assert str(tmp_path / "weights.safetensors") in str(caught.value)
    assert "cannot be read" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    tensors = stored(tmp_path, weight=torch.ones(4, 4))
    (tmp_path / "weights.safetensors").unlink()
    reader = ShardReader(tensors)
    reader.copy(torch.zeros(4, 4), "weight")
    with pytest.raises(CheckpointError, match=r"weights\.safetensors: tensor weight cannot be read"):
        reader.run()


def test_kernels_that_cannot_fetch_ranges_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped_files, "_POPULATE_READ", 9999)  # EINVAL, as on Linux before 5.14
    to = torch.zeros(5, 3)
    reader = ShardReader(stored(tmp_path, weight=torch.ones(5, 3)))
    reader.copy(to, "weight")
    reader.run()
    assert torch.equal(to, torch.ones(5, 3))


def test_the_first_error_ends_it(tmp_path: Path) -> None:
    reader = ShardReader(stored(tmp_path, weight=torch.ones(100, 4)))
    done: list[int] = []

    def fail() -> None:
        raise CheckpointError("this one")

    reader.add([reader.files.extent("weight", 0, 1)], fail)
    for row in range(1, 100):
        reader.add([reader.files.extent("weight", row, row + 1)], lambda row=row: done.append(row))  # type: ignore[misc]
    with pytest.raises(CheckpointError, match="this one"):
        reader.run()
