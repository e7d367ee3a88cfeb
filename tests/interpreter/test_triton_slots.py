"""A step's token ids and block tables by slot as a Triton kernel, against the reference."""

import pytest
import torch

from kernels.slots import read_slots, reference
from kernels.slots.read import BLOCK
from tests.interpreter.guards import guarded
from tests.interpreter.interpreter import recorded_launches
from tests.support.slot_cases import SLOT_CASES, SlotCase


@pytest.mark.parametrize(
    "case",
    [
        *SLOT_CASES,
        SlotCase(BLOCK - 1, 3, 5, BLOCK, BLOCK - 1),
        SlotCase(BLOCK + 1, 2, 4, BLOCK + 3, BLOCK + 1),
    ],
)
def test_reads_by_slot(case: SlotCase) -> None:
    arguments = tuple(map(guarded, case.inputs()))
    with recorded_launches() as launches:
        ids, tables = read_slots(*arguments, case.num_blocks)
    expected_ids, expected_tables = reference.read_slots(*arguments, case.num_blocks)
    assert torch.equal(ids, expected_ids)
    assert torch.equal(tables, expected_tables)
    assert launches == ["read_slots_kernel"] * (case.num_tokens + case.num_seqs * case.num_blocks > 0)


def test_slots_outside_are_named() -> None:
    token_ids, newest_of, slots, newest, tables = SlotCase(4, 3, 6, 5, 2).inputs()
    for bad in (6, 2**40):
        with pytest.raises(IndexError, match=r"^newest_of "):
            read_slots(token_ids, torch.tensor([3, -1, 0, bad]), slots, newest, tables, 2)
    for bad in (-1, 6):
        with pytest.raises(IndexError, match=r"^slots "):
            read_slots(token_ids, newest_of, torch.tensor([0, bad]), newest, tables, 2)
    with pytest.raises(ValueError, match=r"^newest "):
        read_slots(token_ids, newest_of, slots, newest.repeat(2)[::2], tables, 2)
    with pytest.raises(ValueError, match=r"^tables "):
        read_slots(token_ids, newest_of, slots, newest, tables.repeat(1, 1, 2)[:, :, ::2], 2)
