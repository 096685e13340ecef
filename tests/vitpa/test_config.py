"""The configuration: one checked path from defaults, YAML and overrides to a signature that means one experiment."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from tests.support.at_once import at_once
from vitpa.arguments import ConfigError
from vitpa.config import RunConfig
from vitpa.config_file import (
    fields_of,
    keys_help,
    load_config,
    parse_config,
    preset,
    read_yaml,
    record_config,
    shipped_configs,
)
from vitpa.documents import to_yaml

SMALL: dict[str, Any] = {
    "dataset": "cifar10",
    "seed": 7,
    "model": {"embed_dim": 64, "depth": 2, "num_heads": 4},
    "optim": {"lr": 3e-4, "warmup_epochs": 1},
    "train": {"epochs": 3, "global_batch_size": 32},
}
SMALL_SIGNATURE = "b45ea57bf99f4a85"  # what was computed under it is found by it: a change gives up every older run

OTHER = {  # for each key outside `runtime` a value that is not SMALL's
    "dataset": "cifar100",
    "seed": "8",
    "model.kind": "resnet18",
    "model.attention": "positional",
    "model.img_size": "64",
    "model.patch_size": "8",
    "model.embed_dim": "128",
    "model.depth": "3",
    "model.num_heads": "8",
    "model.mlp_ratio": "2",
    "model.drop_path_rate": "0.1",
    "model.pos_embed_std": "0.2",
    "model.global_pool": "avg",
    "augment.crop": "none",
    "augment.crop_padding_px": "5",
    "augment.crop_scale": "[0.08, 0.9]",
    "augment.crop_ratio": "[0.75, 1.5]",
    "augment.hflip": "false",
    "augment.policy": "autoaugment_svhn",
    "augment.randaugment_num_ops": "1",
    "augment.randaugment_magnitude": "10",
    "augment.randaugment_magnitude_std": "1",
    "augment.color_jitter": "[0.3, 0.3, 0.3]",
    "augment.erase_prob": "0.25",
    "augment.erase_mode": "pixel",
    "augment.erase_scale": "[0.02, 0.4]",
    "augment.erase_ratio": "[0.3, 4]",
    "augment.cutout_px": "16",
    "augment.mixup_alpha": "0.8",
    "augment.cutmix_alpha": "1",
    "augment.mixup_switch_prob": "0.4",
    "augment.permute_block_px": "8",
    "augment.eval_crop_pct": "0.9",
    "optim.lr": "2e-4",
    "optim.min_lr": "0",
    "optim.warmup_epochs": "2",
    "optim.weight_decay": "0.1",
    "optim.betas": "[0.9, 0.95]",
    "optim.eps": "1e-6",
    "optim.label_smoothing": "0",
    "optim.grad_clip_norm": "null",
    "train.epochs": "4",
    "train.holdout": "0.1",
    "train.global_batch_size": "64",
    "train.ema_decay": "0.999",
    "train.precision": "float32",
    "train.image_sizes": "[[0,16],[2,32]]",
    "train.order": "quasi_random",
}
NEEDS = {"train.image_sizes": ["augment.crop=random_resized"]}  # without which they cannot be had
OTHER_RUNTIME = {
    "runtime.keep_epochs": "[1]",
    "runtime.root": "elsewhere",
    "runtime.data_dir": "elsewhere",
    "runtime.stage_dir": "/tmp",
    "runtime.compile_cache": "/tmp",
    "runtime.device": "cpu",
    "runtime.accum_steps": "2",
    "runtime.step": "eager",
    "runtime.torch_operations": "[attention]",
    "runtime.loader": "stream",
    "runtime.decoder": "cpu",
    "runtime.tensorboard": "false",
    "runtime.takeover": "true",
}


def config(*overrides: str) -> RunConfig:
    return parse_config(SMALL, "here", overrides)


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def nested(key: str, text: str) -> dict[str, Any]:
    """A document with the one dotted key, its value read as YAML."""
    document = yaml.safe_load(text)
    for part in reversed(key.split(".")):
        document = {part: document}
    assert isinstance(document, dict)
    return document


def refused(path: Path, *overrides: str) -> str:
    """The one line with which a configuration is refused."""
    with pytest.raises(ConfigError) as raised:
        load_config(path, overrides)
    line = str(raised.value)
    assert "\n" not in line
    return line


def test_overrides_win_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "dataset: cifar10\nmodel:\n  depth: 3\n  num_heads: 6\n")
    got = load_config(path, ["model.depth=4", "optim.lr=2e-3"])
    assert (got.model.depth, got.model.num_heads, got.optim.lr) == (4, 6, 2e-3)
    assert got.model.patch_size == parse_config({"dataset": "cifar10"}, "here").model.patch_size


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["seed=1", "seed=2"], "seed=1 and seed=2: seed is given twice; say one of them"),
        (["seed=1", "optim.lr=1", "seed=1"], "seed=1 and seed=1: seed is given twice; say one of them"),
        (["optim.lr=1e-3", "optim.lr=2e-3"], "optim.lr=1e-3 and optim.lr=2e-3: optim.lr is given twice; say one of them"),
        (
            ["optim.betas=[0.9, 1]", "optim.betas=null"],
            "optim.betas=[0.9, 1] and optim.betas=null: optim.betas is given twice",
        ),
        (
            ["runtime.root=a", "runtime.root=b"],
            "runtime.root=a and runtime.root=b: runtime.root is given twice; say one of them",
        ),
    ],
)
def test_a_key_that_the_command_line_gives_twice_is_refused(tmp_path: Path, overrides: list[str], line: str) -> None:
    assert refused(write(tmp_path, to_yaml(SMALL)), *overrides).startswith(f"command line: {line}")
    assert load_config(Path("digits"), [preset("seed=1"), preset("seed=2"), "seed=3"]).seed == 3  # a program's own give way


def integers() -> list[str]:
    """Every key that takes whole numbers."""
    keys = []
    for key, _ in fields_of(RunConfig):
        model: Any = RunConfig
        *sections, name = key.split(".")
        for section in sections:
            model = model.model_fields[section].annotation
        if model.model_fields[name].annotation in (int, int | None):
            keys.append(key)
    return keys


@pytest.mark.parametrize("key", integers())
def test_a_whole_number_has_bounds_which_the_help_states(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^command line: {key}=1{'0' * 20}: Input should be less than or equal to \d+$"):
        config(f"{key}=1{'0' * 20}")
    line = next(line for line in keys_help().splitlines() if line.startswith(f"  {key} "))
    stated = re.search(r"\(([\d,]+) to ([\d,]+)\)$", line)
    assert stated is not None
    with pytest.raises(ConfigError, match=f"less than or equal to {stated[2].replace(',', '')}"):
        config(f"{key}={int(stated[2].replace(',', '')) + 1}")


@pytest.mark.parametrize("override", ["model={num_heads: 6}", "model=7", "train={epochs: 3}"])
def test_an_override_of_a_section_is_refused_as_it_would_drop_the_recipes_other_keys(tmp_path: Path, override: str) -> None:
    path = write(tmp_path, "dataset: cifar10\nmodel:\n  depth: 3\n")
    section = override.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"{section} is a section; give its keys one by one, as {section}\.KEY=VALUE"):
        load_config(path, [override])


def test_overrides_leave_the_document_alone() -> None:
    before = copy.deepcopy(SMALL)
    config("model.depth=9", "runtime.workers=3")
    assert before == SMALL


@pytest.mark.parametrize(("name", "path"), shipped_configs().items())
def test_a_shipped_recipe_loads_by_name_and_opens_with_its_source_and_command(name: str, path: Path) -> None:
    by_name = load_config(Path(name))
    assert by_name == load_config(path)
    assert name == by_name.dataset or name.startswith(f"{by_name.dataset}_"), "several recipes of a data set are DATASET_NAME"
    comments = [line for line in path.read_text().split("\ndataset:")[0].splitlines() if line]
    assert all(line.startswith("#") for line in comments)
    header = "\n".join(comments)
    assert re.search(r"^# Source: \S", header, re.MULTILINE)
    assert re.search(rf"^# Command: .*\bvitpa train {name}\b", header, re.MULTILINE)


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "0.001", "'1e-3'"])
def test_a_number_is_a_number_however_it_is_written(tmp_path: Path, text: str) -> None:
    got = load_config(write(tmp_path, f"dataset: cifar10\noptim:\n  lr: {text}\n  betas: [9e-1, {text}]\n"))
    assert got.optim.lr == 0.001
    assert got.optim.betas == (0.9, 0.001)
    assert isinstance(got.optim.lr, float)


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("dataset: digits\nseed: 1\n# a comment\nseed: 2\n", 4, "seed"),
        ("dataset: digits\noptim:\n  lr: 1.0\n  eps: 1.0\n\n  lr: 2.0\n", 6, "lr"),
        ("dataset: digits\noptim: {lr: 1.0, lr: 1.0}\n", 2, "lr"),
        ("model:\n  depth: 1\ndataset: digits\nmodel:\n  depth: 1\n", 4, "model"),
    ],
)
def test_a_key_given_twice_is_refused_with_its_line(tmp_path: Path, text: str, line: int, key: str) -> None:
    path = write(tmp_path, text)
    assert refused(path) == f"{path}: line {line}: the key '{key}' is given 2 times"


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("optim.lrr", r"unknown key optim\.lrr; did you mean optim\.lr\?"),
        ("lr", r"unknown key lr; did you mean optim\.lr\?"),
        ("train.depth", r"unknown key train\.depth; did you mean model\.depth\?"),
        ("optimm.lr", r"unknown key optimm\.lr; did you mean optim\.lr\?"),
        ("trian.epochs", r"unknown key trian\.epochs; did you mean train\.epochs\?"),
        ("Seed", r"unknown key Seed; did you mean seed\?"),
        ("runtime.num_workers", r"unknown key runtime\.num_workers; did you mean runtime\.workers\?"),
        ("zzz", r"unknown key zzz; known keys: dataset, seed, model\.kind, model\.attention, .*experiment_version$"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(tmp_path: Path, key: str, message: str) -> None:
    path = write(tmp_path, to_yaml(SMALL))
    line = refused(path, f"{key}=1")
    assert line.startswith("command line: ")
    assert re.search(message, line), line
    line = refused(write(tmp_path, to_yaml({**SMALL, **nested(key, "1")})), "seed=1")  # the same from the file
    assert line.startswith(f"{path}: ")
    assert re.search(message, line)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.depth=7.0", r"model\.depth=7\.0: .*valid integer"),
        ("model.depth='7'", r"model\.depth=7: .*valid integer"),
        ("model.depth=true", r"model\.depth=true: .*valid integer"),
        ("model.depth=1e2", r"model\.depth=1e2: .*valid integer"),
        ("model.depth=null", r"model\.depth=null: .*valid integer"),
        ("model.depth=0", r"model\.depth=0: .*greater than or equal to 1"),
        ("seed=-1", r"seed=-1: .*greater than or equal to 0"),
        ("seed=2147483648", r"seed=2147483648: .*less than or equal to 2147483647"),
        ("augment.hflip=1", r"augment\.hflip=1: .*valid boolean"),
        ("augment.hflip='true'", r"augment\.hflip=true: .*valid boolean"),
        (
            "augment.policy=autoaugment",
            r"augment\.policy=autoaugment: .*'autoaugment_cifar10'.*'randaugment' or 'randaugment_timm'",
        ),
        ("augment.randaugment_num_ops=0", r"augment\.randaugment_num_ops=0: .*greater than or equal to 1"),
        ("augment.randaugment_magnitude=31", r"augment\.randaugment_magnitude=31: .*less than or equal to 30"),
        ("augment.erase_prob=1.5", r"augment\.erase_prob=1\.5: .*less than or equal to 1"),
        ("augment.erase_scale=[0.1]", r"augment\.erase_scale\.1 is missing"),
        ("augment.erase_mode=rand", r"augment\.erase_mode=rand: .*'const' or 'pixel'"),
        ("augment.mixup_alpha=-1", r"augment\.mixup_alpha=-1: .*greater than or equal to 0"),
        ("augment.mixup_switch_prob=2", r"augment\.mixup_switch_prob=2: .*less than or equal to 1"),
        ("augment.cutout_px=-1", r"augment\.cutout_px=-1: .*greater than or equal to 0"),
        ("augment.eval_crop_pct=0.0001", r"augment\.eval_crop_pct=0\.0001: .*greater than or equal to 0\.1"),
        ("model.mlp_ratio=1e300", r"model\.mlp_ratio=1e\+?300: .*less than or equal to 100"),
        ("optim.lr=true", r"optim\.lr=true: .*valid number"),
        ("optim.lr=fast", r"optim\.lr=fast: .*valid number"),
        ("optim.lr=[1]", r"optim\.lr=\[1\]: .*valid number"),
        ("optim.lr=.nan", r"\.nan is not a finite number"),
        ("optim.lr=nan", r"optim\.lr=nan: .*valid number"),
        ("optim.lr=.inf", r"\.inf is not a finite number"),
        ("optim.lr=inf", r"optim\.lr=inf: .*valid number"),
        ("optim.lr=1e999", r"1e999.*finite number that float64 can hold"),
        ("optim.min_lr=1e-400", r"1e-400.*finite number that float64 can hold"),
        ("optim.lr='1e-400'", r"optim\.lr=1e-400: .*finite number that float64 can hold"),
        ("augment.crop_scale=[1e-400, 1]", r"1e-400.*finite number that float64 can hold"),
        ("optim.betas=[0.9, nan]", r"optim\.betas\.1=nan: "),
        ("optim.betas=[0.9]", r"optim\.betas\.1 is missing"),
        ("model.attention=linear", r"model\.attention=linear: .*'content' or 'positional'"),
        ("dataset=../data", r"dataset=\.\./data: take lower-case letters, digits, _ and -, and begin with a letter or digit$"),
        ("dataset=10", r"dataset=10: .*valid string"),
    ],
)
def test_a_value_of_another_type_or_range_is_refused(tmp_path: Path, override: str, message: str) -> None:
    path = write(tmp_path, to_yaml(SMALL))
    assert re.search(message, refused(path, override))
    key, _, value = override.partition("=")
    document = {**SMALL, **nested(key, value)}
    assert re.search(message, refused(write(tmp_path, to_yaml(document))))  # the same from the file


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("model.embed_dim=65", r"model\.embed_dim=65 is not a multiple of model\.num_heads=4"),
        ("model.mlp_ratio=0.001", r"model\.mlp_ratio=0\.001 of model\.embed_dim=64 is less than 1 hidden unit"),
        (
            "augment.crop=random_resized augment.crop_scale=[1e-9,1e-4]",
            r"augment\.crop_scale=\[1e-09, 0\.0001\] is less than a pixel of model\.img_size=32",
        ),
        (
            "augment.erase_prob=1 augment.erase_scale=[1e-9,1e-4]",
            r"augment\.erase_scale=.* is less than a pixel of model\.img_s",
        ),
        ("model.patch_size=5", r"model\.img_size=32 is not a multiple of model\.patch_size=5"),
        (
            "augment.policy=randaugment_timm augment.randaugment_magnitude=11",
            r"augment\.randaugment_magnitude=11: augment\.policy=randaugment_timm takes 0 to 10",
        ),
        (
            "augment.cutmix_alpha=1 runtime.accum_steps=32",
            r"augment\.mixup_alpha and augment\.cutmix_alpha .*train\.global_batch_size / runtime\.accum_steps=1 even",
        ),
        ("augment.crop_scale=[0.5,0.2]", r"augment\.crop_scale=\[0\.5, 0\.2\] is not a range"),
        ("augment.crop_ratio=[0,1]", r"augment\.crop_ratio=\[0\.0, 1\.0\] is not a range"),
        ("augment.crop_scale=[0.5,1.5]", r"augment\.crop_scale=\[0\.5, 1\.5\] goes beyond the whole image"),
        ("augment.erase_scale=[0.5,0.2]", r"augment\.erase_scale=\[0\.5, 0\.2\] is not a range of positive numbers"),
        ("augment.erase_scale=[0.5,1.5]", r"augment\.erase_scale=\[0\.5, 1\.5\] goes beyond the whole image"),
        ("augment.erase_ratio=[0,1]", r"augment\.erase_ratio=\[0\.0, 1\.0\] is not a range"),
        (
            "model.kind=resnet18 model.attention=positional",
            r"model\.attention=positional is for model\.kind=vit; model\.kind=resnet18 has no attention",
        ),
        ("augment.color_jitter=[0.3]", r"augment\.color_jitter=\[0\.3\]: expected \[brightness, .* or \[\] for none"),
        ("augment.color_jitter=[0.3,0.3,0.3,0.6]", r"augment\.color_jitter=.*: the hue, the last, must be at most 0\.5"),
        ("augment.color_jitter=[0.3,-1,0.3]", r"augment\.color_jitter"),
        ("model.kind=resnet18 train.ema_decay=0.9", r"train\.ema_decay=0\.9: the batch norm of .*; it must be 0"),
        ("model.kind=resnet18 runtime.accum_steps=2", r"runtime\.accum_steps=2: the batch norm of .*; it must be 1"),
        (
            "model.kind=resnet18 train.global_batch_size=1",
            r"global_batch_size=1: the batch norm of .* takes 2 images at least",
        ),
        ("augment.permute_block_px=5", r"augment\.permute_block_px=5 does not divide model\.img_size=32"),
        ("augment.permute_block_px=64", r"augment\.permute_block_px=64 does not divide model\.img_size=32"),
        ("augment.cutout_px=33", r"augment\.cutout_px=33 is more than model\.img_size=32"),
        ("optim.min_lr=1e-2", r"optim\.min_lr=0\.01 is above optim\.lr=0\.0003"),
        ("optim.betas=[0.9,1.0]", r"optim\.betas=\[0\.9, 1\.0\]: each must be in \[0, 1\)"),
        ("optim.warmup_epochs=4", r"optim\.warmup_epochs=4\.0 is longer than train\.epochs=3"),
        (
            "train.order=quasi_random runtime.loader=resident",
            r"train\.order=quasi_random is for .* streamed; leave out runtime\.loader=resident, or set train\.order=random",
        ),
        ("runtime.accum_steps=3", r"train\.global_batch_size=32 is not a multiple of runtime\.accum_steps=3"),
    ],
)
def test_a_bad_combination_names_its_keys(overrides: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(*overrides.split())


@pytest.mark.parametrize(
    ("sizes", "others", "message"),
    [
        ("[[0,32]]", "model.kind=resnet18", r"is for model\.kind=vit, .*; model\.kind=resnet18 has none"),
        ("[[0,16],[1,32]]", "augment.crop=padded", r"is for augment\.crop=random_resized, .* not for augment\.crop=padded"),
        ("[[0,16],[1,32]]", "augment.permute_block_px=8", r"or set augment\.permute_block_px=8 to 0"),
        ("[[0,16],[1,32]]", "augment.cutout_px=17", r"augment\.cutout_px=17 is more than 16 px"),
        ("[[0,32]]", "", r"32 px is the size of all images without it; leave it out"),
        ("[[1,24],[2,32]]", "", r"the first size must be that of epoch 0, not of epoch 1"),
        ("[[0,16],[2,24],[1,32]]", "", r"expected \[\[epoch, px\], \.\.\.\] with rising epochs"),
        ("[[0,16],[0,32]]", "", r"with rising epochs"),
        ("[[0,16],[3,32]]", "", r"epoch 3 is not before the end, train\.epochs=3"),
        ("[[0,64],[1,32]]", "", r"64 px is more than model\.img_size=32"),
        ("[[0,16],[1,24]]", "", r"the last must be model\.img_size=32, which evaluations have"),
        ("[[0,18],[1,32]]", "", r"18 px is not a multiple of model\.patch_size=4"),
    ],
)
def test_image_sizes_that_cannot_be_are_refused_in_a_line(sizes: str, others: str, message: str) -> None:
    said = re.escape(f"command line: train.image_sizes={sizes.replace(',', ', ')}: ")
    crop = [] if "augment.crop" in others else ["augment.crop=random_resized"]
    with pytest.raises(ConfigError, match=f"^{said}.*{message}"):
        config(*crop, *others.split(), f"train.image_sizes={sizes}")


def test_an_epochs_image_size_is_that_of_the_last_entry_before_it(tmp_path: Path) -> None:
    text = "dataset: photos\naugment: {crop: random_resized}\ntrain: {epochs: 9, image_sizes: [[0, 16], [3, 24], [4, 32]]}\n"
    found = load_config(write(tmp_path, text))
    assert [found.train_img_size(epoch) for epoch in range(9)] == [16] * 3 + [24] + [32] * 5
    assert config().train_img_size(0) == 32


def test_null_is_written_out(tmp_path: Path) -> None:
    """`~` and nothing at all are null in YAML, too, and used to switch off what they were given for."""
    for null in ("null", "Null", "NULL", "!!null null"):
        assert config(f"optim.grad_clip_norm={null}", f"runtime.stage_dir={null}").optim.grad_clip_norm is None
    assert config("optim.grad_clip_norm=null").runtime.stage_dir is None
    assert config("runtime.stage_dir=~/").runtime.stage_dir == "~/"
    assert config("runtime.stage_dir='~'").runtime.stage_dir == "~"
    path = write(tmp_path, "dataset: cifar10\nruntime:\n  stage_dir: ~\n")
    assert refused(path) == f"{path}: line 3: ~ by itself is null in YAML; ~/ is the home directory; write null for none"
    path = write(tmp_path, "dataset: cifar10\noptim:\n  lr: 0.1\n  grad_clip_norm:\n")
    assert refused(path) == f"{path}: line 4: no value; write null for none"
    assert load_config(write(tmp_path, to_yaml(config("optim.grad_clip_norm=null").model_dump()))).optim.grad_clip_norm is None


def test_several_mistakes_are_told_at_once() -> None:
    with pytest.raises(
        ConfigError, match=r"^command line: seed=-1: [^;]+; unknown key model\.dept; did you mean model\.depth\?$"
    ):
        config("seed=-1", "model.dept=1")


def test_a_configuration_cannot_be_changed() -> None:
    got = config()
    with pytest.raises(ValidationError, match="frozen"):
        got.seed = 1  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        got.model.depth = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr", r"override 'optim\.lr': expected key=value, such as optim\.lr=3e-4"),
        ("=1", r"override '=1': expected key=value"),
        (".lr=1", r"override '\.lr=1': expected key=value"),
        ("optim..lr=1", r"override 'optim\.\.lr=1': expected key=value"),
        ("--seed", r"override '--seed': expected key=value"),
        ("seed.x=1", r"override 'seed\.x': seed is a value, not a section"),
        ("seed=[", r"override 'seed=\[': not valid YAML"),
        *(
            (f"{key}={nothing}", rf"override '{key}=.*': {why}.*; write null for none")
            for key in ("runtime.stage_dir", "runtime.root", "optim.grad_clip_norm", "runtime.workers", "seed")
            for nothing, why in {"": "no value", " ": "no value", "# none": "no value", "~": "~ by itself is null"}.items()
        ),
        ("model={depth: 1, depth: 2}", r"override .*: the key 'depth' is given 2 times"),
        ("optim.lr=2024-01-01", r"optim\.lr=2024-01-01: .*valid number"),
        ("optim.lr=!!set {a}", r"override 'optim\.lr=!!set {a}': the tag !!set is not for our files; leave it out"),
    ],
)
def test_an_override_of_another_form_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(override)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"expected `key: value` lines, found nothing"),
        ("- dataset\n", r"expected `key: value` lines, found a list"),
        ("digits\n", r"expected `key: value` lines, found a single value"),
        ("dataset: [\n", r"not valid YAML: .*line 2"),
        ("dataset: digits\n\tseed: 1\n", r"not valid YAML: .*line 2"),
        ("dataset: !!python/name:os.system x\n", r"line 1: the tag !!python/name:os\.system is not for our files"),
        ("{[a]: 1}\n", r"line 1: a key must be a name"),
        ("dataset: 2024-01-01\nseed: 2024-01-01\n", r"seed=2024-01-01: .*valid integer"),
        ("dataset: !!binary aGk=\n", r"line 1: the tag !!binary is not for our files"),
        ("dataset: digits\nmodel: &a [*a]\n", r"line 2: an alias of what it is in"),
        ("seed: 1\n", r"dataset is missing"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    line = refused(path)
    assert line.startswith(f"{path}: ")
    assert re.search(message, line)


BAD = os.fsdecode(b"x\xff")
NOT_UTF8 = "bytes that are not UTF-8, which no configuration can hold; give that file or folder another name"


def test_bytes_that_are_not_utf_8_are_named_with_their_key(tmp_path: Path) -> None:
    path = write(tmp_path, to_yaml(SMALL))
    for key in ("runtime.root", "runtime.stage_dir", "dataset", "seed", BAD):
        assert refused(path, f"{key}={BAD}") == f"override {f'{key}={BAD}'!r}: {NOT_UTF8}"
    assert refused(path, 'runtime.root="x\\udcff"') == f"command line: runtime.root={BAD}: {NOT_UTF8}"
    path = write(tmp_path, to_yaml({**SMALL, "runtime": {"data_dir": BAD}}))
    assert refused(path, "seed=1") == f"{path}: runtime.data_dir={BAD}: {NOT_UTF8}"
    path = write(tmp_path, to_yaml({**SMALL, BAD: 1}))
    assert refused(path) == f"{path}: the key {BAD!r}: {NOT_UTF8}"


def test_a_recipe_may_lie_where_names_are_not_utf_8(tmp_path: Path) -> None:
    folder = tmp_path / BAD
    folder.mkdir()
    assert load_config(write(folder, to_yaml(SMALL))).signature == SMALL_SIGNATURE


def test_a_missing_file_and_one_that_is_no_text(tmp_path: Path) -> None:
    names = ", ".join(shipped_configs())
    assert refused(tmp_path / "none.yaml") == (
        f"{tmp_path}/none.yaml: no such file, and no shipped recipe of that name (there are {names})"
    )
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"dataset: \xff\n")
    assert re.search(r"recipe\.yaml: not a text in UTF-8 \(.*at byte 9", refused(path))
    with pytest.raises(ConfigError, match=r"cannot be read \(.*Is a directory"):
        read_yaml(tmp_path)


def test_the_signature_of_a_fixed_document_is_stable() -> None:
    assert config().signature == SMALL_SIGNATURE


@pytest.mark.parametrize(
    "as_it_was",
    [
        "train.order=random",
        "train.holdout=0.0",
        "augment.permute_block_px=0",
        "model.kind=vit",
        "model.global_pool=token",
        "augment.color_jitter=[]",
        "train.ema_decay=0",
        "train.image_sizes=[]",
    ],
)
def test_a_younger_key_that_is_written_out_as_it_always_was_makes_no_other_run(tmp_path: Path, as_it_was: str) -> None:
    assert config(as_it_was).signature == SMALL_SIGNATURE
    run = record_config(config(as_it_was, f"runtime.root={tmp_path}"))
    assert as_it_was.partition(".")[2].replace("=", ": ") in run.config_yaml.read_text()  # the record has it
    record_config(config(f"runtime.root={tmp_path}"))


def test_of_a_resnet_only_what_counts_for_it_makes_another_run() -> None:
    resnet = config("model.kind=resnet18")
    assert (resnet.network_name, config().network_name) == ("resnet18", "content")
    assert resnet.experiment()["model"] == {"kind": "resnet18", "attention": "content", "img_size": 32}
    for override in ("model.patch_size=5", "model.depth=3", "model.num_heads=7", "model.global_pool=avg"):
        assert config("model.kind=resnet18", override).signature == resnet.signature
    assert config("model.kind=resnet18", "model.img_size=30").signature != resnet.signature


def test_the_table_of_other_values_has_every_key() -> None:
    keys = {key for key, _ in fields_of(RunConfig) if not key.startswith("runtime.")}
    assert set(OTHER) == keys - {"experiment_version"}  # there is only one so far


SHIPPED_SIGNATURES = {
    "cifar10": "2a7491d95151c22e",
    "cifar10_strong": "6395c98f091111ff",
    "cifar100": "19f467fc6728925c",
    "cifar100_strong": "c4a8d3b34b20411c",
    "digits": "0746b6c6a1d25b57",
    "imagenet": "a802366e4cfdbdb6",
    "imagenet_light": "3ba0c61d1c262f87",
    "imagenette": "4093a3ece01a7aba",
    "svhn": "6d53d1d2c6452f4a",
}


def test_the_shipped_recipes_are_the_runs_they_always_were() -> None:
    assert {name: load_config(Path(name)).signature for name in shipped_configs()} == SHIPPED_SIGNATURES


@pytest.mark.parametrize(("key", "value"), OTHER.items())
def test_whatever_may_change_the_numbers_changes_the_signature(key: str, value: str) -> None:
    needed = NEEDS.get(key, [])
    other = config(f"{key}={value}", *needed)
    assert re.fullmatch(r"[0-9a-f]{16}", other.signature)
    assert other.signature != config(*needed).signature


def test_all_these_signatures_differ() -> None:
    assert len({config(f"{key}={value}", *NEEDS.get(key, [])).signature for key, value in OTHER.items()}) == len(OTHER)


@pytest.mark.parametrize("key", [key for key, _ in fields_of(RunConfig) if key.startswith("runtime.")])
def test_the_runtime_does_not_change_the_signature(key: str) -> None:
    other = config(f"{key}={OTHER_RUNTIME.get(key, '3')}" if key != "runtime.accum_steps" else f"{key}=4")
    assert other.runtime != config().runtime
    assert other.signature == SMALL_SIGNATURE


def test_the_signature_is_of_the_meaning_not_of_the_spelling(tmp_path: Path) -> None:
    turned = {
        key: dict(reversed(value.items())) if isinstance(value, dict) else value for key, value in reversed(SMALL.items())
    }
    assert parse_config(turned, "here").signature == SMALL_SIGNATURE
    assert config("optim.warmup_epochs=1.0").signature == config("optim.warmup_epochs=1").signature == SMALL_SIGNATURE
    assert config("optim.lr=0.0003", "model.mlp_ratio=1").signature == SMALL_SIGNATURE
    defaults_written_out = load_config(write(tmp_path, to_yaml(config().model_dump(mode="json"))))
    assert defaults_written_out.signature == SMALL_SIGNATURE


@pytest.mark.parametrize("name", shipped_configs())
def test_a_recorded_configuration_reads_back_as_itself(tmp_path: Path, name: str) -> None:
    whole = load_config(Path(name), [f"runtime.root={tmp_path}"])
    run = record_config(whole)
    assert run.path == tmp_path / "runs" / whole.signature
    again = load_config(run.config_yaml)
    assert again == whole
    assert again.signature == whole.signature


def test_recording_twice_keeps_the_first_and_a_run_with_another_runtime_is_the_same(tmp_path: Path) -> None:
    run = record_config(config(f"runtime.root={tmp_path}"))
    first = run.config_yaml.read_bytes()
    record_config(config(f"runtime.root={tmp_path}", "runtime.workers=3"))
    assert run.config_yaml.read_bytes() == first
    assert list(run.path.iterdir()) == [run.config_yaml]


def test_an_edited_document_under_the_same_signature_is_refused(tmp_path: Path) -> None:
    whole = config(f"runtime.root={tmp_path}")
    run = record_config(whole)
    run.config_yaml.write_text(run.config_yaml.read_text().replace("seed: 7", "seed: 8"))
    with pytest.raises(
        ConfigError, match=rf"config\.yaml: another experiment under the signature {whole.signature}; .*restore"
    ):
        record_config(whole)


def test_processes_that_record_at_once_agree(tmp_path: Path) -> None:
    record = """
    import sys
    from pathlib import Path
    from vitpa.config_file import load_config, record_config
    recipe, root, number = sys.argv[1:]
    configs = [load_config(Path(recipe), [f"runtime.root={root}", f"seed={seed}"]) for seed in range(30)]
    ready()
    print(*(record_config(config).signature for config in configs))
    """
    recipe = write(tmp_path, to_yaml(SMALL))
    answers = at_once(record, 2, recipe, tmp_path)
    assert answers[0] == answers[1]
    runs = list((tmp_path / "runs").iterdir())
    assert sorted(run.name for run in runs) == sorted(answers[0].split())
    for run in runs:
        assert [path.name for path in run.iterdir()] == ["config.yaml"]
        assert load_config(run / "config.yaml").signature == run.name


def numbers_of(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted keys of single numbers with a point."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from numbers_of(field.annotation, f"{prefix}{name}.")
        elif float in (field.annotation, *get_args(field.annotation)):
            yield prefix + name


@pytest.mark.parametrize("key", sorted(numbers_of(RunConfig)))
def test_every_number_has_bounds(tmp_path: Path, key: str) -> None:
    path = write(tmp_path, to_yaml(SMALL))
    assert re.search(rf"{re.escape(key)}=1e\+?308: Input should be less than", refused(path, f"{key}=1e308"))
    assert re.search(rf"{re.escape(key)}=-1e-?30: Input should be greater than", refused(path, f"{key}=-1e-30"))


@pytest.mark.parametrize(
    "text", ["/tmp/my #1 run", "/tmp/a\nb", "a\x85b", " x ", "&a b", "--- x", "\ufeffx", "'a' #b", "a: b", "{x: y}"]
)
def test_a_text_that_yaml_reads_otherwise_is_refused(tmp_path: Path, text: str) -> None:
    line = refused(write(tmp_path, to_yaml(SMALL)), f"runtime.root={text}")
    assert "both kinds of quotes" in line


@pytest.mark.parametrize("override", ["train.epochs=5 #6", "optim.lr=1e-3 # faster", "runtime.tensorboard=true\n"])
def test_a_value_with_a_comment_is_refused(tmp_path: Path, override: str) -> None:
    assert "YAML reads only" in refused(write(tmp_path, to_yaml(SMALL)), override)


@pytest.mark.parametrize("text", ["'/tmp/my #1 run'", '"a: b"', "/tmp/x", "it's", "a#b"])
def test_a_whole_text_is_taken(tmp_path: Path, text: str) -> None:
    config = load_config(write(tmp_path, to_yaml(SMALL)), [f"runtime.root={text}"])
    assert config.runtime.root == (text[1:-1] if text[0] in "'\"" else text)


def test_a_dotted_key_in_a_file_says_how_to_write_it(tmp_path: Path) -> None:
    line = refused(write(tmp_path, to_yaml({**SMALL, "train.epochs": 3})), "seed=1")
    assert "unknown key train.epochs; write it as a section: `train:`, and below it, indented, `epochs: ...`" in line


@pytest.mark.parametrize("key", [key for key, field in fields_of(RunConfig) if "tuple" in str(field.annotation)])
def test_a_single_value_where_several_belong_says_how_to_write_them(tmp_path: Path, key: str) -> None:
    path = write(tmp_path, to_yaml(SMALL))
    example = re.search(rf"write it as `'{key}=(.+)'`", refused(path, f"{key}=7"))
    assert example is not None
    load_config(path, [f"{key}={example[1]}", "train.epochs=300", "augment.crop=random_resized", "model.img_size=224"])
    section, _, name = key.rpartition(".")
    inner = {**SMALL.get(section, {}), name: 7}
    assert f"; write it as `{name}: {example[1]}`" in refused(write(tmp_path, to_yaml({**SMALL, section: inner})))


def test_an_experiment_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, to_yaml(SMALL))
    assert re.search(r"experiment_version=2: .*less than or equal to 1", refused(path, "experiment_version=2"))


def test_an_epoch_beyond_the_last_cannot_be_kept() -> None:
    epochs = config().train.epochs
    assert config(f"runtime.keep_epochs=[1,{epochs}]").runtime.keep_epochs == (1, epochs)
    with pytest.raises(ConfigError, match=f"runtime.keep_epochs has {epochs + 1}, which is beyond train.epochs={epochs}"):
        config(f"runtime.keep_epochs=[1,{epochs + 1}]")
