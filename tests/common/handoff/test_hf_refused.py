"""A directory of another maker that is no model: one line, before memory is taken, without
waiting."""

import json
import os
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from common.handoff.locate import load_tokenizer, read_stage
from common.handoff.publish import load_model
from common.program.errors import InputError


@pytest.fixture
def foreign(tiny_gpt, tiny_reward, stage_dir) -> Callable[..., Path]:
    """foreign(family, kind, **changes of config.json) -> a model's directory without our own
    files."""

    def make(family: str = "llama", kind: str = "lm", **changes) -> Path:
        tiny = tiny_gpt if kind == "lm" else tiny_reward
        folder = Path(stage_dir(tiny(family)))
        for name in ("manifest.json", "stage.json"):
            (folder / name).unlink()
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


def refusal(folder: Path, kind: str = "lm") -> str:
    """The one line that loading a directory ends with, which must be quick and small."""
    begin = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(InputError) as error:
            load_model(str(folder), kind)
        assert tracemalloc.get_traced_memory()[1] < 2e7
    finally:
        tracemalloc.stop()
    assert time.process_time() - begin < 2
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    return str(error.value)


NO_SIZES = [1e12, 1e30, -5, 10**12, True, "4", None, [4], 0.5]
SIZES = {
    "llama": {
        "vocab_size": "vocab_size",
        "max_position_embeddings": "max_length",
        "num_hidden_layers": "n_layer",
        "intermediate_size": "n_inner",
    },
    "gpt2": {"n_positions": "max_length", "n_layer": "n_layer", "n_inner": "n_inner"},
}


@pytest.mark.parametrize("family", SIZES)
def test_what_is_no_size_is_refused(family, foreign):
    folder = foreign(family)
    good = (folder / "config.json").read_text()
    assert load_model(str(folder))
    for key, ours in SIZES[family].items():
        for value in NO_SIZES:
            if ours != "n_inner" or value is not None:  # null is its default
                (folder / "config.json").write_text(json.dumps(json.loads(good) | {key: value}))
                told = refusal(folder)
                assert f"{ours} {value!r}"[:30] in told or f"{ours} 0 describes" in told


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"rms_norm_eps": "1e-5"}, "norm_eps '1e-5' describes no model"),
        ({"rms_norm_eps": float("nan")}, "norm_eps nan describes no model"),
        ({"rope_parameters": {"rope_theta": True}}, "rope_theta True describes no model"),
        ({"tie_word_embeddings": "false"}, "tie_embeddings 'false': must be true or false"),
        ({"num_attention_heads": "x"}, "describes no model"),
        ({"model_type": "ministral", "num_hidden_layers": 10**9, "sliding_window": 4}, "n_layer"),
    ],
)
def test_what_is_no_number_is_refused(changes, words, foreign):
    assert words in refusal(foreign(**changes))


@pytest.mark.parametrize(
    "changes",
    [{"num_hidden_layers": 9999}, {"vocab_size": 9_999_999}, {"intermediate_size": 10**7}],
)
def test_more_parameters_than_the_files_hold_are_refused_unbuilt(changes, foreign):
    told = refusal(foreign(**changes))
    assert "config.json describes a model of" in told and "its weights are" in told


@pytest.mark.parametrize("shift", ["x", float("nan"), True, [1]])
def test_a_shift_that_is_no_number_is_refused(shift, foreign):
    assert "score_shift" in refusal(foreign(kind="reward", score_shift=shift), "reward")


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", INDEX])
@pytest.mark.parametrize("kind", ["a folder", "a FIFO, a socket or a device"])
def test_what_is_no_file_is_not_waited_for(name, kind, foreign):
    folder = foreign()
    (folder / name).unlink(missing_ok=True)
    make = os.mkdir if kind == "a folder" else os.mkfifo
    make(folder / name)
    assert f"/{name}: is {kind}, and a file is wanted" in refusal(folder)


@pytest.mark.parametrize("content", [5, None, [1], "../x", {}, "gone.safetensors"], ids=str)
def test_an_index_that_names_no_file_is_refused(content, foreign):
    folder = foreign()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": content}}))
    refusal(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": content, "b": "x.safetensors"}}))
    refusal(folder)


DEEP = "[" * 100_000


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_deep_nesting_is_refused(name, foreign):
    folder = foreign()
    (folder / name).write_text(DEEP)
    refusal(folder)


def test_a_tokenizer_nested_deep_is_refused(foreign):
    folder = foreign()
    (folder / "tokenizer.json").write_text(DEEP)
    with pytest.raises(InputError, match="no readable tokenizer"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("content", ["{", "[]", DEEP, '{"wall_time": "x", "stage": 5}'])
def test_a_foreign_stage_json_says_nothing(content, foreign):
    folder = foreign()
    (folder / "stage.json").write_text(content)
    assert read_stage(folder) == {}
