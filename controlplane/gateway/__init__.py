"""The gateway: OpenAI's HTTP API in front of the job executor.

`app.py` builds the FastAPI application, `python -m controlplane.gateway` runs it. What a request meets,
in order: `middleware.py` (ids, access log), `auth.py` (key → tenant), `limits.py`, `body.py` (bytes and
deadline), `controlplane.api.openai` (validation), `catalogue.py` (model; in a cluster by `servings.py`),
`chat.py` (template), `tokenizing.py`, `holding.py` (while its model wakes), the job executor behind
`controlplane.jobs.serving`, `answer.py` with `detokenize.py` and `stops.py`, `sse.py`, `metering.py`.
"""
