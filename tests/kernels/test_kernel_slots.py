"""Reads by slot: the reference against loops in Python."""

import pytest
import torch

from kernels.slots import read_slots
from kernels.slots import reference as slots_reference
from tests.support.slot_cases import GROUPS, SLOT_CASES, SlotCase


@pytest.mark.parametrize("case", SLOT_CASES, ids=str)
def test_what_is_read(case: SlotCase) -> None:
    token_ids, newest_of, slots, newest, tables = case.inputs()
    for read in (read_slots, slots_reference.read_slots):
        ids, found = read(token_ids, newest_of, slots, newest, tables, case.num_blocks)
        assert ids.tolist() == [
            token if slot < 0 else int(newest[slot])
            for token, slot in zip(token_ids.tolist(), newest_of.tolist(), strict=True)
        ]
        assert found.tolist() == [
            [tables[group, slot, : case.num_blocks].tolist() for slot in slots] for group in range(GROUPS)
        ]
        assert found.dtype == torch.int32
        assert found.is_contiguous()


def test_the_argument_that_is_refused_is_named() -> None:
    token_ids, newest_of, slots, newest, tables = SlotCase(4, 3, 6, 5, 2).inputs()
    for arguments, name in (
        ((token_ids.int(), newest_of, slots, newest, tables, 2), "token_ids"),
        ((token_ids, newest_of.int(), slots, newest, tables, 2), "newest_of"),
        ((token_ids, newest_of[1:], slots, newest, tables, 2), "newest_of"),
        ((token_ids, newest_of, slots[None], newest, tables, 2), "slots"),
        ((token_ids, newest_of, slots, newest.float(), tables, 2), "newest"),
        ((token_ids, newest_of, slots, newest, tables[:, :5], 2), "tables"),
        ((token_ids, newest_of, slots, newest, tables.long(), 2), "tables"),
        ((token_ids, newest_of, slots, newest, tables, 6), "num_blocks"),
        ((token_ids, newest_of, slots, newest, tables, -1), "num_blocks"),
    ):
        with pytest.raises(ValueError, match=rf"^{name} "):
            read_slots(*arguments)
