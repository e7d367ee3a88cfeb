"""`GET /v1/models`: the served model under each of its names, as OpenAI lists it, and beside that
the catalogue that Codex reads."""

import orjson
from fastapi import FastAPI, Response

from cluster.chat_options import ReasoningEffort
from cluster.frontend.answers import CodexModel, ModelBody, ModelList
from cluster.frontend.openapi import Schemas
from cluster.generation import GenerationService, ModelInfo

_EFFORTS: dict[ReasoningEffort, str] = {
    "low": "Short reasoning, fast answers",
    "medium": "Balanced reasoning",
    "high": "Long reasoning for hard problems",
}
_INSTRUCTIONS = (
    "You are a coding agent in a terminal. You share a workspace with the user: read files before you "
    "change them, make the changes through your tools, run what shows that they work, and then say "
    "briefly what you did."
)
"""Instructions for clients that take them from the catalogue alone."""
_MAX_TOOL_OUTPUT_TOKENS = 10_000
"""Number of tokens of a tool's output that Codex keeps; its own figure for OpenAI's models."""


def add_models(app: FastAPI, service: GenerationService, schemas: Schemas) -> None:
    """Add the routes that list models."""
    served = service.served

    @app.get("/v1/models", openapi_extra=schemas.describe(None, ModelList))
    async def list_models() -> Response:
        """List the served model under each of its names."""
        return _json(_model_list(served.info, service.prompts.defaults.reasoning_effort))

    @app.get("/v1/models/{model_id:path}", openapi_extra=schemas.describe(None, ModelBody))
    async def get_model(model_id: str) -> Response:
        """One model."""
        served.check(model_id)
        return _json(_model_body(served.info, model_id))


def _model_list(model: ModelInfo, effort: ReasoningEffort) -> ModelList:
    return {
        "object": "list",
        "data": [_model_body(model, name) for name in model.names],
        "models": [_codex_model(model, name, rank, effort) for rank, name in enumerate(model.names)],
    }


def _model_body(model: ModelInfo, name: str) -> ModelBody:
    return {
        "id": name,
        "object": "model",
        "created": model.created_unix_s,
        "owned_by": "cantata",
        "root": model.root,
        "parent": None,
        "max_model_len": model.max_model_len,
    }


def _codex_model(model: ModelInfo, name: str, rank: int, effort: ReasoningEffort) -> CodexModel:
    """Return a model's entry in the catalogue. Codex refuses the whole catalogue if a field of its
    `ModelInfo` without a default is missing, and ignores fields that it does not know.

    Args:
        rank: the first of all names is what Codex uses by default.
        effort: for requests that do not set it.
    """
    return {
        "slug": name,
        "display_name": name,
        "description": None,
        "default_reasoning_level": effort,
        "supported_reasoning_levels": [
            {"effort": level, "description": text} for level, text in _EFFORTS.items()
        ],
        "shell_type": "default",
        "visibility": "list" if rank == 0 else "hide",
        "supported_in_api": True,
        "priority": rank,
        "additional_speed_tiers": [],
        "service_tiers": [],
        "availability_nux": None,
        "upgrade": None,
        "base_instructions": _INSTRUCTIONS,
        "include_skills_usage_instructions": False,
        "supports_reasoning_summaries": True,
        "default_reasoning_summary": "auto",
        "support_verbosity": False,
        "default_verbosity": None,
        "apply_patch_tool_type": "freeform",
        "web_search_tool_type": "text",
        "truncation_policy": {"mode": "tokens", "limit": _MAX_TOOL_OUTPUT_TOKENS},
        "supports_parallel_tool_calls": False,
        "supports_image_detail_original": False,
        "context_window": model.max_model_len,
        "max_context_window": model.max_model_len,
        "auto_compact_token_limit": None,
        "effective_context_window_percent": 95,
        "experimental_supported_tools": [],
        "input_modalities": ["text"],
        "supports_search_tool": False,
    }


def _json(value: object) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")
