"""Every setting of a run, one dataclass for each section of a config file: the only place where a default,
its meaning and its allowed range are written. A Config can be made in Python as well, `Config(ffn=FFNConfig(
router="switch", top_k=1))`; whoever uses it fills in what follows from others and checks that all fits.
"""
import dataclasses
import json
from dataclasses import dataclass, field


class ConfigError(ValueError):
    """A setting that cannot be used; the message names the key, the value, its source and the remedy."""
    status = 2                          # what a program that it ends returns to the shell


def opt(default, help, choices=None, low=None, high=None, group=""):
    """A setting: its default, its meaning, and the values that it may take (bounds are inclusive).
    group: the heading in --help of this setting and those that follow it."""
    meta = dict(help=help, choices=choices, low=low, high=high, group=group)
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=meta)
    return field(default=default, metadata=meta)


@dataclass
class ModelConfig:
    n_layer: int = opt(4, "number of blocks", low=1, high=10_000)
    n_embd: int = opt(128, "width d of the residual stream", low=1)
    block_size: int = opt(128, "longest context T, in tokens", low=1)
    vocab_size: int = opt(0, "rows of the embedding table (0: what the corpus's tokenizer has)", low=0)
    mixer: str = opt("attention", "what mixes the positions: attention, mamba (model.MIXERS)")
    attention_every: int = opt(0, "beside another mixer: the middle one of each so many blocks has attention (0: "
                               "none; Jamba: 8)", low=0)
    attention_layers: list[int] = opt([], "indices of the blocks with attention, instead of attention_every")
    n_head: int = opt(4, "query heads of attention", low=1)
    n_kv_head: int = opt(0, "key/value heads, grouped-query attention (0: as many as n_head)", low=0)
    head_dim: int = opt(0, "width of a head (0: n_embd / n_head)", low=0)
    qkv_bias: bool = opt(False, "biases on the q, k and v projections (Qwen2)")
    out_bias: bool = opt(False, "a bias on attention's output projection")
    qk_norm: str = opt("none", "a norm on queries and keys: of each head by itself (Qwen3), or of all heads "
                       "together (OLMoE)", choices=["none", "head", "all"])
    window: int = opt(0, "positions that attention sees, the token's own the last of them (0: all; Mistral)", low=0)
    rope: bool = opt(True, "rotary positions in attention (Jamba has none)")
    rope_base: float = opt(10000.0, "base of the rotary frequencies", low=1.0)
    rope_scaling: str = opt("none", "slower rotary frequencies for texts longer than those of the training: all "
                            "alike, or the slow ones alone (Llama 3.1)", choices=["none", "linear", "llama3"])
    rope_factor: float = opt(1.0, "rope_scaling: how many times slower", low=1.0)
    rope_original: int = opt(8192, "llama3: the context before, over which a pair's turns are counted", low=1)
    rope_low: float = opt(1.0, "llama3: pairs of fewer turns are slowed down", low=0.0)
    rope_high: float = opt(4.0, "llama3: pairs of more turns stay as they are", low=0.0)
    d_state: int = opt(16, "mamba: numbers n in the state of a channel", low=1)
    d_conv: int = opt(4, "mamba: positions K of the short convolution", low=1)
    expand: int = opt(2, "mamba: channels, times n_embd", low=1)
    dt_rank: int = opt(0, "mamba: width of what the step size is made from (0: n_embd / 16)", low=0)
    norm_eps: float = opt(1e-5, "epsilon of the norms of blocks, queries, keys and output", low=1e-12)
    dropout: float = opt(0.0, "dropout on embeddings, attention and block outputs", low=0.0, high=0.9)
    tie_embeddings: bool = opt(True, "the output head shares the embedding table")
    loss_chunks: int = opt(1, "slices in which training computes the loss; above 1 it has no logits", low=1)

    @property
    def head_width(self):
        """Width of one head of attention."""
        return self.head_dim or self.n_embd // self.n_head


@dataclass
class FFNConfig:
    kind: str = opt("moe", "what stands in the feed-forward slot of the sparse layers: dense, moe, peer, pkm "
                    "(model.KINDS)", group="what stands in the slot, and where")
    activation: str = opt("swiglu", "non-linearity, one of ffn.ACTIVATIONS or swiglu, which has a third matrix")
    d_ff: int = opt(0, "hidden width of an unsplit layer or expert (0: 4 n_embd, of swiglu 8/3 n_embd)", low=0)
    d_dense: int = opt(0, "hidden width of the dense layers of a model with sparse ones (0: d_ff)", low=0)
    moe_every: int = opt(0, "the last of each so many layers is sparse (0: all; peer, pkm: the middle)", low=0)
    moe_layers: list[int] = opt([], "indices of the sparse layers, instead of moe_every")
    n_dense_first: int = opt(0, "this many first layers stay dense (DeepSeekMoE)", low=0)
    inserted: bool = opt(False, "the sparse layers stand behind dense ones, not in their place (BASE)")

    n_expert: int = opt(8, "routed experts of a layer, before any granularity split", low=1, group="experts")
    top_k: int = opt(2, "experts that a token visits, before any granularity split", low=1)
    granularity: int = opt(1, "G: experts d_ff/G wide, G times as many, G times as many visited", low=1)
    d_expert: int = opt(0, "hidden width of one expert (0: d_ff / granularity)", low=0)
    n_shared: int = opt(0, "experts that every token visits, each as wide as a routed one", low=0)
    d_shared: int = opt(0, "hidden width of one shared expert, in place of n_shared of them (Qwen2)", low=0)
    shared_gate: bool = opt(False, "weigh the shared output by sigmoid(x w) (Qwen2)")
    output_norm: bool = opt(False, "a norm on the layer's output (the fine-grained paper)")
    n_frozen: int = opt(0, "this many first experts, after the granularity split, never change", low=0)
    frozen_routes: bool = opt(True, "their router rows do not change either (false: the whole router learns)")

    router: str = opt("topk", "one of routers.ROUTERS", group="how tokens choose")
    gate_order: str = opt("topk_then_softmax", "topk: softmax over chosen (Mixtral) or all logits (DeepSeekMoE)",
                          choices=["topk_then_softmax", "softmax_then_topk", "softmax_then_topk_renorm"])
    n_groups: int = opt(1, "groups of experts for group-limited selection (DeepSeek-V2, V3)", low=1)
    topk_groups: int = opt(0, "groups that a token may use (0: all)", low=0)
    route_scale: float = opt(1.0, "factor on the gates of topk and sigmoid (DeepSeek-V3: 2.5)", low=0.01)
    jitter: float = opt(0.01, "switch: router input times U(1-j, 1+j) in training", low=0.0, high=0.99)
    sinkhorn_iters: int = opt(8, "sinkhorn: fixed number of row and column scalings", low=1)
    sinkhorn_tau: float = opt(1.0, "sinkhorn: temperature of the plan", low=1e-3)
    eval_prices: str = opt("raw", "sinkhorn, base: evaluation goes by the raw logits, or minus the moving "
                           "average of the prices in training (ema)", choices=["raw", "ema"])
    hash_table: str = opt("random", "hash: the table; balanced: by counts", choices=["random", "balanced"])
    rl_loss: float = opt(0.01, "rl: coefficient of the policy and baseline losses", low=0.0)
    gumbel_rate: float = opt(1e-4, "sample_top1: r of the temperature max(0.5, exp(-r step))", low=0.0)

    balance: str = opt("auto", "one of balance.LOSSES, or none; auto: what the router's traits name",
                       group="what keeps the experts evenly used")
    balance_loss: float = opt(0.01, "coefficient of the balance loss (beside loss_free 0.0001 is usual)", low=0.0)
    load_loss: float = opt(0.01, "coefficient of the load half of importance_load", low=0.0)
    device_loss: float = opt(0.0, "alpha_2 of deepseek: balance of groups", low=0.0)
    comm_loss: float = opt(0.0, "alpha_3 of deepseek: balance of tokens sent to each group", low=0.0)
    z_loss: float = opt(0.0, "coefficient of the router z-loss (ST-MoE: 0.001)", low=0.0)
    bias_rate: float = opt(0.001, "u of loss_free: step of the selection bias", low=0.0)

    dispatch: str = opt("auto", "how tokens travel to the experts; every choice gives the same numbers",
                        choices=["auto", "loop", "padded", "grouped", "fused"], group="how tokens travel")
    capacity_factor: float = opt(0.0, "slots per expert in training, times k N / E, for which the sequences of a "
                                 "batch compete; later positions are dropped first (0: dropless)", low=0.0, high=1e6)
    eval_capacity_factor: float = opt(0.0, "the same in evaluation (0: dropless)", low=0.0, high=1e6)

    n_keys: int = opt(64, "sub-keys m of each half, for E = m^2 experts", low=2, group="kinds peer and pkm")
    peer_heads: int = opt(4, "retrieval heads h", low=1)
    peer_top_k: int = opt(8, "experts k that each head retrieves", low=1)
    keys_per_head: bool = opt(False, "each head has sub-keys of its own (PKM), not all the same (PEER)")
    d_key: int = opt(0, "width of a query, both halves together (0: n_embd / 2)", low=0)
    query_norm: str = opt("batchnorm", "norm of the queries", choices=["batchnorm", "layernorm", "none"])
    peer_score: str = opt("softmax", "gate over the k retrieved of a head", choices=["softmax", "sigmoid"])
    peer_activation: str = opt("gelu", "non-linearity of a neuron", choices=["gelu", "relu", "silu"])
    peer_path: str = opt("auto", "how rows are gathered; every choice gives the same numbers",
                         choices=["auto", "readable", "lean", "fused"])

    @property
    def experts(self):
        """Routed experts E of a layer after the granularity split: G * n_expert."""
        return self.n_expert * self.granularity

    @property
    def expert_width(self):
        """Hidden width w of one routed expert."""
        return self.d_expert or self.d_ff // self.granularity


@dataclass
class DataConfig:
    name: str | list[str] = opt("python", "corpus, or list of corpora (each is a domain), by name or path")
    weights: list[float] = opt([], "share of each corpus in a batch (empty: equal), such as 0.9, 0.1 for replay")
    tokenizer: str = opt("byte", "byte, char, bpe, gpt2, or the path of a tokenizer.json")
    vocab_size: int = opt(4096, "size of a bpe vocabulary", low=257)
    seed: int = opt(0, "seed of the order of batches; two runs of one data seed see the same batches", low=0)
    dir: str = opt("", "folder of the prepared corpora (empty: data/prepared)")
    max_tokens: int = opt(0, "use at most this many training tokens of each corpus (0: all)", low=0)
    answers_only: bool = opt(False, "of a corpus of questions (math, gsm8k) only the answers are in the loss")

    @property
    def names(self):
        """The corpora as a list."""
        return self.name if isinstance(self.name, list) else [self.name]


@dataclass
class TrainConfig:
    max_steps: int = opt(1000, "optimizer steps", low=1, group="how long, and how")
    batch_size: int = opt(32, "sequences per optimizer step, all micro-steps and processes together", low=1)
    grad_accum: int = opt(1, "micro-steps that a batch is cut into, to save memory. Each is seen by itself by "
                          "the balances switch, gshard, importance_load, btx, btx_detached and quantile, by "
                          "capacity, batchnorm, dropout, routers that draw or look across; no others", low=1)
    lr: float = opt(3e-3, "peak learning rate", low=0.0)
    min_lr: float = opt(0.1, "final learning rate, as a share of lr", low=0.0, high=1.0)
    warmup_steps: int = opt(100, "steps of linear warm-up", low=0)
    schedule: str = opt("cosine", "what follows the warm-up (wsd: stable, then decay)",
                        choices=["cosine", "wsd", "constant"])
    decay_share: float = opt(0.2, "wsd: share of the steps that the final decay takes", low=0.0, high=1.0)
    weight_decay: float = opt(0.1, "AdamW decay of matrices; none on norms, embeddings, biases, tables", low=0.0)
    beta1: float = opt(0.9, "AdamW", low=0.0, high=0.9999)
    beta2: float = opt(0.95, "AdamW", low=0.0, high=0.99999)
    grad_clip: float = opt(1.0, "largest global gradient norm (0: no clipping)", low=0.0)
    seed: int = opt(0, "seed of the initialisation and of every draw in training", low=0, high=2**62)
    init_from: str = opt("", "run folder whose weights, [model] and [ffn] this run starts from")

    eval_every: int = opt(250, "steps between evaluations, denser at first (0: only at the end)", low=0,
                          group="what is told and kept")
    eval_batches: int = opt(20, "validation batches of train.batch_size sequences, always the same ones", low=1)
    log_every: int = opt(1, "steps between rows of log.csv", low=1)
    save_every: int = opt(0, "steps between checkpoints (0: at every evaluation)", low=0)
    keep: str = opt("all", "checkpoints in the run folder: all (last, the one before it, best), best (last "
                    "and best), last", choices=["all", "best", "last"])
    sample_every: int = opt(0, "steps between printed samples (0: only at the end)", low=0)
    sample_tokens: int = opt(200, "length of a printed sample (0: none)", low=0)

    dtype: str = opt("auto", "arithmetic: auto is float32 on CPU and MPS, bfloat16 on CUDA; parameters stay "
                     "float32", choices=["auto", "float32", "bfloat16"], group="what computes")
    device: str = opt("auto", "auto takes cuda, then mps, then cpu", choices=["auto", "cpu", "cuda", "mps"])
    compile: str = opt("auto", "torch.compile: auto weighs what it costs against what it saves in the steps that "
                       "are left", choices=["auto", "on", "off"])
    graph: str = opt("auto", "a step as CUDA graphs, which cost the host nothing; auto: where it can be",
                     choices=["auto", "on", "off"])
    parallel: str = opt("ddp", "several processes (torchrun): ddp, each has the whole model; fsdp, each has a "
                        "share of all that it holds, for what outgrows one GPU; expert, ddp, but each has a "
                        "share of the experts, to which tokens travel", choices=["ddp", "fsdp", "expert"])


@dataclass
class LifelongConfig:
    distill: float = opt(0.0, "weight of T^2 KL(p_old || p_new), mean over tokens (Lifelong-MoE: 1)", low=0.0)
    distill_temperature: float = opt(1.0, "T, by which both models' logits are divided", low=1e-3)
    teacher: str = opt("", "run folder of the old model of distill (empty: the one that l2 holds to)")
    l2: float = opt(0.0, "weight of the squared distance to the old weights, those of the run that "
                         "train.init_from was expanded from, else of itself; new experts are free", low=0.0)
    freeze: str | list[str] = opt([], "patterns of names of parameters that stay as they are, such as "
                                      "embedding* or blocks.?.attention.*; * is any text, ? one letter")
    lora_rank: int = opt(0, "rank r of low-rank adapters W + alpha/r B A on the linear layers of attention "
                            "and dense feed-forward layers; nothing else learns (0: none)", low=0)
    lora_alpha: float = opt(16.0, "alpha, by which the adapters' part is scaled", low=0.0)


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    ffn: FFNConfig = field(default_factory=FFNConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    lifelong: LifelongConfig = field(default_factory=LifelongConfig)
    sources: dict = field(default_factory=dict, repr=False, compare=False)   # "ffn.top_k" -> where it was set

    def get(self, key):
        """The value of a setting by its dotted name."""
        section, _, name = key.partition(".")
        return getattr(getattr(self, section), name)

    def fail(self, key, why):
        """Raises a ConfigError about a value that is fine by itself but not beside the others."""
        source = self.sources.get(key, "default")
        raise ConfigError(f"{source}: {key} = {show(self.get(key))} {why}")

    def to_dict(self):
        """The settings as nested tables."""
        return {section: dataclasses.asdict(getattr(self, section)) for section in SECTIONS}


SECTIONS = {"model": ModelConfig, "ffn": FFNConfig, "data": DataConfig, "train": TrainConfig,
            "lifelong": LifelongConfig}


def show(value):
    """A value as TOML writes it."""
    if isinstance(value, list):
        return "[" + ", ".join(show(v) for v in value) + "]"
    return json.dumps(value, ensure_ascii=False, default=str)    # TOML's are JSON's, but for dates
