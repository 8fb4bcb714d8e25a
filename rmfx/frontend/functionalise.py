"""In-place operations become functional, or are marked so that no rule goes near them.

After `n = op_(b)` every later read of `b` is a read of `n`: that is all there is to it, as long as
nothing else can see the write. Something else can if `b` shares memory with an input, a parameter,
or another value that is read later. Such a write stays, and the values of its alias class are
marked `frozen` with the reason; rules treat them as barriers.

`effects.py` says what a call does. Values share memory where calls may hand it on, and the model's
tensors where their storages overlap; a call of which nothing is known freezes all that it reads.
"""

from __future__ import annotations

import functools
import operator

import torch
from torch import Tensor, fx, nn

from rmfx.errors import WeightError
from rmfx.ir.functions import (
    GIVING_CONTAINERS,
    JOINS_OF_CONTAINERS,
    asks_for_number,
    is_of_numbers,
    torch_name,
)
from rmfx.ir.kinds import CASTS, is_ordinary
from rmfx.ir.notes import (
    CONTAINER,
    FROZEN,
    FUNCTIONAL,
    NUMBER,
    WRITTEN,
    gives_container,
    gives_number,
    noted,
    shape_of,
    type_of,
)

from .canonicalise import UNSAFE, has_functional_form
from .effects import effects_of
from .layers import input_of_call
from .memory import memories, storage_of, tensors_behind
from .schemas import Effects


def mark_numbers(graph: fx.Graph) -> None:
    """Mark nodes whose value is a number, a size or the like instead of a tensor."""
    for node in graph.nodes:
        if _is_container(node):
            node.meta[CONTAINER] = True
        elif _is_number(node):
            node.meta[NUMBER] = True


def _is_container(node: fx.Node) -> bool:
    """Whether a node gives a tuple or list of tensors."""
    if node.op == "call_method":
        return node.target in GIVING_CONTAINERS
    if node.op != "call_function":
        return False
    if torch_name(node) in GIVING_CONTAINERS:
        return True
    of_container = any(gives_container(n) for n in node.all_input_nodes)
    if node.target is operator.getitem:
        return of_container and isinstance(node.args[1], slice)
    return of_container and node.target in JOINS_OF_CONTAINERS


def _is_number(node: fx.Node) -> bool:
    value = noted(node)
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool, int, float)):
        return True
    if asks_for_number(node) or node.target is torch._assert:
        return True
    if node.op != "call_function" or node.target is getattr:
        return False
    of_numbers = all(gives_number(n) for n in node.all_input_nodes)
    return bool(node.all_input_nodes) and of_numbers and is_of_numbers(node.target)


def functionalise(gm: fx.GraphModule) -> None:
    """Redirect reads after safe in-place writes; mark what must stay as `frozen`.

    A safe write gets `meta["functional"]`: its node may be given its functional form.
    """
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    aliases, types = _Aliases(gm), _Types(gm)
    safe: list[tuple[fx.Node, fx.Node]] = []
    for node in gm.graph.nodes:
        effects = effects_of(gm, node)
        written = [n for n in effects.writes if not gives_number(n)]
        aliases.start(node)
        reason = effects.unknown
        if written and reason is None:
            reason = _why_stays(gm, node, written, aliases, types, order)
            if reason is None:
                _redirect(node, written[0], order)
                safe.append((node, written[0]))
                continue
        aliases.visit(node, effects)
        if effects.owned:
            aliases.freeze_memory(effects.owned, reason or "a layer writes to its own weights")
        if reason is not None:
            aliases.join(node, *written)
            aliases.freeze(node, f"{reason} ({node.name})")
    for node, target in reversed(safe):
        # What is written to again, in a way that stays, stays as it is: it writes to its target.
        if aliases.is_frozen(node):
            aliases.join(node, target)
    aliases.mark()


def _why_stays(
    gm: fx.GraphModule,
    node: fx.Node,
    written: list[fx.Node],
    aliases: _Aliases,
    types: _Types,
    order: dict[fx.Node, int],
) -> str | None:
    """Why a write cannot become functional, None if it can."""
    seen = (aliases.why_seen(one, node, order) for one in written)
    reason = next((why for why in seen if why is not None), None)
    reason = reason or types.why_changed(written[0], node)
    is_safe = written == [input_of_call(node)] and has_functional_form(gm, node)
    return reason or (None if is_safe else UNSAFE)


def _redirect(node: fx.Node, written: fx.Node, order: dict[fx.Node, int]) -> None:
    """Let what reads a value after a write to it read the write's result."""
    written.replace_all_uses_with(node, delete_user_cb=lambda user: order[user] > order[node])
    node.meta[FUNCTIONAL] = True


def written_inputs(gm: fx.GraphModule) -> set[fx.Node]:
    """Placeholders whose memory a graph may write to."""
    aliases, found = _Aliases(gm), set()
    for node in gm.graph.nodes:
        effects = effects_of(gm, node)
        aliases.visit(node, effects)
        aliases.join(node, *effects.writes)
        for written in effects.writes:
            found |= {member for member in aliases.of(written) if member.op == "placeholder"}
    return found


class _Types:
    """Whether in-place arithmetic, which keeps its left operand's type, would else promote it."""

    def __init__(self, gm: fx.GraphModule) -> None:
        tensors = (*gm.parameters(), *gm.buffers())
        kinds = {t.dtype for t in tensors if t.is_floating_point()}
        casts = any(n.op == "call_method" and n.target in CASTS for n in gm.graph.nodes)
        self._uniform = len(kinds) <= 1 and not casts

    def why_changed(self, written: fx.Node, node: fx.Node) -> str | None:
        read = [n for n in node.all_input_nodes if not gives_number(n)]
        types = [type_of(n) for n in read]
        own = type_of(written)
        if len(types) < 2 and own is not None and own[0].is_floating_point:
            return None
        known = None not in types
        same = len(set(types)) == 1 if known else self._uniform
        same = same or (known and own is not None and _promoted(read) == own[0])
        return None if same else "an in-place operation on values of different types"


def _promoted(values: list[fx.Node]) -> torch.dtype:
    """The type to which values are promoted where they meet; those without dimensions weigh less.

    One whose shape nobody noted is taken to have dimensions.
    """
    kinds = [(type_of(n)[0], len(shape_of(n, (None,)))) for n in values]
    shown = [torch.empty((1,) * rank, dtype=kind, device="meta") for kind, rank in kinds]
    return functools.reduce(_met, shown).dtype


def _met(x: Tensor, y: Tensor) -> Tensor:
    rank = max(x.dim(), y.dim())
    return torch.empty((1,) * rank, dtype=torch.result_type(x, y), device="meta")


class _Aliases:
    """Classes of values that may share memory."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._class: dict[fx.Node, list[fx.Node]] = {}
        self._reasons: dict[int, str] = {}
        self._behind = {node: tensors_behind(gm, node) for node in gm.graph.nodes}
        self._memory = memories(t for behind in self._behind.values() for t in behind)
        self._first: dict[int, fx.Node] = {}  # the value that stands for a memory of the model
        self._frozen: dict[int, str] = {}

    def visit(self, node: fx.Node, effects: Effects) -> None:
        """Take note of whose memory a value may lie in."""
        self._class.setdefault(node, [node])
        if node.op in ("get_attr", "placeholder"):
            for tensor in self._behind[node]:
                self.join(node, self._first.setdefault(self._memory[id(tensor)], node))
        if not gives_number(node):
            self.join(node, *effects.aliases)

    def start(self, node: fx.Node) -> None:
        self._class[node] = [node]

    def join(self, node: fx.Node, *others: fx.Node) -> None:
        for other in others:
            mine, theirs = self._class[node], self._class[other]
            if mine is theirs or gives_number(other):
                continue
            if len(mine) > len(theirs):  # so that no value moves often
                mine, theirs = theirs, mine
            theirs.extend(mine)
            for member in mine:
                self._class[member] = theirs
            if id(mine) in self._reasons:
                self._reasons.setdefault(id(theirs), self._reasons[id(mine)])

    def of(self, node: fx.Node) -> list[fx.Node]:
        return self._class[node]

    def freeze(self, node: fx.Node, reason: str) -> None:
        self._reasons.setdefault(id(self._class[node]), reason)

    def is_frozen(self, node: fx.Node) -> bool:
        """Whether there is a reason for a value's class to stay as it is."""
        return id(self._class[node]) in self._reasons

    def freeze_memory(self, tensors: tuple[Tensor, ...], reason: str) -> None:
        """Take note that a call writes to tensors that its module holds."""
        for tensor in tensors:
            self._frozen.setdefault(self._memory[id(tensor)], reason)

    def why_seen(self, written: fx.Node, node: fx.Node, order: dict[fx.Node, int]) -> str | None:
        """Who else would see a write to `written`, if anyone."""
        members = self._class[written]
        if id(members) in self._reasons:
            return self._reasons[id(members)]
        for member in members:
            if member.op == "placeholder":
                return "an in-place operation writes to the network's input"
            if member.op == "get_attr":
                return "an in-place operation writes to a parameter or buffer"
            later = any(order[user] > order[node] for user in member.users)
            if member is not written and later:
                return "an in-place operation writes to memory that is read under another name"
        return None

    def mark(self) -> None:
        """Mark the values of frozen classes, and all that holds memory which is written to."""
        self._freeze_strangers()
        for node, members in self._class.items():
            if node.op != "call_module" and id(members) in self._reasons:
                for tensor in self._behind[node]:
                    self._frozen.setdefault(self._memory[id(tensor)], self._reasons[id(members)])
        for node, behind in self._behind.items():
            found = (self._frozen.get(self._memory[id(tensor)]) for tensor in behind)
            reason = next((why for why in found if why is not None), None)
            if reason is not None:
                node.meta[WRITTEN] = True
            if reason is not None and node.op == "call_module":
                node.meta[FROZEN] = reason
            elif reason is not None:
                self.freeze(node, reason)
        for node, members in self._class.items():
            reason = self._reasons.get(id(members))
            if reason:
                node.meta[FROZEN] = reason
        self._check_copies()

    def _check_copies(self) -> None:
        """Raise WeightError for memory written to that a copy of the network would take apart."""
        apart: dict[int, set[int]] = {}  # what copies keep together has one number
        for node, behind in self._behind.items():
            for tensor in behind:
                key = self._memory[id(tensor)]
                found = apart.setdefault(key, set())
                # A parameter is copied with a storage of its own.
                own = isinstance(tensor, nn.Parameter)
                found.add(id(tensor) if own else storage_of(tensor))
                if key in self._frozen and len(found) > 1:
                    raise WeightError(
                        f"{node.target}: the network writes to the memory in which it lies, where "
                        "a parameter lies, too, or a tensor with a storage of its own, as those "
                        "made of numpy's arrays; a copy would part them: make them views of one "
                        "buffer"
                    )

    def _freeze_strangers(self) -> None:
        """Tensors that compute in a way of their own are not what a rule takes them for."""
        for node, behind in self._behind.items():
            for tensor in behind if node.op != "placeholder" else ():
                if not is_ordinary(tensor):
                    kind = type(tensor).__name__
                    self.freeze_memory(
                        (tensor,), f"a weight is a {kind}, which computes its own way"
                    )
