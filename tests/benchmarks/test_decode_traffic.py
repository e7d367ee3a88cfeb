"""A decode layer of gpt-oss: how many launches, and how much traffic beyond its weights and KV
cache."""

import pytest

pytest.importorskip("triton")

from benchmarks.decode_traffic import layer_launches, least_bytes
from workers.model.make_checkpoint import preset_config

AFTER_ATTENTION = [
    "linear",
    "add_rms_norm_kernel",
    "narrow_linear_kernel",
    "choose_experts",
    "EXPERTS",
    "EXPERTS",
    "add_slots_rms_norm",
]


@pytest.mark.parametrize("target", ["sm_90", "sm_100", "gfx950"])
@pytest.mark.parametrize("window", [128, None])
def test_launches_and_traffic(target: str, window: int | None) -> None:
    """At most 12 launches and 1.1 times what must be read at any batch."""
    config = preset_config("120b")
    for batch_size in (1, 8, 64, 256):
        launches = layer_launches(config, window, target, batch_size, 8192)
        assert len(launches) <= 12
        assert sum(launch.total_bytes for launch in launches) <= 1.1 * least_bytes(launches)
        names = ["EXPERTS" if launch.name.startswith("expert_matmul") else launch.name for launch in launches]
        merges = ["_merge_splits"] if window is None else []
        if batch_size <= 64:
            assert names == ["linear", "_rope_and_store", "_attend", *merges, *AFTER_ATTENTION]


def test_the_least_is_what_the_shapes_say() -> None:
    config = preset_config("120b")
    batch_size, context = 3, 1000
    launches = layer_launches(config, None, "sm_100", batch_size, context)
    hidden, heads, kv_heads = 2880, 64 * 64, 8 * 64
    dense = (
        2 * (hidden + (heads + 2 * kv_heads) * (hidden + 1) + hidden * (heads + 1) + hidden)
        + 4 * 64
        + 4 * 128 * (hidden + 1)
    )
    an_expert = 3 * hidden * hidden * 17 / 32 + 2 * 3 * hidden
    touched = 128 * (1 - (1 - 4 / 128) ** batch_size)
    keys_and_values = 2 * kv_heads * 2 * batch_size * (context + 1)
    # The first norm belongs to the layer before, as a launch; its weight is as large as the one
    # that comes last.
    assert least_bytes(launches) == pytest.approx(dense + touched * an_expert + keys_and_values)
    assert launches[0].weight_bytes == 2 * (heads + 2 * kv_heads) * (hidden + 1)
