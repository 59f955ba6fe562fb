"""Command line and YAML: what is accepted, and how mistakes are told."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_mod.config import cli
from megatron_mod.config.ranks import OPTIONS, check_ranks
from megatron_mod.config.validate import check_batches, check_outputs
from megatron_mod.model.architecture import Architecture, check_parallel
from megatron_mod.parallel.topology import plan

ROOT = Path(__file__).resolve().parents[2]
REQUIRED = {
    "model": {"checkpoint": "base"},
    "data": {"train": "train.jsonl"},
    "train": {"steps": 10},
    "checkpoint": {"save": "run"},
}


@pytest.fixture
def parse(tmp_path):
    def call(*arguments, **sections):
        path = tmp_path / "config.yaml"
        content = {
            name: {**REQUIRED.get(name, {}), **sections.get(name, {})}
            for name in {**REQUIRED, **sections}
        }
        path.write_text(yaml.safe_dump(content))
        return cli.parse(["--config", str(path), *arguments])

    return call


def test_the_command_line_overrides_the_file(parse):
    config = parse(
        "--router.capacity", "0.3", "--optimizer.lr=0.5", "--router.layers.deepest", "2",
        router={"capacity": 0.9, "layers": {"deepest": 5}},
    )  # fmt: skip
    assert config.router.capacity == 0.3
    assert config.router.layers == {"deepest": 2}
    assert config.optimizer.lr == 0.5


def test_a_section_comes_from_a_file_or_inline(parse, tmp_path):
    path = tmp_path / "section"
    path.write_text("scope: layer\nthreshold: 0.25\n")
    assert parse("--router", str(path)).router.threshold == 0.25
    assert parse("--router", "{scope: layer}").router.scope == "layer"
    path.write_text("threshold: 0.25\nthreshold: 0.5\n")
    with pytest.raises(ValueError, match="section, line 2: .*'threshold' is set twice"):
        parse("--router", str(path))


def test_lists_are_lists(parse):
    assert parse(router={"layers": "all"}).router.layers == "all"
    assert parse("--router.layers", "all").router.layers == "all"
    config = parse("--router.layers.deepest", "3", router={"layers": "all"})
    assert config.router.layers == {"deepest": 3}
    config = parse("--router.layers", "[3, 4]", router={"capacity": [0.5, 0.25]})
    assert config.router.layers == [3, 4]
    assert config.router.capacity == [0.5, 0.25]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a.jsonl", "a.jsonl"),
        ("some/name:train[:10%]", "some/name:train[:10%]"),
        ("[a.jsonl, b.parquet]", ["a.jsonl", "b.parquet"]),
        ("{a.jsonl: 2.9, b.jsonl: 1}", {"a.jsonl": 2.9, "b.jsonl": 1.0}),
    ],
)
def test_data_is_one_source_several_or_weighted_ones(parse, tmp_path, text, value):
    assert parse("--data.train", text).data.train == value
    assert parse(data={"train": value}).data.train == value
    config = parse("--data.train", text)
    path = tmp_path / "resolved.yaml"
    path.write_text(cli.to_yaml(config))
    assert cli.parse(["--config", str(path)]) == config


def test_what_is_saved_parses_to_the_same(parse, tmp_path):
    config = parse("--router.layers", "[1]", "--train.seed", "7")
    path = tmp_path / "resolved.yaml"
    path.write_text(cli.to_yaml(config))
    assert cli.parse(["--config", str(path)]) == config


@pytest.mark.parametrize(
    ("arguments", "sections", "message"),
    [
        (["--router.capcity", "0.5"], {}, "'router.capcity'; did you mean 'router.capacity'"),
        (["--train.timeout", "0"], {}, "train.timeout = 0.0: must be above 0 and below 525600"),
        (["--train.timeout", ".inf"], {}, "train.timeout = inf: must be above 0 and below 525600"),
        ([], {"router": {"treshold": 0.5}}, "'router.treshold'; did you mean 'router.threshold'"),
        ([], {"optimiser": {"lr": 1}}, "'optimiser'; did you mean 'optimizer'"),
        (["--train.steps", "many"], {}, "train.steps"),
        (["--train.steps", "null"], {}, "train.steps and train.epochs are both unset"),
        (
            ["--train.epochs", "3"],
            {},
            "config.yaml, line 8) and train.epochs = 3: both say how long",
        ),
        (["--train.epochs", "0"], {}, "train.epochs = 0.0: must be above 0"),
        (["--train.steps", "-1"], {}, "train.steps = -1: must be at least 0"),
        (["--router.scope", "layers"], {}, "router.scope"),
        (["--router.granularity", "attn_word"], {}, "router.granularity"),
        (["--router.threshold", "1"], {}, "router.threshold"),
        (["--router.capacity_loss_weight", "0"], {}, "router.capacity to 1.0"),
        (["--router.capacity_loss_weight", "-1"], {}, "router.capacity to 1.0"),
        (["--router.capacity_loss_weight", "nan"], {}, "must be a number or auto"),
        ([], {"router": {"capacity_loss_weight": "Auto"}}, "line"),
        (["--router.bias", "false"], {}, "= auto needs biases"),
        (
            ["--router.bias", "false", "--router.capacity_loss_weight", "1"],
            {},
            "router.init = importance: sets the routers' biases",
        ),
        (["--router.init", "random"], {}, "router.init = random: must be importance, zeros or"),
        (["--router.stand_in_rank", "0"], {}, "router.stand_in_rank = 0: must be at least 1"),
        (
            ["--router.stand_in", "none", "--router.stand_in_rank", "4"],
            {},
            "router.stand_in_rank = 4: nothing stands in",
        ),
        (
            ["--router.stand_in", "none", "--router.stand_in_tokens", "9"],
            {},
            "router.stand_in_tokens = 9: nothing stands in",
        ),
        (
            ["--router.stand_in_lr", "0.1"],
            {},
            "router.stand_in_lr = 0.1: would be ignored, because train.trainable = routers gives",
        ),
        (
            ["--router.stand_in_lr", "0.1"],
            {"train": {"trainable": "all"}},
            "router.stand_in_lr = 0.1: would be ignored, because train.trainable = all gives",
        ),
        (
            ["--router.stand_in", "none"],
            {"train": {"trainable": "routers+stand_ins"}},
            "there are no stand-ins to train",
        ),
        (["--train.trainable", "stand_ins"], {}, "routers+stand_ins+lora, lora or all"),
        (["--train.loss", "kl"], {}, "train.loss = kl: must be task, distill or both"),
        (["--parallel.sequence_parallel", "true"], {}, "tensor_model_parallel_size above 1"),
        (["--train.validation_interval", "5"], {}, "data.validation = None"),
        (["--data.validation", "v.jsonl"], {}, "set both"),
        (["--data.validation_split", "0.1"], {}, "set both"),
        (["--data.validation_split", "1"], {}, "data.validation_split = 1.0: must be 0 to below 1"),
        ([], {"data": {"validation": "v", "validation_split": 0.1}}, "set one of them"),
        (["--data.train", "[]"], {}, "names nothing"),
        (["--data.train", "[a, a]"], {}, "names a file twice"),
        ([], {"data": {"train": {"a": 1.0, "b": 0}}}, "the weight of b is 0"),
        (["--data.max_train_samples", "0"], {}, "data.max_train_samples = 0"),
        (["--data.on_bad_record", "ignore"], {}, "data.on_bad_record"),
        (["--data.template", "chatml"], {}, "data.template"),
        (["--model.dtype", "float16"], {}, "model.dtype"),
        (["--optimizer.lr", "nan"], {}, "optimizer.lr"),
        (["--optimizer.lr", ".inf"], {}, "optimizer.lr = inf: must be above 0 and at most 1e+09"),
        (["--optimizer.lr", "1e39"], {}, "optimizer.lr = 1e+39: must be above 0 and at most"),
        (["--train.seed", "1" * 23], {}, "must be 0 to 4294967295"),
        (["--lr", "1"], {}, "'lr'; did you mean 'optimizer.lr'"),
        (["--trainer.seed", "1"], {}, "'trainer.seed'; did you mean 'train.seed'"),
        (["--router", "{scop: layer}"], {}, "'router.scop'; did you mean 'router.scope'"),
        (["--router", "{scope: layer, scope: model}"], {}, "'scope' is set twice"),
        (["--train.steps"], {}, "train.steps: expected one argument"),
        (["--config"], {}, "--config: needs a file"),
        (["stray"], {}, "stray"),
    ],
)  # fmt: skip
def test_mistakes_are_named(parse, arguments, sections, message):
    with pytest.raises(ValueError) as caught:
        parse(*arguments, **sections)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"), [("auto", "auto"), ("2", 2.0), ("0.5", 0.5), ("1e-3", 0.001)]
)
def test_a_penaltys_weight_is_a_number_or_found(parse, tmp_path, text, value):
    config = parse("--router.capacity_loss_weight", text)
    assert config.router.capacity_loss_weight == value
    path = tmp_path / "resolved.yaml"
    path.write_text(cli.to_yaml(config))
    assert cli.parse(["--config", str(path)]) == config
    path.write_text(f"router:\n  capacity_loss_weight: {text}\n")
    assert parse("--router", f"{{capacity_loss_weight: {text}}}").router == config.router


def test_a_stand_ins_rank_fits_the_model(parse):
    for granularity, rank in (("attn_token", 32), ("mlp_token", 64), ("block_sequence", 64)):
        router = parse("--router.granularity", granularity).router
        assert router.resolve(num_layers=30, hidden_size=576).stand_in_rank == rank
        assert router.resolve(num_layers=30, hidden_size=40).stand_in_rank == 20
    router = parse("--router.stand_in_rank", "577").router
    with pytest.raises(ValueError, match="must be at most the model's hidden size, 576"):
        router.resolve(num_layers=30, hidden_size=576)
    assert (
        parse("--router.stand_in", "none")
        .router.resolve(num_layers=30, hidden_size=576)
        .stand_in_rank
        is None
    )


def test_missing_settings_are_named():
    with pytest.raises(ValueError, match=r"data\.train"):
        cli.parse(["--train.steps", "3"])
    with pytest.raises(ValueError, match=r"model\.checkpoint and model\.hf_path are both unset"):
        cli.parse(["--train.steps=3", "--data.train=text", "--checkpoint.save=run"])


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        cli.parse(["--config", str(tmp_path / "none.yaml")])
    path = tmp_path / "broken.yaml"
    path.write_text("model: [")
    with pytest.raises(ValueError, match="not valid YAML"):
        cli.parse(["--config", str(path)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"train:\n  steps: 3\n  steps: 4\n", "line 3: not valid YAML: 'steps' is set twice"),
        (b"train: {}\ndata: {}\ntrain: {}\n", "'train' is set twice, first in line 1"),
        (b"train:\n  steps: 3\ntrain.steps: 4\n", "line 3: train.steps is set twice, first in"),
        (b"train:\n  seed: six\n", "train.seed = six (FILE, line 2): must be a whole number."),
        (b"train:\n  seed: -1\n", "train.seed = -1 (FILE, line 2): must be 0 to 4294967295."),
        (b"train:\n  sed: 1\n", "line 2: unknown key 'train.sed'; did you mean 'train.seed'?"),
        (b"train: 7\n", "line 1: section 'train' must hold fields, not 7"),
        (b"optimizer:\n  lr: .nan\n", "optimizer.lr = nan (FILE, line 2): must be above 0"),
        ("train:\n  # gr\xfc\xdfe\n".encode("latin-1"), "line 2: is not UTF-8"),
        (b"train: {steps: 3", "not valid YAML"),
        (b"train: \0", "not valid YAML"),
        (b"", "must hold sections"),
        (b"? [a, b]\n: 3\n", "not valid YAML"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_file_is_told_with_its_line(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_bytes(text)
    required = ["--model.checkpoint=a", "--data.train=b", "--checkpoint.save=c", "--train.steps=1"]
    with pytest.raises(ValueError) as caught:
        cli.parse(["--config", str(path), *required])
    assert message.replace("FILE", str(path)) in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_ends_anywhere_is_one_message_at_most(tmp_path):
    shipped = (ROOT / "configs" / "smollm2" / "135m_attn_sequence.yaml").read_bytes()
    path = tmp_path / "config.yaml"
    said = []
    for end in range(0, len(shipped), 67):
        path.write_bytes(shipped[:end])
        try:
            cli.parse(["--config", str(path)])
        except ValueError as error:
            said.append(str(error))
    assert len(said) > 10
    assert not any("\n" in message for message in said)


@pytest.mark.parametrize(
    ("field", "value", "type_in_words"),
    [
        ("router.capacity", "x", "a number, a list of numbers or null"),
        ("router.capacity_loss_weight", "automatic", "a number or auto"),
        ("router.layers", "x", "all, a mapping to whole numbers or a list of whole numbers"),
        (
            "router.layers.deepest",
            "x",
            "all, a mapping to whole numbers or a list of whole numbers",
        ),
        ("data.max_train_samples", "x", "a whole number or null"),
        ("model.transformer_impl", "x", "local, transformer_engine or null"),
        ("data.packing", "x", "true or false or auto"),
        ("train.seed", "2.5", "a whole number"),
    ],
)
def test_a_wrong_type_is_one_short_line(parse, field, value, type_in_words):
    with pytest.raises(ValueError) as caught:
        parse(f"--{field}", value)
    assert str(caught.value) == f"{field} = {value}: must be {type_in_words}."


def test_folders_that_cannot_be_written_are_refused_at_the_start_only(parse, tmp_path):
    (tmp_path / "file").touch()
    config = parse("--checkpoint.save", str(tmp_path / "file" / "run"))
    with pytest.raises(ValueError, match=r"checkpoint\.save = .*file is not a folder"):
        check_outputs(config)
    check_outputs(parse("--checkpoint.save", str(tmp_path / "run")))


SMOL = Architecture(
    num_layers=30, hidden_size=576, ffn_hidden_size=1536, num_attention_heads=9,
    num_query_groups=3, kv_channels=64, vocab_size=49152, max_sequence_length=8192,
    layernorm_epsilon=1e-5, rotary_base=1e5, tied_embeddings=True,
)  # fmt: skip


def test_tensor_degree_must_divide_heads():
    check_parallel(SMOL, tensor=3, pipeline=2)
    with pytest.raises(ValueError, match=r"9 attention heads; use one of \[1, 3\]"):
        check_parallel(SMOL, tensor=2, pipeline=1)


def test_every_stage_needs_a_layer():
    check_parallel(SMOL, tensor=1, pipeline=4)
    check_parallel(SMOL, tensor=1, pipeline=5, virtual_pipeline=6)
    with pytest.raises(ValueError, match="30 layers; use at most 30"):
        check_parallel(SMOL, tensor=1, pipeline=31)
    with pytest.raises(ValueError, match="virtual_pipeline_model_parallel_size = 7: .* 30 layers"):
        check_parallel(SMOL, tensor=1, pipeline=5, virtual_pipeline=7)


@pytest.mark.parametrize(
    ("settings", "layout"),
    [
        ({}, None),
        ({"pipeline_layout": "even"}, (8, 8, 7, 7)),
        ({"pipeline_layout": [13, 9, 8, 0]}, (13, 9, 8, 0)),
        ({"num_layers_in_first_pipeline_stage": 9}, (9, 7, 7, 7)),
        ({"num_layers_in_first_pipeline_stage": 27}, (27, 1, 1, 1)),
    ],
)
def test_a_pipeline_is_cut_as_it_is_asked_to(parse, settings, layout):
    from megatron_mod.training.pipeline import asked_layout

    config = parse(parallel={"pipeline_model_parallel_size": 4, **settings})
    assert asked_layout(config.parallel, SMOL) == layout


def test_a_layout_is_also_taken_from_the_command_line(parse):
    from megatron_mod.training.pipeline import asked_layout

    parallel = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
    config = parse("--parallel.pipeline_layout", "[12, 6, 6, 6]", parallel=parallel)
    assert asked_layout(config.parallel, SMOL) == (12, 6, 6, 6)
    assert asked_layout(parse("--parallel.pipeline_layout=even").parallel, SMOL) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"pipeline_layout": [18, 12, 0]},
            r"\[18, 12, 0\]: gives the layers of 3 .* is 4; .* auto",
        ),
        ({"pipeline_layout": [8, 8, 8, 8]}, "is 32 layers and this model has 30; .* auto"),
        ({"pipeline_layout": [15, 0, 8, 7]}, "only the last stage, .* without layers; .* auto"),
        ({"pipeline_layout": [0, 15, 8, 7]}, "only the last stage, .* without layers; .* auto"),
        ({"pipeline_layout": [31, 1, -1, -1]}, r"pipeline_layout = -1.*must be at least 0"),
        ({"pipeline_layout": "evn"}, "pipeline_layout = evn.* must be auto, even or a list"),
        ({"num_layers_in_first_pipeline_stage": 28}, "leave the other 3 .* at least one"),
        (
            {"num_layers_in_first_pipeline_stage": 9, "pipeline_layout": "even"},
            "pipeline_layout = even and .* leave the second out",
        ),
        (
            {"num_layers_in_first_pipeline_stage": 9, "virtual_pipeline_model_parallel_size": 2},
            "virtual pipeline's chunks; leave it out",
        ),
        (
            {"num_layers_in_first_pipeline_stage": 30, "pipeline_model_parallel_size": 1},
            r"stage = 30: .*\(2 or more\)",
        ),
        ({"pipeline_layout": [18, 12], "pipeline_model_parallel_size": 1}, "2 stage.* is 1; "),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(parse, settings, message):
    from megatron_mod.training.pipeline import asked_layout

    with pytest.raises(ValueError, match=message):
        asked_layout(parse(parallel={"pipeline_model_parallel_size": 4, **settings}).parallel, SMOL)


def test_world_size_must_fit():
    assert plan(tensor=2, pipeline=2, world_size=8).data == 2
    with pytest.raises(ValueError, match="= 4 does not divide the 6 ranks"):
        plan(tensor=2, pipeline=2, world_size=6)


def test_tools_name_their_own_options():
    degrees = {"tensor": 3, "pipeline": 1}
    with pytest.raises(ValueError, match=r"--tensor \(3\) x --pipeline \(1\) = 3 does not divide"):
        check_ranks(degrees, world_size=2, names=OPTIONS)
    with pytest.raises(ValueError, match="^--tensor 2: does not divide .* 9 attention heads"):
        check_parallel(SMOL, tensor=2, pipeline=1, names=OPTIONS)
    with pytest.raises(ValueError, match=r"^--pipeline 31: .* use at most 30\.$"):
        check_parallel(SMOL, tensor=1, pipeline=31, names=OPTIONS)


def test_batches_must_be_shared_evenly():
    check_batches(global_batch_size=8, micro_batch_size=2, data_ranks=4)
    with pytest.raises(ValueError, match="use 12, for example"):
        check_batches(global_batch_size=10, micro_batch_size=2, data_ranks=3)
