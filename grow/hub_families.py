"""The families of hub_families.toml, and a config.json in our settings and back."""
import tomllib
from pathlib import Path
from typing import NamedTuple


class Family(NamedTuple):
    """An entry of the file. tensors: {ours: [theirs]} of a whole model, {i} is the layer."""
    architecture: str
    keys: dict
    always: dict
    tensors: dict
    layers: list = ()
    folds: dict = {}


def read_families():
    """({name: Family}, {key: {its value, as text: ours}}, what all families share)."""
    text = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
    shared, found = text["shared"], {}
    for name, own in text["families"].items():
        block = shared["block"] | own.pop("block", {})
        inside = {f"blocks.{{i}}.{ours}": [f"model.layers.{{i}}.{part}" for part in theirs]
                  for ours, theirs in block.items()}
        keys = shared["keys"] | own.pop("keys")
        found[name] = Family(keys=keys, tensors=shared["outside"] | inside, **own)
    return found, text["values"], shared


FAMILIES, VALUES, SHARED = read_families()

# The value of a multiplier that changes nothing: of attention's 1 / sqrt(head).
neutral = lambda key, head: head ** -0.5 if key == "attention_multiplier" else 1.0      # noqa: E731


def flat(config):
    """A config.json with rope_scaling, of the old or the new name, as keys rope.NAME."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ValueError("rope_scaling is not one table for all layers")
    if "llama3" in (rope.get("rope_type"), rope.get("type")):
        rope = {"original_max_position_embeddings": config.get("max_position_embeddings")} | rope
    theta = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
    return config | theta | {f"rope.{key}": value for key, value in rope.items()}


def settings_of(config, family):
    """Tables of the settings in a config.json. Raises ValueError for what is not known here."""
    c, settings = flat(config), dict(family.always)
    for key, known in SHARED["only"].items():
        value = c.get(key)
        each = value if isinstance(value, list) and value else [value]      # one for each layer
        if any(one not in (None, known) for one in each):
            raise ValueError(f"{key} = {str(value)[:80]} is not known here, only {known}")
    for key in family.folds:
        if type(c.get(key, 1.0)) not in (int, float) or not 0 < c.get(key, 1.0) < 1e30:
            raise ValueError(f"{key} = {str(c[key])[:80]} is no positive number")
    for spellings, (names, *default) in family.keys.items():
        keys = spellings.split()
        value = next((c[key] for key in keys if key in c), *default[:1] or [None])
        if value is None:                                       # null is 0 or false
            if not default:
                raise ValueError(f"{keys[0]} is missing")
            value = type(default[0])()
        if values := VALUES.get(keys[0]):
            text = str(value).lower() if isinstance(value, bool) else value
            if not isinstance(text, str) or text not in values:
                raise ValueError(f"{keys[0]} = {str(value)[:80]} is none of {', '.join(values)}")
            value = values[text]
        settings |= dict.fromkeys(names.split(), value)
    settings |= sparse_of(c, family, settings["model.n_layer"])
    return {section: {key.partition(".")[2]: value for key, value in settings.items()
                      if key.startswith(section)} for section in ("model", "ffn")}


def unread(config, family):
    """Keys of a config.json that nothing here reads, and that may mean something."""
    read = " ".join([*family.keys, *family.folds, *SHARED["only"], SHARED["unread"]]).split()
    return [key for key in config if config[key] and key not in [*read, *family.layers[:2]]]


def sparse_of(c, family, n):
    """{ffn.moe_layers: their indices} where not all layers have experts."""
    if not family.layers or type(n) is not int or n > 10_000:
        return {}
    (every, first, offset), layers = family.layers, range(n)
    step, dense = c.get(every, 1), c.get(first) or []
    dense = layers[:max(dense, 0)] if type(dense) is int else dense
    if type(step) is not int or step < 1 or not isinstance(dense, (list, range)):
        raise ValueError(f"{every} or {first} says nothing about layers")
    sparse = [i for i in layers if i not in dense and (i + offset) % step == 0]
    some = 0 < len(sparse) < n
    return {"ffn.moe_layers": sparse} if some else {"ffn.moe_every": n + 1 - len(sparse)}


def config_of(values, name):
    """The config.json of a family from {setting: value}; what it cannot say is lost."""
    family, c = FAMILIES[name], {}
    for spellings, (names, *default) in family.keys.items():
        key, value = spellings.split()[0], values.get(names.split()[0], *default or [1])
        back = {ours: theirs for theirs, ours in VALUES.get(key, {}).items()}.get(value, value)
        c[key] = {"true": True, "false": False}.get(back, back) if key in VALUES else back
    c["sliding_window"] = c.get("sliding_window") or None
    if family.layers:
        dense = [i for i in range(c["num_hidden_layers"]) if i not in values["ffn.moe_layers"]]
        c |= {family.layers[0]: 1, family.layers[1]: dense if family.layers[2] else len(dense)}
    # of rotary positions what their kind of scaling reads, by both names of the table
    rope = {key[5:]: c.pop(key) for key in list(c) if key.startswith("rope.")}
    rope = dict(list(rope.items())[:{"default": 1, "linear": 2}.get(rope["rope_type"])])
    c |= dict(rope_parameters=rope | dict(rope_theta=c["rope_theta"]),
              rope_scaling=rope if len(rope) > 1 else None)
    c |= {key: neutral(key, values["model.head_dim"]) for key in family.folds}
    return c | dict(architectures=[family.architecture], model_type=name, hidden_act="silu")


def factors(config, family, head, tied):
    """{end of a tensor's name: what it is multiplied by}."""
    found = {}
    for key, places in family.folds.items():
        value, one = config.get(key, 1.0), neutral(key, head)
        # a tied head would be scaled like the embedding: the norm before it takes that back
        if tied and key == "embedding_multiplier":
            places = places | {"model.norm.weight": -1}
        for end, power in places.items() if value != one else ():
            found[end] = found.get(end, 1.0) * (value / one) ** power
    return found
