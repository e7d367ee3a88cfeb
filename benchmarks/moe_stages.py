"""A switch that takes the pipeline out of the grouped products: a wrong result that is right with
one stage is a race between a load and its use."""

import os
from dataclasses import replace

ENVIRONMENT = "GPU_CHECK_MOE_NUM_STAGES"
"""Environment variable: stages of all tiles in this process; unset: each tile's own."""


def apply_from_environment() -> None:
    """Apply the variable; call it in a process that has launched nothing yet."""
    wanted = os.environ.get(ENVIRONMENT)
    if wanted is None:
        return
    from kernels.moe import grouped, tile_choice

    choose_tile, num_stages = tile_choice.choose_tile, int(wanted)

    def choose(*args: object, **options: object) -> tile_choice.Tile:
        return replace(choose_tile(*args, **options), num_stages=num_stages)  # type: ignore[arg-type]

    grouped.choose_tile = choose  # type: ignore[assignment]
