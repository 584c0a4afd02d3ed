"""Which settings fit together, with the words for those that do not: [(is wrong, key, why)], asked by model.check
and by the layers."""


def refuse(config, checks):
    """The config, if none of the checks (is wrong, key, why) is; raises ConfigError for the first that is."""
    for wrong, key, why in checks:
        if wrong:
            config.fail(key, why)
    return config


def model_checks(config, some_attention, some_sparse):
    """Those of a whole model. some_attention: whether a block has it beside another mixer; some_sparse: whether a
    layer is of the kind of [ffn]."""
    m, f = config.model, config.ffn
    return [
        *attention_checks(m),
        *((any(not 0 <= i < m.n_layer for i in config.get(key)), key, f"names a layer outside 0..{m.n_layer - 1}")
          for key in ("ffn.moe_layers", "model.attention_layers")),
        (m.mixer != "attention" and m.attention_every and not some_attention, "model.attention_every",
         f"gives none of the {m.n_layer} blocks attention"),
        (not some_sparse, "ffn.n_dense_first" if f.n_dense_first else "ffn.moe_every",
         f"leaves none of the {m.n_layer} layers sparse; for a dense model set ffn.kind = \"dense\"")]


def attention_checks(m):
    """[(is wrong, key, why)] of the attention of a ModelConfig."""
    width = "model.head_dim" if m.head_dim else "model.n_embd"
    return [
        (not m.head_dim and m.n_embd % m.n_head, width,
         f"cannot be divided by model.n_head = {m.n_head}; or set model.head_dim"),
        (m.rope and m.head_width % 2, width,
         f"gives heads of odd width {m.head_width}; rotary positions turn pairs, so make it even"),
        (m.n_head % m.n_kv_head, "model.n_kv_head", f"must divide model.n_head = {m.n_head}"),
        (m.rope_scaling != "none" and not m.rope, "model.rope_scaling",
         "has no rotary positions to slow down: model.rope = false"),
        (m.rope_scaling != "none" and m.rope_factor == 1, "model.rope_scaling",
         "slows nothing down: set model.rope_factor above 1"),
        (m.rope_scaling == "llama3" and m.rope_low >= m.rope_high, "model.rope_low",
         f"must be below model.rope_high = {m.rope_high}"),
    ]


def moe_checks(config, routers, k):
    """Those of a layer of experts. routers: {name: its Traits}; k: routed experts that a token visits."""
    f, traits = config.ffn, routers[config.ffn.router]
    return [*expert_checks(f), *choice_checks(config, traits, routers, k), *balance_checks(f, traits, routers),
            (f.z_loss and not traits.logits, "ffn.z_loss", "needs a router with logits"),
            *((getattr(f, name) and not traits.capacity, f"ffn.{name}",
               f"has no meaning for ffn.router = \"{f.router}\"")
              for name in ("capacity_factor", "eval_capacity_factor")),
            (f.output_norm and k == 1 and traits.across != "always", "ffn.output_norm",
             "cancels the gate of the only expert, so that the router would never learn; raise ffn.top_k")]


def expert_checks(f):
    """How many experts an FFNConfig has, and how wide they are."""
    return [
        (f.n_frozen > f.experts, "ffn.n_frozen", f"is more than the {f.experts} routed experts"),
        (f.top_k > f.n_expert, "ffn.top_k", f"is more than ffn.n_expert = {f.n_expert}"),
        (f.d_expert and f.granularity > 1, "ffn.d_expert",
         f"and ffn.granularity = {f.granularity} both set the width of an expert; give one of them"),
        (not f.d_expert and f.d_ff % f.granularity, "ffn.granularity", f"does not divide d_ff = {f.d_ff}"),
        (f.d_shared and f.n_shared, "ffn.d_shared", "and ffn.n_shared both set the width; give one of them"),
        (f.shared_gate and not (f.d_shared or f.n_shared), "ffn.shared_gate", "needs d_shared or n_shared")]


def choice_checks(config, traits, routers, k):
    """How a token chooses k of them."""
    f, E, names = config.ffn, config.ffn.experts, config.data.name
    room = f.topk_groups * (E // f.n_groups)
    return [
        (traits.k > 0 and k != traits.k, "ffn.top_k",
         f"(times ffn.granularity) must be {traits.k} for ffn.router = \"{f.router}\""),
        (k < traits.least, "ffn.top_k", f"makes the gate constant; use {traits.least} or more"),
        ("gate_order" in traits.reads and k == 1 and f.gate_order != "softmax_then_topk", "ffn.gate_order",
         "makes the only gate of a token 1, so that the router would never learn; use \"softmax_then_topk\""),
        (traits.by_corpus and (not isinstance(names, list) or len(names) != E), "data.name",
         f"must list {E} corpora, one for each expert of ffn.router = \"{f.router}\""),
        (E % f.n_groups, "ffn.n_groups", f"does not divide the {E} routed experts"),
        (f.topk_groups > f.n_groups, "ffn.topk_groups", f"is more than ffn.n_groups = {f.n_groups}"),
        (f.n_groups > 1 and "n_groups" not in traits.reads, "ffn.n_groups",
         f"works with ffn.router = {those(routers, lambda t: 'n_groups' in t.reads)} only"),
        (f.n_groups > 1 and room < k, "ffn.topk_groups", f"leaves {room} experts to choose {k} from")]


def balance_checks(f, traits, routers):
    """What keeps the choice even."""
    by = "loss_free" if f.balance == "quantile" else f.balance              # both move the bias of a router
    return [
        (by in ("loss_free", "importance_load") and by != traits.balance, "ffn.balance",
         f"needs ffn.router = {those(routers, lambda t: t.balance == by)}, with the bias or the noise for it"),
        (f.balance == "quantile" and (f.n_groups > 1 or f.n_frozen and f.frozen_routes), "ffn.balance",
         "knows neither groups nor frozen routes; with ffn.n_groups or ffn.n_frozen use \"loss_free\""),
        (f.balance != "none" and not traits.steerable, "ffn.balance", f"has nothing to act on: ffn.router = "
         f"\"{f.router}\" does not choose by probability; use \"none\"")]


def those(routers, fits):
    """Names of the routers whose traits fit, for a message."""
    return " or ".join(f'"{name}"' for name, traits in routers.items() if fits(traits))
