"""`/v1/models`, `/v1/tokenize`, `/v1/detokenize`."""

from __future__ import annotations

import orjson
from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response

from controlplane.api.errors import invalid
from controlplane.api.openai import DetokenizeRequest, TokenizeRequest
from controlplane.api.openai_responses import DetokenizeResponse, Model, ModelList, TokenizeResponse
from controlplane.gateway.body import read_model
from controlplane.gateway.catalogue import Pending, ServedModel
from controlplane.gateway.context import context_of
from controlplane.gateway.frames import token_text
from controlplane.gateway.plan import check_ids, render_chat
from controlplane.gateway.routes.documented import GENERATION, READING, answers, body_of
from controlplane.gateway.state import Gateway, identify
from controlplane.gateway.tokenizing import encode

router = APIRouter()


@router.get("/v1/models", responses=answers(ModelList, READING), response_class=Response)
async def list_models(request: Request) -> Response:
    """The models that can be named, whether or not an executor holds them now."""
    gateway, _ = await identify(request, "models")
    models = [_view(gateway, model) for model in gateway.catalogue.models()]
    models += [_pending_view(model) for model in gateway.catalogue.pendings()]
    return _json(ModelList(object="list", data=models))


@router.get("/v1/models/{model:path}", responses=answers(Model, READING), response_class=Response)
async def get_model(request: Request, model: str) -> Response:
    """One model, by id, alias or revision."""
    gateway, _ = await identify(request, "models")
    pending = gateway.catalogue.pending(model)
    if pending is not None:
        return _json(_pending_view(pending))
    return _json(_view(gateway, gateway.catalogue.resolve(model)))


def _view(gateway: Gateway, model: ServedModel) -> Model:
    return Model(
        id=model.id,
        object="model",
        created=model.created,
        owned_by="deepflow",
        root=model.card.name or model.id,
        max_model_len=model.context_length,
        revision=model.revision,
        aliases=list(model.entry.aliases),
        ready=gateway.executor.can_serve(model.revision),
    )


def _pending_view(model: Pending) -> Model:
    """Never started: nothing is known of it but its names."""
    return Model(
        id=model.id,
        object="model",
        created=model.created,
        owned_by="deepflow",
        root=model.id,
        max_model_len=0,
        revision="",
        aliases=list(model.aliases),
        ready=False,
    )


@router.post(
    "/v1/tokenize",
    responses=answers(TokenizeResponse, GENERATION),
    openapi_extra=body_of(TokenizeRequest),
    response_class=Response,
)
async def tokenize(request: Request) -> Response:
    """The ids of a text or of a conversation (vLLM's shape)."""
    gateway, _ = await identify(request, "tokenize")
    body = await read_model(request, TokenizeRequest, gateway.settings)
    model = gateway.catalogue.resolve(body.model)
    context_of(request).model = model.id
    if (body.prompt is None) == (body.messages is None):
        raise invalid("Give either prompt or messages.", "prompt")
    if body.messages is not None:
        prompted = body.add_generation_prompt is not False
        ids = await render_chat(
            body.messages,
            model,
            gateway.pool,
            add_generation_prompt=prompted,
            special=bool(body.add_special_tokens),
            limited=False,
        )
    else:
        text, special = body.prompt or "", body.add_special_tokens is not False
        longest = model.table.longest
        ids = await gateway.pool.run(
            lambda: encode(model.words, text, special=special, longest=longest, limit=None)
        )
    shown = [token_text(model.table.raw(token), prefixed=False) for token in ids]
    return _json(
        TokenizeResponse(
            count=len(ids),
            max_model_len=model.context_length,
            tokens=ids,
            token_strs=shown if body.return_token_strs else None,
        )
    )


@router.post(
    "/v1/detokenize",
    responses=answers(DetokenizeResponse, GENERATION),
    openapi_extra=body_of(DetokenizeRequest),
    response_class=Response,
)
async def detokenize(request: Request) -> Response:
    """The text of ids, special tokens by their names (vLLM's shape)."""
    gateway, _ = await identify(request, "detokenize")
    body = await read_model(request, DetokenizeRequest, gateway.settings)
    model = gateway.catalogue.resolve(body.model)
    context_of(request).model = model.id
    check_ids(body.tokens, model, "tokens")
    text: str = await gateway.pool.run(
        lambda: model.tokenizer.decode_batch([body.tokens], skip_special_tokens=False)[0]
    )
    return _json(DetokenizeResponse(prompt=text))


def _json(model: BaseModel) -> Response:
    return Response(orjson.dumps(model.model_dump()), media_type="application/json")
