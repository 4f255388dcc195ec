# SPDX-License-Identifier: MIT
"""Recipes: where values come from, what is refused, and whether the official settings are the official ones."""

import dataclasses
from pathlib import Path

import pytest
import torch
import yaml
from transformers import ResNetConfig, TrainingArguments

from prompt_cam_hf.baselines import INTRConfig
from prompt_cam_hf.training import recipe as recipe_module
from prompt_cam_hf.training.recipe import Recipe, load_recipe, parse_recipe, training_arguments

RECIPES = Path(recipe_module.__file__).with_name("recipes")

# The official settings: backbone, learning rate, epochs, warm-up rate, drop path, prompt dropout.
DINO, DINOV2 = "facebook/dino-vitb16", "facebook/dinov2-base"
OFFICIAL = {
    "dino_cub": (DINO, 0.005, 130, 0, 0.1, 0.1),
    "dino_birds525": (DINO, 0.01, 100, 0, 0.1, 0.1),
    "dino_cars": (DINO, 0.01, 100, 0, 0.1, 0.1),
    "dino_dogs": (DINO, 0.005, 100, 0, 0.1, 0.1),
    "dino_pet": (DINO, 0.005, 100, 0, 0.1, 0.1),
    "dinov2_cub": (DINOV2, 0.001, 130, 0.000001, 0, 0),
    "dinov2_dogs": (DINOV2, 0.005, 100, 0.000001, 0, 0),
    "dinov2_pet": (DINOV2, 0.005, 100, 0.000001, 0, 0),
}


@pytest.fixture
def write(tmp_path):
    def write_recipe(text: str) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return str(path)

    return write_recipe


REQUIRED = "backbone: some/backbone\ndata: photos\noutput_dir: out\n"


def minimal(**values) -> Recipe:
    return Recipe(**{"backbone": "some/backbone", "data": "photos", "output_dir": "out", **values})


OURS = {
    *(f"dino_{name}" for name in ("flowers", "food101", "insects2", "moths", "fungi", "fish_vista", "rare_species")),
    "dino_medicinal_leaf",
    "own_photos",
    "own_photos_cpu",
    "bioclip_cub",
    "bioclip2_cub",
    "birds",
    "birds_deep",
    "intr_birds",
}


def test_recipes_are_all_there():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {*OFFICIAL, *OURS, "intr_cub"}


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_recipe(name):
    recipe = load_recipe(RECIPES / f"{name}.yaml", data="photos")
    found = (
        recipe.backbone,
        recipe.learning_rate,
        recipe.num_train_epochs,
        recipe.warmup_learning_rate,
        recipe.drop_path_rate,
        recipe.prompt_dropout,
    )
    assert found == OFFICIAL[name]
    assert (recipe.optimizer, recipe.momentum, recipe.weight_decay, recipe.train_batch_size) == ("sgd", 0.9, 1e-3, 16)
    assert (recipe.warmup_epochs, recipe.min_learning_rate) == (20, 1e-6)
    assert (recipe.image_size, recipe.image_mean, recipe.image_std) == (224, [0.5] * 3, [0.5] * 3)
    assert (recipe.class_prompt_layer, recipe.num_agnostic_prompts, recipe.first_prompt_layer) == (-1, None, 0)
    assert recipe.augmentation


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_recipe_states_what_makes_it(name):
    """A later change of a default must not change an official recipe."""
    stated = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    assert stated.keys() >= {
        "backbone", "learning_rate", "num_train_epochs", "warmup_epochs", "warmup_learning_rate", "min_learning_rate",
        "drop_path_rate", "prompt_dropout", "optimizer", "momentum", "weight_decay", "train_batch_size", "image_size",
        "image_mean", "image_std",
    }  # fmt: skip


def test_recipe_of_intr_has_the_settings_of_its_official_code():
    recipe = load_recipe("intr_cub", data="photos")
    assert (recipe.method, recipe.backbone, recipe.resizing) == ("intr", "facebook/detr-resnet-50", "detr")
    assert (recipe.optimizer, recipe.learning_rate, recipe.backbone_learning_rate) == ("adamw", 5e-5, 1e-5)
    assert (recipe.weight_decay, recipe.train_batch_size, recipe.num_train_epochs) == (1e-6, 12, 140)
    assert (recipe.drop_rate_at_epoch, recipe.warmup_epochs, recipe.augmentation) == (80, 0, True)
    assert training_arguments(recipe).max_grad_norm == 0.1
    config = INTRConfig(backbone_config=ResNetConfig(), **recipe.intr)
    assert (config.encoder_layers, config.decoder_layers, config.d_model) == (6, 6, 256)
    assert (config.encoder_attention_heads, config.decoder_attention_heads) == (8, 8)
    assert (config.encoder_ffn_dim, config.decoder_ffn_dim, config.activation_function) == (2048, 2048, "relu")
    assert config.dropout == config.attention_dropout == config.activation_dropout == 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resizing": "detr"}, "resizing is for method intr, and the method is prompt_cam"),
        ({"backbone_learning_rate": 0.1}, "backbone_learning_rate is for method intr"),
        (
            {"method": "intr", "intr": {"encoder_layer": 2}},
            "unknown key 'intr.encoder_layer'",
        ),
        ({"method": "intr", "cache_features": True, "backbone_learning_rate": 0.1}, "a backbone that stays as it is"),
        ({"method": "intr", "resizing": "detr", "image_size": 64}, "leave image_size, _mean and _std out"),
        ({"method": "intr", "resizing": "detr", "cache_images": True}, "cache_images needs images of one size"),
        ({"drop_rate_at_epoch": 3}, "warmup_epochs is 20, but with drop_rate_at_epoch the rate is constant"),
    ],
)
def test_settings_of_intr_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        minimal(**settings)


@pytest.mark.parametrize("name", ["own_photos", "own_photos_cpu"])
def test_own_photos_needs_nothing_more(name):
    recipe = load_recipe(name)
    assert recipe.data and recipe.output_dir and recipe.skip_unreadable
    assert recipe.image_size is recipe.image_mean is recipe.image_std is None  # as the backbone expects


def test_command_line_wins_over_recipe_wins_over_default(write):
    path = write(REQUIRED + "learning_rate: 0.02\nnum_train_epochs: 50\n")
    recipe = parse_recipe([path, "--learning_rate", "0.03", "--data=other", "--bf16", "--cache_features=false"])
    assert (recipe.learning_rate, recipe.num_train_epochs, recipe.momentum) == (0.03, 50, 0.9)
    assert (recipe.data, recipe.bf16, recipe.cache_features) == ("other", True, False)


def test_every_kind_of_value_on_the_command_line(write):
    arguments = """--class_prompt_layer -2 --num_agnostic_prompts 0 --min_learning_rate 1e-7 --image_mean [0.1,0.2,0.3]
        --label_column yes --optimizer adamw --resume_from_checkpoint --trainer.max_grad_norm 1.5
        --trainer.report_to=tensorboard"""
    recipe = parse_recipe([write(REQUIRED), *arguments.split()])
    assert (recipe.class_prompt_layer, recipe.num_agnostic_prompts, recipe.min_learning_rate) == (-2, 0, 1e-7)
    assert (recipe.image_mean, recipe.label_column, recipe.optimizer) == ([0.1, 0.2, 0.3], "yes", "adamw")
    assert recipe.resume_from_checkpoint is True
    assert recipe.trainer == {"max_grad_norm": 1.5, "report_to": "tensorboard"}


def test_resume_takes_a_path(write):
    recipe = parse_recipe([write(REQUIRED), "--resume_from_checkpoint", "out/checkpoint-10"])
    assert recipe.resume_from_checkpoint == "out/checkpoint-10"


def test_required_keys_may_come_from_the_command_line(write):
    recipe = parse_recipe([write("backbone: some/backbone\n"), "--data", "photos", "--output_dir", "out"])
    assert (recipe.data, recipe.output_dir) == ("photos", "out")


def test_numbers_without_a_point_are_numbers(write):
    """YAML 1.1 reads 1e-6 as text, and 1 is an int."""
    recipe = load_recipe(write(REQUIRED + "min_learning_rate: 1e-6\nlearning_rate: 1\n"))
    assert recipe.min_learning_rate == 1e-6
    assert type(recipe.learning_rate) is float


def test_trainer_settings_of_file_and_command_line_are_merged(write):
    path = write(REQUIRED + "trainer:\n  max_grad_norm: 1.0\n  adam_beta1: 0.8\n")
    assert parse_recipe([path, "--trainer.max_grad_norm", "2.0"]).trainer == {"max_grad_norm": 2.0, "adam_beta1": 0.8}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learing_rate: 0.1", "unknown key 'learing_rate'; the nearest one is 'learning_rate'"),
        ("epochs: 3", "unknown key 'epochs'; the nearest one is '.*epochs'"),
        ("seed: 1\nseed: 2", "the key 'seed' stands there 2 times"),
        ("learning_rate: fast", "learning_rate must be a number, got 'fast'"),
        ("learning_rate: true", "learning_rate must be a number, got True"),
        ("learning_rate:", "learning_rate must be a number, got None"),
        ("num_train_epochs: 1.5", "num_train_epochs must be a whole number, got 1.5"),
        ("num_train_epochs: true", "num_train_epochs must be a whole number, got True"),
        ("bf16: 1", "bf16 must be true or false, got 1"),
        ("optimizer: adam", "optimizer must be sgd or adamw, got 'adam'"),
        ("image_mean: 0.5", "image_mean must be a list of numbers or empty, got 0.5"),
        ("image_mean: [a, b, c]", "image_mean must be a list of numbers or empty, got"),
        ("image_mean: [0.5]", "image_mean must be three numbers"),
        ("image_mean: []", "image_mean must be three numbers"),
        ("image_size: 0", "image_size must be at least 1, got 0"),
        ("image_std: [0.5, 0, 0.5]", "image_std must be above 0"),
        ("num_agnostic_prompts: many", "num_agnostic_prompts must be a whole number or empty, got 'many'"),
        ("label_column: 3", "label_column must be text, got 3"),
        ("trainer: 3", "trainer must be a mapping"),
        ("learning_rate: 0", "learning_rate must be above 0, got 0.0"),
        ("learning_rate: .nan", "learning_rate must be finite, got nan"),
        ("min_learning_rate: 1", "min_learning_rate must be between 0 and learning_rate, got 1.0"),
        ("train_batch_size: 0", "train_batch_size must be at least 1, got 0"),
        ("prompt_dropout: 1", "prompt_dropout must be at least 0 and below 1, got 1.0"),
        ("num_train_epochs: 10", r"warmup_epochs \(20\) must be below num_train_epochs \(10\)"),
        ("bf16: true\nfp16: true", "bf16 and fp16 exclude each other"),
        (
            "trainer: {max_grad_nrom: 1}",
            "unknown key 'trainer.max_grad_nrom'; the nearest one is 'trainer.max_grad_norm'",
        ),
        ("trainer: {learning_rate: 1}", "trainer.learning_rate is set by the recipe's own keys"),
        ("trainer: {save_total_limit: 1}", "trainer.save_total_limit is set by the recipe's own keys"),
    ],
)
def test_refused_in_a_file_and_on_the_command_line(write, text, message):
    with pytest.raises((TypeError, ValueError), match=message):
        load_recipe(write(REQUIRED + text))
    if "\n" in text or text.endswith(":"):
        return
    name, value = text.split(": ", 1)
    if name == "trainer" and value.startswith("{"):
        name, value = value[1:-1].split(": ")
        name = f"trainer.{name}"
    elif name in ("trainer", "label_column"):
        return  # a command line has only text, and no `trainer` key
    with pytest.raises((TypeError, ValueError), match=message):
        parse_recipe([write(REQUIRED), f"--{name}", value])
    with pytest.raises((TypeError, ValueError), match=message):
        parse_recipe([write(REQUIRED), f"--{name}={value}"])


def test_refused_in_python():
    with pytest.raises(TypeError, match="learning_rate must be a number, got 'fast'"):
        minimal(learning_rate="fast")
    with pytest.raises(TypeError, match="unexpected keyword argument 'learing_rate'"):
        minimal(learing_rate=0.1)
    assert minimal(data=Path("photos")).data == "photos"


def test_home_folder_is_understood():
    recipe = minimal(output_dir="~/out", backbone="~/vit")
    assert (recipe.output_dir, recipe.backbone) == (str(Path.home() / "out"), str(Path.home() / "vit"))
    assert training_arguments(recipe).output_dir == recipe.output_dir


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "arguments are required: RECIPE"),
        (["--seed", "1"], "arguments are required: RECIPE"),
        (["{recipe}", "stray"], "'stray' is neither a key"),
        (["{recipe}", "--seed"], "--seed: expected one argument"),
        (["{recipe}", "--trainer.max_grad_norm"], "--trainer.max_grad_norm: expected one argument"),
        (["{recipe}", "--learn", "1"], "unknown key 'learn'"),
        (["{recipe}", "-x"], "'-x' is neither a key"),
    ],
)
def test_command_line_refused(write, arguments, message):
    path = write(REQUIRED)
    with pytest.raises(ValueError, match=message):
        parse_recipe([argument.replace("{recipe}", path) for argument in arguments])


def test_files_refused(write, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no recipe file 'nowhere\.yaml'"):
        load_recipe("nowhere.yaml")
    with pytest.raises(ValueError, match="must hold lines of the form `key: value`"):
        load_recipe(write("just text"))
    with pytest.raises(ValueError, match="must hold lines of the form `key: value`"):
        load_recipe(write(""))
    with pytest.raises(ValueError, match=r"is not YAML: .*line 1"):
        load_recipe(write("seed: ]"))
    with pytest.raises(ValueError, match=r"no backbone and no data; .*--backbone \.\.\. --data \.\.\."):
        load_recipe(write("output_dir: out"))


def test_help_names_every_key(capsys):
    with pytest.raises(SystemExit):
        parse_recipe(["--help"])
    printed = capsys.readouterr().out
    assert all(f"--{key.name}" in printed for key in dataclasses.fields(Recipe) if key.name != "trainer")


def test_saved_recipe_gives_the_same_recipe(tmp_path):
    recipe = minimal(
        learning_rate=1e-7,
        min_learning_rate=0,
        warmup_learning_rate=0,
        num_agnostic_prompts=3,
        trainer={"adam_beta1": 0.8},
    )
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    assert "resume_from_checkpoint" not in recipe.to_yaml()


def test_training_arguments_of_the_official_optimiser():
    arguments = training_arguments(minimal(trainer={"adam_epsilon": 1e-3}))
    assert (arguments.optim, arguments.optim_args) == ("sgd", "momentum=0.9")
    assert (arguments.max_grad_norm, arguments.weight_decay, arguments.adam_epsilon) == (0, 1e-3, 1e-3)
    assert arguments.per_device_train_batch_size == 16
    assert training_arguments(minimal(optimizer="adamw")).optim == "adamw_torch"


def test_batch_is_shared_by_accumulation_steps():
    arguments = training_arguments(minimal(trainer={"gradient_accumulation_steps": 4}))
    assert arguments.per_device_train_batch_size == 4
    with pytest.raises(ValueError, match=r"16 cannot be shared evenly by 3 .* choose a multiple of 3"):
        training_arguments(minimal(trainer={"gradient_accumulation_steps": 3}))


def test_gradient_checkpointing_reaches_trainer_without_a_warning(recwarn):
    arguments = training_arguments(minimal(gradient_checkpointing=True))
    assert getattr(arguments, "activation_checkpointing", arguments.gradient_checkpointing)
    assert not [warning for warning in recwarn if "checkpointing" in str(warning.message)]


def test_trainer_names_are_those_of_transformers():
    settings = recipe_module._trainer_settings(minimal())
    assert settings.keys() <= {argument.name for argument in dataclasses.fields(TrainingArguments)}


def test_cpu_is_chosen_where_there_is_nothing_else():
    assert training_arguments(minimal()).use_cpu == (not torch.accelerator.is_available())
