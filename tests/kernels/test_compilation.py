"""The interpreter forgives what a compiler does not: every kernel compiles for a GPU, on a machine without one."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from softprompt_kernels.embed_gather.kernel import _kernel as embed_gather
from softprompt_kernels.kv_write.kernel import _kernel as kv_write
from softprompt_kernels.paged_attention.kernel import _kernel as paged_attention

KINDS = {
    "page_table_ptr": "*i32", "query_start_ptr": "*i32", "context_lens_ptr": "*i32",
    "slots_ptr": "*i64", "dst_ptr": "*i64", "src_ptr": "*i64", "scale": "fp32", "softcap": "fp32",
}

def compile_for_gpu(kernel, **constants):
    def kind(name):
        if name in constants:
            return "constexpr"
        return KINDS.get(name, "*bf16" if name.endswith("_ptr") else "i32")

    source = ASTSource(kernel, {name: kind(name) for name in kernel.arg_names}, constants)
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]

compile_for_gpu(embed_gather, BLOCK=1024)
compile_for_gpu(kv_write, D=64, ROW=192, BLOCK=256)
compile_for_gpu(
    paged_attention, D=64, GROUP=3, BLOCK_Q=5, BLOCK_M=16, BLOCK_N=64, BLOCK_D=64,
    HAS_SOFTCAP=True, HAS_WINDOW=True, HAS_SINKS=True, PRECISION="tf32",
)
"""


def test_every_kernel_compiles_for_a_gpu() -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr
