"""All that is fast and not the paper. Each fast function stands beside the plain one that it must
equal. Every file imports, and its twins run, without Triton.

    common         the rule that picks kernel or twin, the activations
    norm           the root-mean-square norm on a CPU
    order          the pairs in expert order, by counting
    moe            tokens into expert order and back, the gated activation, the grouped experts
    peer           PEER's experts: forward, backward, the gradient of the table
    product_keys   the best k of the m^2 experts of a query, and the gradient of the sub-keys
    parts          float32 products on tensor cores, from bfloat16 parts
    loss           the loss of the output layer without all the logits
    mamba          the selective scan and its gradient, in chunks
    assignment     tokens to experts in equal numbers, for the router base

A kernel comes as three functions:

    name_torch(...)    the twin: plain PyTorch, any device and float dtype; defines what is computed
    _name_kernel       the Triton kernel: float32 or bfloat16 in and out, float32 inside
    name(...)          what other files call: picks twin or kernel, allocates the results

Letters: N tokens, d width, E experts, w hidden width of an expert, k choices per token, P = N k
pairs (a token at one of its experts); for PEER h heads, R = h k rows per token, P = N R pairs,
m sub-keys of a half, E = m^2. In a kernel, arguments and constants are in capitals.

Rules of every kernel:
- Deterministic. One program writes an output element and adds in a fixed order; nothing is atomic.
- No synchronisation and no recompilation. Shapes alone decide a launch, never the experts' loads.
- Offsets into tensors are 64-bit: an index becomes int64 before it is multiplied by a width,
  because a tensor can hold more than 2^31 elements. Single widths, k, R and m are below 2^31.
- A grid has at most 2^31 - 1 programs along x and 65,535 along y. A block has at most 2^20
  elements, which limits a width that one program holds whole (PEER's d).
- torch.compile. A launch is plain `kernel[grid](...)`: torch.compile puts it into its graph and
  reads from the kernel which arguments it writes. A function that is called in a kernel gets no
  pointers that it only reads if its result goes into the address of a store: they would count as
  written. A custom operator would add dispatch in eager mode and hide the launch from Inductor.
- Autograd is not inside a kernel. Every gradient is one of these functions too, and an
  autograd.Function ties forward and backward together.
"""
