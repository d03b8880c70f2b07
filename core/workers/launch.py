"""Start the workers that a text such as "local:4" or "ray://host:10001" asks for."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from urllib.parse import parse_qsl

import torch

from core.errors import LayerShapError
from core.loading import resolve_device, resolve_dtype
from core.models import LayeredModel, fingerprint
from core.workers.cluster import RayCrew, connect, place
from core.workers.local import LocalCrew, gpus_of_workers
from core.workers.pool import WorkerPool
from core.workers.protocol import Crew, Recipe

_SPECIFICATION = re.compile(
    r"local(:(?P<count>[1-9]\d{0,3}|auto))?"
    r"|(?P<ray>ray)(://(?P<address>auto|[^?/]+:\d+))?"
    r"(\?(?P<resources>(cpus|gpus)=[1-9]\d{0,3}(&(cpus|gpus)=[1-9]\d{0,3})?))?"
)


@dataclass(frozen=True)
class _Specification:
    """`count` of local workers, None for one per GPU; or a Ray cluster's `address`."""

    ray: bool
    count: int | None
    address: str
    cpus: int | None
    gpus: int | None

    @classmethod
    def parse(cls, text: str) -> _Specification:
        found = _SPECIFICATION.fullmatch(text)
        if found is None:
            raise LayerShapError(
                f"Workers are given as {text!r}; write local, local:4, ray, ray://host:10001 or "
                "ray://host:10001?gpus=2."
            )
        count = found["count"]
        resources = {name: int(value) for name, value in parse_qsl(found["resources"] or "")}
        return cls(
            ray=found["ray"] is not None,
            count=None if count in (None, "auto") else int(count),
            address=found["address"] or "",
            cpus=resources.get("cpus"),
            gpus=resources.get("gpus"),
        )


def worker_device(workers: str, device: str = "auto") -> str:
    """What such workers would evaluate on, "cpu", "cuda" or "mps"; connects to a Ray cluster.

    Raises:
        LayerShapError: the text cannot be read, or there is no such cluster or device.
    """
    wanted = _Specification.parse(workers)
    if not wanted.ray:
        return resolve_device(device).type
    connect(wanted.address)
    return place(device, wanted.cpus, wanted.gpus).device


def worker_dtype(dtype: str, device: str) -> str:
    """The dtype that `dtype` stands for on workers, which may have a GPU where this machine has
    none: bfloat16 then."""
    if dtype == "auto" and device == "cuda" and not torch.cuda.is_available():
        return "bfloat16"
    return str(resolve_dtype(dtype, torch.device(device))).removeprefix("torch.")


def start_workers(workers: str, model: LayeredModel, device: str = "auto") -> WorkerPool:
    """Start workers that each load the model from where this one came from, in its dtype.

    Args:
        workers: "local" (one per GPU; without GPUs one), "local:4", "ray" (a cluster that runs
            here, or a Ray of its own), "ray://auto", "ray://host:10001"; Ray's may end in
            "?gpus=2&cpus=4", what each worker takes.
        model: may be on another device than the workers.
        device: of the workers, as for `load_model`.

    Returns:
        A context manager; give it to `LayerGame`. Loading goes on while this returns.

    Raises:
        LayerShapError: the text cannot be read, there is no such cluster or device, or the model
            exists only in this process.
    """
    wanted = _Specification.parse(workers)
    if not model.info.source:
        raise LayerShapError(
            "Workers load the model themselves, and this one exists only in memory; save it to a "
            "folder and load it from there."
        )
    recipe = Recipe(
        source=model.info.source,
        revision=model.info.revision,
        dtype=model.info.dtype,
        device=worker_device(workers, device),
        weights=fingerprint(model.module, buffers=False),
    )
    crew = _ray_crew(wanted, recipe) if wanted.ray else _local_crew(wanted, recipe)
    return WorkerPool(model, crew)


def _ray_crew(wanted: _Specification, recipe: Recipe) -> Crew:
    return RayCrew(recipe, place(recipe.device, wanted.cpus, wanted.gpus))


def _local_crew(wanted: _Specification, recipe: Recipe) -> Crew:
    if recipe.device == "cuda":
        gpus = gpus_of_workers(wanted.count)
        sharing = max(gpus.count(name) for name in gpus)
        return LocalCrew(replace(recipe, memory_share=1 / sharing), len(gpus), gpus)
    size = wanted.count or 1
    threads = max(1, torch.get_num_threads() // size)
    return LocalCrew(replace(recipe, memory_share=1 / size, threads=threads), size, [])
