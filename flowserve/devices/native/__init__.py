"""Compiled CPU step (C++ in this folder), loaded by ctypes; absent builds fall back to plain torch.

Why C++ and not torch.compile: a step is some two hundred small kernels. One call without interpreter,
allocator or dispatcher between them runs at the memory's speed from the first step on, starts in no
time, and needs only a C++ compiler at install; plain torch multiplies bf16 at a tenth of float32's rate
on cores without AVX-512 (measured by tests/bench/engine.py).
"""
