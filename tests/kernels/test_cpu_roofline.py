"""The yardstick of matrix products: the faster data type wins, and a slow one costs a bounded
amount of work."""

import pytest
import torch
from torch import Tensor

from kernels.cpu.roofline import GEMM_DTYPES, GEMM_SECONDS, GEMM_SIZES, LONGEST_CALL, fastest_gemm


class Machine:
    """A clock that only products move.

    Args:
        rates: operations a second of each data type.
        stall_s: added to each product on more than one thread, whatever its size.
    """

    def __init__(self, rates: dict[torch.dtype, float], stall_s: float = 0.0) -> None:
        self._rates, self._stall_s = rates, stall_s
        self.now_s = 1000.0
        self.calls: list[tuple[torch.dtype, int, float]] = []

    def clock(self) -> float:
        return self.now_s

    def product(self, left: Tensor, right: Tensor) -> None:
        assert left.shape == right.shape == (len(left), len(left))
        assert left.dtype == right.dtype
        took_s = 2 * len(left) ** 3 / self._rates[left.dtype] + (
            self._stall_s if torch.get_num_threads() > 1 else 0
        )
        self.now_s += took_s
        self.calls.append((left.dtype, len(left), took_s))


@pytest.mark.parametrize("slow", GEMM_DTYPES)
@pytest.mark.parametrize("slow_rate", [1e6, 1e8, 1e9])
def test_a_slow_product_is_bounded_and_the_other_wins(slow: str, slow_rate: float) -> None:
    (fast,) = GEMM_DTYPES.keys() - {slow}
    machine = Machine({GEMM_DTYPES[slow]: slow_rate, GEMM_DTYPES[fast]: 1e11})
    gemm = fastest_gemm(machine.product, machine.clock)
    assert gemm.dtype == fast
    assert gemm.flops_per_s == pytest.approx(1e11)
    smallest_s = 2 * GEMM_SIZES[0] ** 3 / slow_rate
    of_slow = [took for dtype, _, took in machine.calls if dtype is GEMM_DTYPES[slow]]
    assert max(of_slow) <= max(LONGEST_CALL * GEMM_SECONDS, smallest_s)
    assert machine.now_s - 1000 <= 2 * smallest_s + GEMM_SECONDS * (1 + LONGEST_CALL)
    if slow_rate >= 1e8:
        assert gemm.size >= 1024, "the slow product leaves time for the fast one"


def test_nothing_but_slow_products_end_too() -> None:
    machine = Machine(dict.fromkeys(GEMM_DTYPES.values(), 1e5))
    gemm = fastest_gemm(machine.product, machine.clock)
    assert gemm.size == GEMM_SIZES[0]
    assert gemm.flops_per_s == pytest.approx(1e5)
    assert len(machine.calls) == 2, "one of each data type"


def test_a_fast_machine_multiplies_the_largest_matrices() -> None:
    machine = Machine({torch.float32: 1e13, torch.bfloat16: 1e14})
    gemm = fastest_gemm(machine.product, machine.clock)
    assert (gemm.dtype, gemm.size) == ("bf16", GEMM_SIZES[-1])
    assert machine.now_s - 1000 < GEMM_SECONDS


@pytest.mark.usefixtures("_restore_threads")
@pytest.mark.parametrize("stall_s", [0.04, 1.0])
def test_threads_that_wait_for_each_other_do_not_hide_the_faster_product(stall_s: float) -> None:
    """Threads wait for each other if other processes use the cores."""
    torch.set_num_threads(2)
    machine = Machine({torch.float32: 1e11, torch.bfloat16: 1e9}, stall_s)
    gemm = fastest_gemm(machine.product, machine.clock)
    assert (gemm.dtype, gemm.flops_per_s) == ("fp32", pytest.approx(1e11))
    assert gemm.size >= 1024
    assert torch.get_num_threads() == 2


def test_products_of_this_machine() -> None:
    gemm = fastest_gemm()
    assert gemm.dtype in GEMM_DTYPES
    assert gemm.size in GEMM_SIZES
    assert gemm.flops_per_s > 1e6
