"""Settings of runs whose processes Ray starts."""

from __future__ import annotations

from pydantic import Field

from retort.config.sections import Section


class ClusterSection(Section):
    """What Ray starts for `retort train --cluster` (docs/cluster.md); without that option these settings do nothing."""

    ranks: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="ranks that train the student; default: one for each GPU that no teacher has, or without GPUs one "
        "for each machine",
    )
    rank_cpus: int = Field(default=1, ge=1, le=1024, description="CPUs of a rank, and its threads")
    teachers: int = Field(
        default=0,
        ge=0,
        le=1024,
        description="servers of the teacher, which ranks share; 0: every rank loads the teacher itself",
    )
    teacher_cpus: int = Field(default=1, ge=1, le=1024, description="CPUs of a server of the teacher, and its threads")
    teacher_gpus: int | None = Field(
        default=None, ge=0, le=1, description="GPUs of a server of the teacher; default: 1 where there are GPUs"
    )
    worker_cpus: int = Field(
        default=1, ge=1, le=1024, description="CPUs of a worker (rollout.workers) or of vLLM, and its threads"
    )
    worker_gpus: int | None = Field(
        default=None,
        ge=0,
        le=64,
        description="GPUs of a worker; default: 1 where there are GPUs; more are for a vLLM that is told so, by "
        'rollout.vllm_options=["--tensor-parallel-size=2"]',
    )
    environments: int = Field(
        default=0,
        ge=0,
        le=1024,
        description="servers of the environment of the rollouts, which ranks share; 0: every rank plays it itself",
    )
    environment_cpus: int = Field(default=1, ge=1, le=1024, description="CPUs of a server of the environment")
    retries: int = Field(
        default=3,
        ge=0,
        le=1000,
        description="how often in a row a run that lost a rank goes on by itself from its newest checkpoint; a new "
        "checkpoint begins the count anew",
    )
    wait: float = Field(
        default=300.0,
        ge=0,
        le=1_000_000,
        description="seconds to wait for CPUs and GPUs that others in the cluster use",
    )
    hangs: float = Field(
        default=120.0,
        ge=1,
        le=1_000_000,
        description="seconds without a sign of life after which a rank, a server of the teacher or a worker is "
        "killed and started again, as is one that cannot reach the driver",
    )
    dashboard: bool = Field(
        default=False,
        description="start Ray's dashboard, on loopback, with a cluster of this machine alone; it needs ray[default]",
    )
