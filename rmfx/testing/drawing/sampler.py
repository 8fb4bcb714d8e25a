"""The sampler: draws networks that are valid as drawn.

It draws the trees that `networks.spec` describes. It knows the shape of every value while it
draws and only ever chooses among what fits, so no drawn network is ever thrown away. It also
knows which values share memory, so that an in-place operation never reaches the caller's
inputs and never overlaps with what it reads; every other aliasing is fair game.
"""

from __future__ import annotations

import math

from rmfx.testing.networks.operations import Flatten
from rmfx.testing.networks.spec import NetworkSpec

from . import sites
from .constructs import unusual
from .digits import typed
from .draws import Draws
from .families import FAMILIES, basic, bottleneck
from .joins import join, recall
from .layers import act, affine, layer, some_style, some_width
from .places import take_all, tokens
from .shortcuts import fit
from .steps import constant, drop, scale
from .things import Thing, draw_one, on_maps
from .values import INPUT, Path, Value
from .windows import pad, pool, pool_all, strided_blur


class Sampler(Draws):
    """Draws networks with the choices of `random`; equal choices give equal networks."""

    def residual(self, path: Path) -> None:
        """Add a residual site."""
        sites.residual(self, path)

    def any_block(self, path: Path) -> None:
        """Add a residual site, or something that only looks like one."""
        sites.any_block(self, path)

    def block(self) -> NetworkSpec:
        """One residual block, sometimes behind a stem."""
        path = self.start()
        if self.one_in(2):
            layer(self, path)
        self.residual(path)
        if self.one_in(2):
            act(self, path)
        return self.finish(path)

    def network(self) -> NetworkSpec:
        """Stem, one to four blocks with things between them, head."""
        path = self.start()
        if self.one_in(3):
            self._classic(path)
        else:
            self._any_blocks(path)
        return typed(self, self.finish(path))

    def _classic(self, path: Path) -> None:
        """What a ResNet or a MobileNet is: stages of equal blocks of one family, then a head."""
        family = self.pick(FAMILIES)
        layer(self, path, style=self.pick(("keep", "stride")))
        if path.value.is_map and self.one_in(4):
            pool(self, path)
        form = self.pick(("a += b", "a + b", "b + a"))
        for stage in range(self.pick((1, 2))):
            outputs = path.value.channels * self.pick((1, 2)) if stage else path.value.channels
            for block in range(self.pick((1, 2))):
                main, shortcut = path.operand(), path.operand()
                first = block == 0 and stage > 0
                family(self, main, min(outputs, 8), "stride" if first else "preserve")
                fit(self, shortcut, main.value.shape)
                join(self, path, [main, shortcut], form)
                if family in (basic, bottleneck):
                    act(self, path)
        self._head(path)

    def _any_blocks(self, path: Path) -> None:
        """Stem, blocks of all kinds with things between them, perhaps a head."""
        if not self.one_in(4):
            layer(self, path, style=self.pick(("keep", "stride", "valid")))
        if path.value.is_map and self.one_in(15):
            take_all(self, path)
        for _ in range(self.pick((1, 2, 2, 3, 4))):
            self.any_block(path)
            if not self.one_in(3):
                act(self, path)
            if self.one_in(4):
                draw_one(self, path, _BETWEEN)
            if self.one_in(4) and not self.is_large:
                unusual(self, path)
        if self.one_in(3):
            self._head(path)

    def start(self) -> Path:
        """An empty network for inputs of some layout."""
        layout = self.pick(("2d", "2d", "2d", "2d", "1d", "3d", "features", "tokens"))
        channels = self.pick((2, 1, 3, 4, 6))
        if layout == "features":
            shape: tuple[int, ...] = (channels,)
        elif layout == "tokens":
            shape = (self.pick((2, 3, 5)), channels)
        else:
            sizes = (5, 6, 7) if layout == "3d" else (5, 6, 7, 8, 9, 11)
            shape = (channels, *(self.pick(sizes) for _ in range(int(layout[0]))))
        self.batch = self.pick((1, 2, 3))
        self.shapes.append((self.batch, *shape))
        return Path(Value(shape, INPUT, tokens=layout == "tokens"), depth=3)

    def _head(self, path: Path) -> None:
        """Global pooling, flatten, classifier; sometimes residual blocks on the features."""
        if path.value.is_map:
            if not self.one_in(4):
                pool_all(self, path)
            shape = (math.prod(path.value.shape),)
            form = self.pick(("module", "function", "method", "reshape"))
            self.put(path, Flatten(form), shape, alias=True)
        if self.one_in(3):
            self.residual(path)
        affine(self, path, self.pick((3, 5)))

    def finish(self, path: Path) -> NetworkSpec:
        """The network that has been drawn, with an output of some kind."""
        output = self.pick(("tensor", "tensor", "tensor", "tuple", "list", "dict", "nested"))
        names = [] if output == "tensor" else [n for n in self.saved if self.one_in(2)]
        return NetworkSpec(tuple(self.shapes), tuple(path.nodes), output, tuple(names))


def _transition(sampler: Draws, path: Path) -> None:
    """A layer of any width and stride."""
    layer(sampler, path, some_width(sampler, path.value), some_style(sampler))


_BETWEEN = (  # what may stand between two blocks
    *map(Thing, (drop, Draws.save, recall, _transition, constant, scale)),
    *(Thing(draw, on_maps) for draw in (pool, pad, strided_blur, tokens)),
)
