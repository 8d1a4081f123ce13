"""What a cluster is made of, in the figures of its vendors.

Nothing here was measured by us: every number names the page that it was read from, and each can be given on the
command line instead. `orpo-ds estimate` multiplies with them and says so.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

GB = 10**9
GIB = 2**30

# What a GPU holds that is no tensor: the CUDA context with its kernels, and NCCL's channels. Not measured by us; an
# idle process of torch shows about half of this in nvidia-smi, and every communicator adds to it.
CUDA_RESERVE_BYTES = 2 * GIB
# What a training process holds before it holds a model: Python, torch, transformers, DeepSpeed, the tokenizer. The
# figure is of a CPU process (`benchmarks/estimate.py` measures it in each of its runs); CUDA's libraries add to it.
PROCESS_BYTES = 460 * 2**20


@dataclass(frozen=True)
class Gpu:
    """One kind of accelerator.

    Attributes:
        name: of the product.
        memory_bytes: of one GPU.
        flops_per_s: dense bf16 products.
        link_bytes_per_s: to the other GPUs of its node, one direction.
        host_link_bytes_per_s: to its host, one direction.
        network_bytes_per_s: its share of the node's network, one direction.
        host_bytes: memory of the node it is sold in, per GPU.
        host_memory_bytes_per_s: of that memory, per GPU.
        drive_bytes_per_s: of the node's NVMe drives, per GPU; 3 GB/s is assumed, one drive a GPU.
        usd_per_hour: to rent one; None: not known here.
        sources: where the figures stand.
    """

    name: str
    memory_bytes: int
    flops_per_s: float
    link_bytes_per_s: float
    host_link_bytes_per_s: float
    network_bytes_per_s: float
    host_bytes: int
    host_memory_bytes_per_s: float
    drive_bytes_per_s: float
    usd_per_hour: float | None
    sources: str


_CAPACITY_BLOCKS = "AWS EC2 Capacity Blocks, price per accelerator and hour, list of 2024 (prices change)"

GPUS = {
    "H100": Gpu(
        name="H100 SXM 80GB",
        memory_bytes=80 * GB,
        flops_per_s=989.4e12,
        link_bytes_per_s=450 * GB,
        host_link_bytes_per_s=64 * GB,
        network_bytes_per_s=50 * GB,
        host_bytes=2048 * GIB // 8,
        host_memory_bytes_per_s=77 * GB,
        drive_bytes_per_s=3 * GB,
        usd_per_hour=4.916,
        sources="NVIDIA H100 datasheet (1,979 TFLOP/s bf16 with sparsity, half of it dense; NVLink 900 GB/s both ways; "
        "PCIe Gen5 128 GB/s both ways); NVIDIA DGX H100 datasheet (8 x 400 Gbit/s InfiniBand, 2 TB host memory in "
        "2 x 8 channels of DDR5-4800); " + _CAPACITY_BLOCKS,
    ),
    "H200": Gpu(
        name="H200 SXM 141GB",
        memory_bytes=141 * GB,
        flops_per_s=989.4e12,
        link_bytes_per_s=450 * GB,
        host_link_bytes_per_s=64 * GB,
        network_bytes_per_s=50 * GB,
        host_bytes=2048 * GIB // 8,
        host_memory_bytes_per_s=77 * GB,
        drive_bytes_per_s=3 * GB,
        usd_per_hour=5.408,
        sources="NVIDIA H200 datasheet; NVIDIA DGX H200 datasheet; " + _CAPACITY_BLOCKS,
    ),
    "A100": Gpu(
        name="A100 SXM 80GB",
        memory_bytes=80 * GB,
        flops_per_s=312e12,
        link_bytes_per_s=300 * GB,
        host_link_bytes_per_s=32 * GB,
        network_bytes_per_s=25 * GB,
        host_bytes=2048 * GIB // 8,
        host_memory_bytes_per_s=51 * GB,
        drive_bytes_per_s=3 * GB,
        usd_per_hour=None,
        sources="NVIDIA A100 datasheet; NVIDIA DGX A100 640GB datasheet (8 x 200 Gbit/s InfiniBand, 2 TB host memory)",
    ),
    "A100-40": Gpu(
        name="A100 SXM 40GB",
        memory_bytes=40 * GB,
        flops_per_s=312e12,
        link_bytes_per_s=300 * GB,
        host_link_bytes_per_s=32 * GB,
        network_bytes_per_s=25 * GB,
        host_bytes=1024 * GIB // 8,
        host_memory_bytes_per_s=51 * GB,
        drive_bytes_per_s=3 * GB,
        usd_per_hour=1.844,
        sources="NVIDIA A100 datasheet; NVIDIA DGX A100 320GB datasheet (1 TB host memory); "
        + _CAPACITY_BLOCKS,
    ),
}
BY_MEMORY_GB = {80: "H100", 141: "H200", 40: "A100-40"}  # which GPU `8x80GB` means


@dataclass(frozen=True)
class Cluster:
    """What a run is estimated for.

    Attributes:
        gpu: in every node.
        gpus_per_node: of them, each with a rank of its own.
        nodes: hosts.
    """

    gpu: Gpu
    gpus_per_node: int
    nodes: int

    @property
    def ranks(self) -> int:
        """Of the job."""
        return self.gpus_per_node * self.nodes

    @property
    def host_bytes_per_node(self) -> int:
        """Memory of a node."""
        return self.gpu.host_bytes * self.gpus_per_node

    def seconds_to_move(self, num_bytes: float) -> float:
        """Of an all-gather or a reduce-scatter whose result or input has `num_bytes`, at the line rate.

        Each rank lacks all but its own part. Inside a node it comes over the GPU's own link; between nodes each
        byte enters a node once, through all its network cards together. The two overlap, so the slower one counts.
        The latency of the hops is left out.
        """
        inside = num_bytes * (self.gpus_per_node - 1) / self.gpus_per_node / self.gpu.link_bytes_per_s
        card = self.gpu.network_bytes_per_s * self.gpus_per_node
        between = num_bytes * (self.nodes - 1) / self.nodes / card
        return max(inside, between)


def parse_cluster(
    gpus: str,
    *,
    nodes: int,
    network_gbit: float | None = None,
    host_gb: float | None = None,
    usd_per_gpu_hour: float | None = None,
) -> Cluster:
    """A cluster from its words.

    Args:
        gpus: of one node, `8x80GB` or `8xH100`.
        nodes: hosts.
        network_gbit: Gbit/s of a node's network for each GPU; by default what the vendor's node has.
        host_gb: GB of host memory of a node; by default likewise.
        usd_per_gpu_hour: what a GPU costs; by default the list price that is known.

    Raises:
        ValueError: neither form, or a GPU that is not known here.
    """
    found = re.fullmatch(r"(\d+)\s*[xX]\s*(?:(\d+)\s*GB|([A-Za-z][\w-]*))", gpus.strip())
    if found is None or int(found[1]) < 1 or nodes < 1:
        raise ValueError(
            f"--gpus {gpus} --nodes {nodes}: write the GPUs of one node as 8x80GB or 8xH100, and at least one node."
        )
    count, memory, name = int(found[1]), found[2], found[3]
    if memory is not None:
        known = BY_MEMORY_GB.get(int(memory))
        # Another size is an H100 with that memory: what fits is then right, and the time is as good as the guess.
        gpu = GPUS["H100"] if known is None else GPUS[known]
        gpu = replace(gpu, memory_bytes=int(memory) * GB)
    elif name.upper() in GPUS:
        gpu = GPUS[name.upper()]
    else:
        raise ValueError(f"--gpus {gpus}: known are {', '.join(GPUS)}, or a size as in {count}x80GB.")
    changes: dict[str, float] = {}
    if network_gbit is not None:
        changes["network_bytes_per_s"] = network_gbit * GB / 8
    if host_gb is not None:
        changes["host_bytes"] = int(host_gb * GB / count)
    if usd_per_gpu_hour is not None:
        changes["usd_per_hour"] = usd_per_gpu_hour
    return Cluster(gpu=replace(gpu, **changes), gpus_per_node=count, nodes=nodes)  # type: ignore[arg-type]
