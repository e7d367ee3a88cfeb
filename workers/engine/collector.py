"""Settings of Python's cyclic garbage collector for an engine process."""

import gc

_YOUNG_OBJECTS = 20_000
"""Net allocations after which the collector scans young objects. A step of 1024 sequences makes a
few thousand, which reference counting frees again; with the default of 700 each step triggered
collections, and every few hundred steps a full one of 50 ms."""


def spare_collections() -> None:
    """Reduce garbage collection; call it once, when the model is loaded. Objects that exist now
    live as long as the process and are not scanned again; later ones are scanned rarely. Cycles are
    still found, only later."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS, 10, 10)
