"""Kernels as data: what to compile and how to launch it. Needs neither Triton nor CUDA.

A kernel is a Triton function in an op's `kernel.py`. A `KernelSpec` names one variant of it, with
every constant fixed; `export/kernel_compiler.py` makes a cubin of it for each GPU. A `Launch` says
once how to run a variant; `launcher.py` runs it on a GPU, and tests run it in Triton's interpreter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

# Types of runtime arguments, as Triton writes them; `*` is a pointer to device memory.
SCALAR_TYPES = ("i32", "i64", "fp32")
POINTED_TYPES = ("fp32", "fp16", "bf16", "i8", "u8", "i32", "i64")
# Every pointer's address is a multiple of this; loads of 16 bytes depend on it.
POINTER_ALIGNMENT = 16
# The size in a grid rule that a launcher knows by itself: the GPU's multiprocessors, one program on
# each. Such programs may wait for each other.
PROCESSORS = "processors"
MOST_PROCESSORS = 1024
# Triton's names of number types by numpy's.
TRITON_TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}

Constant = int | float | bool | str
# Dimensions by name of an op's input or output; -1 where a dimension varies.
Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class KernelSpec:
    """One variant of a kernel.

    Attributes:
        name: unique among the variants of a model, and the stem of its files.
        function: `module:function` of the Triton source, or `path/file.cu:function` of CUDA C++
            within a package.
        arguments: type of each runtime argument by name, in the kernel's order. Pointers are
            multiples of `POINTER_ALIGNMENT`.
        constants: value of each `tl.constexpr` by name.
        grid: programs along x, y and z as rules over the sizes of a launch: a product such as
            `batch * heads` of names, whole numbers and `ceil(name / number)`. With `PROCESSORS`
            the launch is a cooperative one.
        num_warps: warps of a block, 32 threads each.
        num_stages: depth of Triton's software pipelines.
        divisible: integer arguments that are multiples of 16.
    """

    name: str
    function: str
    arguments: Mapping[str, str]
    constants: Mapping[str, Constant]
    grid: tuple[str, str, str]
    num_warps: int = 4
    num_stages: int = 2
    divisible: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = [
            f"argument {name!r} has unknown type {kind!r}"
            for name, kind in self.arguments.items()
            if kind not in SCALAR_TYPES and not (kind.startswith("*") and kind[1:] in POINTED_TYPES)
        ]
        if both := self.arguments.keys() & self.constants.keys():
            problems.append(f"both argument and constant: {', '.join(sorted(both))}")
        if unknown := [name for name in self.divisible if name not in self.arguments]:
            problems.append(f"divisible but no argument: {', '.join(unknown)}")
        problems += [f"grid rule {rule!r}" for rule in self.grid if not _is_rule(rule)]
        if problems:
            raise ValueError(f"kernel {self.name}: {'; '.join(problems)}")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One run of a kernel.

    Attributes:
        kernel: name of the variant.
        sizes: value of every name in the variant's grid rules.
        arguments: value of each runtime argument; pointers are addresses, 0 where none is used.
    """

    kernel: str
    sizes: Mapping[str, int]
    arguments: Mapping[str, int | float]


class OpKernels(Protocol):
    """The kernels of one custom op at fixed attributes, types and static dimensions.

    Each op's `launches.py` makes one: `make_kernels(attributes, shapes, dtypes)`, where attributes
    are the ONNX node's, and shapes and dtypes (numpy's names) are keyed by `CustomOp.inputs` and
    `CustomOp.outputs`. What varies between launches (batch, tokens, slots) may be -1 there and has
    no influence. It raises ValueError for what no kernel covers.
    """

    @property
    def specs(self) -> tuple[KernelSpec, ...]:
        """Every variant that some launch may use."""

    def workspace_bytes(self, shapes: Shapes) -> int:
        """Scratch memory that launches at these full shapes, or smaller ones, need."""

    def counters(self, shapes: Shapes) -> int:
        """How many int32 counters they need: zero before the first launch, and after each."""

    def launches(
        self, shapes: Shapes, addresses: Mapping[str, int], workspace: int, counters: int
    ) -> tuple[Launch, ...]:
        """What to run, in order, to compute the op once.

        Args:
            shapes: every dimension of every input and output.
            addresses: where each input and output lies, contiguous.
            workspace: address of the scratch memory; what it holds is arbitrary.
            counters: address of the counters.

        Raises:
            ValueError: a shape beyond what the kernels were made for.
        """


def grid_of(rules: Sequence[str], sizes: Mapping[str, int]) -> tuple[int, int, int]:
    """Programs along x, y and z.

    Args:
        rules: three rules as in `KernelSpec.grid`.
        sizes: value of every name in them.

    Raises:
        ValueError: not three rules, a rule that cannot be read, or a name without a size.
    """
    if len(rules) != 3:
        raise ValueError(f"a grid has three rules, got {list(rules)}")
    x, y, z = (prod(_factor(text, sizes) for text in rule.split("*")) for rule in rules)
    return x, y, z


_NAME = r"[a-z_]+"
_NUMBER = r"\d+"
_FACTOR = re.compile(
    rf"\s*(?:(?P<number>{_NUMBER})|(?P<name>{_NAME})"
    rf"|ceil\(\s*(?P<top>{_NAME})\s*/\s*(?P<bottom>{_NUMBER})\s*\))\s*"
)


def _is_rule(rule: str) -> bool:
    return all(_FACTOR.fullmatch(text) for text in rule.split("*"))


def _factor(text: str, sizes: Mapping[str, int]) -> int:
    found = _FACTOR.fullmatch(text)
    if not found:
        raise ValueError(f"cannot read {text.strip()!r} in a grid rule")
    if number := found["number"]:
        return int(number)
    name = found["name"] or found["top"]
    if name not in sizes:
        raise ValueError(f"the grid needs the size {name!r}, got {', '.join(sizes) or 'none'}")
    return sizes[name] if found["name"] else -(-sizes[name] // int(found["bottom"]))
