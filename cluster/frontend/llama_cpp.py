"""Routes of llama.cpp's server for its clients: `/props` and `/apply-template`."""

import orjson
from fastapi import FastAPI, Request, Response

from cluster.frontend import body, schema
from cluster.frontend.answers import AppliedTemplate, Props
from cluster.frontend.openapi import Schemas
from cluster.frontend.tokenize import chat_to_render
from cluster.generation import GenerationService
from workers.request import SamplingParams


def add_llama_cpp(
    app: FastAPI, service: GenerationService, schemas: Schemas, limits: body.BodyLimits
) -> None:
    """Add the routes."""

    @app.get("/props", openapi_extra=schemas.describe(None, Props))
    async def props() -> Response:
        """Properties of the server, in llama.cpp's form."""
        return _json(_props(service, app.version))

    @app.post("/apply-template", openapi_extra=schemas.describe(schema.TemplateRequest, AppliedTemplate))
    async def apply_template(request: Request) -> Response:
        """The prompt of a chat as text, with the names of special tokens."""
        asked, chat = await body.read(
            request,
            schema.TemplateRequest,
            limits,
            service.served.info.max_model_len,
            lambda asked, num_bytes: chat_to_render(asked, asked.messages, num_bytes),
        )
        service.served.check(asked.model)
        ids = await service.prompts.chat(chat, begins_answer=asked.add_generation_prompt is not False)
        answer: AppliedTemplate = {"prompt": await service.prompts.detokenize(ids)}
        return _json(answer)


def _props(service: GenerationService, version: str) -> Props:
    model, encoding, default = service.served.info, service.prompts.encoding, SamplingParams()
    return {
        "default_generation_settings": {
            "n_ctx": model.max_model_len,
            "params": {"temperature": default.temperature, "top_p": default.top_p},
        },
        "total_slots": service.max_in_flight,
        "model_alias": model.id,
        "model_path": model.root,
        "modalities": {"vision": False, "audio": False},
        "chat_template": "",
        "bos_token": "",
        "eos_token": encoding.decode([encoding.return_], skip_special_tokens=False),
        "build_info": f"cantata {version}",
    }


def _json(value: object) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")
