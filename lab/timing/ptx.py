"""What the Triton kernels become on an H100, without one: `python -m lab.timing.ptx [NAME ...]`,
half a minute.

For each launch that the public functions of kernels/ would make: registers, bytes spilled, shared
memory, atomics, widths of the loads. NAME picks kernels by a part of their name. The real functions
are called on small CPU tensors and a launch compiles for sm_90 instead of running, so that block
sizes, warps and constants are those of the code; the numbers of tokens, pairs and experts are
run-time arguments and do not matter.
"""
import re
import subprocess
import sys
import tempfile
from collections import Counter
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from kernels import common
from kernels import moe as moe_kernels
from kernels import order as order_kernels
from kernels import parts
from kernels import peer as peer_kernels
from kernels import product_keys


def report(name, ptx, shared):
    """One line; registers and spills (stores + loads) are ptxas's. cp.async.cg always loads 16
    bytes."""
    # ptxas assembles the text and says what the kernel needs.
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [triton.knobs.nvidia.ptxas.path, "-v", "-arch=sm_90a", file.name, "-o",
                   "/dev/null"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", text)[1]
    spilled = re.findall(r"(\d+) bytes spill", text)
    # Loads and atomics are counted in the text itself.
    # "" for the latter
    loads = Counter(re.findall(r"ld\.global\S*?((?:v\d\.)?b\d+)|cp\.async\.cg", ptx))
    widths = " ".join(f"{n}x{width or 'cp.async'}" for width, n in sorted(loads.items()))
    atomics = len(re.findall(r"\b(?:atom|red)\.\S+", ptx))
    print(f"  {name:34} {registers:>3} registers {sum(map(int, spilled)):4} B spilled {shared:6} B "
          f"shared {atomics} atomics  loads {widths}", flush=True)


def compile_instead(run):
    """In the place of JITFunction.run: compiles a launch and reports on it."""
    def launch(self, *args, grid, warmup, **options):
        if any(name in self.__name__ for name in sys.argv[1:] or [""]):
            kernel = run(self, *args, grid=grid, warmup=True, **options)
            report(self.__name__, kernel.asm["ptx"], kernel.metadata.shared)
    return launch


def moe(d, w, k, dtype):
    """The launches of a mixture-of-experts layer: width d, experts of hidden width w, k for each
    token."""
    print(f"d {d} w {w} k {k} {dtype}")
    x = torch.zeros(32, d, dtype=dtype)
    order, weight = torch.arange(32 * k), torch.zeros(32 * k)
    order, inverse = moe_kernels.invert(order)
    moe_kernels.unpermute(moe_kernels.permute(x, order, k), inverse, k)
    for activation, width in (("swiglu", 2 * w), ("gelu", w)):
        h = torch.zeros(32 * k, width, dtype=dtype)
        a = moe_kernels.gated_activation(h, weight, activation)
        moe_kernels.gated_activation_backward(a, h, weight, activation)


def order(P, E):
    """The launches of the sort of P pairs by expert."""
    print(f"expert order P {P} E {E}")
    pairs = torch.zeros(P, dtype=torch.int64)
    order_kernels.ExpertOrder.apply(torch.zeros(P), pairs, pairs, E)


def peer(d, R, dtype):
    """The launches of PEER's experts: width d, R rows for each token."""
    print(f"d {d} R {R} {dtype}")
    x, W = torch.zeros(16, d, dtype=dtype), torch.zeros(1024, 2, d, dtype=dtype)
    s, idx = torch.zeros(16, R), torch.zeros(16, R, dtype=torch.int32)
    y, h = peer_kernels.peer_forward(x, W, idx, s, "gelu")
    _, dh, a, _ = peer_kernels.peer_backward_tokens(y, W, idx, s, h, "gelu")
    peer_kernels.peer_backward_table(x, y, dh, a, idx, 1024)


if __name__ == "__main__":
    # A driver that names an H100, a launch that only compiles, and CPU tensors that count as
    # CUDA's.
    target = GPUTarget("cuda", 90, 32)
    triton.runtime.driver.set_active(SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: 0,
        get_current_stream=lambda device: 0))
    JITFunction.run = compile_instead(JITFunction.run)
    common.use_triton = lambda x: True
    fp32, bf16 = torch.float32, torch.bfloat16
    for shape in ((768, 256, 8, bf16), (768, 1024, 2, bf16), (1000, 344, 3, bf16),
                  (768, 256, 8, fp32)):
        moe(*shape)
    for P, E in ((2 ** 15, 8), (2 ** 18, 128), (2 ** 18, 1024)):
        order(P, E)
    for d, dtype in ((256, bf16), (512, bf16), (768, bf16), (1024, bf16), (1100, bf16), (256, fp32),
                     (512, fp32), (768, fp32), (1024, fp32), (1100, fp32)):
        peer(d, 128, dtype)
    for d, k, dtype in ((64, 16, fp32), (128, 16, fp32), (64, 32, fp32), (64, 16, bf16), (64, 32, bf16)):
        print(f"sub-keys c {d} m 1024 k {k} {dtype}")
        q, sub_keys = torch.zeros(16, 8, 2, d, dtype=dtype), torch.zeros(2, 1024, d, dtype=dtype)
        product_keys.product_key_experts(q, sub_keys, k)
        chosen = torch.zeros(16, 8, 2, k, dtype=torch.int32)
        product_keys.sub_key_gradient(q, chosen.float(), chosen, 1024)
    print("parts of W (128, 768) and of a gradient (16, 128)")
    parts.split(torch.zeros(1, 128 * 768))
    parts.split(torch.zeros(16, 128), backward=True)
