"""Cases of reads by slot, for the reference and the kernel."""

from dataclasses import dataclass

import torch
from torch import Tensor

GROUPS = 2


@dataclass(frozen=True)
class SlotCase:
    num_tokens: int
    num_seqs: int
    num_slots: int
    max_blocks: int
    num_blocks: int

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return (token_ids, newest_of, slots, newest, tables); about half of the tokens are of
        slots, of the last slot too."""
        generator = torch.Generator().manual_seed(self.num_tokens)

        def integers(low: int, high: int, *shape: int) -> Tensor:
            return torch.randint(low, high, shape, generator=generator)

        token_ids = integers(0, 2**31, self.num_tokens)
        newest_of = torch.where(
            integers(0, 2, self.num_tokens) == 0, -1, integers(0, self.num_slots, self.num_tokens)
        )
        newest_of[-1:] = self.num_slots - 1
        slots = torch.randperm(self.num_slots, generator=generator)[: self.num_seqs]
        return (
            token_ids,
            newest_of,
            slots,
            integers(0, 2**40, self.num_slots),
            integers(0, 2**31, GROUPS, self.num_slots, self.max_blocks).int(),
        )


SLOT_CASES = [
    SlotCase(0, 0, 3, 4, 2),
    SlotCase(1, 1, 1, 1, 1),
    SlotCase(3, 3, 7, 5, 0),
    SlotCase(9, 4, 6, 11, 11),
    SlotCase(40, 2, 3, 130, 129),
]
