"""The interpreter forgives what a compiler does not: every kernel compiles for a GPU, on a machine without one."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from softprompt_kernels.act_mul.kernel import _act_mul_kernel as act_mul
from softprompt_kernels.embed_gather.kernel import _embed_gather_kernel as embed_gather
from softprompt_kernels.kv_write.kernel import _kv_write_kernel as kv_write
from softprompt_kernels.lora_expand.kernel import _lora_expand_kernel as lora_expand
from softprompt_kernels.lora_shrink.kernel import _lora_shrink_kernel as lora_shrink
from softprompt_kernels.paged_attention.kernel import _combine_splits_kernel as combine
from softprompt_kernels.paged_attention.kernel import _paged_attention_kernel as paged_attention
from softprompt_kernels.rmsnorm.kernel import _rmsnorm_kernel as rmsnorm
from softprompt_kernels.rope.kernel import _rope_kernel as rope
from softprompt_kernels.rope_kv_write.kernel import _rope_kv_write_kernel as rope_kv_write
from softprompt_kernels.sample.kernel import _sample_kernel as sample

KINDS = {
    "page_table_ptr": "*i32", "query_start_ptr": "*i32", "context_lens_ptr": "*i32",
    "slots_ptr": "*i64", "dst_ptr": "*i64", "src_ptr": "*i64", "scale": "fp32", "softcap": "fp32",
    "ranks_ptr": "*i32", "starts_ptr": "*i32", "tiles_ptr": "*i32", "order_ptr": "*i64", "scales_ptr": "*fp32",
    "top_ptr": "*fp32", "h_ptr": "*fp32", "total_ptr": "*fp32", "parts_ptr": "*fp32", "eps": "fp32",
    "temperature_ptr": "*fp64", "top_p_ptr": "*fp64", "min_p_ptr": "*fp64", "points_ptr": "*fp64",
    "top_k_ptr": "*i64", "tokens_ptr": "*i64", "allowed_ptr": "*i32",
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
for num_splits in (1, 16):
    compile_for_gpu(
        paged_attention, PAGE_SIZE=16, D=64, GROUP=3, BLOCK_Q=5, BLOCK_M=16, BLOCK_N=64, BLOCK_D=64,
        HAS_SOFTCAP=True, HAS_WINDOW=True, HAS_SINKS=True, NUM_SPLITS=num_splits, PRECISION="tf32",
    )
compile_for_gpu(combine, D=80, BLOCK_D=128, NUM_SPLITS=16)
for flag in (False, True):
    compile_for_gpu(act_mul, GELU_TANH=flag, BLOCK=1024)
    compile_for_gpu(rmsnorm, N=576, BLOCK=1024, HAS_RESIDUAL=flag, UNIT_OFFSET=flag)
for tokens in (16, 64):
    compile_for_gpu(lora_shrink, PRECISION="tf32", NUM_PARTS=4, BLOCK_T=tokens, BLOCK_R=64, BLOCK_K=64)
    compile_for_gpu(
        lora_expand, PRECISION="tf32", NUM_SLICES=3, NUM_PARTS=4, BLOCK_T=tokens, BLOCK_R=64, BLOCK_N=128,
    )
for kernel in (rope, rope_kv_write):
    compile_for_gpu(kernel, H=9, KV_HEADS=3, HALF=32, BLOCK_H=16, BLOCK_HALF=32)
for flag in (False, True):
    compile_for_gpu(sample, HAS_ALLOWED=flag, KEY_BITS=16, DIGIT_BITS=4, BLOCK=2048, NUM_TILES=64)
KINDS |= {name: "*fp32" for name in ("q_ptr", "keys_ptr", "values_ptr", "sinks_ptr", "out_ptr")}
compile_for_gpu(
    paged_attention, PAGE_SIZE=16, D=128, GROUP=4, BLOCK_Q=4, BLOCK_M=16, BLOCK_N=16, BLOCK_D=128,
    HAS_SOFTCAP=False, HAS_WINDOW=False, HAS_SINKS=False, NUM_SPLITS=1, PRECISION="ieee",
)
"""


def test_every_kernel_compiles_for_a_gpu() -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr
