"""Evaluations spread over several GPUs and machines.

A game asks a pool of workers as it would ask its own evaluator; estimation knows nothing of it.
"""

from core.workers.launch import start_workers, worker_device, worker_dtype
from core.workers.pool import WorkerPool

__all__ = ["WorkerPool", "start_workers", "worker_device", "worker_dtype"]
