"""What cluster/deploy/ ships: files that their tools take, with tokens on and nothing open to the world.

``make kuberay CRD=ray.io_rayjobs.yaml`` validates against the operator's published schema, a file or its address.
"""

import os
import shutil
import subprocess

import fsspec
import jsonschema
import pytest
import yaml
from toys import ROOT

DEPLOY = ROOT / "cluster" / "deploy"
CRD = os.environ.get("KUBERAY_CRD")


def read(name):
    return yaml.safe_load((DEPLOY / name).read_text())


def test_the_cluster_file_is_one_to_ray():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = read("ray-cluster.yaml")
    validate_config(prepare_config(config))
    commands = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    starts = [c for c in commands if "ray start" in c]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in c for c in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert "~/.ray/auth_token" in config["file_mounts"]


def test_the_ray_job_has_tokens_and_goes_on():
    job = read("rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert "--run evolver" in job["spec"]["entrypoint"]
    runtime = yaml.safe_load(job["spec"]["runtimeEnvYAML"])
    assert runtime["working_dir"].startswith("/")
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        assert {m["name"] for m in container["volumeMounts"]} <= {
            v["name"] for v in group["template"]["spec"]["volumes"]
        }


@pytest.mark.skipif(CRD is None, reason="KUBERAY_CRD names no schema of the operator")
def test_the_ray_job_is_one_to_the_operator():
    with fsspec.open(CRD, "rt") as file:
        definitions = list(yaml.safe_load_all(file))
    (crd,) = [d for d in definitions if d and d["spec"]["names"]["kind"] == "RayJob"]
    (schema,) = [v["schema"]["openAPIV3Schema"] for v in crd["spec"]["versions"] if v["name"] == "v1"]
    strict(schema["properties"]["spec"])
    assert [e.message for e in jsonschema.Draft202012Validator(schema).iter_errors(read("rayjob.yaml"))] == []


def strict(schema):
    """Unknown keys are errors, which the API server drops in silence."""
    if isinstance(schema, dict):
        if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
        for inner in schema.values():
            strict(inner)
    elif isinstance(schema, list):
        for inner in schema:
            strict(inner)


def test_the_slurm_script_is_one_to_bash():
    script = DEPLOY / "slurm.sh"
    subprocess.run([shutil.which("bash"), "-n", str(script)], check=True)
    text = script.read_text()
    assert "RAY_AUTH_MODE=token" in text
    assert "--requeue" in text


def test_the_runtime_environment_is_pinned_and_leaves_out_what_is_large():
    from ray.runtime_env import RuntimeEnv

    found = read("runtime-env.yaml")
    RuntimeEnv(**{k: v for k, v in found.items() if k != "working_dir"})
    assert ".ci/constraints.txt" in found["pip"]["packages"][0]
    assert {"/.venv", "/.git", "/results"} <= set(found["excludes"])
