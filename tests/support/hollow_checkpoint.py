"""Checkpoints of any size that take no disk: exact headers and sizes, and holes where the weights
would be."""

from pathlib import Path

from workers.config import ModelConfig
from workers.model.make_checkpoint import plan_checkpoint
from workers.model.safetensors_writer import safetensors_header, stored_bytes


def write_hollow_checkpoint(folder: Path, model: ModelConfig) -> Path:
    """Write the checkpoint into `folder`, which is made."""
    folder.mkdir()
    plan = plan_checkpoint(model, seed=0)
    for name, text in plan.texts:
        (folder / name).write_text(text)
    for name, tensors in plan.shards:
        header = safetensors_header(tensors, plan.metadata)
        with (folder / name).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(stored_bytes(spec) for spec in tensors))
    return folder
