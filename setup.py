"""Builds the compiled CPU step and the compiled copy; everything else stands in pyproject.toml.

Both are optional: without a compiler, or (the step) on another processor family, the install goes on
and the worker uses plain torch, and numpy to copy. They are plain shared libraries for ctypes, so one
build serves every Python version.
"""

from __future__ import annotations

import platform

from setuptools import Extension, setup

extensions = [
    Extension(
        "kvtransfer.native._copy",
        sources=["kvtransfer/native/copy.c"],
        extra_compile_args=["-O3", "-std=gnu11", "-fvisibility=hidden"],
        optional=True,
    )
]
if platform.machine() in ("x86_64", "AMD64"):
    extensions.append(
        Extension(
            "flowserve.devices.native._llama_cpu",
            sources=[f"flowserve/devices/native/{name}.cpp" for name in ("llama_cpu", "llama_avx2")],
            depends=[
                f"flowserve/devices/native/{name}.h"
                for name in ("api", "attention", "gemm", "panels", "simd", "step", "threads", "tiles")
            ],
            language="c++",
            # AVX2 and FMA are the floor; the loader asks the processor before the first call.
            extra_compile_args=[
                "-O3",
                "-std=c++17",
                "-mavx2",
                "-mfma",
                "-mf16c",
                "-pthread",
                "-fvisibility=hidden",
            ],
            extra_link_args=["-pthread"],
            optional=True,
        )
    )

setup(ext_modules=extensions)
