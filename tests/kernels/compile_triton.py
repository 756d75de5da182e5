"""Compile every Triton kernel to machine code for a GPU that need not be there; run by ``test_triton.py``.

python -m tests.kernels.compile_triton 90 bf16      sm_90, one type of numbers
"""

import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from saelab.kernels import triton_bag_sum, triton_entry_dots, triton_kth, triton_positions, triton_row_topk

BITS = {"fp32": 32, "bf16": 16, "fp64": 64}


def compiled(kernel, types, **constants):
    function = getattr(kernel, "fn", kernel) if hasattr(kernel, "configs") else kernel
    signature = {name: types.get(name, "constexpr") for name in function.arg_names}
    constexprs = {(function.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=function, signature=signature, constexprs=constexprs)
    code = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options={"num_warps": 8})
    print(function.__name__, len(code.asm["cubin"]))


def main():
    name = sys.argv[2]
    p, i, bits, acc = "*" + name, "*i64", BITS[name], tl.float64 if name == "fp64" else tl.float32
    bag = {"weight": p, "indices": i, "offsets": i, "scale": p, "out": p, "d": "i32"}
    compiled(triton_bag_sum._bag_sum, bag, ACC=acc, ENTRIES=4, WIDTH=256)
    dots = {"left": p, "right": p, "indices": i, "rows": i, "order": i, "out": p, "nnz": "i32", "d": "i32"}
    compiled(triton_entry_dots._entry_dots, dots, ACC=acc, ENTRIES=8, WIDTH=128)
    topk = {"tile": p, "values": p, "columns": i, "d_sae": "i32", "k": "i32"}
    compiled(triton_row_topk._row_topk, topk, BITS=bits, BLOCK=1024)
    where = {"tile": p, "least": p, "d_sae": "i32", "per_column": "i32"}
    compiled(triton_positions._count, where | {"counts": i}, ACC=acc, BLOCK=1024)
    compiled(triton_positions._write, where | {"starts": i, "places": i}, ACC=acc, BLOCK=1024)
    kth = {"values": p, "prefix": i, "counts": i, "n": "i32"}
    for shift in (bits - 8, 0):
        compiled(triton_kth._histogram, kth, SHIFT=shift, BITS=bits, BLOCK=1024)


if __name__ == "__main__":
    main()
