"""Settings that lie: config.json, YAML of other projects, recipes, --config, --set, options."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from support.reliability.attacks import (
    Attack,
    Bases,
    Words,
    attacks,
    check,
    converting,
    copied,
    each,
    inspecting,
    model_file,
    saved,
)
from support.reliability.warm_commands import Sandbox, WarmCommands

pytest_plugins = ["support.reliability.warm_fixtures"]

WRONG: dict[str, Any] = {
    "a text of escapes": "\x1b[2J\u202e",
    "an object": {"a": 1},
    "a list": [1, 2],
    "0": 0,
    "-1": -1,
    "2**40": 2**40,
    "10**400": 10**400,
    "1.5": 1.5,
    "NaN": float("nan"),
    "infinity": float("inf"),
    "true": True,
}
DEEP = "[" * 100_000


# ---- config.json -------------------------------------------------------------------------------


def _hub(changes: dict[str, Any] | bytes, sandbox: Sandbox, bases: Bases) -> Words:
    root = copied(bases.hub, sandbox.input / "c")
    path = root / "config.json"
    if isinstance(changes, bytes):
        path.write_bytes(changes)
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return converting(root, sandbox)


SIZES = "n_layer n_embd n_head n_positions vocab_size n_inner layer_norm_epsilon".split()
OTHERS = "model_type architectures activation_function tie_word_embeddings dtype".split()
RIGHT = {
    ("n_inner", "0"),  # no such value says more than the default
    ("tie_word_embeddings", "true"),
}
CONFIG = {
    f"{key} is {what}": {key: value}
    for key in (*SIZES, *OTHERS)
    for what, value in WRONG.items()
    if (key, what) not in RIGHT
}
# Megatron's args need no architectures, no eps of 1e-5, and dtype is a remark beside the weights.
NO_MATTER = ("architectures", "dtype", "layer_norm_epsilon", "n_inner")
ATTACKS = [
    Attack(
        f"config.json: {what}",
        partial(_hub, changes),
        refused=None if what.startswith(NO_MATTER) else True,
    )
    for what, changes in CONFIG.items()
]
FILES: dict[str, bytes] = {
    "deep": DEEP.encode(),
    "deep objects": b'{"a":' * 100_000,
    "a list": b"[]",
    "empty": b"",
    "5,000 digits": b'{"model_type": "gpt2", "n_layer": ' + b"9" * 5000 + b"}",
    "no text": b"\xff\xfe\xfd",
    "a NUL": b"\0" * 100,
    "40 MB": b'{"a": "' + b"x" * 40_000_000 + b'"}',
    "30 MB of lists": b'{"a": [' + b"[]," * 10_000_000 + b"[]]}",
    "a key of a megabyte": json.dumps({"k" * 1_000_000: 1}).encode(),
    "a model_type of a megabyte": json.dumps({"model_type": "k" * 1_000_000}).encode(),
    "a surrogate": b'{"model_type": "\\ud800"}',
    "a pickle": b"\x80\x02cos\nsystem\n.",
}
ATTACKS += [Attack(f"config.json: {what}", partial(_hub, it)) for what, it in FILES.items()]


def _remote(sandbox: Sandbox, bases: Bases) -> Words:
    root = copied(bases.hub, sandbox.input / "c")
    about = json.loads((root / "config.json").read_text())
    about["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (root / "config.json").write_text(json.dumps(about))
    for name in ("evil.py", "configuration_gpt2.py", "modeling_gpt2.py", "torch.py"):
        (root / name).write_text(f"import os\nos.system({sandbox.command!r})\n")
    return converting(root, sandbox)


def _generation(content: bytes, sandbox: Sandbox, bases: Bases) -> Words:
    root = copied(bases.hub, sandbox.input / "c")
    (root / "generation_config.json").write_bytes(content)
    return converting(root, sandbox)


ATTACKS.append(Attack("config.json: code beside it", _remote, refused=None))
ATTACKS += [
    Attack(f"generation_config.json: {what}", partial(_generation, content), refused=None)
    for what, content in FILES.items()
]

ROPE = {
    "a factor of 0": {"factor": 0.0},
    "a factor of NaN": {"factor": float("nan")},
    "a factor of -8": {"factor": -8.0},
    "a factor of infinity": {"factor": float("inf")},
    "equal factors": {"low_freq_factor": 4.0},
    "factors the wrong way": {"low_freq_factor": 8.0},
    "a low factor of 0": {"low_freq_factor": 0.0},
    "a low factor of NaN": {"low_freq_factor": float("nan")},
    "0 positions": {"original_max_position_embeddings": 0},
    "-1 positions": {"original_max_position_embeddings": -1},
    "positions that are a text": {"original_max_position_embeddings": "8192"},
    "a factor that is a list": {"factor": [8.0]},
}


def _llama(changes: dict[str, Any], sandbox: Sandbox, bases: Bases) -> Words:
    """A Llama's config.json without weights: its settings are read first."""
    import torch
    from safetensors.torch import save_file

    rope = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    about = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 32,
        "rope_theta": 10000.0,
        "rope_scaling": rope | changes,
    }
    layer = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (64, 16),
        "model.norm.weight": (16,),
        "lm_head.weight": (64, 16),
        f"{layer}input_layernorm.weight": (16,),
        f"{layer}post_attention_layernorm.weight": (16,),
        **{f"{layer}self_attn.{name}_proj.weight": (16, 16) for name in "qkvo"},
        f"{layer}mlp.gate_proj.weight": (32, 16),
        f"{layer}mlp.up_proj.weight": (32, 16),
        f"{layer}mlp.down_proj.weight": (16, 32),
    }
    root = sandbox.input / "llama"
    root.mkdir()
    (root / "config.json").write_text(json.dumps(about))
    tensors = {name: torch.ones(shape) for name, shape in shapes.items()}
    save_file(tensors, root / "model.safetensors", metadata={"format": "pt"})
    return converting(root, sandbox)


ATTACKS += [Attack(f"rope_scaling: {what}", partial(_llama, it)) for what, it in ROPE.items()]


# ---- YAML of other projects --------------------------------------------------------------------

SETTINGS = """
  num_layers: 1
  hidden_size: 32
  num_attention_heads: 4
  ffn_hidden_size: 64
  max_position_embeddings: 32
  vocab_size: 256
  activation_func: {_target_: torch.nn.functional.gelu}
"""


def _bridge(content: str, sandbox: Sandbox, bases: Bases) -> Words:
    root = copied(bases.dist, sandbox.input / "c")
    saved(root / "common.pt", {"iteration": 1})
    text = content.replace("COMMAND", sandbox.command)
    (root / "run_config.yaml").write_text(text, errors="surrogatepass")
    return converting(root, sandbox)


BOMB = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
)
YAMLS: dict[str, str] = {
    "a tag that calls": "model: !!python/object/apply:os.system ['COMMAND']\n",
    "a tag that makes": "model: !!python/object/new:subprocess.Popen [['COMMAND']]\n",
    "a tag that imports": "model: !!python/module:antigravity\n",
    "a tag of a name": "model: !!python/name:os.system\n",
    "a tag of a tuple": "model: !!python/tuple [1, 2]\n",
    "a tag of ours": "model: !evil\n  a: 1\n",
    "a directive": "%TAG ! tag:yaml.org,2002:python/object/apply:\n---\nmodel: !os.system [x]\n",
    "a target that is shared lists": BOMB + "\nmodel:" + SETTINGS + "  _target_: *a9\n",
    "layers that are shared lists": BOMB + "\nmodel:" + SETTINGS + "  moe_layer_freq: *a9\n",
    "an activation that is shared lists": BOMB + "\nmodel:" + SETTINGS + "  activation_func: *a9\n",
    "a setting that is an alias of itself": "model: &m\n  num_layers: *m\n",
    "merges of aliases": "a: &a {x: 1}\nmodel:\n" + "  <<: *a\n" * 10,
    "deep lists": "model: " + "[" * 50_000,
    "deep mappings": "model: " + "{a: " * 50_000,
    "deep by indents": "".join(" " * n + "a:\n" for n in range(900)),
    "5 MB": "model:" + SETTINGS + "  x: " + "y" * 5_000_000 + "\n",
    "keys of one hash": "model:\n" + "".join(f"  {n * (2**61 - 1)}: 1\n" for n in range(1, 30_000)),
    "keys that are numbers": "model:" + SETTINGS + "  1: 2\n",
    "keys that are lists": "model:\n  ? [1, 2]\n  : 3\n",
    "no settings": "model: 3\n",
    "a list": "- 1\n",
    "two documents": "model: {}\n---\nmodel: {}\n",
    "a tab": "model:\n\tnum_layers: 1\n",
    "escapes": "model:" + SETTINGS + '  normalization: "\\x1b[2J"\n',
    "raw escapes": "model: \x1b[2J\n",
    "a surrogate": "model: \udcff\n",
    "a layer count of 400 digits": "model:" + SETTINGS.replace("layers: 1", f"layers: {10**400}"),
    "a layer count of 5,000 digits": "model:" + SETTINGS.replace(": 1", ": " + "9" * 5000),
    "a layer count in base 60": "model:" + SETTINGS.replace("layers: 1", "layers: 1:30:00"),
    "a hidden size of NaN": "model:" + SETTINGS.replace("hidden_size: 32", "hidden_size: .nan"),
    "a target of code": "model:" + SETTINGS + "  _target_: os.system\n  args: COMMAND\n",
}
# Such an entry takes no part in what is computed.
YAML_MAY_BE_READ = ("a target of code", "keys that are numbers", "layers that are shared lists")
ATTACKS += each(
    "run_config.yaml",
    YAMLS,
    lambda content: partial(_bridge, content),
    may_be_read=YAML_MAY_BE_READ,
)


def _nemo(content: str, sandbox: Sandbox, bases: Bases) -> Words:
    root = sandbox.input / "nemo"
    copied(bases.dist, root / "model_weights")
    (root / "model_weights/common.pt").unlink()
    text = content.replace("COMMAND", sandbox.command)
    (root / "model_config.yaml").write_text(text, errors="surrogatepass")
    return converting(root, sandbox)


ATTACKS += [
    Attack(f"model_config.yaml: {what}", partial(_nemo, YAMLS[what]))
    for what in ("a tag that calls", "deep lists", "5 MB", "keys of one hash", "a list", "a tab")
]
ATTACKS.append(
    Attack(
        "model_config.yaml: settings that are shared lists",
        partial(_nemo, BOMB + "\nnum_layers: *a9\nhidden_size: *a9\nactivation: *a9\n"),
    )
)


# ---- args of Megatron --------------------------------------------------------------------------


def _args(changes: dict[str, Any], sandbox: Sandbox, bases: Bases) -> Words:
    import torch

    root = copied(bases.gpt, sandbox.input / "c")
    contents = torch.load(model_file(root), weights_only=False)
    for name, value in changes.items():
        setattr(contents["args"], name, value)
    saved(model_file(root), contents)
    return converting(root, sandbox)


ARGS = "num_layers hidden_size num_attention_heads ffn_hidden_size max_position_embeddings".split()
# No such value says anything: the tensors do, or the default.
ATTACKS += [
    Attack(
        f"args: {name} is {what}",
        partial(_args, {name: value}),
        refused=None if not value else True,
    )
    for name in ARGS
    for what, value in WRONG.items()
]


# ---- TOML --------------------------------------------------------------------------------------


def _config(content: str, sandbox: Sandbox, bases: Bases) -> Words:
    path = sandbox.input / "c.toml"
    path.write_text(content, errors="surrogatepass")
    return ["convert", "--config", path, "--ckpt", bases.gpt, "--output", sandbox.output]


def _recipe(content: str, sandbox: Sandbox, bases: Bases) -> Words:
    path = sandbox.input / "r.toml"
    path.write_text(content, errors="surrogatepass")
    passage = {
        "article": "the cat sat on the mat",
        "questions": ["who sat?"],
        "options": [["a", "b", "c", "d"]],
        "answers": ["A"],
    }
    for split in ("train", "dev"):
        (sandbox.input / split / "high").mkdir(parents=True)
        (sandbox.input / split / "high" / "1.txt").write_text(json.dumps(passage) + "\n" * 2)
    words = ("race", "--ckpt", bases.bert, "--data", sandbox.input, "--output-dir", sandbox.output)
    return [*words, "--recipe", path, "--device", "cpu", "--max-steps", 1]


def _initial(content: str, sandbox: Sandbox, bases: Bases) -> Words:
    path = sandbox.input / "i.toml"
    path.write_text(content, errors="surrogatepass")
    (sandbox.input / "text.txt").write_text("the cat sat on the mat\n" * 50)
    return [
        *("lm", "--init", path, "--tokenizer", bases.gpt / "tokenizer", "--device", "cpu"),
        *("--data", sandbox.input / "text.txt", "--output-dir", sandbox.output),
        *("--max-steps", 1, "--seq-length", 8, "--global-batch", 1),
    ]


BAD_TOML: dict[str, str] = {
    "deep lists": "a = " + DEEP,
    "deep tables": "a" + ".b" * 50_000 + " = 1\n",
    "5,000 digits": "tp = " + "9" * 5000,
    "a NUL": "a = '\0'",
    "no text": "\udcff\udcfe",
    "escapes in a key": '"\x1b[2J" = 1',
    "escaped escapes in a key": '"\\u001b[2J" = 1',
    "a key of a megabyte": "k" * 1_000_000 + " = 1",
    "a key twice": "tp = 1\ntp = 2",
    "rubbish": "[[[",
    "3 MB": "# " + "x" * 3_000_000,
}
RECIPE = """task = "race"
lr = 1e-5
epochs = 1
global_batch = 1
seq_length = 32
max_qa_length = 16
"""
INITIAL = (
    "num_layers = 1\nhidden_size = 16\nnum_attention_heads = 2\nmax_position_embeddings = 16\n"
)


def _with(text: str, key: str, value: str) -> str:
    """Return a TOML file with another value at a key."""
    lines = [line for line in text.splitlines() if not line.startswith(f"{key} ")]
    return "\n".join([*lines, f"{key} = {value}"])


VALUES = {
    "a list": "[1]",
    "a table": "{a = 1}",
    "2**40": "1099511627776",
    "10**400": "1" + "0" * 400,
    "-1": "-1",
    "NaN": "nan",
    "infinity": "inf",
    "a date": "1979-05-27",
    "a text of escapes": '"\\u001b[2J"',
}
ATTACKS += [
    Attack(f"{name}: {what}", partial(prepare, content))
    for name, prepare in (("--config", _config), ("--recipe", _recipe), ("--init", _initial))
    for what, content in BAD_TOML.items()
]
ATTACKS += [
    Attack(
        f"--config: {key} is {what}",
        partial(_config, f'to = "hf"\n{key} = {value}'),
        refused=None if (key, what) == ("max-shard-size", "2**40") else True,
    )
    for key in ("tp", "dtype", "max-shard-size", "set")
    for what, value in VALUES.items()
]
ATTACKS += [
    Attack(f"--config: {text}", partial(_config, f'to = "megatron"\n{text}'))
    for text in ('config = "other.toml"', "help = true", "overwrite = 3")
]
ATTACKS += [
    Attack(
        f"--recipe: {key} is {what}",
        partial(_recipe, _with(RECIPE, key, value)),
    )
    for key in ("lr", "epochs", "global_batch", "seq_length", "weight_decay", "task")
    for what, value in VALUES.items()
]
ATTACKS += [
    Attack(
        f"--init: {key} is {what}",
        partial(_initial, _with(INITIAL, key, value)),
    )
    for key in ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings")
    for what, value in VALUES.items()
]


# ---- options -----------------------------------------------------------------------------------


def _options(words: list[str], sandbox: Sandbox, bases: Bases) -> Words:
    return [*converting(bases.gpt, sandbox), *words]


OPTIONS: dict[str, list[str]] = {
    f"--set {name} {what}": ["--set", f"{name}={value}"]
    for name in ("num_layers", "num_attention_heads", "rotary_base")
    for what, value in {
        "of 5,000 digits": "9" * 5000,
        "of 10**400": str(10**400),
        "of NaN": "nan",
        "of infinity": "inf",
        "of escapes": "\x1b[2J",
        "of a megabyte": "x" * 100_000,
        "of -1": "-1",
        "of 0": "0",
        "of 2**40": str(2**40),
    }.items()
}
OPTIONS |= {
    "--set of an unknown name of escapes": ["--set", "\x1b[2J=1"],
    "--set without a value": ["--set", "num_layers"],
    "--tp of 5,000 digits": ["--tp", "9" * 5000],
    "--tp of 2**40": ["--tp", str(2**40)],
    "--pp of 2**40": ["--pp", str(2**40)],
    "--dtype of escapes": ["--dtype", "\x1b[2J"],
    "--max-shard-size of 5,000 digits": ["--max-shard-size", "9" * 5000 + "GB"],
    "--max-shard-size of escapes": ["--max-shard-size", "\x1b[2J"],
    "--tokenizer of nobody": ["--to", "hf", "--tokenizer", "~nobody/x"],
    "--tokenizer of 5,000 letters": ["--to", "hf", "--tokenizer", "a" * 5000],
    "an option of escapes": ["--\x1b[2J"],
    "a word of escapes": ["\x1b[2J"],
}
ATTACKS += [Attack(f"option: {what}", partial(_options, words)) for what, words in OPTIONS.items()]

NAMES: dict[str, str] = {
    "a name of 5,000 letters": "a" * 5000,
    "a path of 5,000 folders": "a/" * 5000,
    "a name of escapes": "\x1b[2J\u202e",
    "a home of nobody": "~nobody/x",
    "a surrogate": "\udcff",
    "an entry of the catalog of escapes": "catalog:\x1b[2J",
    "a sample that goes up": "sample:../../x",
    "an empty name": "",
}
ATTACKS += [
    Attack(f"--ckpt: {what}", partial(lambda name, s, b: ["inspect", "--ckpt", name], name))
    for what, name in NAMES.items()
]


def _memory(value: str, sandbox: Sandbox, bases: Bases) -> Words:
    return ["plan", "--ckpt", bases.gpt, "--device-memory", value]


ATTACKS += [
    Attack(f"--device-memory: {what}", partial(_memory, value))
    for what, value in {
        "5,000 digits": "9" * 5000,
        "5,000 digits of GB": "9" * 5000 + "GB",
        "10**400": "1e400GB",
        "NaN": "nanGB",
        "-1": "-1GB",
        "escapes": "\x1b[2JGB",
    }.items()
]


def _plan(words: list[str], sandbox: Sandbox, bases: Bases) -> Words:
    return ["plan", "--ckpt", bases.gpt, *words]


ATTACKS += [
    Attack(f"plan: {' '.join(words)[:40]}", partial(_plan, words), refused=None)
    for words in (
        ["--dp", "100000"],
        ["--tp", "100000"],
        ["--set", "num_layers=1000000000"],
        ["--dp", "9" * 400],
        ["--batch-tokens", "9" * 400],
    )
]


def _tracker(content: bytes, sandbox: Sandbox, bases: Bases) -> Words:
    root = copied(bases.gpt, sandbox.input / "c")
    (root / "latest_checkpointed_iteration.txt").write_bytes(content)
    return inspecting(root)


ATTACKS += [
    Attack(f"tracker: {what}", partial(_tracker, content), refused=None)
    for what, content in {
        "4,000 digits": b"9" * 4000,
        "10,000 digits": b"9" * 10_000,
        "a path": b"../../../etc",
        "escapes": b"\x1b[2J",
        "a NUL": b"1\x00",
        "10 MB": b"1" * 10_000_000,
        "no text": b"\xff\xfe",
        "nothing": b"",
        "-1": b"-1",
    }.items()
]


@attacks(ATTACKS, every=40)
def test_no_setting_is_believed(attack: Attack, warm: WarmCommands, bases: Bases):
    check(attack, warm, bases)


def test_right_ones_are_read(warm: WarmCommands, bases: Bases):
    """What the attacks change is right before they do."""
    for prepare in (
        partial(_hub, {}),
        partial(_llama, {}),
        partial(_bridge, "model:" + SETTINGS),
        partial(_args, {}),
        partial(_config, 'to = "megatron"'),
        partial(_options, []),
        partial(_recipe, RECIPE),
        partial(_initial, INITIAL),
    ):
        done = Attack("right", prepare, refused=False).run(warm, bases)
        assert done.faults(refused=False) == [], done.err
