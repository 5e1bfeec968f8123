"""The command line on a hub id, end to end, against a hub on localhost."""

import json
import subprocess
import sys

import pytest

from tests.loaders.hub_server import ROOT, FakeHub, client_environment, serve
from tests.oracles.tiny_gpt_oss import write_tiny_gpt_oss

PROMPT = ("--prompt", "It was", "--max-new-tokens", "4", "--temperature", "0")


@pytest.fixture
def hub(tmp_path):
    write_tiny_gpt_oss(tmp_path / "model", vocab=4096, tokenizer=True)
    files = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    with serve(FakeHub(repos={"acme/tiny": files})) as running:
        yield running


def generate(hub, cache, **env):
    return subprocess.run(
        [sys.executable, "-m", "moe_runtime", "generate", "acme/tiny", *PROMPT],
        cwd=ROOT, env=client_environment(hub, cache) | env, text=True, capture_output=True,
    )  # fmt: skip


def test_generates_from_the_hub_and_then_offline(hub, tmp_path):
    online = generate(hub, tmp_path / "cache")
    assert online.returncode == 0, online.stderr
    hub.requests.clear()
    offline = generate(hub, tmp_path / "cache", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert offline.stdout == online.stdout
    assert not hub.requests


def test_a_model_we_do_not_run_is_refused_before_its_weights_are_fetched(hub, tmp_path):
    config = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
    hub.repos["acme/tiny"]["config.json"] = json.dumps(config).encode()
    result = generate(hub, tmp_path / "cache")
    assert result.returncode == 1
    first, second = result.stderr.splitlines()
    assert first.startswith("error: model_type 'mixtral'") and second.startswith("hint: supported:")
    shards = {name: n for name, n in hub.fetched().items() if name.endswith(".safetensors")}
    assert shards and max(shards.values()) <= 100_000, "headers alone"


def test_a_gated_model_is_an_error_with_the_way_out(hub, tmp_path):
    hub.gated.add("acme/tiny")
    result = generate(hub, tmp_path / "cache")
    assert result.returncode == 1 and not result.stdout
    first, second = result.stderr.splitlines()
    assert first.startswith("error: acme/tiny: this model is gated")
    assert second.startswith(f"hint: accept the licence at {hub.url}/acme/tiny")
