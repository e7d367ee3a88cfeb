"""The fp8 KV cache: float8_e4m3fn (OCP), with one scale for each KV head."""

import torch

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
