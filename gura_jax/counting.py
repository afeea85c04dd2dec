"""Count a traced function's work from its shapes, and find instructions in a compiled program's text."""

import collections
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn


class Work(NamedTuple):
    """What a function computes, on all devices together.

    Attributes:
        flops: of matrix products and convolutions, by type of their operands: ``bfloat16`` or ``float32``.
        fused_attentions: library calls for attention, each of one layer.
        unknown_loops: loops whose length depends on data; their bodies count once.
    """

    flops: Mapping[str, float]
    fused_attentions: int
    unknown_loops: int


class Found(NamedTuple):
    """Instructions in a compiled program's text, where the body of a loop stands once.

    Attributes:
        collectives: between devices, by kind.
        fused_attentions: custom calls of cuDNN's attention or of TPU kernels.
        float32_products: matrix products and convolutions with float32 operands, by what they were traced from.
    """

    collectives: Mapping[str, int]
    fused_attentions: int
    float32_products: Mapping[str, int]


def count_work(traced: ClosedJaxpr) -> Work:
    """Count matrix products and convolutions, as often as they are computed.

    Padding and what blocks compute twice are in it; of a convolution over dilated samples, the zeros are not.
    """
    flops: dict[str, float] = collections.defaultdict(float)
    attentions = loops = 0.0
    for equation, times in _computed(traced.jaxpr, 1.0):
        name = equation.primitive.name
        if name in _FLOPS:
            flops[_operand_type(equation)] += times * _FLOPS[name](equation)
        attentions += times * (name in _ATTENTIONS)
        loops += times * (name == "while")
    return Work(dict(flops), round(attentions), round(loops))


def _computed(jaxpr: Jaxpr, times: float) -> Iterator[tuple[JaxprEqn, float]]:
    """Every equation, also of inner functions, and how often it is computed on all devices together."""
    for equation in jaxpr.eqns:
        yield equation, times
        repeats = _REPEATS.get(equation.primitive.name, lambda parameters: 1)(equation.params)
        for inner in _inner(equation):
            yield from _computed(inner, times * repeats)


def _inner(equation: JaxprEqn) -> Iterator[Jaxpr]:
    if equation.primitive.name == "cond":  # one of them is computed: at least the cheapest
        yield min(equation.params["branches"], key=lambda branch: sum(count_work(branch).flops.values())).jaxpr
        return
    for parameter in equation.params.values():
        for value in parameter if isinstance(parameter, (tuple, list)) else (parameter,):
            if isinstance(value, ClosedJaxpr):
                yield value.jaxpr
            elif isinstance(value, Jaxpr):
                yield value


def _shapes(variables: Sequence[Any]) -> list[Any]:
    """What has a shape and a dtype."""
    return [variable.aval for variable in variables]


def _operand_type(equation: JaxprEqn) -> str:
    """``bfloat16`` where both operands are, else ``float32``."""
    types = {operand.dtype.name for operand in _shapes(equation.invars)[:2]}
    return "bfloat16" if types == {"bfloat16"} else "float32"


def _matrix_flops(equation: JaxprEqn) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    (result,), left = _shapes(equation.outvars), _shapes(equation.invars)[0]
    return 2.0 * result.size * math.prod(left.shape[axis] for axis in contracted)


def _convolution_flops(equation: JaxprEqn) -> float:
    (result,), kernel = _shapes(equation.outvars), _shapes(equation.invars)[1]
    channels = kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
    zeros = math.prod(equation.params["lhs_dilation"])  # samples that a gradient puts between its own
    return 2.0 * result.size * (kernel.size // channels) / zeros


def _attention_flops(products: int) -> Callable[[JaxprEqn], float]:
    """Of so many products of queries [B, T, H, K] and keys [B, S, H, K], over all queries and keys."""

    def flops(equation: JaxprEqn) -> float:
        queries, keys = _shapes(equation.invars)[:2]
        return 2.0 * products * queries.size * keys.shape[1]

    return flops


_ATTENTIONS = ("dot_product_attention_fwd_wrapper", "dot_product_attention_bwd_wrapper")
_FLOPS: Mapping[str, Callable[[JaxprEqn], float]] = {
    "dot_general": _matrix_flops,
    "conv_general_dilated": _convolution_flops,
    _ATTENTIONS[0]: _attention_flops(2),
    _ATTENTIONS[1]: _attention_flops(5),  # the scores again, and four gradients
}
_REPEATS: Mapping[str, Callable[[Mapping[str, Any]], int]] = {
    "scan": lambda parameters: parameters["length"],
    "shard_map": lambda parameters: math.prod(
        parameters["mesh"].shape[axis] for axis in parameters["newly_manual_axes"]
    ),
    "pallas_call": lambda parameters: math.prod(parameters["grid_mapping"].grid),
}

# %name = f32[2,3]{1,0} op(%operand, ...), ...; a type may be a tuple of types
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%(?P<name>\S+) = \(?(?P<type>\w+)\[.*? (?P<op>[a-z][\w\-]*)\((?P<rest>.*)$")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r'custom_call_target="([^"]*)"')
_TRACED_FROM = re.compile(r'op_name="([^"]*)"')
_COLLECTIVE = re.compile(
    r"(all-gather|all-reduce|all-to-all|ragged-all-to-all|reduce-scatter|collective-permute|collective-broadcast|"
    r"send|recv)(?:-start)?"
)
_PRODUCT = re.compile(r"dot|convolution|__cublas\S*|__cudnn\$conv\S*")
_FUSED_ATTENTION = re.compile(r"__cudnn\$fmha\S*|tpu_custom_call")


def find_instructions(text: str) -> Found:
    """Read a compiled program, as ``jax.stages.Compiled.as_text`` writes it."""
    types: dict[str, str] = {}
    products: list[tuple[str, str]] = []
    collectives: collections.Counter[str] = collections.Counter()
    attentions = 0
    for line in text.splitlines():
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        types[match["name"]] = match["type"]
        op, rest = match["op"], match["rest"]
        if called := _CALLED.search(rest):
            op = called[1]
        if found := _COLLECTIVE.fullmatch(op):
            collectives[found[1]] += 1
        attentions += bool(_FUSED_ATTENTION.fullmatch(op))
        if _PRODUCT.fullmatch(op):
            products.append((match["name"], rest))
    float32: collections.Counter[str] = collections.Counter()
    for name, rest in products:
        operands = _OPERAND.findall(rest.split(")", 1)[0])[:2]
        if any(types.get(operand) == "f32" for operand in operands):
            source = _TRACED_FROM.search(rest)
            float32[source[1] if source else name] += 1
    return Found(dict(collectives), attentions, dict(float32))
