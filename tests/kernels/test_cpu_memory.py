"""Memory for weights: zeros of the shape and dtype that is asked for, on huge pages where they are
large."""

from pathlib import Path

import pytest
import torch

from kernels.cpu.memory import zeros

HUGE_PAGE = 2 << 20


@pytest.mark.parametrize(
    "shape",
    [(), (0,), (3, 5), (HUGE_PAGE - 1,), (HUGE_PAGE,), (HUGE_PAGE + 1,), (3, HUGE_PAGE // 2 + 7)],
)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
def test_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = zeros(shape, dtype)
    assert tensor.shape == shape
    assert tensor.dtype == dtype
    assert tensor.is_contiguous()
    assert not tensor.any()
    tensor.fill_(1)
    assert tensor.sum(dtype=torch.float64).item() == tensor.numel()


def test_large_memory_is_aligned_and_outlives_its_views() -> None:
    part = zeros((8, HUGE_PAGE), torch.uint8)[7]
    others = [zeros((8, HUGE_PAGE), torch.uint8).fill_(3) for _ in range(4)]
    assert part.data_ptr() % HUGE_PAGE == 0
    assert not part.any()
    assert all((other == 3).all() for other in others)


def test_huge_pages_where_the_system_gives_them() -> None:
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not enabled.is_file() or "[never]" in enabled.read_text():
        pytest.skip("transparent huge pages are off on this system")
    tensor = zeros((5 * HUGE_PAGE + 12345,), torch.uint8)
    area = mapping_of(tensor.data_ptr())
    assert "hg" in area["VmFlags"].split()
    # The last, started page is not a huge one: the advised area ends with the tensor.
    assert int(area["Size"].split()[0]) * 1024 < tensor.nbytes + 4096


def mapping_of(address: int) -> dict[str, str]:
    """Return the fields of the memory area that holds an address."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        bounds = line.split(" ", 1)[0].split("-")
        if len(bounds) == 2 and int(bounds[0], 16) <= address < int(bounds[1], 16):
            fields = {}
            for field in lines:
                name, _, value = field.partition(":")
                fields[name] = value
                if name == "VmFlags":
                    return fields
    raise AssertionError("the address is not mapped")
