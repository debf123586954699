"""Few bytes that become many, or that take for ever: shared lists, sets, large sizes."""

from __future__ import annotations

from functools import partial

from support.reliability.attacks import (
    Attack,
    Bases,
    Words,
    attacks,
    check,
    converting,
    copied,
    inspecting,
    model_file,
)
from support.reliability.pickle_bytes import (
    BUILD,
    called,
    listed,
    mapped,
    named,
    number,
    numbers,
    pickled,
    real,
    storage,
    tensor,
    text,
    torch_stream,
    torch_zip,
    tupled,
    with_entry,
    with_pickle,
)
from support.reliability.warm_commands import Sandbox, WarmCommands

pytest_plugins = ["support.reliability.warm_fixtures"]


def shared(depth: int = 9, breadth: int = 10, kind: str = "list") -> bytes:
    """Push a container of containers, every level of which holds the one below many times."""
    value = listed(text("x"))
    for level in range(depth):
        again = b"".join(b"h" + bytes([level]) for _ in range(breadth))
        keep = b"q" + bytes([level]) + b"0"
        if kind == "list":
            value += keep + b"](" + again + b"e"
        elif kind == "tuple":
            value += keep + b"(" + again + b"t"
        else:
            pairs = b"".join(text(str(n)) + b"h" + bytes([level]) for n in range(breadth))
            value += keep + b"}(" + pairs + b"u"
    return value


def _one_hash(count: int, kind: str) -> bytes:
    """Push a container of many numbers with one hash."""
    of = [number(n * (2**61 - 1)) for n in range(1, count)]
    if kind == "dict":
        return b"}(" + b"".join(key + number(1) for key in of) + b"u"
    if kind == "dict, one at a time":
        return b"}" + b"".join(key + number(1) + b"s" for key in of)
    if kind == "set":
        return b"\x8f(" + b"".join(of) + b"\x90"
    if kind == "frozenset":
        return b"(" + b"".join(of) + b"\x91"
    if kind == "set by a call":
        return called(named("builtins", "set"), listed(*of))
    if kind == "OrderedDict":
        pairs = listed(*(tupled(key, number(1)) for key in of))
        return called(named("collections", "OrderedDict"), pairs)
    if kind == "tuples of -1 and -2":
        bits = range(count)
        keys = (numbers(*(-1 - (n >> bit & 1) for bit in range(16))) for n in bits)
        return b"\x8f(" + b"".join(keys) + b"\x90"
    assert kind == "tuples"
    return b"\x8f(" + b"".join(tupled(key) for key in of) + b"\x90"


KINDS = (
    "dict", "dict, one at a time", "set", "frozenset", "set by a call", "OrderedDict", "tuples",
    "tuples of -1 and -2",
)  # fmt: skip
VALUES: dict[str, bytes] = {
    f"60,000 of one hash: {kind}": _one_hash(60_000, kind) for kind in KINDS
}
VALUES |= {f"shared {kind}s": shared(kind=kind) for kind in ("list", "tuple", "dict")}
VALUES |= {
    "3 MB of sets": b"](" + b"\x8f" * 3_000_000 + b"e",
    "3 MB of sets of five": b"](" + b"\x8f(K\x01K\x02K\x03K\x04K\x05\x90" * 230_000 + b"e",
    "3 MB of frozensets": b"](" + b"(K\x01\x91" * 700_000 + b"e",
    "a memo of 10 million": b"]" + b"\x94" * 1_000_000,
    "a million copies of a list": listed(*[number(1)] * 1000)
    + b"q\x00"
    + b"".join([named("builtins", "set") + b"(h\x00tR0"] * 20_000),
    "a class called 10 million times": named("evil", "X")
    + b"q\x00("
    + b"h\x00)R" * 1_000_000
    + b"l",
    "a tuple as a key, of shared tuples": b"}" + shared(kind="tuple") + number(1) + b"s",
    "an argument of shared lists": called(named("evil", "X"), shared()),
    "a state of shared lists": called(named("evil", "X")) + mapped({"a": shared()}) + BUILD,
    "a version of shared lists": mapped({"checkpoint_version": shared()}),
    "a float of 10**308 as a size": real(1e308),
    "text doubled": text("x" * 1000) + b"q\x00" + b"](" + b"h\x00" * 1_000_000 + b"e",
}
KEYS = ("checkpoint_version", "args", "iteration", "rng_state")


def _beside(value: bytes, key: str, sandbox: Sandbox, bases: Bases) -> Words:
    root = copied(bases.gpt, sandbox.input / "c")
    data = with_entry(bases.data_pickle, key, value)
    with_pickle(model_file(bases.gpt), model_file(root), data)
    return inspecting(root)


def _alone(value: bytes, form: int, sandbox: Sandbox, bases: Bases) -> Words:
    data = pickled(mapped({"model": value}), protocol=4)
    path = sandbox.input / "m.pt"
    if form == 0:
        torch_zip(path, data)
    elif form == 1:
        path.write_bytes(torch_stream(data))
    else:
        root = copied(bases.dist, sandbox.input / "c")
        (root / ".metadata").write_bytes(data)
        return inspecting(root)
    return inspecting(path)


ATTACKS = [
    Attack(f"{what}, as {key}", partial(_beside, value, key), refused=None)
    for what, value in VALUES.items()
    for key in KEYS[: 4 if "shared" in what else 1]
]
ATTACKS += [
    Attack(f"{what}, form {form}", partial(_alone, value, form))
    for at, (what, value) in enumerate(VALUES.items())
    for form in range(3)
    if form == at % 3 or "hash" in what
]

# ---- sizes that stand for much work --------------------------------------------------------------


def _sized(name: str, size: bytes, sandbox: Sandbox, bases: Bases) -> Words:
    fields = {
        "num_layers": number(1), "hidden_size": number(64), "num_attention_heads": number(4),
        "padded_vocab_size": number(256), "max_position_embeddings": number(32),
    }  # fmt: skip
    args = called(named("argparse", "Namespace")) + mapped(fields | {name: size}) + BUILD
    held = tensor(storage(), number(0), numbers(4), numbers(1))
    model = mapped({"language_model": mapped({"embedding": held})})
    value = mapped({"args": args, "model": model, "checkpoint_version": real(3.0)})
    path = torch_zip(sandbox.input / "m.pt", pickled(value), {"0": bytes(16)})
    return converting(path, sandbox)


FIELDS = (
    "num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "padded_vocab_size",
    "max_position_embeddings", "num_experts", "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
)  # fmt: skip
ATTACKS += [
    Attack(f"{name} of {size}", partial(_sized, name, number(size)))
    for name in FIELDS
    for size in (10**9, 2**40)
]


def _options(words: list[str], sandbox: Sandbox, bases: Bases) -> Words:
    named_of = {"GPT": bases.gpt, "OUT": sandbox.output}
    return [named_of.get(word, word) for word in words]


SIZES = (
    ["plan", "--model", "gpt2-355m", "--dp", "100000"],
    ["plan", "--model", "gpt2-355m", "--set", "num_layers=1000000000"],
    ["plan", "--model", "gpt2-355m", "--set", "num_layers=1099511627776"],
    ["plan", "--ckpt", "GPT", "--set", "num_layers=1000000000"],
    ["inspect", "--ckpt", "GPT", "--set", "num_layers=1000000000"],
    ["inspect", "--ckpt", "GPT", "--set", "hidden_size=1099511627776"],
    ["inspect", "--ckpt", "GPT", "--set", "num_attention_heads=1099511627776"],
    ["convert", "--ckpt", "GPT", "--to", "megatron", "--tp", "1000000000", "--output", "OUT"],
    ["convert", "--ckpt", "GPT", "--to", "megatron", "--pp", "1000000000", "--output", "OUT"],
    ["convert", "--ckpt", "GPT", "--to", "megatron", "--ep", "1000000000", "--output", "OUT"],
    ["convert", "--ckpt", "GPT", "--to", "torch_dist", "--tp", "1000000000", "--output", "OUT"],
    ["score", "--ckpt", "GPT", "--input", "/dev/null", "--tp", "1000000000", "--output", "OUT"],
)
ATTACKS += [Attack(" ".join(words), partial(_options, words), refused=None) for words in SIZES]


@attacks(ATTACKS, every=12)
def test_no_bomb_takes_time_or_memory(attack: Attack, warm: WarmCommands, bases: Bases):
    check(attack, warm, bases)
