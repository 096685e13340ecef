"""README.md of an export: the model card, which says what the weights are and how to have them again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from vitpa.config import RunConfig
from vitpa.config_file import load_config, shipped_configs
from vitpa.data.manifest import Manifest, beton_path, manifest_path
from vitpa.datasets import DATASETS, SPLITS, facts_of
from vitpa.errors import UserError
from vitpa.export.files import CHECK_IMAGES, CONFIG, FILES, TOLERANCE, WEIGHTS
from vitpa.export.seeds import Seeds
from vitpa.installation import VERSION
from vitpa.rundir import Result
from vitpa.trained import TrainedRun

RUN_YAML = "run.yaml"  # the run's configuration in an export, without `runtime`
PAPER = (
    "[Vision Transformers provably learn spatial structure](https://arxiv.org/abs/2210.09221) (Jelassi et al., NeurIPS 2022)"
)
READ = """config = json.loads(Path("config.json").read_text())
arguments = {**config["model_args"], "num_classes": config["num_classes"]}
"""


def model_card(
    run: TrainedRun,
    result: Result,
    model: nn.Module,
    *,
    document: dict[str, Any],
    seeds: Seeds,
    made_with: dict[str, Any],
    licence: str,
) -> str:
    """The card, in Markdown with the Hugging Face Hub's header.

    Args:
        run: Finished.
        result: Its result.
        model: With its weights.
        document: What config.json says.
        seeds: Its accuracy over seeds.
        made_with: Its env.json.
        licence: Of the weights.
    """
    config, source = run.config, facts_of(run.config.dataset).source
    header = {
        "license": licence.lower(),
        "library_name": "pytorch" if "file" in document else "timm",
        "tags": ["image-classification", *(["vision-transformer"] if config.model.kind == "vit" else [])],
        "datasets": [config.dataset],
    }
    hashes = [f"- {split}: `{digest}`" for split, digest in sorted(result.beton_sha256.items())]
    copied = f" {FILES[config.network_name]} is vitpa's: MIT." if "file" in document else ""
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {run.name}",
        _what(config, sum(parameter.numel() for parameter in model.parameters())),
        f"## Use\n\n```python\n{snippet(document)}```",
        _images(config, document),
        _accuracy(config, result, seeds),
        "\n".join([f"## Data\n\n{config.dataset}: {source}. SHA-256 of the `.beton` files:\n", *hashes]),
        _training(config, result),
        _versions(result, made_with),
        f"## Licence\n\nWeights: {licence}.{copied} The data set has terms of its own: {source}.",
    ]
    return "\n\n".join(parts) + "\n"


def _what(config: RunConfig, parameters: int) -> str:
    its = config.model
    if its.kind != "vit":
        network = "timm's ResNet-18 with the stem for small images: a 3x3 convolution with stride 1, and no pooling after it"
    else:
        size, pool = (
            f"{its.img_size} x {its.img_size}",
            "a class token" if its.num_prefix_tokens else "the mean of all patches",
        )
        network = (
            f"A ViT for images of {size} pixels (patches of {its.patch_size}, {its.depth} blocks of width {its.embed_dim}, "
        )
        network += f"{its.num_heads} heads, an MLP of {its.mlp_ratio:g} x the width, {pool} for the head), whose attention "
        positional = its.attention == "positional"
        network += "depends on the positional encodings alone" if positional else "is the usual one: timm's VisionTransformer"
    own = ", but for qk and v of the attention" if config.network_name == "positional" else ""
    text = (
        f"{network}. {parameters:,} parameters in float32, with timm's names{own}. Trained with vitpa, in the comparison of "
    )
    text += f"{PAPER}. Data: {config.dataset}; epochs: {config.train.epochs}; seed: {config.seed}."
    if config.train.ema_decay:
        text += "\n\nThe weights are the moving average that the training kept, by which the run is judged "
        text += f"(train.ema_decay={config.train.ema_decay:g}), not those of its last step."
    return text


def snippet(document: dict[str, Any]) -> str:
    """Python that loads the model in the folder of an export."""
    head = "import json\nfrom pathlib import Path\n\n"
    if "file" not in document:
        load = f'model = timm.create_model(config["architecture"], **arguments, checkpoint_path="{WEIGHTS}").eval()\n'
        return f"{head}import timm\n\n{READ}{load}"
    file, builder = document["file"], document["builder"]
    imports = "from safetensors.torch import load_file\n\n"
    imports += f"from {Path(file).stem} import {builder}  # {file}, beside this file; it needs torch, timm and jaxtyping\n\n"
    return f'{head}{imports}{READ}model = {builder}(**arguments).eval()\nmodel.load_state_dict(load_file("{WEIGHTS}"))\n'


def _images(config: RunConfig, document: dict[str, Any]) -> str:
    its = document["pretrained_cfg"]
    text = (
        f"Images (B, {', '.join(map(str, its['input_size']))}) -> logits (B, {document['num_classes']}). Pixels are scaled to "
    )
    text += f"[0, 1], then (x - mean) / std per channel, with mean {its['mean']} and std {its['std']}."
    if its["crop_pct"] != 1:
        text += f" Of larger images: the short side to the model's size / {its['crop_pct']:g}, then the centre crop."
    if block_px := config.augment.permute_block_px:
        text += f"\n\n**The model takes permuted images**: of blocks of {block_px} pixels, counted row by row, block b of its "
        text += f"input is block permute_block_order[b] of the image; the order is in {CONFIG}."
    text += (
        f"\n\nThese files were loaded again and gave, to {TOLERANCE:g}, the logits of the run's own model on {CHECK_IMAGES} "
    )
    return f"{text}images of seeded noise."


ONE_SEED = "One seed: how much another would differ is not known."
_WITHOUT = {  # of Seeds.without
    "not started": "they had not been started",
    "not finished": "they had not finished",
    "damaged": "their records are damaged",
}


def _accuracy(config: RunConfig, result: Result, seeds: Seeds) -> str:
    row = f"| this run, on {config.evaluated_on} | {100 * result.top1:.2f} % | {100 * result.top5:.2f} % | {result.loss:.4f} |"
    lines = ["## Accuracy", "", "| | top-1 | top-5 | loss |", "| --- | --- | --- | --- |", row, ""]
    its = seeds.top1
    if its.mean is None or its.std is None or its.ci95_low is None or its.ci95_high is None:
        of = f" ({its.n} of {seeds.wanted} of the sweep {seeds.sweep})" if seeds.wanted > 1 else ""
        others = bool(of or seeds.unread)
        lines.append(f"One seed{of}, so that there is no interval." if others else ONE_SEED)
    else:
        which = f"Over the seeds {', '.join(map(str, seeds.seeds))} of the sweep {seeds.sweep} ({its.n} of {seeds.wanted})"
        interval = f"95 % interval of the mean by Student's t [{100 * its.ci95_low:.2f}, {100 * its.ci95_high:.2f}] %"
        lines.append(f"{which}: top-1 {100 * its.mean:.2f} ± {100 * its.std:.2f} %, {interval}.")
    if seeds.left_out:
        lines.append(f"Not in the mean, as other code or data made them: {', '.join(seeds.left_out)}.")
    for reason in dict.fromkeys(seeds.without.values()):
        names = ", ".join(name for name, its_reason in seeds.without.items() if its_reason == reason)
        lines.append(f"Not in the mean, as {_WITHOUT[reason]}: {names}.")
    if seeds.unread:
        lines.append(f"Not looked at for other seeds, as the record cannot be used: sweep {', sweep '.join(seeds.unread)}.")
    return "\n".join(lines)


def _training(config: RunConfig, its: Result) -> str:
    short = command_of(config)
    also = f" With the recipes of vitpa {VERSION} it is `{short}`." if short else ""
    took = (
        f"{its.train_time_s:,.0f} s, {its.gpu_hours:.2f} GPU-hours, {its.images_per_s:,.0f} images/s, attempts: {its.attempts}"
    )
    if its.energy_j is not None:
        took += f"; {its.energy_j / 3.6e6:.3g} kWh of the GPUs"
    prep, unknown = prep_command(config, its.beton_sha256)
    return f"""## Training

```bash
{prep}
vitpa train {RUN_YAML}
```

{RUN_YAML}, beside this file, is the whole configuration, of signature `{its.signature}`.{also}{unknown}
It took {took}; finished {its.finished_utc}."""


PHOTOS = {"resize": "short_side", "size_px": 256, "jpeg_share": 1, "jpeg_quality": 90}  # vitpa prep's defaults for photos
SMALL = {"resize": "none", "size_px": None, "jpeg_share": 0, "jpeg_quality": None}  # and for images of at most 32 px


def prep_command(config: RunConfig, beton_sha256: Mapping[str, str]) -> tuple[str, str]:
    """The `vitpa prep` that makes the run's data, with the settings of its manifest that are not the default; and what to add.

    DIR stands for the folder of the source, which is a place on the machine of who exports.
    """
    dataset = config.dataset
    if dataset in DATASETS and DATASETS[dataset].image_size_px is not None:  # neither a source nor settings are needed
        return f"vitpa prep {dataset}", ""
    manifests = [_manifest(config, beton_sha256, split) for split in SPLITS]
    train = manifests[0]
    words = ["vitpa", "prep", dataset, "--source", "DIR"]
    source = f" DIR holds the images of {dataset}: train/ and val/ with a folder per class."
    if train is None:
        return shlex.join(words), f"{source} Other settings than the defaults of `vitpa prep` are not known here."
    its = train.images
    stored = its.model_dump(include=set(PHOTOS))
    if stored not in (PHOTOS, SMALL):
        if its.resize != "none":
            words += ["--max-side-px" if its.resize == "max_side" else "--short-side-px", str(its.size_px)]
        words += ["--jpeg-share", f"{its.jpeg_share:g}"]
        words += ["--jpeg-quality", str(its.jpeg_quality)] if its.jpeg_quality else []
    words += [] if its.white_level is None else ["--white-level", str(its.white_level)]
    words += ["--skip-corrupt"] if any(each is not None and each.skipped for each in manifests) else []
    return shlex.join(words), source


def _manifest(config: RunConfig, beton_sha256: Mapping[str, str], split: str) -> Manifest | None:
    """The manifest of a split that the run was trained with; None if other data lie there now, or none."""
    try:
        manifest = Manifest.read(manifest_path(beton_path(config.runtime.data_path, config.dataset, split)))
    except (UserError, OSError):
        return None
    return manifest if manifest.beton_sha256 == beton_sha256.get(split) else None


def command_of(config: RunConfig) -> str:
    """The shortest `vitpa train RECIPE a.b=c ...` that means this run; empty if there is none."""
    its, found = _flat(config.model_dump(mode="json", exclude={"runtime"})), []
    if config.model.kind != "vit":  # the other keys do not count
        its = {
            key: value for key, value in its.items() if not key.startswith("model.") or key in ("model.kind", "model.img_size")
        }
    for name, path in shipped_configs().items():
        base = _flat(load_config(path).model_dump(mode="json", exclude={"runtime"}))
        words = [f"{key}={_text(value)}" for key, value in its.items() if base[key] != value]
        try:
            if load_config(path, words).signature == config.signature:
                found.append([name, *words])
        except UserError:  # an older run may be such as cannot be started any more
            continue
    return shlex.join(["vitpa", "train", *min(found, key=len)]) if found else ""


def _flat(document: dict[str, Any]) -> dict[str, Any]:
    """A configuration by its dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in document.items():
        flat |= {f"{name}.{key}": its for key, its in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _text(value: object) -> str:
    """A value as an override says it."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _versions(result: Result, made_with: dict[str, Any]) -> str:
    versions = {"Python": made_with.get("python"), **(made_with.get("versions") or {})}
    commit = made_with.get("git_commit")
    code = f"commit `{commit}`{' with changes' if made_with.get('git_dirty') else ''}, " if commit else ""
    known = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return f"""## Versions

- vitpa {VERSION} exported it; trained by {code}code version `{result.code_version}`
- {known or "libraries: not recorded"}
- on {made_with.get("gpu") or made_with.get("device") or "an unknown device"}
- SHA-256 over the weights after the last step: `{result.weights_sha256}`"""
