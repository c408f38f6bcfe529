"""The contract of a loss: what the trainer relies on, and what is said about a class that does not keep it."""

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from minitrain import ConfigError, Loss, Models, create_loss
from minitrain.cli.config_commands import load_plugin
from minitrain.data.examples import row_format
from minitrain.losses import add_features, registered
from tests.examples import examples, files
from tests.messages import raises
from tests.rows import REQUIRED

VARIED = [
    *((name, REQUIRED.get(name, {})) for name in registered()),
    ("policy", {"kl_coef": 0.1}),
    ("policy", {"kl_coef": 0.1, "kl_in": "reward", "vf_coef": 0.1}),
    ("policy", {"advantages": "given", "vf_coef": 0.1}),
    ("classify", {"regression": True}),
    ("dpo", {"variant": "simpo"}),
]


def contents(file) -> dict:
    return {"values": dict(file.doc_features), "columns": dict(file.token_features), "labels": list(file.labels)}


def assert_equal(a: dict, b: dict) -> None:
    assert a["labels"] == b["labels"]
    for kind in ("values", "columns"):
        assert a[kind].keys() == b[kind].keys()
        for name, numbers in a[kind].items():
            np.testing.assert_array_equal(np.asarray(numbers), np.asarray(b[kind][name]))


@pytest.mark.parametrize("name, options", VARIED, ids=str)
def test_data_is_not_changed_and_requirements_stay(name, options):
    """`on_data_loaded` returns features and leaves the files alone; `requires` is right before it and after it."""
    loss = create_loss(name, **options)
    (file,) = files(examples(loss.example_type))
    file.labels.reverse()  # so that a loss numbers them in another way
    before, required = copy.deepcopy(contents(file)), loss.requires
    added = list(loss.on_data_loaded([file], []))
    assert_equal(contents(file), before)
    assert loss.requires == required
    if name in ("policy", "classify"):
        assert added


def test_added_features_are_in_the_file():
    """Documents, tokens and labels; what has the same name is replaced, and a loss may return nothing."""
    (file,) = files(examples("rollout"))
    old = file.token_features["advantages"].clone()
    add_features(create_loss("policy", advantages="rloo"), [file])
    assert file.token_features["advantages"].shape == old.shape and not torch.equal(
        file.token_features["advantages"], old
    )
    (file,) = files(examples("classification"))
    file.labels = ["b", "a", "c"]
    loss = create_loss("classify")
    numbers = file.doc_features["label"].copy()
    add_features(loss, [file])
    assert file.labels == ["a", "b", "c"] and file.doc_features["label"].tolist() == [
        [1, 0, 2][int(n)] for n in numbers
    ]

    class Silent(Loss):
        def on_data_loaded(self, train, eval):
            self.n = len(train)

    add_features(Silent(None), [file])


# ------------------------------------------------------------------------------------------ classes of other contracts


def test_a_call_with_the_old_arguments_is_refused():
    """In the class itself, and with the advice to take `models`."""
    for old in (
        lambda self, batch, policy, reference=None, teacher=None: None,
        lambda self, batch, policy: None,
        lambda self, batch, policy, **models: None,
        lambda self, batch: None,
    ):
        with raises(ConfigError, "usage", "Mine: ", "__call__(self, batch, models)"):
            type("Mine", (Loss,), {"__call__": old})
    for right in (lambda self, batch, models: None, lambda self, batch, m, scale=1.0: None, lambda self, *args: None):
        assert issubclass(type("Mine", (Loss,), {"__call__": right}), Loss)


@pytest.mark.parametrize(
    "old, new",
    [
        ("weight", "num_items"),
        ("record", "example_type"),
        ("outputs", "head_labels"),
        ("ignored", "unused_options"),
        ("summary", "finalize_metrics"),
        ("judge", "compute_eval_metrics"),
        ("needs", "requires"),
        ("prepare", "on_data_loaded (return AddedFeatures instead of changing the files)"),
        ("statistics", "step_statistics"),
        ("receive", "set_step_statistics"),
    ],
)
def test_a_method_of_the_old_name_is_refused(old, new):
    """It would never be called. A helper of that name is fine beside the method of the new name."""
    with raises(ConfigError, "usage", "Mine: ", f"{old} to {new}"):
        type("Mine", (Loss,), {old: lambda self: None})
    both = {
        old: lambda self: None,
        new.partition(" ")[0]: "conversation" if new == "example_type" else lambda self: None,
        "has_step_statistics": True,
    }
    assert type("Mine", (Loss,), both)


def test_an_example_type_that_does_not_exist_is_refused():
    """Of a loss and of a row format; the names of 0.1.0, too."""
    for old in ("feedback", "labelled", "rows"):
        with pytest.raises(ConfigError, match=f"Mine: .*set example_type .*, not '{old}'"):
            type("Mine", (Loss,), {"example_type": old})
        with pytest.raises(ConfigError, match=f"row format mine: unknown kind '{old}'. Use one of "):
            row_format("mine", old, "text")


def test_step_statistics_have_to_be_declared():
    """Without the class attribute they would never be asked for."""
    with raises(ConfigError, "usage", "Mine: ", "has_step_statistics = True"):
        type("Mine", (Loss,), {"step_statistics": lambda self, batch, models: None})
    assert [name for name, cls in registered().items() if cls.has_step_statistics] == ["kto"]


def test_a_plugin_with_an_old_loss_is_named(tmp_path):
    """The error names the file and the class, and all changes at once."""
    file = tmp_path / "mine.py"
    file.write_text(
        "from minitrain import Loss\n\n\nclass Old(Loss):\n    needs = frozenset({'reference'})\n\n"
        "    def __call__(self, batch, policy, reference=None, teacher=None): ...\n"
    )
    with raises(ConfigError, "usage", "--plugin: ", "mine.py: Old: ", "needs to requires", "__call__"):
        load_plugin(str(file))


def test_models_besides_the_policy():
    """Only those that are there."""
    assert Models("p").frozen() == {} and Models("p", teacher="t").frozen() == {"teacher": "t"}


@dataclass
class NoOptions:
    pass


def test_the_error_is_one_for_objects_too():
    """A class that is never registered is checked where it is defined."""
    with raises(ConfigError, "usage", "Mine: ", "__call__"):

        class Mine(Loss):
            def __call__(self, batch, policy):
                return policy(batch)

        Mine(NoOptions())
