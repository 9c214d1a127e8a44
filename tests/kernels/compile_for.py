"""Compile the fused kernels for a GPU that need not be there, and print the shared memory of each, as JSON.

    python tests/kernels/compile_for.py <compute capability, such as 90> <bf16 | fp16 | fp32> <F and D>

It runs in a process of its own, because under TRITON_INTERPRET=1 there is nothing to compile.
"""

import json
import sys
from collections.abc import Callable

import torch
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from kernels.infini_memory import fused as infini
from kernels.linear_attention import fused
from kernels.window_linear_attention import fused as window

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
INPUTS = {"q", "k", "v", "out", "dout", "dq", "dk", "dv", "local", "answers", "dlocal"}
INPUTS |= {"phi_q", "phi_k", "sink_k", "sink_v"}
STORED = {"states_M", "after_M"}
SIZES = {"T", "NT", "H", "G", "SEGMENTS", "rows", "NS", "NB", "SHIFT", "ROWS", "RUNS", "W"}
TYPES = {
    "eps": "fp32",
    "clamp": "fp32",
    "mask": "*i1",
    "totals": "*fp64",
    "initial_n": "*fp64",
    "lost": "*i32",
    "limited": "*i32",
    "before": "*i64",
    "sink_seen": "*i1",
    "n": "*fp64",
}


def pointer(name: str, dtype: str) -> str:
    """The type of one of the kernels' arguments."""
    if name in INPUTS:
        return f"*{dtype}"
    if name in STORED:
        return "*bf16" if dtype == "bf16" else "*fp32"
    if name in {"cu", "offsets", "starts", "stops"}:
        return "*i64"
    if name in SIZES:
        return "i32"
    return TYPES.get(name, "*fp32")


def window_pointer(name: str, dtype: str) -> str:
    """As `pointer`, where `scale` is that of softmax."""
    return "fp32" if name == "scale" else pointer(name, dtype)


def shared(
    kernel: object,
    capability: int,
    dtype: str,
    constants: dict,
    options: dict,
    pointer: Callable[[str, str], str] = pointer,
) -> int:
    """Compile one kernel; the shared memory it takes. `pointer` knows the types of its arguments."""
    names = kernel.arg_names  # type: ignore[attr-defined]
    given = {name: constants[name] for name in names if name in constants}
    types = {name: "constexpr" if name in given else pointer(name, dtype) for name in names}
    places = {(names.index(name),): value for name, value in given.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name][0] == "*"}
    source = ASTSource(kernel, types, places, aligned)
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options).metadata.shared


def main(capability: int, dtype: str, width: int) -> dict[str, int]:
    """Every kernel, with everything switched on that a packed, masked and normalised call switches on."""
    block = min(width, fused.largest_block(divmod(capability, 10), DTYPES[dtype]))
    constants = {"F": width, "D": width, "C": fused.CHUNK, "BF": block, "BD": block}
    constants |= dict.fromkeys(("STORE", "HAS_INITIAL", "HAS_FINAL", "HAS_MASK", "PACKED", "NORMALIZE"), True)
    constants |= {"OPERAND": tl.bfloat16 if dtype == "bf16" else tl.float32}
    constants |= {"PRECISION": "ieee" if dtype == "fp32" else "tf32"}
    options = {"num_warps": 8 if block > 64 else 4, "num_stages": 2 if capability >= 80 else 1}
    found = {
        kernel.__name__: shared(kernel, capability, dtype, constants, options)
        for kernel in (fused._states, fused._output, fused._state_gradients)
    }
    found["_gradients"] = shared(fused._gradients, capability, dtype, constants, fused.GRADIENTS)
    step = constants | {"BF": width, "BD": 32}
    found["_one_token"] = shared(fused._one_token, capability, dtype, step, {})
    rows = {"D": width, "BD": width, "BR": 16}
    found["_denominator_gradients"] = shared(fused._denominator_gradients, capability, dtype, rows, {})
    for size in (32, 100):  # two blocks a span, and two tiles a block
        cut = infini.Cut.of(4 * size, size, 1)
        own = constants | {"S": size, "P": cut.span, "BT": cut.tile, "TILES": cut.tiles, "BN": 256}
        own |= dict.fromkeys(("HAS_GATE", "PER_TOKEN"), True) | {"WITHIN": cut.span > size, "BR": 16}
        for kernel in (infini._prepare, infini._limits, infini._totals):
            found[f"infini{kernel.__name__} {size}"] = shared(
                kernel, capability, dtype, own, {"num_warps": 4, "num_stages": 1}
            )
        for kernel in (infini._states, infini._output, infini._state_gradients):
            found[f"infini{kernel.__name__} {size}"] = shared(kernel, capability, dtype, own, options)
        found[f"infini_gradients {size}"] = shared(infini._gradients, capability, dtype, own, fused.GRADIENTS)
    found["infini_mix_gradients"] = shared(infini._mix_gradients, capability, dtype, own | {"BD": width}, {})
    found["infini_one_token"] = shared(
        infini._one_token, capability, dtype, own | {"BF": width, "BD": 32}, {}
    )
    return found | with_a_window(capability, dtype, width, constants, options)


def with_a_window(capability: int, dtype: str, width: int, constants: dict, options: dict) -> dict[str, int]:
    """The kernels of `window_linear_attention` that are its own."""
    own = constants | dict.fromkeys(("EXTRA", "HAS_MASK"), True)
    own |= {"K": width, "BK": constants["BF"], "SINKS": 4, "BS": 16, "LENGTH": window.RUN}
    given = (capability, dtype)
    found = {}
    for size in (32, 100):
        cut = window.Cut.of(4 * size, size, 1)
        sizes = own | {
            "S": size,
            "P": cut.span,
            "BT": cut.tile,
            "TILES": cut.tiles,
            "WITHIN": cut.span > size,
        }
        found[f"window_output {size}"] = shared(window._output, *given, sizes, options, window_pointer)
    sizes = own | {"S": 32, "BT": fused.CHUNK}
    for kernel in (window._query_gradients, window._key_gradients, window._sink_gradients):
        found[f"window{kernel.__name__}"] = shared(kernel, *given, sizes, fused.GRADIENTS, window_pointer)
    rows = own | {"BD": width, "BR": 16}
    found["window_row_gradients"] = shared(window._row_gradients, *given, rows, {}, window_pointer)
    step = own | {"BK": width, "BF": width, "BD": 32, "BW": min(64, 8192 // width), "BS": 4}
    found["window_one_token"] = shared(window._one_token, *given, step, {}, window_pointer)
    return found


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))))
