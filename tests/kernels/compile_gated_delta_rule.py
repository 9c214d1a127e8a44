"""As `compile_for.py`, of the gated delta rule: `<compute capability> <bf16 | fp16 | fp32> <F and D>`."""

import json
import sys
from unittest import mock

import torch
import triton
import triton.language as tl
from compile_for import DTYPES, shared

from kernels.gated_delta_rule import fused

INPUTS = {"q", "k", "v", "out", "dout", "dq", "dk", "dv"}
STORED = {"inverse", "w", "y", "du", "states", "states_after"}
SIZES = {"T", "NT", "H", "G", "TOKENS"}
SWITCHES = ("SCALED", "HAS_DECAY", "HAS_INITIAL", "HAS_FINAL", "HAS_MASK", "PACKED")


def pointer(name: str, dtype: str) -> str:
    """The type of one of the kernels' arguments."""
    if name in INPUTS:
        return f"*{dtype}"
    if name in STORED:
        return "*bf16" if dtype == "bf16" else "*fp32"
    if name in {"cu", "offsets", "starts", "stops"}:
        return "*i64"
    return "i32" if name in SIZES else {"mask": "*i1"}.get(name, "*fp32")


def main(capability: int, dtype: str, width: int) -> dict[str, int]:
    """Every kernel, with everything switched on that a packed and masked call with decay switches on."""
    with mock.patch.object(fused, "_machine", return_value=(divmod(capability, 10), 1)):
        plan = fused.plan(torch.empty(0, dtype=DTYPES[dtype]), width, width, 0, 0)
    constants = {"F": width, "D": width, "C": plan.size, "BF": plan.block_f, "BD": plan.block_d}
    constants |= dict.fromkeys(SWITCHES, True)
    constants |= {"OPERAND": tl.bfloat16 if dtype == "bf16" else tl.float32}
    constants |= {"PRECISION": "ieee" if dtype == "fp32" else "tf32"}
    options = {"num_warps": plan.warps, "num_stages": plan.stages}
    walk = constants | {"BF": plan.walk_f, "BD": plan.walk_d}
    token = constants | {"BF": triton.next_power_of_2(width), "BD": 32}
    kernels = [
        (fused._transform, constants, options),
        (fused._states, walk, options),
        (fused._output, constants, options),
        (fused._written_gradients, constants, options),
        (fused._state_gradients, walk, options),
        (fused._gradients, constants, fused.GRADIENTS),
        (fused._one_token, token, {}),
    ]
    return {
        kernel.__name__: shared(kernel, capability, dtype, given, settings, pointer)
        for kernel, given, settings in kernels
    }


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))))
