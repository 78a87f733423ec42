"""Command line and environment of a TE: what is refused before anything starts. Needs nothing."""

from __future__ import annotations

import pytest

from flowserve.shell.settings import Endpoint, SettingsError, is_loopback, parse, parse_endpoint

TOKEN = {"DEEPFLOW_CLUSTER_TOKEN": "secret"}


def test_defaults_are_a_local_executor_on_any_port() -> None:
    settings = parse(["--te-id", "te-0"], {})
    assert settings.listen == Endpoint("127.0.0.1", 0) == settings.metrics_listen
    assert settings.role == "colocated" and settings.device == "cpu" and settings.threads >= 1
    assert not settings.parent_death and settings.redis_url == ""


def test_environment_gives_credential_registry_and_parent_death() -> None:
    env = {**TOKEN, "REDIS_URL": "redis://a", "DEEPFLOW_PARENT_DEATH": "1"}
    settings = parse(["--te-id", "te-0"], env)
    assert (settings.token, settings.redis_url, settings.parent_death) == ("secret", "redis://a", True)
    assert parse(["--te-id", "te-0", "--redis-url", "redis://b"], env).redis_url == "redis://b"


@pytest.mark.parametrize("listen", ["0.0.0.0:1", "10.1.2.3:1", "[::]:1", "example.org:1"])
def test_refuses_other_than_loopback_without_a_token(listen: str) -> None:
    argv = ["--te-id", "te-0", "--listen", listen, "--advertise-host", "10.1.2.3"]
    with pytest.raises(SettingsError, match="DEEPFLOW_CLUSTER_TOKEN"):
        parse(argv, {})
    assert parse(argv, TOKEN).advertise_host == "10.1.2.3"


def test_refuses_a_wildcard_that_peers_could_not_reach() -> None:
    with pytest.raises(SettingsError, match="advertise-host"):
        parse(["--te-id", "te-0", "--listen", "0.0.0.0:1"], TOKEN)


@pytest.mark.parametrize(
    "argv",
    [
        ["--te-id", ""],
        ["--te-id", "a b"],
        ["--te-id", "x" * 129],
        ["--te-id", "ids"],
        ["--te-id", "te-0", "--listen", "nowhere"],
        ["--te-id", "te-0", "--listen", "127.0.0.1:70000"],
        ["--te-id", "te-0", "--metrics-listen", ":1"],
        ["--te-id", "te-0", "--max-tasks", "0"],
        ["--te-id", "te-0", "--threads", "-1"],
        ["--te-id", "te-0", "--max-asleep", "0"],
        ["--te-id", "te-0", "--engine-args", "{}"],
        ["--te-id", "te-0", "--engine", "vllm", "--engine-args", "{"],
        ["--te-id", "te-0", "--engine", "vllm", "--engine-args", "[]"],
        ["--te-id", "te-0", "--lease-seconds", "nan"],
        ["--te-id", "te-0", "--watchdog-seconds", "0"],
        ["--te-id", "te-0", "--max-running", "600"],
        ["--te-id", "te-0", "--disk-cache", "/tmp/kv"],
        ["--te-id", "te-0", "--disk-cache-bytes", "1000"],
    ],
)
def test_refuses_values_that_make_no_sense(argv: list[str]) -> None:
    with pytest.raises(SettingsError):
        parse(argv, TOKEN)


def test_arguments_of_vllms_engine_are_json() -> None:
    argv = ["--te-id", "te-0", "--engine", "vllm", "--engine-args", '{"enforce_eager": true}']
    settings = parse(argv, {})
    assert settings.engine == "vllm" and settings.engine_args == {"enforce_eager": True}


def test_endpoints_read_and_write_alike() -> None:
    for text in ("127.0.0.1:80", "[::1]:0", "host:65535"):
        assert str(parse_endpoint(text)) == text
    assert is_loopback("127.9.9.9") and is_loopback("::1") and is_loopback("localhost")
    assert not is_loopback("10.0.0.1") and not is_loopback("localhost.example.org")
