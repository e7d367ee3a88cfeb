"""Token automata in C++. The caller has checked the rows (`AutomatonRows.check`)."""

import ctypes

from torch import Tensor

from kernels.automaton.layout import AutomatonRows
from kernels.cpu import native, structures


def mask(logits: Tensor, automaton: AutomatonRows) -> None:
    """Compute `kernels.automaton.reference.mask`.

    Args:
        logits: [S, V] fp32, rows contiguous; changed.
    """
    arguments = _arguments(automaton, logits=logits)
    native.ready().cantata_automaton_mask(ctypes.byref(arguments))


def advance(automaton: AutomatonRows, token_ids: Tensor) -> None:
    """Compute `kernels.automaton.reference.advance`."""
    arguments = _arguments(automaton, token_ids=token_ids)
    native.ready().cantata_automaton_advance(ctypes.byref(arguments))


def _arguments(
    automaton: AutomatonRows, *, logits: Tensor | None = None, token_ids: Tensor | None = None
) -> structures.AutomatonArgs:
    return structures.AutomatonArgs(
        0 if logits is None else logits.data_ptr(),
        native.pointer(automaton.words),
        native.pointer(automaton.places),
        native.pointer(automaton.rows),
        native.pointer(token_ids),
        automaton.num_rows,
        0 if logits is None else logits.shape[1],
        0 if logits is None else logits.stride(0),
    )
