"""Builds the compiled CPU step and the compiled copy; everything else stands in pyproject.toml.

Both are optional: without a compiler, or (the step) on another processor family, the install goes on
and the worker uses plain torch, and numpy to copy. They are plain shared libraries for ctypes, so one
build serves every Python version.
"""

from __future__ import annotations

import platform
from glob import glob
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

AVX512 = [f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "bf16", "vnni")]


class Build(build_ext):
    """Sources named for an instruction set are compiled for it; the others for the floor."""

    def build_extension(self, extension: Extension) -> None:
        compile_one = self.compiler._compile

        def compile_for(*arguments: Any) -> None:
            obj, src, ext, cc_args, extra, pp_opts = arguments
            wider = AVX512 if src.endswith("_avx512.cpp") else []
            compile_one(obj, src, ext, cc_args, [*extra, *wider], pp_opts)

        self.compiler._compile = compile_for
        try:
            super().build_extension(extension)
        finally:
            self.compiler._compile = compile_one


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
            sources=sorted(glob("flowserve/devices/native/*.cpp")),
            depends=sorted(glob("flowserve/devices/native/*.h")),
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

setup(ext_modules=extensions, cmdclass={"build_ext": Build})
