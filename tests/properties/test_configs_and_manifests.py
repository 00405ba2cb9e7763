"""Configs and manifests: for any text a config or one line; any change of a file is seen."""

import json

from anything import TEXT, VALUES, result_or_line
from hypothesis import assume, example, given
from hypothesis import strategies as st

from common.config.command_line import cli_args
from common.config.overrides import check_overrides, split_overrides
from common.config.schema import build, load, schemas_of, to_dict
from common.config.strict_yaml import read_yaml
from common.program.files import MANIFEST, verify, write_manifest
from stages.rl.train import Config

GIVEN = {"parent": "a", "reward_model": "b", "train_data": "c", "output_dir": "no/such/folder"}
KEYS = sorted(schemas_of(Config))
YAML = st.lists(
    st.tuples(st.sampled_from([*KEYS, "no_such_key"]), TEXT | st.integers().map(str)), max_size=4
).map(lambda pairs: "".join(f"{key}: {value}\n" for key, value in pairs))


@given(st.binary(max_size=30) | st.text(max_size=30).map(str.encode) | YAML.map(str.encode))
@example(b"a: !!timestamp 2001-99-99")
@example(b"a: !!binary x")
@example(b"? [a]\n: b")
def test_any_file_is_a_config_or_one_line(tmp_path, content):
    file = tmp_path / "any.yaml"
    file.write_bytes(content)
    found = result_or_line(read_yaml, file)
    assert found is None or all(isinstance(key, str) for key in found[0])
    if found is not None:
        values, where = found
        cfg = result_or_line(build, Config, GIVEN | values, dict.fromkeys(GIVEN, "y") | where)
        assert cfg is None or isinstance(cfg, Config)


@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3))
def test_any_values_are_a_config_or_one_line(values):
    where = dict.fromkeys([*values, ""], "x.yaml:1")
    cfg = result_or_line(build, Config, GIVEN | values, where | dict.fromkeys(GIVEN, "y"))
    if cfg is not None:
        assert Config(**to_dict(cfg)) == cfg


@given(st.lists(st.sampled_from(KEYS).map("--{}".format) | TEXT, max_size=5))
def test_any_words_are_a_config_or_one_line(words):
    assume(not {"-h", "--help", "--version", "--config"} & set(words))
    assume(not any(word.startswith("--config=") for word in words))
    cfg = result_or_line(load, Config, [*cli_args(GIVEN), *words])
    assert cfg is None or isinstance(cfg, Config)


# Surrogates cannot be words of a command line.
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=9)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "seed": st.integers(0, 2**32 - 1),
            "learning_rate": st.floats(0, 1e30),
            "reference": st.none() | WORDS,
            "train_data": WORDS,
            "resume": st.booleans(),
            "score_clip": st.none() | st.floats(1e-9, 1e30),
            "lora_targets": st.lists(st.sampled_from(("qkv", "out", "up")), min_size=1),
        },
    )
)
def test_a_config_as_words_comes_back(values):
    assume((values.get("reference") or "").lower() not in ("null", "none"))
    cfg = Config(**GIVEN | values)
    given_ = {key: value for key, value in to_dict(cfg).items() if value != []}
    assert load(Config, cli_args(given_)) == cfg


@given(st.lists(TEXT | st.tuples(TEXT, TEXT, TEXT).map("--{0[0]}.{0[1]}={0[2]}".format)))
def test_keys_of_steps_are_kept_or_one_line(words):
    others, overrides = split_overrides(words)
    assert set(others) <= set(words)
    given_ = sum(len(keys) for keys in overrides.values())
    assert given_ <= len(words) - len(others)
    result_or_line(check_overrides, overrides, ["sft", "rl"], "x.yaml")


FILES = st.dictionaries(
    st.sampled_from(("a.json", "b.bin", "c.safetensors")), st.binary(max_size=40), min_size=1
)


@given(FILES, st.data())
def test_every_change_of_a_file_is_seen(tmp_path, files, data):
    for old in tmp_path.iterdir():
        old.unlink()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    write_manifest(tmp_path, [tmp_path / name for name in files])
    verify(tmp_path)
    name = data.draw(st.sampled_from(sorted(files)))
    changed = data.draw(st.binary(max_size=41) | st.none())
    assume(changed != files[name])
    if changed is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(changed)
    assert result_or_line(lambda: verify(tmp_path) or True) is None
    weights_only = changed is not None and name.endswith(".safetensors")
    if weights_only and len(changed) == len(files[name]):
        verify(tmp_path, weights=False)


ENTRIES = st.dictionaries(
    st.sampled_from(("a.json", "", "..", ".", "x/y", "a\0b", "/")),
    st.fixed_dictionaries({"size": VALUES, "sha256": VALUES}) | VALUES,
    max_size=2,
)


@given(st.binary(max_size=20) | (ENTRIES | VALUES).map(lambda value: json.dumps(value).encode()))
@example(b'{"..": {"size": 4096, "sha256": ""}}')
@example(b'{"sub": {"size": 4096, "sha256": ""}}')
def test_any_manifest_is_right_or_one_line(tmp_path, content):
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "sub").mkdir(exist_ok=True)
    (tmp_path / MANIFEST).write_bytes(content)
    result_or_line(verify, tmp_path)
