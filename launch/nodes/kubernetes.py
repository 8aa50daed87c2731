"""Kubernetes: a PyTorchJob for the training operator, or an indexed Job with a headless service."""

import re
import shlex
from typing import Any

import yaml

from launch.nodes.job import Job, beside
from launch.nodes.options import PlaceOptions
from launch.nodes.place import SchedulerPlace, Written
from launch.recipe_file import read_recipe
from vlm.errors import UserError, nearest
from vlm.paths import shown

_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_IMAGE = re.compile(
    r"([A-Za-z0-9.-]+(:\d{1,5})?/)?[a-z0-9]+([._/-]+[a-z0-9]+)*"
    r"(:[A-Za-z0-9_][A-Za-z0-9._-]{0,127})?(@sha256:[0-9a-f]{64})?"
)
_LONGEST_IMAGE = 500
_WORKLOADS = ("pytorchjob", "job")
_PORT = 29_400
_RECIPE = "/etc/vlm/recipe.yaml"
_SLACK = 30  # seconds that the agent has to end when its ranks have
_USER_ERROR = 2


class Kubernetes(SchedulerPlace):
    """A manifest beside the run directory, which kubectl gets."""

    takes = frozenset({"image", "namespace", "volume", "workload", "cache"})

    def __init__(self, job: Job, options: PlaceOptions) -> None:
        super().__init__(job, options)
        if options.image is None:
            raise UserError("--image: --on kubernetes needs a container image that has vlm")
        if len(options.image) > _LONGEST_IMAGE or not _IMAGE.fullmatch(options.image):
            raise UserError(
                f"--image: {shown(options.image)} is no name of an image: small letters, as in registry.org/team/vlm:1"
            )
        if options.namespace is not None and not _LABEL.fullmatch(options.namespace):
            raise UserError(f"--namespace: {shown(options.namespace)} is no name of a namespace")
        self.workload = options.workload or "pytorchjob"
        if self.workload not in _WORKLOADS:
            raise UserError(f"--workload: unknown {shown(self.workload)}; {nearest(self.workload, _WORKLOADS)}")
        self.volumes = [_volume(text) for text in options.volume or ()]
        if options.cache is not None and not (options.cache.startswith("/") and options.cache.isprintable()):
            raise UserError(f"--cache: {shown(options.cache)} is no path from / on")
        self.manifest = beside(job.run, ".k8s.yaml")

    def files(self) -> list[Written]:  # noqa: D102
        objects = [self._recipe(), *(self._pytorchjob() if self.workload == "pytorchjob" else self._indexed_job())]
        return [Written(self.manifest, yaml.safe_dump_all(objects, sort_keys=False, width=1000))]

    def command(self) -> list[str]:  # noqa: D102
        return ["kubectl", "apply", "-f", str(self.manifest)]

    def command_words(self) -> str:  # noqa: D102
        return shlex.join(self.command())

    def _recipe(self) -> dict[str, Any]:
        """The recipe as it was checked here, its bases and overrides in it; what is trusted was asked for here."""
        _, values = read_recipe(self.job.recipe, self.job.overrides, trust=True)
        if self.options.cache is not None:
            values.setdefault("data", {}).setdefault("cache", {})["folder"] = self.options.cache
        text = yaml.safe_dump(values, sort_keys=False)
        return {**self._head("v1", "ConfigMap", f"{self.job.name}-recipe"), "data": {"recipe.yaml": text}}

    def _head(self, version: str, kind: str, name: str) -> dict[str, Any]:
        namespace = {} if self.options.namespace is None else {"namespace": self.options.namespace}
        return {"apiVersion": version, "kind": kind, "metadata": {"name": name, **namespace}}

    def _pytorchjob(self) -> list[dict[str, Any]]:
        """The operator gives each pod a name that the others find it by, and starts one anew that ended by a signal."""
        template = self._template(f"{self.job.name}-master-0", "pytorch", restart=None)
        replica = {"restartPolicy": "ExitCode", "template": template}
        specs: dict[str, Any] = {"Master": {"replicas": 1, **replica}}
        if self.job.nodes.most > 1:
            specs["Worker"] = {"replicas": self.job.nodes.most - 1, **_copy(replica)}
        run_policy = {"cleanPodPolicy": "None", "backoffLimit": self.job.restarts}
        return [
            {
                **self._head("kubeflow.org/v1", "PyTorchJob", self.job.name),
                "spec": {"runPolicy": run_policy, "pytorchReplicaSpecs": specs},
            }
        ]

    def _indexed_job(self) -> list[dict[str, Any]]:
        name = self.job.name
        service = {
            **self._head("v1", "Service", name),
            "spec": {
                "clusterIP": "None",
                "publishNotReadyAddresses": True,
                "selector": {"batch.kubernetes.io/job-name": name},
                "ports": [{"name": "meet", "port": _PORT}],
            },
        }
        template = self._template(f"{name}-0.{name}", "vlm", restart="Never")
        template["spec"]["subdomain"] = name
        mistake = {"containerName": "vlm", "operator": "In", "values": [_USER_ERROR]}
        job = {
            **self._head("batch/v1", "Job", name),
            "spec": {
                "completionMode": "Indexed",
                "completions": self.job.nodes.most,
                "parallelism": self.job.nodes.most,
                "backoffLimit": self.job.restarts,
                "podFailurePolicy": {
                    "rules": [
                        {"action": "FailJob", "onExitCodes": mistake},
                        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                    ]
                },
                "template": template,
            },
        }
        return [service, job]

    def _template(self, host: str, container: str, restart: str | None) -> dict[str, Any]:
        """The pod of one node; its ranks share memory, and it has time to save when it is to go."""
        job = self.job.with_recipe(_RECIPE).without_overrides()
        words = [*job.node_command(), "--meet", f"{host}:{_PORT}"]
        mounts = [
            {"name": "recipe", "mountPath": "/etc/vlm", "readOnly": True},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
            *({"name": f"volume-{n}", "mountPath": path} for n, (_, path) in enumerate(self.volumes)),
        ]
        volumes: list[dict[str, Any]] = [
            {"name": "recipe", "configMap": {"name": f"{job.name}-recipe"}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
            *(
                {"name": f"volume-{n}", "persistentVolumeClaim": {"claimName": claim}}
                for n, (claim, _) in enumerate(self.volumes)
            ),
        ]
        if self.options.cache is not None:
            mounts.append({"name": "cache", "mountPath": self.options.cache})
            volumes.append({"name": "cache", "emptyDir": {}})
        pod = {
            **({} if restart is None else {"restartPolicy": restart}),
            "terminationGracePeriodSeconds": job.grace + _SLACK,
            "containers": [
                {
                    "name": container,
                    "image": self.options.image,
                    "command": [_escaped(word) for word in words],
                    "ports": [{"name": "meet", "containerPort": _PORT}],
                    "resources": {"limits": {"nvidia.com/gpu": job.ranks}},
                    "volumeMounts": mounts,
                    **({"workingDir": self.volumes[0][1]} if self.volumes else {}),
                }
            ],
            "volumes": volumes,
        }
        return {"spec": pod}


def _copy(values: dict[str, Any]) -> dict[str, Any]:
    """The same values once more: YAML would write a reference to the first."""
    copy: dict[str, Any] = yaml.safe_load(yaml.safe_dump(values))
    return copy


def _escaped(word: str) -> str:
    """A word of a command, in which Kubernetes would fill in `$(NAME)`."""
    return word.replace("$(", "$$(")


def _volume(text: str) -> tuple[str, str]:
    claim, colon, path = text.partition(":")
    if not colon or not _LABEL.fullmatch(claim) or not path.startswith("/") or ":" in path or not path.isprintable():
        raise UserError(
            f"--volume: {shown(text)} is no CLAIM:PATH: the claim's name in a-z, 0-9 and '-', the path from / on"
        )
    return claim, path
