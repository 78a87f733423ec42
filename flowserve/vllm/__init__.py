"""vLLM as the engine under the TE-shell: whole requests (colocated), for models that FlowServe does not run.

Nothing here is imported where `--engine flowserve` serves, and vLLM itself only when a model is loaded.
"""
