"""What a network costs: multiply-adds, parameters, traffic, memory; in all and node by node."""

from .counting import Cost, NodeCost, count, nodes, skips, table
from .streams import Skip

__all__ = ["Cost", "NodeCost", "Skip", "count", "nodes", "skips", "table"]
