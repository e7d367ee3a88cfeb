"""The transport-neutral service under both APIs: requests in, events out."""

from cluster.fleet.dispatch import MAX_ENGINE_DEATHS
from cluster.generation.prompts import Prompts
from cluster.generation.requests import (
    ChatRequest,
    CompletionRequest,
    FieldNames,
    Options,
    Structure,
    ToolChoice,
    Truncation,
)
from cluster.generation.running import Generation
from cluster.generation.service import GenerationService
from cluster.generation.settings import Capacity, ChatDefaults, ModelInfo, ServedModel
from cluster.generation.turn import Journal

__all__ = [
    "MAX_ENGINE_DEATHS",
    "Capacity",
    "ChatDefaults",
    "ChatRequest",
    "CompletionRequest",
    "FieldNames",
    "Generation",
    "GenerationService",
    "Journal",
    "ModelInfo",
    "Options",
    "Prompts",
    "ServedModel",
    "Structure",
    "ToolChoice",
    "Truncation",
]
