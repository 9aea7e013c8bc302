"""A Ray cluster of two nodes on this machine, each with two CPUs, until standard input ends; its address is printed.

Each line of standard input adds a node.
"""

import sys

from ray.cluster_utils import Cluster  # pyright: ignore[reportMissingImports]

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
cluster.add_node(num_cpus=2)
print(cluster.address, flush=True)
for _ in sys.stdin:
    cluster.add_node(num_cpus=2)
cluster.shutdown()
