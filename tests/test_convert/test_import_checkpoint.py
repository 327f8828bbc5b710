"""`convert import` and `convert export` from the command line: whole models, parts of them, and the sidecar."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image
from safetensors.numpy import load_file
from transformers import AutoImageProcessor

import saisa_jax
from saisa_jax import parallel
from saisa_jax.__main__ import main
from saisa_jax.checkpoints import copy_sidecar, load_model, save_model
from saisa_jax.config import Config, ConfigError, from_config_dict, to_config_dict
from saisa_jax.convert.configs import config_from_hf, preprocessor_to_hf
from saisa_jax.convert.files.safetensors import read_header
from saisa_jax.convert.import_checkpoint import ImportOptions, import_checkpoint
from saisa_jax.convert.layouts import TOWER_PREFIX
from saisa_jax.data.images import prepare_image
from saisa_jax.data.sample import DataError
from saisa_jax.data.text.tokenizer import load_tokenizer
from saisa_jax.testing.checkpoints import tiny_model, write_checkpoint
from saisa_jax.training.start import starting_params

WHOLE = ("saisa", "llava", "llava-hf")


def convert(*words: object) -> None:
    assert main(["convert", *map(str, words)]) == 0


def everything(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a directory: dtype, shape and bits."""
    found = {}
    for file in directory.glob("*.safetensors"):
        header = read_header(file)
        for key, value in load_file(file).items():
            found[key] = (header[key].dtype, tuple(value.shape), value.tobytes())
    return found


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in every layout, and a SAISA with its tower in a folder of its own."""
    root = tmp_path_factory.mktemp("sources")
    for layout in (*WHOLE, "hf-llm", "hf-vision"):
        write_checkpoint(root / layout, layout, shard_bytes=60_000)
    write_checkpoint(root / "apart", "saisa", parts=("decoder", "projector"))
    write_checkpoint(root / "apart" / "vision_tower", "hf-vision", dtype="F32")
    for layout in ("saisa", "llava"):
        shutil.copytree(root / "hf-vision", root / layout / "vision_tower")
    return root


@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize("layout", WHOLE)
def test_untrained_import_and_export_is_the_identity(
    sources: Path, layout: str, dtype: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert("import", "--from", sources / layout, "--to", tmp_path / "ckpt", *(["--dtype", dtype] if dtype else []))
    assert "kept in the sidecar: " in capsys.readouterr().out
    convert("export", "--from", tmp_path / "ckpt", "--layout", layout, "--to", tmp_path / "out")
    assert "STALE" not in capsys.readouterr().out
    tensors = everything(sources / layout)
    assert everything(tmp_path / "out") == tensors
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (sources / layout / "tokenizer.json").read_bytes()
    read = lambda folder: json.loads((folder / "config.json").read_text())  # noqa: E731
    before, after = read(sources / layout), read(tmp_path / "out")
    if layout != "llava-hf":  # whose programs want the tower in a folder of its own, and find it by an absolute name
        assert after.pop("mm_vision_tower") == str(tmp_path / "out" / before.pop("mm_vision_tower"))
        inside = {key.removeprefix(TOWER_PREFIX[layout]): held for key, held in tensors.items() if "vision" in key}
        assert everything(tmp_path / "out" / "vision_tower") == inside
        assert config_from_hf(tmp_path / "out") == config_from_hf(sources / layout)
    assert before == after


def test_a_llava_is_read_as_saisa(sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same parameters, and what layouts or alignments cannot be is an error that names the option."""
    convert("import", "--from", sources / "llava", "--to", tmp_path / "llava")
    options = ["--layout=llava", "--as=saisa", "--visual_layers=1", "--frozen_prefix"]
    convert("import", "--from", sources / "llava", "--to", tmp_path / "vica", *options)
    assert "layers that see images: 1 of 2" in capsys.readouterr().out
    (plain, _, *_), (params, config, *_) = load_model(tmp_path / "llava"), load_model(tmp_path / "vica")
    jax.tree.map(np.testing.assert_array_equal, params, plain)
    model = config.model_for("finetune")
    assert (model.alignment, model.visual_layers, model.frozen_prefix) == ("saisa", (1,), True)
    assert config.finetune.sharing == "shared"
    for source, wrong, message in (
        ("llava", ["--visual_layers=1"], "visual_layers is a choice of model.alignment=saisa, not of 'llava'"),
        ("llava", ["--as=saisa", "--visual_layers=0,7"], "names [7], out of range for model.num_layers=2"),
        ("llava", ["--as=flamingo"], "no layout holds cross layers"),
        ("saisa", ["--as=llava"], "has a projector for each layer, which only saisa reads"),
    ):
        assert main(["convert", "import", f"--from={sources / source}", f"--to={tmp_path / 'no'}", *wrong]) == 2
        assert message in capsys.readouterr().err
    assert main(["convert", "export", f"--from={tmp_path / 'vica'}", "--layout=llava", f"--to={tmp_path / 'no'}"]) == 2
    assert "alignment='saisa': its readers compute 'llava'" in capsys.readouterr().err


def test_a_tower_of_its_own_comes_back_too(sources: Path, tmp_path: Path) -> None:
    convert("import", "--from", sources / "apart", "--to", tmp_path / "ckpt")
    convert("export", "--from", tmp_path / "ckpt", "--layout", "saisa", "--to", tmp_path / "out")
    for folder in (".", "vision_tower"):
        assert everything(sources / "apart" / folder) == everything(tmp_path / "out" / folder)
    assert "model.mm_projector.0.weight" in everything(tmp_path / "out")
    assert "vision_model.encoder.layers.1.mlp.fc1.bias" in everything(tmp_path / "out" / "vision_tower")


def test_an_imported_model_answers(sources: Path, tmp_path: Path) -> None:
    convert("import", "--from", sources / "apart", "--to", tmp_path / "ckpt", "--dtype", "float32")
    model = saisa_jax.load(str(tmp_path / "ckpt"))
    assert model.stage_config.template == "vicuna_v1" and model.model_config.dtype == "float32"
    assert len(model.generate(["what is it?", "?"], [[Image.new("RGB", (9, 9))], []], max_new_tokens=2)) == 2


def test_an_llm_alone_answers_text(sources: Path, tmp_path: Path) -> None:
    convert("import", "--from", sources / "hf-llm", "--to", tmp_path / "ckpt")
    model = saisa_jax.load(str(tmp_path / "ckpt"))
    assert len(model.generate(["what is it?"], [[]], max_new_tokens=2)) == 1
    with pytest.raises(DataError, match="without a vision encoder"):
        model.generate(["what is it?"], [[Image.new("RGB", (9, 9))]])
    convert("export", "--from", tmp_path / "ckpt", "--layout", "hf-llm", "--to", tmp_path / "out")
    assert everything(sources / "hf-llm") == everything(tmp_path / "out")


def test_a_starting_point_for_training(sources: Path, tmp_path: Path) -> None:
    start = tmp_path / "start"
    convert("import", "--llm", sources / "hf-llm", "--vision", sources / "hf-vision", "--to", start, "--seed", 3)
    params, config, tokenizer, metadata = load_model(start)
    assert metadata["stage"] == "pretrain" and set(params) >= {"visual_proj", "vision", "layers"}
    assert "visual_proj" not in params["layers"] and config.finetune.sharing == "per_layer"
    assert tokenizer is not None and Path(config.data.tokenizer) == start / "tokenizer"
    again = tmp_path / "again"
    convert("import", "--llm", sources / "hf-llm", "--vision", sources / "hf-vision", "--to", again, "--seed", 3)
    jax.tree.map(np.testing.assert_array_equal, load_model(again)[0], params)
    for layout, source in (("hf-llm", "hf-llm"), ("hf-vision", "hf-vision")):
        convert("export", "--from", start, "--layout", layout, "--to", tmp_path / layout)
        assert everything(sources / source) == everything(tmp_path / layout)


def test_images_of_another_size(sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table of positions stays as it was and goes back so; only layouts that can say so take it."""
    to, learnt = tmp_path / "ckpt", tiny_model("hf-vision").vision.image_size
    convert("import", "--llm", sources / "hf-llm", "--vision", sources / "hf-vision", "--to", to, "--image_size", 16)
    model = saisa_jax.load(str(to))
    assert (model.model_config.vision.image_size, model.model_config.vision.position_size) == (16, learnt)
    assert model.model_config.vision.num_patches < model.params["vision"]["position_embedding"].shape[0] - 1
    assert len(model.generate(["what is it?"], [[Image.new("RGB", (9, 9))]], max_new_tokens=2)) == 1
    convert("export", "--from", to, "--layout", "hf-vision", "--to", tmp_path / "out")
    assert everything(sources / "hf-vision") == everything(tmp_path / "out")
    capsys.readouterr()
    assert main(["convert", "export", f"--from={to}", "--layout=llava", f"--to={tmp_path / 'llava'}"]) == 2
    assert "no place for positions that are resampled" in capsys.readouterr().err


def test_the_sidecar_goes_through_training_and_grows_stale(
    sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert("import", "--from", sources / "apart", "--to", tmp_path / "ckpt")
    params, config, tokenizer, metadata = load_model(tmp_path / "ckpt")
    proj = params["layers"]["visual_proj"]["fc1"]
    proj["bias"] = proj["bias"] + 1
    save_model(tmp_path / "trained", params, config, tokenizer, metadata, copy_sidecar(tmp_path / "ckpt"))
    capsys.readouterr()
    convert("inspect", tmp_path / "ckpt")
    assert "stale" not in capsys.readouterr().out
    convert("inspect", tmp_path / "trained")
    assert "trained since: 2\n  model.mm_projector.0.weight" in capsys.readouterr().out
    convert("export", "--from", tmp_path / "trained", "--layout", "saisa", "--to", tmp_path / "out")
    stale = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("STALE"))
    assert "model.mm_projector.0.weight, model.mm_projector.2.weight" in stale and "encoder" not in stale
    before, after = everything(sources / "apart"), everything(tmp_path / "out")
    assert set(before) == set(after)
    assert {key for key in before if before[key] != after[key]} == {
        f"model.layers.{i}.mm_projector.0.bias" for i in range(2)
    }
    file = next((tmp_path / "trained" / "sidecar").rglob("tensors.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert main(["convert", "inspect", str(tmp_path / "trained")]) == 2
    assert "tensors.safetensors is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("layout", [*WHOLE, "hf-llm", "hf-vision"])
def test_export_of_a_model_that_was_not_imported(layout: str, tmp_path: Path) -> None:
    """A model trained here: everything is written from our configuration, and reads back as the same model."""
    source = "saisa" if layout in ("saisa", "hf-llm", "hf-vision") else "llava"
    write_checkpoint(tmp_path / "in", source)
    write_checkpoint(tmp_path / "tower", "hf-vision")
    tower = ["--vision", tmp_path / "tower"]
    convert("import", "--from", tmp_path / "in", "--to", tmp_path / "ckpt", *tower)
    shutil.rmtree(tmp_path / "ckpt" / "sidecar")
    params, config, tokenizer, metadata = load_model(tmp_path / "ckpt")
    save_model(tmp_path / "plain", params, config, tokenizer, metadata)
    convert("export", "--from", tmp_path / "plain", "--layout", layout, "--to", tmp_path / "out", "--dtype", "float32")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"
    if layout == "hf-vision":
        return
    vision = ["--vision", tmp_path / "tower"] if layout == "hf-llm" else []
    convert("import", "--from", tmp_path / "out", "--to", tmp_path / "back", *vision)
    again, back, *_ = load_model(tmp_path / "back")
    kept = "vision" if layout == "hf-llm" else "final_norm"
    jax.tree.map(np.testing.assert_array_equal, again[kept], params[kept])
    same = dataclasses.replace(back.model, dtype=config.model.dtype, vision=config.model.vision)
    if layout != "hf-llm":
        assert same == config.model
        assert back.model.vision.num_used_layers == config.model.vision.num_used_layers


def test_an_answer_ends_at_every_token_that_the_files_name(tmp_path: Path) -> None:
    raw = write_checkpoint(tmp_path / "llm", "hf-llm")
    (tmp_path / "llm" / "config.json").write_text(json.dumps(raw | {"eos_token_id": 3}))
    (tmp_path / "llm" / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 9]}))
    convert("import", "--from", tmp_path / "llm", "--to", tmp_path / "after")
    model = saisa_jax.load(str(tmp_path / "after"))
    ends = {3, 5, 9, model.tokenizer.eos_token_id}
    assert set(model.model_config.end_token_ids) == set(model.generator.eos_ids) == ends

    params, config, tokenizer, metadata = load_model(tmp_path / "after")
    save_model(tmp_path / "plain", params, config, tokenizer, metadata)
    convert("export", "--from", tmp_path / "plain", "--layout", "hf-llm", "--to", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    assert set(written) == ends


@pytest.mark.parametrize("mode", ["pad", "square", "resize"])
def test_pictures_become_pixels_as_the_files_say(mode: str, tmp_path: Path) -> None:
    """transformers' own processor gives the pixels that we compute with, from what we write and from what we read."""
    vision = dataclasses.replace(tiny_model("llava-hf").vision, image_mode=mode)
    model = dataclasses.replace(tiny_model("llava-hf"), vision=vision)
    raw = write_checkpoint(tmp_path / "in", "llava-hf", model)
    (tmp_path / "in" / "preprocessor_config.json").write_text(json.dumps(preprocessor_to_hf(vision, pads=True)))
    read = config_from_hf(tmp_path / "in", layout="llava-hf", raw=raw).vision
    assert read.image_mode == mode
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8))
    ours = prepare_image(image, read.image_size, read.image_mode, read.image_mean)
    ours = (ours / np.float32(255) - np.float32(read.image_mean)) / np.float32(read.image_std)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "in", backend="pil")
    theirs = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.multi_device
def test_into_any_sharding(sources: Path, tmp_path: Path) -> None:
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:2]), ("a",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    import_checkpoint(ImportOptions(str(sources / "llava-hf")), tmp_path / "mesh", sharding=everywhere)
    import_checkpoint(ImportOptions(str(sources / "llava-hf")), tmp_path / "one")
    jax.tree.map(np.testing.assert_array_equal, load_model(tmp_path / "mesh")[0], load_model(tmp_path / "one")[0])


@pytest.mark.parametrize("layout", [*WHOLE, "hf-llm", "hf-vision"])
def test_inspect(sources: Path, layout: str, capsys: pytest.CaptureFixture[str]) -> None:
    convert("inspect", sources / layout, "--all")
    out = capsys.readouterr().out
    assert f"layout {layout}, family " in out and "missing" not in out and "unexpected" not in out
    assert "ignored, kept" in out or layout == "hf-llm"


def test_inspect_tells_what_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = write_checkpoint(tmp_path / "llm", "hf-llm")
    (tmp_path / "llm" / "config.json").write_text(json.dumps(raw | {"num_hidden_layers": 1, "vocab_size": 100}))
    convert("inspect", tmp_path / "llm")
    out = capsys.readouterr().out
    assert "unexpected: 9\n  model.layers.1." in out and "does not fit: 2\n  misshaped" in out


def test_config_is_a_recipe(sources: Path, tmp_path: Path) -> None:
    convert("import", "--from", sources / "llava-hf", "--to", tmp_path / "ckpt")
    assert to_config_dict(load_model(tmp_path / "ckpt")[1]).model.alignment == tiny_model("llava").alignment


def mesh_and_rules(config: Config) -> tuple:
    mesh = parallel.make_mesh(config.mesh)
    return mesh, parallel.make_rules(config.model, mesh)


def test_training_from_an_import(sources: Path, tmp_path: Path) -> None:
    """The recipe `configs/imported.py` fits, and what cannot be trained from says what it lacks."""
    recipe = importlib.import_module("configs.imported")
    tower = ["--vision", sources / "hf-vision"]
    convert("import", "--llm", sources / "hf-llm", *tower, "--to", tmp_path / "start")
    config = from_config_dict(Config, recipe.get_config(str(tmp_path / "start")))
    tokenizer = load_tokenizer(config.data.tokenizer)
    place = mesh_and_rules(config)
    start = starting_params(config, "pretrain", epath.Path(tmp_path / "run"), tokenizer, *place)
    assert "visual_proj" in start.make(start.argument) and start.source == str(tmp_path / "start")
    for kind, leaf in (("low_rank", "fc1"), ("resampler", "queries")):  # the import's own, and a fresh one
        tokens = 5 if kind == "resampler" else None
        projector = dataclasses.replace(config.model.projector, kind=kind, num_tokens=tokens)
        other = dataclasses.replace(config, model=dataclasses.replace(config.model, projector=projector))
        start = starting_params(other, "pretrain", epath.Path(tmp_path / "run"), tokenizer, *place)
        made = jax.eval_shape(start.make, start.argument)
        assert leaf in made["visual_proj"] and leaf not in made["layers"]
        assert start.source == str(tmp_path / "start")
    convert("import", "--from", sources / "hf-llm", "--to", tmp_path / "llm")
    with pytest.raises(ConfigError, match="an LLM without a vision encoder"):
        recipe.get_config(str(tmp_path / "llm"))
    config = dataclasses.replace(config, init_from=str(tmp_path / "llm"))
    with pytest.raises(ConfigError, match=r"holds no vision tower and no projector, .* convert import --llm"):
        starting_params(config, "pretrain", epath.Path(tmp_path / "run"), tokenizer, *place)


def test_memory_stays_near_the_parameters(tmp_path: Path) -> None:
    """In a process of its own; the slack of 2 GiB is for larger models, here the libraries' own memory is all of it."""
    model = dataclasses.replace(tiny_model("hf-llm"), embed_dim=512, mlp_dim=2048, num_layers=24, max_length=64)
    write_checkpoint(tmp_path / "in", "hf-llm", model)
    small, to = sources_of("hf-llm", tmp_path), tmp_path / "out"
    script = (
        "import jax; jax.config.update('jax_platforms', 'cpu')\n"
        "from saisa_jax.convert import memory\n"
        "from saisa_jax.checkpoints import read_account\n"
        "from saisa_jax.convert.import_checkpoint import ImportOptions, import_checkpoint\n"
        f"import_checkpoint(ImportOptions({str(small)!r}), {str(tmp_path / 'warm')!r})\n"
        "before = memory.peak_bytes()\n"
        f"import_checkpoint(ImportOptions({str(tmp_path / 'in')!r}, dtype='float32'), {str(to)!r})\n"
        f"leaves = read_account({str(to)!r})[0]['leaves']\n"
        "print(memory.peak_bytes() - before, memory.allowance(leaves, slack=0))\n"
    )
    # Of few arenas: what glibc keeps for each of the many threads that write differs by 40 MB from run to run.
    environment = {**os.environ, "XLA_FLAGS": "", "MALLOC_ARENA_MAX": "2"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    grown, allowed = map(int, done.stdout.split()[-2:])
    assert allowed > 300e6 and grown < allowed + 200 * 2**20


def sources_of(layout: str, root: Path) -> Path:
    write_checkpoint(root / "small", layout)
    return root / "small"
