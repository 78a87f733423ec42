"""What pods are given for weights."""

from __future__ import annotations

from typing import Any

import pytest

from controlplane.api.resources.names import WEIGHTS_PATH
from controlplane.api.resources.warmpool import WarmPool
from controlplane.operator.pods import UNBOUNDED_WEIGHTS, pod_spec

FOLDER = ["--weights-dir", f"{WEIGHTS_PATH}/node", "--weights-bytes"]


def made(**spec: Any) -> tuple[list[str], list[dict[str, Any]]]:
    """The executor's options for weights, and the volumes for them."""
    body = {"metadata": {"namespace": "n", "name": "p"}, "spec": {"accelerator": "a", "image": "i", **spec}}
    pod = pod_spec(WarmPool.model_validate(body), token_secret="", redis_secret="")
    executor, fetcher = pod["containers"]
    args = executor["args"]
    mounted = [mount for mount in executor["volumeMounts"] if mount["name"] == "weights"]
    volumes = [volume for volume in pod["volumes"] if volume["name"] == "weights"]
    assert len(mounted) == len(volumes)
    assert not any(mount["name"] == "weights" for mount in fetcher["volumeMounts"])
    at = args.index("--weights-dir") if "--weights-dir" in args else len(args)
    return args[at : at + 6], volumes


@pytest.mark.parametrize(
    ("spec", "options", "limit"),
    [
        ({}, [*FOLDER, str(UNBOUNDED_WEIGHTS)], None),
        ({"resources": {"limits": {"memory": "2Gi"}}}, [*FOLDER, str(2 << 30)], None),
        ({"weights": {"sizeLimit": "1Gi"}}, [*FOLDER, str(1 << 30)], "1Gi"),
        ({"device": "cuda", "weights": {"sizeLimit": "1Gi"}}, [*FOLDER, str(1 << 30)], "1Gi"),
        (
            {"weights": {"sizeLimit": "1Gi", "reserve": "2Gi"}},
            [*FOLDER, str(1 << 30), "--weights-reserve-bytes", str(1 << 30)],
            "1Gi",
        ),
    ],
)
def test_weights_lie_in_memory_of_the_pod(spec: Any, options: list[str], limit: str | None) -> None:
    given, (volume,) = made(**spec)
    assert given[: len(options)] == options
    bound = {} if limit is None else {"sizeLimit": limit}
    assert volume["emptyDir"] == {"medium": "Memory", **bound}


@pytest.mark.parametrize(
    "spec", [{"device": "cuda"}, {"weights": {"sizeLimit": "0"}}, {"device": "cuda", "tensorParallel": 2}]
)
def test_weights_are_the_process_own_where_memory_for_them_is_not_wanted(spec: Any) -> None:
    assert made(**spec) == ([], [])
