"""Python's cyclic garbage collector, set for a process that is an engine."""

import gc

_YOUNG_OBJECTS = 20_000
"""Objects more than were freed before the collector looks at the young ones. A step of 1024
sequences makes a few thousand, which reference counts free again; with the default of 700 each step
set off collections, and every few hundred one of everything, 50 ms long."""


def spare_collections() -> None:
    """Call it once, when the model is loaded: what is there now lives as long as the process and is
    not looked at again, and what comes later is looked at rarely. Cycles are still found, only
    later."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS, 10, 10)
