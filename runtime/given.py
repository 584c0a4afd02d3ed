"""Settings that were given where nothing reads them: refused by name, so that none is without effect in
silence."""
import dataclasses

from settings import Config, FFNConfig

CHOICES = ("kind", "router", "balance")         # settings of [ffn] that decide which of the others are read


def refuse_unread(config, readers):
    """Raises ConfigError for a setting of [ffn] that was given, not as its default, where nothing reads it.

    readers: [(choice, value, names)], the settings that a choice reads with that value; what no choice names
    is always read. config: complete. Three things are tolerated:
    - What a file says for a choice that the command line replaces: `peer.toml --ffn.kind dense`.
    - On a command line with ffn.kind or ffn.router also what other kinds and routers read, since an
      experiment gives the same settings to all of its arms.
    - A file that gives most settings of [ffn], as a run's config.toml does.
    """
    f, default, sources = config.ffn, Config(), config.sources
    names = [spec.name for spec in dataclasses.fields(FFNConfig) if f"ffn.{spec.name}" in sources]
    by_source = [sources[f"ffn.{name}"] for name in names]
    # the choices that the command line made; they replace those of a file
    made = [c for c in CHOICES if sources.get(f"ffn.{c}", "").startswith("--")]
    for name in names:
        key = f"ffn.{name}"
        who = [(choice, value) for choice, value, read in readers if name in read]
        written = by_source.count(sources[key]) > len(dataclasses.fields(FFNConfig)) / 2
        line = sources[key].startswith("--")
        tolerated = written or ("kind" in made or "router" in made if line else made)
        if who and config.get(key) != default.get(key) and not tolerated and not any(
                in_effect(f, choice, value, readers) for choice, value in who):
            wanted = " or ".join(f'"{value}"' for _, value in who)
            config.fail(key, f"has no effect: it is read with ffn.{who[0][0]} = {wanted}")
    refuse_switched_off(config)


# Settings that another one switches on: (setting, whether it is on, what switches it on).
SWITCHED = [
    ("ffn.device_loss", lambda c: c.ffn.n_groups > 1, "ffn.n_groups above 1"),
    ("ffn.comm_loss", lambda c: c.ffn.n_groups > 1, "ffn.n_groups above 1"),
    ("ffn.frozen_routes", lambda c: c.ffn.n_frozen, "ffn.n_frozen"),
    *((f"model.{name}", lambda c: c.model.mixer != "attention", "another model.mixer than attention")
      for name in ("attention_every", "attention_layers")),
    *((f"model.{name}", lambda c: c.model.mixer == "mamba", "model.mixer = \"mamba\"")
      for name in ("d_state", "d_conv", "expand", "dt_rank")),
    ("train.decay_share", lambda c: c.train.schedule == "wsd", "train.schedule = \"wsd\""),
    *((f"model.{name}", lambda c: has_attention(c.model), "attention in some block")
      for name in ("head_dim", "out_bias", "qk_norm", "window", "rope_scaling")),
    ("model.rope_factor", lambda c: c.model.rope_scaling != "none", "model.rope_scaling"),
    *((f"model.{name}", lambda c: c.model.rope_scaling == "llama3", "model.rope_scaling = \"llama3\"")
      for name in ("rope_original", "rope_low", "rope_high")),
    ("lifelong.distill_temperature", lambda c: c.lifelong.distill, "lifelong.distill"),
    ("lifelong.teacher", lambda c: c.lifelong.distill or c.lifelong.l2, "lifelong.distill or lifelong.l2"),
    ("lifelong.lora_alpha", lambda c: c.lifelong.lora_rank, "lifelong.lora_rank")]


def refuse_switched_off(config):
    """Raises ConfigError for one of SWITCHED that was given on a command line, not as its default, and is off.
    A file may hold what a command line switches on, or what an earlier run wrote."""
    for key, is_on, switch in SWITCHED:
        given = config.sources.get(key, "").startswith("--") and config.get(key) != Config().get(key)
        if given and not is_on(config):
            config.fail(key, f"has no effect: it is read with {switch}")


def has_attention(m):
    """Whether some block of a ModelConfig has it."""
    return m.mixer == "attention" or m.attention_every or m.attention_layers


def in_effect(f, choice, value, readers):
    """Whether an FFNConfig makes the choice, of a kind that reads it."""
    kinds = [kind for c, kind, read in readers if c == "kind" and choice in read]
    return getattr(f, choice) == value and (choice == "kind" or f.kind in kinds)
