"""What one start of TorchServe needs: its folder, environment and command line."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from marwright.archive.admission import POLICY_NAME
from marwright.client import Endpoint
from marwright.client.endpoint import SUPERVISOR_KEY_NAME
from marwright.errors import ServerError
from marwright.server.certificate import Certificate, make_certificate
from marwright.server.deployment import Deployment
from marwright.server.frontend import write_classes
from marwright.server.java import find_java
from marwright.server.keys import SECRET_NAMES
from marwright.server.ports import Ports
from marwright.server.properties import render_properties
from marwright.server.rendering import render_deployment, render_java_options, render_models
from marwright.server.sections import TlsFiles
from marwright.server.wanted import Wanted
from marwright.storage import translate_os_errors

if TYPE_CHECKING:
    from marwright.archive.policy import Policy

__all__ = [
    "clear_run_folder",
    "count_cores",
    "find_file",
    "Launch",
    "make_run_folder",
    "RUNNING_NAME",
    "STAGING",
    "THREAD_LIMITS",
]

RUNNING_NAME = "deployment.json"
"""In the run folder: the deployment that the server was started with, or was last changed to."""
STAGING = "store"
"""The folder of staged archives, in the run folder."""
LONGEST_FOLDER = 80
"""Characters: worker sockets lie below it, and a Unix socket's path ends at 107."""
THREAD_LIMITS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
SPIN_COUNT = "30000"
"""How long a thread of torch's stays awake for its next piece of work: a tenth of GNU OpenMP's own.

Where other work had the cores, a batch then took 2.8 ms instead of 45; elsewhere as long as before.
"""
PREDICTIONS_VARIABLE = "MARWRIGHT_PREDICTIONS"
SPOOL_BYTES = 64 << 20
"""Most that workers write before somebody collects it: some 25,000 predictions."""
CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")


def find_package() -> Path:
    """Return the folder of the installed package `ts`.

    Raises:
        ServerError: it is not installed.
    """
    spec = importlib.util.find_spec("ts")
    if spec is None or spec.origin is None:
        raise ServerError(
            "TorchServe is not installed", remedy="install it: pip install 'torchserve==0.12.0'"
        )
    return Path(spec.origin).parent


def find_file(name: str) -> Path:
    """Return a file that comes with this package."""
    return Path(str(resources.files("marwright.server") / name))


def make_run_folder() -> Path:
    """Make a private folder (0700) whose path leaves room for a socket's name."""
    base = Path(tempfile.gettempdir()).resolve()
    if len(str(base)) > LONGEST_FOLDER - len("/marwright-12345678"):
        base = Path("/tmp")
    return Path(tempfile.mkdtemp(prefix="marwright-", dir=base))


def clear_run_folder(folder: Path) -> None:
    """Make what a start needs in a run folder, and take away what an earlier one has left."""
    for name in ("tmp", "workflows", "classes"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("tmp", "workflows"):
        (folder / name).mkdir(mode=0o700)
    # An earlier server's tokens are not to be taken for this one's.
    (folder / "key_file.json").unlink(missing_ok=True)


@dataclass(frozen=True)
class Launch:
    """One start of TorchServe in a run folder."""

    deployment: Deployment
    policy: Policy | None
    wanted: Sequence[Wanted]
    files: Mapping[tuple[str, str], str]
    """The staged archives' names, by model and version."""
    run_folder: Path
    log_file: Path

    def write_properties(self, ports: Ports) -> dict[str, str]:
        """Write config.properties, and what the deployment says; return the properties."""
        properties = {
            "metrics_config": str(find_file("metrics.yaml")),
            "model_store": str(self.run_folder / STAGING),
            "workflow_store": str(self.run_folder / "workflows"),
            **render_deployment(self.deployment, ports=ports, certificate=self._find_certificate()),
            **render_models([item for item in self.wanted if item.workers], self.files),
        }
        with translate_os_errors("write the server's run folder"):
            text = render_properties(properties)
            (self.run_folder / "config.properties").write_text(text, encoding="utf-8")
            running = json.dumps(self.deployment.model_dump(mode="json"))
            (self.run_folder / RUNNING_NAME).write_text(running, encoding="utf-8")
        return properties

    def make_endpoint(self, properties: Mapping[str, str]) -> Endpoint:
        """Return where the server will answer; write the key and the policy that it names."""
        tokens_on = properties["disable_token_authorization"] != "true"
        certificate = properties.get("certificate_file")
        grpc = {
            api: f"{properties[f'grpc_{api}_address']}:{properties[f'grpc_{api}_port']}"
            for api in ("inference", "management")
        }
        return Endpoint(
            inference_url=properties["inference_address"],
            management_url=properties["management_address"],
            metrics_url=properties["metrics_address"],
            key_file=self.run_folder / "key_file.json" if tokens_on else None,
            model_store=self.deployment.store.resolve(),
            staging=self.run_folder / STAGING,
            log_file=self.log_file,
            policy=self._write_policy(),
            supervisor_key=self._write_key(),
            certificate=Path(certificate) if certificate else None,
            grpc_inference=grpc["inference"],
            grpc_management=grpc["management"],
        )

    def make_command(self, properties: Mapping[str, str], *, key_file: Path | None) -> list[str]:
        """Return the command line; write the classes that stand before TorchServe's own.

        Raises:
            JavaError: there is no Java for it.
            ServerError: TorchServe is not installed.
        """
        java, package = find_java(), find_package()
        frontend, classes = package / "frontend", self.run_folder / "classes"
        write_classes(
            frontend / "model-server.jar", classes, eager_batches=self.deployment.eager_batches
        )
        own = self.deployment.limits.queue
        queues = sum(item.settings.get("jobQueueSize") or own for item in self.wanted)
        return [
            str(java.path),
            f"-Dmodel_server_home={package.parent}",
            f"-Djava.io.tmpdir={self.run_folder / 'tmp'}",
            f"-Dlog4j.configurationFile={find_file('log4j2.xml').as_uri()}",
            *properties.get("vmargs", "").split(),
            *render_java_options(self.deployment, queues=queues, key_file=key_file),
            *("-cp", os.pathsep.join([str(classes), str(frontend / "*")])),
            "org.pytorch.serve.ModelServer",
            *("--python", sys.executable),
            *("-f", str(self.run_folder / "config.properties")),
            "-ncs",  # no snapshots: what is to run is said by whoever starts the server
        ]

    def make_environment(self) -> dict[str, str]:
        """Return the environment: private folders, threads, and no secret but those let through.

        TorchServe hides variables from its workers only; here Java does not get them either.
        """
        secret = re.compile(SECRET_NAMES)
        passed = set(self.deployment.access.environment)
        logs = str(self.log_file.parent)
        return {
            **{
                key: value
                for key, value in os.environ.items()
                if not key.startswith("TS_") and (key in passed or not secret.fullmatch(key))
            },
            **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(self.run_folder / "tmp")),
            **dict.fromkeys(("LOG_LOCATION", "METRICS_LOCATION"), logs),
            **self._describe_prediction_log(),
            **_limit_threads(sum(item.workers for item in self.wanted), os.environ),
        }

    def _describe_prediction_log(self) -> dict[str, str]:
        """Return the variable in which handlers/prediction_log.py finds its settings."""
        predictions = self.deployment.monitoring.predictions
        if predictions is None:
            return {}
        settings = predictions.model_dump(mode="json", exclude={"keep_days", "most_bytes"})
        settings["folder"] = str(predictions.folder.absolute())
        spool = min(SPOOL_BYTES, predictions.most_bytes // 4)
        return {PREDICTIONS_VARIABLE: json.dumps({**settings, "spool_bytes": spool})}

    def _find_certificate(self) -> Certificate | None:
        tls = self.deployment.tls
        if tls == "development":
            return make_certificate(self.run_folder)
        return Certificate(tls.certificate, tls.key) if isinstance(tls, TlsFiles) else None

    def _write_policy(self) -> Path | None:
        """Write the policy where those who register look for it, and nobody else can change it."""
        if self.policy is None:
            return None
        path = self.run_folder / POLICY_NAME
        self.policy.write(path)
        return path

    def _write_key(self) -> Path | None:
        """Write what only those know who may read the run folder; None where no key is asked."""
        if self.deployment.access.models == "token":
            return None
        path = self.run_folder / SUPERVISOR_KEY_NAME
        with translate_os_errors(f"write {path}"):
            path.touch(mode=0o600)
            path.write_text(secrets.token_urlsafe(32), encoding="ascii")
        return path


def _limit_threads(workers: int, environment: Mapping[str, str]) -> dict[str, str]:
    """Divide the cores among the workers, before anything in one of them makes threads.

    Two workers with a thread for every core are 19 times slower than with one each. What the
    user's environment says stands.
    """
    threads = str(max(1, count_cores() // workers if workers else 1))
    limits = dict.fromkeys(THREAD_LIMITS, threads)
    if "OMP_WAIT_POLICY" not in environment:
        limits["GOMP_SPINCOUNT"] = SPIN_COUNT
    return {name: value for name, value in limits.items() if name not in environment}


def count_cores() -> int:
    """Return the cores this process may use: affinity, and a container's quota (cgroup v2)."""
    cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):  # no container, or "max"
        quota, period = CPU_LIMIT.read_text(encoding="ascii").split()
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores
