"""Families that people train have the outcomes of docs/architectures.json: equal to transformers, or refused."""

import pytest
import transformers

from tests.architectures.outcomes import BUILT, GROUPS, OK, Outcome, Table, run_checks

pytestmark = pytest.mark.numeric

TABLE = Table()
QUICK = ("llama", "qwen3_moe", "gemma3_text", "gpt2", "mamba2")
FAMILIES = (
    *QUICK,
    *(
        "qwen2",
        "qwen3",
        "qwen3_next",
        "qwen3_5_text",
        "qwen3_5_moe_text",
        "gemma2",
        "gemma3",
        "gemma3n_text",
        "gemma4_text",
    ),
    *(
        "mistral",
        "ministral3",
        "mixtral",
        "phi3",
        "phimoe",
        "gpt_neox",
        "gpt_oss",
        "falcon_h1",
        "cohere2",
        "olmo2",
        "olmo3",
    ),
    *(
        "olmoe",
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_v32",
        "glm4",
        "glm4_moe",
        "smollm3",
        "granite",
        "granitemoehybrid",
    ),
    *("llama4", "minimax", "kimi_linear", "lfm2", "jamba", "nemotron_h", "exaone4", "ernie4_5", "hunyuan_v1_moe"),
)
PARTS = {
    "numbers": ("padded", "packed", "eager", "shared", "checkpointing", "frozen", "bfloat16"),
    "files": ("meta", "sharded", "final", "float32", "long", "generate"),
    "adapters": ("lora", "four_bits"),
}
CLASSIFIERS = [kind for kind in FAMILIES if kind in GROUPS["classifiers"].kinds] + ["bert", "roberta", "modernbert"]


def assert_outcomes(group: str, kind: str, folder, checks: tuple[str, ...] = ()) -> None:
    """Each outcome is ok, n/a, or the one in the table. Another version of transformers may refuse other checks."""
    outcomes = run_checks(group, kind, folder, checks)
    assert outcomes.pop(BUILT) == OK
    others = {check: outcome for check, outcome in outcomes.items() if outcome.word not in ("ok", "n/a")}
    if transformers.__version__ == TABLE.transformers:
        expected = {check: TABLE.outcome(group, kind, check) for check in others}
        others = {c: o for c, o in others.items() if (o.word, o.code) != (expected[c].word, expected[c].code)}
    else:
        others = {check: outcome for check, outcome in others.items() if outcome.word != "refused"}
    assert not others


@pytest.mark.parametrize("kind", QUICK)
def test_a_few_families(kind, tmp_path):
    """The checks that take no training step."""
    assert_outcomes("causal", kind, tmp_path, ("padded", "packed", "shared", "checkpointing", "frozen", "meta"))


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", FAMILIES)
def test_causal_models(kind, part, tmp_path):
    assert_outcomes("causal", kind, tmp_path, PARTS[part])


@pytest.mark.slow
@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_classifiers(kind, tmp_path):
    assert_outcomes("classifiers", kind, tmp_path)


def test_each_check_belongs_to_a_part():
    assert sorted(check for checks in PARTS.values() for check in checks) == sorted(GROUPS["causal"].checks)


def test_the_table_has_all_model_types():
    """Of the version that it was made with."""
    if transformers.__version__ != TABLE.transformers:
        pytest.skip(f"the table is of transformers {TABLE.transformers}")
    assert {group: [*TABLE.rows[group]] for group in GROUPS} == {name: group.kinds for name, group in GROUPS.items()}


def test_nothing_is_wrong_or_crashes():
    """Each outcome of the table is ok, n/a, or a refusal with a code."""
    outcomes = [
        (kind, check, o) for rows in TABLE.rows.values() for kind, row in rows.items() for check, o in row.items()
    ]
    assert [one for one in outcomes if one[2].word not in ("ok", "n/a", "refused")] == []
    assert [one for one in outcomes if one[2].word == "refused" and not one[2].code] == []


def test_a_table_is_read_as_it_was_written(tmp_path):
    """With all outcomes and their reasons."""
    TABLE.write(tmp_path / "table.json")
    copy = Table(tmp_path / "table.json")
    assert copy.rows == {
        g: {k: {c: o for c, o in r.items() if o != OK} for k, r in rows.items()} for g, rows in TABLE.rows.items()
    }
    assert copy.transformers == TABLE.transformers


def test_the_code_of_a_refusal():
    assert Outcome("refused", "lr: too large. [too-large]").code == "too-large" and OK.code == ""
