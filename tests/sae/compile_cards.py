"""Compile the kernels of `saerad.sae.cards` for a card, on a machine that needs none: Triton brings the compiler and the assembler along.

usage: compile_cards.py COMPUTE_CAPABILITY    prints the name of every kernel and the size of its machine code
"""
import os
import sys

import torch

for name in ("SAERAD_TRITON", "TRITON_INTERPRET"): os.environ.pop(name, None)
torch.cuda.is_available = lambda: True                   # asked for once, by the import below
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from saerad.sae import cards  # noqa: E402

F, H, I, L, B, N = "*fp32", "*bf16", "*i32", "*i64", "*i8", "i32"
ROW = {"D": 4096, "BETA1": 0.9, "BETA2": 0.999, "EPS": 1e-8}
KERNELS = {
    "gather_kernel": ((F, F, F, F, I, N, N, N), cards.TILE),
    "digits_kernel": ((I, F, F, I, I, N, N), cards.TILE | {"SHIFT": 8}),
    "pick_kernel": ((I, I, I, I), {}),
    "select_kernel": ((F, F, F, N, H, B, I, F, N, N), cards.TILE),
    "errors_kernel": ((F, F, H, H, F, F, F, N, N), {"GROUPS": 5, "B": 1024}),
    "slopes_kernel": ((H, H, F, N, N), cards.TILE),
    "lengths_kernel": ((H, F, F, F, N), {"D": 4096, "ON_SPHERE": True}),
    "rows_kernel": ((H, F, F, F, H, F, F, F, N), ROW | {"ON_SPHERE": True, "ROUND": True}),
    "bias_kernel": ((F, F, F, F, F, F, N), {"B": 1024} | {k: ROW[k] for k in ("BETA1", "BETA2", "EPS")}),
    "count_kernel": ((F, F, F, N, I, I, N), {"GROUPS": 5, "B": 1024}),
    "list_kernel": ((F, F, F, N, L, I, I, F, N, N), {"B": 1024}),
    "decode_kernel": ((L, I, F, H, H, N, N), {"GROUPS": 5, "B": 1024}),
    "features_kernel": ((L, L, I, F, L, H, H, H, H, H, F, N, N), {"D": 4096}),
}

for name, (types, constants) in KERNELS.items():
    kernel = getattr(cards, name)
    plain = [arg for arg in kernel.arg_names if arg not in constants]
    signature = dict(zip(plain, types, strict=True)) | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, {arg: signature[arg] for arg in kernel.arg_names}, {(kernel.arg_names.index(k),): v for k, v in constants.items()})
    made = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32))
    print(name, len(made.asm["cubin"]))
