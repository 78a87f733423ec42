"""`/v1/chat/completions` and `/v1/completions`."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from controlplane.api.openai import ChatCompletionRequest, CompletionRequest
from controlplane.api.openai_responses import ChatCompletion, Completion
from controlplane.gateway.auth import Principal
from controlplane.gateway.body import read_model
from controlplane.gateway.context import context_of
from controlplane.gateway.plan import Plan, plan_chat, plan_completion
from controlplane.gateway.routes.documented import GENERATION, answers, body_of
from controlplane.gateway.run import Run
from controlplane.gateway.sse import StreamResponse, WholeResponse
from controlplane.gateway.state import Gateway, identify, refuse_if_draining

router = APIRouter()


@router.post(
    "/v1/chat/completions",
    responses=answers(ChatCompletion, GENERATION, stream=True),
    openapi_extra=body_of(ChatCompletionRequest),
    response_class=Response,
)
async def create_chat_completion(request: Request) -> Response:
    """A model's answer to a conversation."""
    gateway, principal = await identify(request, "chat")
    refuse_if_draining(gateway)
    context = context_of(request)
    body = await read_model(request, ChatCompletionRequest, gateway.settings)
    model = gateway.catalogue.find(body.model) or await gateway.holding.introduce(
        gateway.catalogue, body.model, context
    )
    context.model = model.id
    context.stage("read")
    plan = await plan_chat(body, model, gateway.pool, gateway.settings)
    context.stage("tokenize")
    return await _answer(request, gateway, principal, plan)


@router.post(
    "/v1/completions",
    responses=answers(Completion, GENERATION, stream=True),
    openapi_extra=body_of(CompletionRequest),
    response_class=Response,
)
async def create_completion(request: Request) -> Response:
    """A model's continuation of one or more prompts."""
    gateway, principal = await identify(request, "completion")
    refuse_if_draining(gateway)
    context = context_of(request)
    body = await read_model(request, CompletionRequest, gateway.settings)
    model = gateway.catalogue.find(body.model) or await gateway.holding.introduce(
        gateway.catalogue, body.model, context
    )
    context.model = model.id
    context.stage("read")
    plan = await plan_completion(body, model, gateway.pool, gateway.settings)
    context.stage("tokenize")
    return await _answer(request, gateway, principal, plan)


async def _answer(request: Request, gateway: Gateway, principal: Principal, plan: Plan) -> Response:
    context = context_of(request)
    lease = await gateway.limiter.admit(principal, context.request_id, plan.prompt_tokens * plan.n)
    context.response_headers.extend(lease.headers)
    run = Run(
        plan, context, principal, lease,
        meter=gateway.meter, demand=gateway.demand, settings=gateway.settings,
    )  # fmt: skip
    try:
        held = gateway.holding.enter(plan.model, size=context.body_bytes, priority=principal.priority)
        if held is None:
            run.submit(gateway.executor)
    except BaseException:
        await run.settle("not submitted")
        raise
    context.stage("submit")
    return StreamResponse(run, held) if plan.stream else WholeResponse(run, held)


ENDPOINTS = {"/v1/chat/completions": create_chat_completion, "/v1/completions": create_completion}
"""The hot routes, for `middleware.py`."""
