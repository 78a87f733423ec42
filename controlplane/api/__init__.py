"""Wire types of the HTTP API: OpenAI bodies, errors, `/deepflow/v1`. Imports nothing of ours."""
