"""Where the kinds of a model are taken: found by what a pass over a few tokens adds up to.

Names of modules differ between families; sums do not. A tensor is the attention's output if the
block's input plus it is, bit for bit, what a later module is called with; the same holds for the
MLP and the block's output. What does not add up is not taken.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from h5traces.extract.anatomy import Site, states_in, states_of
from h5traces.format import kinds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    Note = Callable[[nn.Module, dict[str, torch.Tensor], dict[str, Any]], None]

    from h5traces.extract.anatomy import Anatomy, Side

# Kinds that are arguments of the attention function.
CALL_SIDES: Final[dict[str, Side]] = {
    kinds.QUERIES: "query",
    kinds.KEYS: "key",
    kinds.VALUES: "value",
}
# Arguments of attention functions that may come by position, after query, key and value.
_FURTHER: Final = ("attention_mask", "scaling")
# Names that configurations have for a factor on what a sublayer adds.
_FACTORS: Final = ("residual_multiplier", "scale_depth")


Sites = dict[str, dict[int, Site]]


@dataclass
class _Event:
    """One call of a module inside of a block; numbers count calls and returns."""

    name: str
    module: nn.Module
    start: int
    end: int = -1
    given: torch.Tensor | None = None
    returned: tuple[torch.Tensor | None, ...] = ()


class _Trace:
    """What happens in one block during one pass."""

    def __init__(self) -> None:
        self.before: torch.Tensor | None = None
        self.after: torch.Tensor | None = None
        self.events: list[_Event] = []
        self.calls: list[tuple[nn.Module, dict[str, torch.Tensor]]] = []
        self.by_product = False
        self.open: list[_Event] = []
        self.clock = 0

    def tick(self) -> int:
        self.clock += 1
        return self.clock


def find_sites(anatomy: Anatomy, tokens: dict[str, Any]) -> Sites:
    """The sites of every kind but hidden states and attentions, by kind and layer.

    Parameters
    ----------
    anatomy
        The parts of the model.
    tokens
        Inputs of a pass over one sequence.
    """
    traces = _traced(anatomy, tokens)
    factors = [1.0, *_factors(anatomy.decoder.config)]
    found: Sites = defaultdict(dict)
    for layer, trace in enumerate(traces):
        attention = anatomy.attentions[layer]
        for kind, site in _sites_of(trace, attention, factors):
            found[kind][layer] = site
        for kind, site in _router(anatomy, layer, trace):
            found[kind][layer] = site
    return dict(found)


def _factors(config: Any) -> Iterator[float]:
    for name in _FACTORS:
        value = getattr(config, name, None)
        if isinstance(value, (int, float)):
            yield float(value)
            yield float(value) / config.num_hidden_layers**0.5


def _traced(anatomy: Anatomy, tokens: dict[str, Any]) -> list[_Trace]:
    """One pass, with what every module in a block took and gave."""
    traces = [_Trace() for _ in anatomy.blocks]
    current: list[_Trace] = []

    def enter(trace: _Trace) -> Callable[..., None]:
        def note(_module: nn.Module, args: Any, kwargs: Any) -> None:
            trace.before = states_in(args, kwargs).clone()
            current.append(trace)

        return note

    def leave(_module: nn.Module, _args: Any, output: Any) -> None:
        current.pop().after = states_of(output).clone()

    def start(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            trace = current[-1]
            given = first_tensor(args, kwargs)
            event = _Event(name, module, trace.tick())
            event.given = None if given is None else given.clone()
            trace.events.append(event)
            trace.open.append(event)

        return note

    def end(_module: nn.Module, _args: Any, output: Any) -> None:
        event = current[-1].open.pop()
        event.end = current[-1].tick()
        event.returned = tuple(_copies(output))

    def call(module: nn.Module, parts: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
        if current:
            current[-1].by_product |= BY_PRODUCT in facts
            current[-1].calls.append((module, {side: each.clone() for side, each in parts.items()}))

    with contextlib.ExitStack() as hooks, torch.inference_mode():
        seen: set[nn.Module] = set()
        for block, trace in zip(anatomy.blocks, traces, strict=True):
            hooks.callback(block.register_forward_pre_hook(enter(trace), with_kwargs=True).remove)
            for name, module in block.named_modules():
                # Blocks may share modules.
                if not name or module in seen or isinstance(module, nn.ModuleList):
                    continue
                seen.add(module)
                hooks.callback(
                    module.register_forward_pre_hook(start(name), with_kwargs=True).remove
                )
                hooks.callback(module.register_forward_hook(end).remove)
            hooks.callback(block.register_forward_hook(leave).remove)
        modules = [each for each in anatomy.attentions if each is not None]
        hooks.enter_context(attention_calls(call, modules))
        anatomy.decoder(**tokens, use_cache=False)
    return traces


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The first tensor of numbers that a module was called with."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value
    return None


def _copies(output: Any) -> Iterator[torch.Tensor | None]:
    for each in output if isinstance(output, (tuple, list)) else (output,):
        is_numbers = isinstance(each, torch.Tensor) and each.is_floating_point()
        yield each.clone() if is_numbers else None


@contextlib.contextmanager
def attention_calls(note: Note, modules: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Tell `note` of every call of transformers' attention functions, whichever is in force.

    It gets the attention module, and ``query`` ``(B, A, S, D)``, ``key`` and ``value`` ``(B, K, S,
    D)`` as they enter the product, and what else the function was called with, by name. Of
    `modules`, of which some older families call none, it gets the factors of their own products,
    and in the place of all else ``BY_PRODUCT``, and ``BIAS``: what they add to the scores, or None.
    """
    functions: Any = ALL_ATTENTION_FUNCTIONS
    plain = functions.get_interface
    products = _Products(note)

    def get_interface(*args: Any, **kwargs: Any) -> Any:
        function = plain(*args, **kwargs)

        def told(module: Any, query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> Any:
            facts = {**dict(zip(_FURTHER, rest, strict=False)), **named}
            note(module, {"query": query, "key": key, "value": value}, facts)
            products.is_inside, before = False, products.is_inside
            try:
                return function(module, query, key, value, *rest, **named)
            finally:
                products.is_inside = before

        return told

    functions.get_interface = get_interface
    try:
        with contextlib.ExitStack() as stack:
            chosen = set(modules)
            for each in chosen:
                enter = each.register_forward_pre_hook(products.enter, with_kwargs=True)
                stack.callback(enter.remove)
                stack.callback(each.register_forward_hook(products.leave).remove)
            if chosen:
                stack.enter_context(products)
            yield
    finally:
        del functions.get_interface


BY_PRODUCT: Final = "by_product"
BIAS: Final = "bias"
# Arguments of modules that multiply themselves.
_BIASES: Final = ("alibi", "position_bias")
_SCORES_AXES: Final = 4


class _Products(TorchFunctionMode):
    """Tells of queries, keys and values that a module multiplies itself."""

    def __init__(self, note: Note) -> None:
        super().__init__()
        self._note = note
        self._module: nn.Module | None = None
        self._factors: tuple[torch.Tensor, torch.Tensor] | None = None
        self._num_rows = 1
        self._bias: torch.Tensor | None = None
        self.is_inside = False

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """The module begins."""
        self._module, self._factors, self.is_inside = module, None, True
        states = first_tensor(args, kwargs)
        self._num_rows = 1 if states is None else len(states)
        self._bias = next((kwargs[each] for each in _BIASES if each in kwargs), None)

    def leave(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        """It ends."""
        self.is_inside = False

    def __torch_function__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.is_inside and func in _PRODUCTS:
            left, right = [*args, *(kwargs or {}).values()][func in _SUMS :][:2]
            if result.ndim == _SCORES_AXES:
                self._multiplied(left, right, result)
            elif left.ndim == right.ndim == _SCORES_AXES - 1 and not len(left) % self._num_rows:
                # Rows and heads lie along one axis.
                self._multiplied(*map(self._unfolded, (left, right, result)))
        elif self.is_inside and func is torch.nn.functional.scaled_dot_product_attention:
            self._tell(*args[:3])
        return result

    def _unfolded(self, values: torch.Tensor) -> torch.Tensor:
        return values.reshape(self._num_rows, -1, *values.shape[1:])

    def _multiplied(self, left: torch.Tensor, right: torch.Tensor, result: torch.Tensor) -> None:
        if self._factors is None and result.shape[-1] == result.shape[-2] == left.shape[-2]:
            self._factors = left, right.transpose(-1, -2)
        elif self._factors is not None and left.shape[-1] == left.shape[-2]:
            self._tell(*self._factors, right)

    def _tell(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        self.is_inside = False
        assert self._module is not None
        parts = {"query": query, "key": key, "value": value}
        self._note(self._module, parts, {BY_PRODUCT: True, BIAS: self._bias})


# Their first argument is added to the product of the next two.
_SUMS: Final = (torch.baddbmm, torch.Tensor.baddbmm)
_PRODUCTS: Final = (
    *(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__),
    *(torch.bmm, torch.Tensor.bmm, *_SUMS),
)


def _sites_of(
    trace: _Trace, attention: nn.Module | None, factors: list[float]
) -> Iterator[tuple[str, Site]]:
    before, after = trace.before, trace.after
    if before is None or after is None:
        return
    span = next((each for each in trace.events if each.module is attention), None)
    yield from _sums(trace, before, after, span, factors)
    if span is None:
        return
    assert attention is not None
    calls = [each for each in trace.calls if _is_inside(each[0], attention)]
    if len(calls) == 1:
        ((module, parts),) = calls
        for kind, side in CALL_SIDES.items():
            if parts[side].ndim == 4 and parts[side].shape[2] == before.shape[1]:
                yield kind, Site(span.name, module, side, by_product=trace.by_product)
        heads = parts["query"].shape[1]
    else:
        heads = 0
    projection = _projection(trace, span)
    if projection is not None and heads and projection.given is not None:
        if projection.given.shape[-1] == heads * calls[0][1]["value"].shape[-1]:
            name = projection.name
            yield kinds.HEAD_OUTPUTS, Site(name, projection.module, "input", heads=heads)


def _is_inside(module: nn.Module, outer: nn.Module) -> bool:
    return any(each is module for each in outer.modules())


def _projection(trace: _Trace, span: _Event) -> _Event | None:
    """The call inside of the attention that gave what it returns."""
    result = span.returned[0] if span.returned else None
    found = [
        each
        for each in trace.events
        if span.start < each.start
        and each.end < span.end
        and each.returned
        and _equal(each.returned[0], result)
        and not list(each.module.children())
        # Not a dropout, which changes nothing here.
        and list(each.module.parameters())
    ]
    return found[0] if found else None


def _sums(
    trace: _Trace,
    before: torch.Tensor,
    after: torch.Tensor,
    attention: _Event | None,
    factors: list[float],
) -> Iterator[tuple[str, Site]]:
    """The sublayers of a block, by the sums that they make."""
    added = list(_outputs(trace, before.shape))
    first = _addition(trace, before, added, after, factors)
    mid = None
    if first is not None:
        site, end, mid_site = first
        # Attention within a larger sublayer adds to something else.
        if attention is None or end >= attention.end:
            mid = mid_site
            if attention is not None:
                yield kinds.ATTENTION_OUTPUT, site
    elif attention is not None and (pair := _parallel(before, after, attention, added)):
        # Both sublayers read the block's input.
        yield kinds.ATTENTION_OUTPUT, pair[0]
        yield kinds.MLP_OUTPUT, pair[1]
        return
    last = _last_addition(trace, before, added, after, factors, mid)
    if last is not None:
        mid, site = last
        yield kinds.MLP_OUTPUT, site
    if mid is not None:
        yield kinds.RESIDUAL_MID, mid


def _outputs(trace: _Trace, shape: torch.Size) -> Iterator[tuple[Site, torch.Tensor, _Event]]:
    """What modules returned that could be added to the residual stream, outer modules first."""
    for event in sorted(trace.events, key=lambda each: (each.name.count("."), each.end)):
        first = event.returned[0] if event.returned else None
        if first is not None and first.numel() == shape.numel() and first.shape[-1] == shape[-1]:
            yield Site(event.name, event.module, "output"), first.reshape(shape), event


def _addition(
    trace: _Trace,
    before: torch.Tensor,
    added: list[tuple[Site, torch.Tensor, _Event]],
    after: torch.Tensor,
    factors: list[float],
) -> tuple[Site, int, Site | None] | None:
    """The first output that added to the input gives what a later module takes, or the end."""
    for site, values, event in added:
        for factor in factors:
            total = before + values * factor
            for later in trace.events:
                if later.start > event.end and _same(later.given, total):
                    return (
                        replace(site, factor=factor),
                        event.end,
                        Site(later.name, later.module, "input"),
                    )
            if torch.equal(total, after):
                return replace(site, factor=factor), event.end, None
    return None


def _last_addition(
    trace: _Trace,
    before: torch.Tensor,
    added: list[tuple[Site, torch.Tensor, _Event]],
    after: torch.Tensor,
    factors: list[float],
    mid: Site | None,
) -> tuple[Site, Site] | None:
    """What a module takes, and a later output, that add up to the block's output."""
    for given in trace.events:
        if given.given is None or (mid is not None and given.module is not mid.module):
            continue
        if given.given.numel() != after.numel():
            continue
        start = given.given.reshape(after.shape)
        for site, values, event in added:
            if event.end < given.start or torch.equal(start, before):
                continue
            for factor in factors:
                if torch.equal(start + values * factor, after):
                    taken = Site(given.name, given.module, "input")
                    return taken, replace(site, factor=factor)
    return None


def _parallel(
    before: torch.Tensor,
    after: torch.Tensor,
    attention: _Event,
    added: list[tuple[Site, torch.Tensor, _Event]],
) -> tuple[Site, Site] | None:
    """Two outputs that, added to the input in any order, give the block's output."""
    first = next((each for each in added if each[2] is attention), None)
    if first is None:
        return None
    for site, values, event in added:
        if attention.start <= event.start <= attention.end:
            continue
        sums = (
            before + first[1] + values,
            before + values + first[1],
            first[1] + values + before,
        )
        if any(torch.equal(each, after) for each in sums):
            return first[0], site
    return None


def _same(found: torch.Tensor | None, expected: torch.Tensor) -> bool:
    return (
        found is not None
        and found.numel() == expected.numel()
        and found.shape[-1] == expected.shape[-1]
        and torch.equal(found.reshape(expected.shape), expected)
    )


def _equal(found: torch.Tensor | None, expected: torch.Tensor | None) -> bool:
    return found is not None and expected is not None and _same(found, expected)


def _router(anatomy: Anatomy, layer: int, trace: _Trace) -> Iterator[tuple[str, Site]]:
    """The router of a block, as transformers knows it."""
    recorders = getattr(anatomy.decoder, "_can_record_outputs", None) or {}
    named = recorders.get(kinds.ROUTER_LOGITS)
    wanted = named if isinstance(named, list) else [named] if named is not None else []
    for recorder in wanted:
        cls = getattr(recorder, "target_class", recorder)
        part = getattr(recorder, "index", 0)
        place = getattr(recorder, "layer_name", None) or ""
        found = [
            each
            for each in trace.events
            if isinstance(cls, type) and isinstance(each.module, cls) and each.name.endswith(place)
        ]
        if len(found) == len(wanted) == 1 and found[0].returned[part] is not None:
            yield kinds.ROUTER_LOGITS, Site(found[0].name, found[0].module, "output", part=part)
