"""What the nodes of a graph call, and which of it has to stay as it is."""

from __future__ import annotations

from collections import Counter

from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from rmfx.algebra.affine import AffineConv
from rmfx.errors import Refusal

from .computed_weights import remedies
from .elements import Virtual
from .nodes import attribute, constant, has_hooks, replaced_method


class Calls:
    """The modules and tensors that the nodes of a graph module read, as they are now."""

    def __init__(self, source: fx.GraphModule) -> None:
        self._source = source

    def module(self, node: fx.Node) -> nn.Module | None:
        """The existing module that a node calls, None for other nodes and for virtual layers."""
        return self._source.get_submodule(str(node.target)) if node.op == "call_module" else None

    def replacement(self, node: fx.Node) -> Virtual | nn.Module | None:
        """What a rule has put under the node's target, if anything."""
        return None

    def callee(self, node: fx.Node) -> Virtual | nn.Module | None:
        """What stands at a call_module node, made or given."""
        made = self.replacement(node)
        return self.module(node) if made is None else made

    def attribute(self, node: fx.Node) -> object:
        """The value behind a get_attr node."""
        return attribute(self._source, node)

    def constant(self, node: fx.Node) -> Tensor | None:
        """The tensor behind a get_attr node, None where calls may find another one there."""
        return constant(self._source, node)


class Callees(Calls):
    """The modules that the nodes of a graph call: those of its source, and those that rules made.

    Attributes:
        modules: the source's modules by their targets, without those that rules have freed.
        virtual: target -> layer or module that is to stand there.
    """

    def __init__(self, source: fx.GraphModule, graph: fx.Graph, *, may_copy: bool = False) -> None:
        super().__init__(source)
        self._may_copy = may_copy
        self.modules = dict(source.named_modules(remove_duplicate=False))
        self.virtual: dict[str, Virtual | nn.Module] = {}
        self._calls: Counter[int] = Counter()  # of each module, by identity
        self._targets: Counter[str] = Counter()  # of each path
        self._owners: dict[int, set[int]] = {}  # modules and nodes that hold a parameter
        for node in graph.nodes:
            self._count(node)

    def _count(self, node: fx.Node) -> None:
        if node.op == "call_module":
            module = self.modules.get(str(node.target))
            if module is not None:
                self._calls[id(module)] += 1
                self._targets[str(node.target)] += 1
                for p in module.parameters():
                    self._owners.setdefault(id(p), set()).add(id(module))
        elif node.op == "get_attr":
            value = self.attribute(node)
            self._owners.setdefault(id(value), set()).add(id(node))

    def module(self, node: fx.Node) -> nn.Module | None:
        if node.op != "call_module" or node.target in self.virtual:
            return None
        return self.modules.get(str(node.target))

    def replacement(self, node: fx.Node) -> Virtual | nn.Module | None:
        return self.virtual.get(str(node.target)) if node.op == "call_module" else None

    def weights(self, node: fx.Node) -> int:
        """How many numbers the layer that a node calls has."""
        made, module = self.replacement(node), self.module(node)
        if isinstance(made, Virtual):
            return made.layer.weight.numel() if isinstance(made.layer, AffineConv) else 0
        return sum(p.numel() for p in module.parameters()) if module is not None else 0

    def guard(self, node: fx.Node) -> Refusal | None:
        """Why the module of a call_module node must stay as it is, if it must.

        Its weights may be baked into another layer only if nothing else looks at them, or if that
        may be a copy.
        """
        module = self.module(node)
        if module is None:
            return None
        name = str(node.target)
        ways_out = remedies(module)
        if has_hooks(module) and not ways_out:
            return Refusal(f"module {name} has hooks; remove them first", (node.name,))
        if (method := replaced_method(module)) is not None:
            return Refusal(f"module {name} has a {method} method of its own", (node.name,))
        if ways_out:
            return Refusal(
                f"module {name} computes its weights at every call; make ordinary ones of them by "
                f"{' and '.join(ways_out)} first, or convert what torch.export.export makes of the "
                "model",
                (node.name,),
            )
        return None if self._may_copy else self._shared(node, module)

    def _shared(self, node: fx.Node, module: nn.Module) -> Refusal | None:
        """Why weights that are used elsewhere, too, must stay."""
        parameters = list(module.parameters())
        calls = self._calls[id(module)]
        if parameters and calls > 1:
            return Refusal(
                f"module {node.target} is called {calls} times; give each call its own copy of "
                "the module",
                (node.name,),
            )
        if any(len(self._owners[id(p)]) > 1 for p in parameters):
            return Refusal(
                f"a parameter of module {node.target} is also used elsewhere; give each use its "
                "own",
                (node.name,),
            )
        return None

    def release(self, target: str) -> bool:
        """Take note that a call of a target is gone; gives whether the target is free now."""
        self.virtual.pop(target, None)
        module = self.modules.get(target)
        self._targets[target] -= 1
        if module is not None:
            self._calls[id(module)] -= 1
            if self._targets[target] > 0:
                return False
        self.modules.pop(target, None)
        return True


def is_touched(module: nn.Module) -> bool:
    """Whether hooks, parametrizations or methods of its own change what a module does."""
    if has_hooks(module) or parametrize.is_parametrized(module):
        return True
    return replaced_method(module) is not None
