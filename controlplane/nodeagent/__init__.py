"""The node's owner of model files (later also of weight and pool memory).

`sources.fetch` turns a model URI into a verified path in the node's cache. Called by the local
supervisor, the CLI (`deepflow models pull`), and the tests. DeepServe section 5 (pre-warmed
model files in node storage) is where this room is heading.
"""
