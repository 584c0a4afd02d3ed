"""What the Triton kernels become on an H100, without one: `python -m lab.ptx [NAME ...]`.

Prints, for each launch that the public functions of kernels.py and kernels_peer.py would make, registers,
spills, shared memory, atomics and the widths of the loads. NAME picks kernels by a part of their name. Half
a minute.

How: the real functions are called on small CPU tensors, and a launch compiles for sm_90 instead of running.
So block sizes, warps and constants are those of the code; T, P and N are run-time arguments and do not
matter. """

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

import kernels
import kernels_peer

SEEN = set()


def measure(ptx):
    """registers and spilled bytes (stores + loads), as ptxas reports them."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [triton.knobs.nvidia.ptxas.path, "-v", "-arch=sm_90a", file.name, "-o", "/dev/null"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", text))
    return int(re.search(r"Used (\d+) registers", text)[1]), spilled


def compile_instead(run):
    def launch(self, *args, grid, warmup, **options):
        if not any(name in self.__name__ for name in sys.argv[1:] or [""]):
            return
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        ptx = kernel.asm["ptx"]
        if ptx in SEEN:
            return
        SEEN.add(ptx)
        loads = Counter(re.findall(r"ld\.global\S*?((?:\.v\d)?\.b\d+)", ptx))
        atomics = len(re.findall(r"\b(?:atom|red)\.\S+", ptx))
        registers, spilled = measure(ptx)
        widths = " ".join(f"{n}x{width[1:]}" for width, n in sorted(loads.items()))
        print(f"  {self.__name__:36} {registers:3} registers {spilled:4} B spilled "
              f"{kernel.metadata.shared:6} B shared {atomics} atomics  loads {widths}", flush=True)
    return launch


def moe(d, n, k, dtype):
    T = 32
    print(f"d {d} n {n} k {k} {dtype}")
    x, order = torch.zeros(T, d, dtype=dtype), torch.arange(T * k)
    kernels.unpermute(kernels.permute(x, order, k), order, k)
    for activation, width in (("swiglu", 2 * n), ("gelu", n)):
        h, weight = torch.zeros(T * k, width, dtype=dtype), torch.zeros(T * k)
        a = kernels.gated_activation(h, weight, activation)
        kernels.gated_activation_backward(a, h, weight, activation)


def peer(d, R, dtype):
    T, N = 16, 1024
    print(f"d {d} R {R} {dtype}")
    x, W = torch.zeros(T, d, dtype=dtype), torch.zeros(N, 2, d, dtype=dtype)
    s, idx = torch.zeros(T, R), torch.zeros(T, R, dtype=torch.int32)
    y, h = kernels_peer.peer_forward(x, W, idx, s, "gelu")
    dx, dh, a, ds = kernels_peer.peer_backward_tokens(y, W, idx, s, h, "gelu")
    kernels_peer.peer_backward_table(x, y, dh, a, idx, N)


if __name__ == "__main__":
    target = GPUTarget("cuda", 90, 32)
    driver = SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: 0,
                             get_current_stream=lambda device: 0)
    triton.runtime.driver.set_active(driver)
    kernels.use_triton = lambda x: True
    JITFunction.run = compile_instead(JITFunction.run)
    for shape in ((768, 256, 8), (768, 1024, 2), (1000, 344, 3)):
        moe(*shape, torch.bfloat16)
    moe(768, 256, 8, torch.float32)
    for d in (256, 512, 768, 1024):
        peer(d, 128, torch.bfloat16)
    peer(512, 128, torch.float32)
    for d, k, dtype in ((64, 16, torch.float32), (128, 16, torch.float32), (64, 32, torch.float32),
                        (64, 16, torch.bfloat16)):
        print(f"sub-keys d {d} n 1024 k {k} {dtype}")
        q, sub_keys = torch.zeros(16, 8, 2, d, dtype=dtype), torch.zeros(2, 1024, d, dtype=dtype)
        kernels_peer.product_key_topk(q, sub_keys, k)
