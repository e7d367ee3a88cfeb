"""A device that cannot be used is refused in one sentence."""

import pytest
import torch

from workers.errors import ConfigError
from workers.rank.device import usable_device

WITHOUT_CUDA = torch.version.cuda is None and torch.version.hip is None


@pytest.mark.skipif(not WITHOUT_CUDA, reason="this torch has CUDA or ROCm")
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_a_torch_without_cuda_says_what_to_install(name: str) -> None:
    with pytest.raises(ConfigError) as refused:
        usable_device(name)
    sentence = str(refused.value)
    assert sentence.startswith(f"engine.device {name} cannot be used here: the torch that is installed, ")
    assert "without CUDA and ROCm" in sentence
    assert "TORCH_INDEX_URL" in sentence
    assert "\n" not in sentence


def test_a_gpu_that_is_not_there_is_named_in_torchs_first_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def set_device(device: object) -> None:
        raise RuntimeError("CUDA error: invalid device ordinal\nCUDA kernel errors might be reported later")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    sentence = "^engine.device cuda:9 cannot be used here: CUDA error: invalid device ordinal$"
    with pytest.raises(ConfigError, match=sentence):
        usable_device("cuda:9")
