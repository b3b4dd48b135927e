"""The one door to compiled code: it picks the backend once, checks shapes and dtypes, and names what is wrong."""

from stage1_pro.native.backend import backend, use, why
from stage1_pro.native.cuda import BucketSwitch, CudaRouted, CudaRouter, DeviceArray, cuda_why
from stage1_pro.native.router import Routed, Router
from stage1_pro.native.rows import MAX_ROWS, cluster_numbers, order, rows, search_dual, sweep
from stage1_pro.native.suite import (
    SUITE,
    Columns,
    Ranked,
    Suite,
    augrc,
    augrc_influence,
    bootstrap_augrc,
    resample_counts,
)

__all__ = [
    "MAX_ROWS",
    "SUITE",
    "BucketSwitch",
    "Columns",
    "CudaRouted",
    "CudaRouter",
    "DeviceArray",
    "Ranked",
    "Routed",
    "Router",
    "Suite",
    "augrc",
    "augrc_influence",
    "backend",
    "bootstrap_augrc",
    "cluster_numbers",
    "cuda_why",
    "order",
    "resample_counts",
    "rows",
    "search_dual",
    "sweep",
    "use",
    "why",
]
