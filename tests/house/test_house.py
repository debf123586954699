"""The rules that hold the house together: who imports whom, rooms, names, who talks.

The rules themselves are in support/house/house_rules.py. Each is shown on a made-up source to be
able to fail, and then applied to the whole product.
"""

from __future__ import annotations

import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.house import house_rules
from support.paths import PROJECT, TESTS

from mlm_eval.checkpoints.errors import PACKAGES

PRODUCT = house_rules.sources(PROJECT)

# Imported where they are there; the command that wants them says how to install them.
OPTIONAL = {
    canonicalize_name(Requirement(requirement).name)
    for requirement, extra in PACKAGES.values()
    if extra is not None
}

# Public names that stand in more than one file, and why.
SHARED = {
    "T": "a type variable",
}


def declared() -> dict[str, Requirement]:
    """Return what an installation brings, by distribution."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {canonicalize_name(r.name): r for r in map(Requirement, project["dependencies"])}


# --- the rules on made-up sources: each has to be able to fail ----------------------------------

LAZY, ENGINE, LAMBADA = (
    "mlm_eval.checkpoints.lazy",
    "mlm_eval.engine.engine",
    "mlm_eval.tasks.zero_shot.lambada",
)


@pytest.mark.parametrize(
    ("module", "source", "faulty"),
    [
        # between the layers
        (LAZY, "from mlm_eval.engine.engine import Engine", True),
        (LAZY, "from mlm_eval import Engine", True),
        (LAZY, "from mlm_eval import gpt", True),
        (LAZY, "from .. import gpt", True),
        (LAZY, "def f():\n    import mlm_eval.ranks.launch", True),
        (LAZY, "from mlm_eval.options import Option", True),
        (LAZY, "from mlm_eval.checkpoints.errors import InputError", False),
        (LAZY, "from .errors import InputError", False),
        (LAZY, "from mlm_eval import InputError", False),
        (LAZY, "import torch", False),
        (LAZY, "from megatron.core import parallel_state", True),
        (ENGINE, "from mlm_eval.tasks.zero_shot import lambada", True),
        (ENGINE, "if TYPE_CHECKING:\n    from mlm_eval.tasks.data import sources", True),
        (ENGINE, "import_module('mlm_eval.tasks.zero_shot.lambada')", True),
        (ENGINE, "import mlm_eval.cli", True),
        (ENGINE, "import tasks.lambada", True),
        (ENGINE, "from mlm_eval.checkpoints.config import ModelConfig", False),
        (LAMBADA, "from mlm_eval.cli import app", True),
        (LAMBADA, "from mlm_eval.engine.engine import Engine", False),
        ("mlm_eval.cli.__init__", "from mlm_eval.tasks import lambada", False),
        # between the rooms
        (ENGINE, "from mlm_eval.training import loop", True),
        (ENGINE, "from mlm_eval.ranks import mesh", False),
        ("mlm_eval.model.gpt", "from mlm_eval.ranks import mesh", True),
        ("mlm_eval.model.gpt", "from .bert import BERT", False),
        ("mlm_eval.planning.plan", "from mlm_eval.harness import model", True),
        ("mlm_eval.planning.plan", "from mlm_eval.reporting import text", False),
        ("mlm_eval.options", "from mlm_eval.checkpoints.errors import InputError", True),
        (LAMBADA, "from mlm_eval.tasks.finetune import race", True),
        (LAMBADA, "from mlm_eval.tasks import workloads", True),
        (LAMBADA, "from mlm_eval.tasks.data import sources", False),
        ("mlm_eval.checkpoints.megatron.args", "from ..huggingface import plan", True),
        ("mlm_eval.checkpoints.files.output", "from mlm_eval.checkpoints import convert", True),
    ],
)
def test_the_direction_rule_tells_right_from_wrong(module: str, source: str, faulty: bool):
    assert len(house_rules.direction_faults({module: source})) == faulty


def test_the_circle_rule_sees_every_kind_of_import():
    """Deferred, for types only, by way of a third module; not what only hangs on a circle."""
    first, second, third, outside = (f"mlm_eval.engine.{x}" for x in ("a", "b", "c", "d"))
    circle = {
        first: "def f():\n    from mlm_eval.engine.b import g",
        second: "if TYPE_CHECKING:\n    import mlm_eval.engine.c",
        third: "from . import a",
        outside: "from . import a",
    }
    assert house_rules.circles(circle) == [[first, second, third]]
    assert house_rules.circles({**circle, third: "import torch"}) == []
    engine = {ENGINE: "from .a import f", first: "from mlm_eval import Engine"}
    assert house_rules.circles(engine) == [[first, ENGINE]]


def test_the_room_rule_counts_files_and_reads_doors():
    files = {f"mlm_eval.engine.f{n}": "" for n in range(12)}
    door = {"mlm_eval.engine.__init__": '"""What is inside."""'}
    assert house_rules.room_faults(files | door) == []
    assert len(house_rules.room_faults(files | door | {"mlm_eval.engine.f12": ""})) == 1
    assert len(house_rules.room_faults(files | {"mlm_eval.engine.__init__": "import os"})) == 1
    assert len(house_rules.room_faults(files)) == 1


def test_the_rule_of_doors_sees_what_they_do_not_name():
    door = {"mlm_eval.ranks.__init__": '"""Starts ranks: launch.py, collective.py."""'}
    room = {f"mlm_eval.ranks.{name}": "" for name in ("launch", "collectives", "__init__")} | door
    package = {"mlm_eval.__init__": '"""ranks/ and __main__.py."""', "mlm_eval.__main__": ""}
    faults = ["mlm_eval.ranks does not name collectives.py"]
    assert house_rules.unnamed_at_the_door(room | package) == faults
    strangers = {"mlm_eval.engine.__init__": '"""Nothing."""'}
    more = house_rules.unnamed_at_the_door(room | package | strangers)
    assert more == [*faults, "mlm_eval does not name engine/"]


def test_the_name_rules_see_what_stands_twice_and_what_is_anothers():
    one = {"mlm_eval.a": "def read(): ...\nLIMIT: int = 3\n_own = 1\nclass A:\n    _held = 1"}
    other = {"mlm_eval.b": "class read: ...\nLIMIT = 4\n_own = 2"}
    assert set(house_rules.shared_names(one | other)) == {"read", "LIMIT"}
    assert house_rules.private_faults(one | other) == []
    for source in (
        "from mlm_eval.a import _own",
        "from mlm_eval import a\na._own",
        "from mlm_eval.a import A\nA()._held",
        "def f():\n    import mlm_eval.a as other\n    return other._own",
    ):
        assert house_rules.private_faults(one | {"mlm_eval.c": source}), source
    assert house_rules.private_faults(one | {"mlm_eval.c": "import os\nos._exit(1)"}) == []


@pytest.mark.parametrize(
    ("source", "faulty"),
    [
        ("import torch.distributed as dist", True),
        ("from torch import distributed", True),
        ("from torch.distributed import all_reduce", True),
        ("import torch\ntorch.distributed.get_rank()", True),
        ("import torch.distributed.checkpoint as dcp", False),
        ("from torch.distributed.checkpoint.metadata import Metadata", False),
        ("from torch.distributed import checkpoint", False),
    ],
)
def test_the_process_group_rule_tells_right_from_wrong(source: str, faulty: bool):
    for module in (LAZY, "mlm_eval.model.gpt"):
        assert bool(house_rules.process_group_faults({module: source})) == faulty
    assert not house_rules.process_group_faults({"mlm_eval.model.tensor_parallel": source})


@pytest.mark.parametrize(
    ("source", "faulty"),
    [
        ("import torch.distributed as dist\ndist.all_reduce(x)", True),
        ("import torch\ntorch.distributed.barrier()", True),
        ("from torch import distributed as d\nd.broadcast_object_list([1])", True),
        ("def f():\n    from torch.distributed import all_gather", True),
        ("import torch.distributed as dist\ndist.get_rank()", False),
        ("from mlm_eval.ranks.collectives import barrier\nbarrier()", False),
        ("from functools import reduce", False),
    ],
)
def test_the_collective_rule_tells_right_from_wrong(source: str, faulty: bool):
    assert bool(house_rules.collective_faults({"mlm_eval.engine.score": source})) == faulty
    assert not house_rules.collective_faults({house_rules.TALKERS[1]: source})


def test_the_rules_of_printing_and_of_dependencies_are_able_to_fail():
    assert house_rules.print_faults({ENGINE: "def f():\n    print(1)"})
    assert not house_rules.print_faults({"mlm_eval.cli.run": "print(1)"})
    sources = {ENGINE: "import torch, os\nfrom huggingface_hub.utils import x\nimport mlm_eval"}
    assert not house_rules.dependency_faults(sources, {"torch", "huggingface-hub"}, set())
    assert len(house_rules.dependency_faults(sources, {"torch", "rich"}, set())) == 2
    assert not house_rules.dependency_faults(sources, {"torch"}, {"huggingface-hub"})


# --- the rules on the project -------------------------------------------------------------------


def test_every_room_is_seen_and_has_a_floor():
    rooms = {house_rules.floor(module.removesuffix(".__init__"))[1] for module in PRODUCT}
    assert rooms == {house_rules.API, *(room for rooms in house_rules.FLOORS for room in rooms)}


def test_imports_go_one_way_between_layers_and_rooms():
    assert house_rules.direction_faults(PRODUCT) == []


def test_no_modules_import_each_other_in_a_circle():
    assert house_rules.circles(PRODUCT) == []


def test_a_room_holds_a_dozen_files_and_has_a_docstring_at_its_door():
    assert house_rules.room_faults(PRODUCT) == []


def test_the_rooms_of_the_tests_hold_a_dozen_files():
    for folder in [TESTS, *TESTS.rglob("*")]:
        files = [file for file in folder.glob("*.py") if file.stem != "__init__"]
        assert len(files) <= 12 or "oracles" in folder.parts, folder


def test_doors_name_what_is_behind_them():
    assert house_rules.unnamed_at_the_door(PRODUCT) == []


def test_no_public_name_stands_in_two_files():
    shared = house_rules.shared_names(PRODUCT)
    assert {name: where for name, where in shared.items() if name not in SHARED} == {}
    assert set(SHARED) <= set(shared), "unique by now: strike them off the list"


def test_no_file_uses_what_another_one_keeps_private():
    assert house_rules.private_faults(PRODUCT) == []


def test_the_loader_and_the_model_need_no_process_group():
    """But for the one file of the model that talks to other ranks."""
    assert house_rules.process_group_faults(PRODUCT) == []


def test_collectives_are_called_in_two_files():
    assert house_rules.collective_faults(PRODUCT) == []


def test_only_the_command_line_prints():
    assert house_rules.print_faults(PRODUCT) == []


def test_what_is_declared_is_imported_and_what_is_imported_is_declared():
    assert house_rules.dependency_faults(PRODUCT, set(declared()), OPTIONAL) == []
