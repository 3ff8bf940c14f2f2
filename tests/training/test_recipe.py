"""Protects: recipes that are written, read back, changed on the command line and settled without anything left open."""

import pytest
import tomlkit

from vitalloy.errors import RecipeError
from vitalloy.training.defaults import Machine
from vitalloy.training.recipe import Recipe

CPU = Machine("cpu", cores=2)
GPU = Machine("gpu", bf16=True, cores=16)


def settled(images=1257, size=(8, 8), flip=False, machine=CPU, config=None, **choices) -> Recipe:
    return Recipe(**choices).resolve(images, 10, size, flip, config, machine)


@pytest.mark.parametrize(
    "made", [Recipe(), settled(), settled(layer_decay=0.75, budget='"10ms", 5MB', img_size=[32, 48])]
)
def test_round_trip_through_toml(tmp_path, made):
    path = tmp_path / "recipe.toml"
    path.write_text(made.to_toml(), encoding="utf-8")
    assert Recipe.from_toml(path) == made


def test_every_line_says_what_it_is():
    text = Recipe().to_toml()
    for name, field in Recipe.model_fields.items():
        (line,) = [li for li in text.splitlines() if li.startswith((f"{name} = ", f"# {name} = "))]
        assert field.description and field.description in line
    assert "# ---- Schedule" in text
    assert all(not isinstance(v, dict) for v in tomlkit.parse(text).unwrap().values())  # flat: `--set epochs=4`


def test_an_unknown_key_is_refused_with_a_suggestion(tmp_path):
    with pytest.raises(RecipeError, match=r"no key 'epoch'. Did you mean 'epochs'"):
        Recipe(epoch=4)
    path = tmp_path / "r.toml"
    path.write_text("learning_rate = 0.1\nepochs = 3\nbatchsize = 4\n")
    with pytest.raises(RecipeError) as caught:
        Recipe.from_toml(path)
    assert str(path) in str(caught.value) and "Did you mean 'batch_size'" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"), [("epochs = ", "is not TOML"), ("[train]\nepochs = 3", "flat"), (None, "cannot be read")]
)
def test_a_file_that_is_no_recipe(tmp_path, text, message):
    path = tmp_path / "r.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        Recipe.from_toml(path)


def test_bad_values_are_told_one_a_line():
    with pytest.raises(RecipeError) as caught:
        Recipe(epochs="many", lr=-1, crop_scale=[1, 2, 3], precision="8")
    lines = str(caught.value).splitlines()
    assert lines[0] == "epochs = 'many': should be a valid integer or 'auto'."
    assert [line.split(" = ")[0] for line in lines] == ["epochs", "lr", "crop_scale", "precision"] or len(lines) == 4
    assert all("pydantic" not in line for line in lines)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"pretrained": True, "weights": "x.pth"}, "two starts"),
        ({"distillation": "hard"}, "needs a teacher"),
        ({"teacher": "runs/a"}, "choose 'hard' or 'soft'"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "nothing to train on"),
        ({"ema": True, "strategy": "fsdp"}, "fsdp splits"),
        ({"crop_scale": [0.9, 0.3]}, "smallest, largest"),
        ({"lr": float("nan")}, "finite"),
    ],
)
def test_choices_that_do_not_fit_together(choices, message):
    with pytest.raises(RecipeError, match=message):
        Recipe(**choices)


def test_overrides_need_no_quotes():
    texts = "epochs=4 lr=1e-3 mixup=0 model=cvt_13 ema=true img_size=[32,48] corruptions=fog,snow data=7"
    texts = [*texts.split(), "weights=none", "patience=none", "teacher=", "budget = 10ms, 5MB"]
    changed = settled(weights="a.pth").with_overrides(texts)
    assert (changed.epochs, changed.lr, changed.mixup, changed.model, changed.ema) == (4, 1e-3, 0, "cvt_13", True)
    assert changed.img_size == (32, 48) and changed.corruptions == ["fog", "snow"] and changed.data == "7"
    assert changed.weights is None and changed.patience == 0 and changed.budget == "10ms, 5MB"
    assert settled().with_overrides({"epochs": "auto"}).automatic == ["epochs"]
    with pytest.raises(RecipeError, match="Did you mean 'mixup'"):
        Recipe().with_overrides(["mixupp=1"])
    with pytest.raises(RecipeError, match="key=value"):
        Recipe().with_overrides(["epochs"])
    with pytest.raises(RecipeError, match="epochs = 'four'"):
        Recipe().with_overrides(["epochs=four"])


@pytest.mark.parametrize("images", [3, 40, 1257, 50_000, 1_281_167])
@pytest.mark.parametrize("size", [(8, 8), (64, 48), (375, 500)])
@pytest.mark.parametrize("machine", [CPU, GPU])
@pytest.mark.parametrize("start", [{}, {"weights": "a.pth"}, {"probe": True, "pretrained": True}])
def test_nothing_is_left_automatic(images, size, machine, start):
    made = settled(images, size, True, machine, **start)
    assert made.automatic == []
    assert made.resolve(9, 3, (500, 500), False, None, GPU) == made  # settled stays settled
    assert made.min_lr < made.lr and made.warmup_epochs < made.epochs and made.batch_size % 2 == 0


def test_what_is_given_is_kept():
    made = settled(epochs=7, lr=0.5, ema=False, hflip=True, threads=3, accelerator="cpu", machine=GPU)
    assert (made.epochs, made.lr, made.ema, made.hflip, made.threads) == (7, 0.5, False, True, 3)
    assert made.precision == "32-true" and made.accelerator == "cpu"


def test_choices_follow_the_data_and_the_start():
    digits, photos = settled(), settled(200_000, (375, 500), True, GPU)
    assert digits.model == "cvt_nano" and photos.model == "cvt_13"
    assert digits.img_size == 32 and photos.img_size == 224 and settled(size=(60, 40)).img_size == 64
    assert not digits.hflip and photos.hflip and digits.randaugment == 0 < photos.randaugment
    assert photos.mixup > 0 and photos.precision == "bf16-mixed" and photos.channels_last
    tuned = settled(weights="a.pth")
    assert tuned.lr < digits.lr and tuned.epochs <= digits.epochs
    assert settled(200_000, batch_size=256).lr > settled(200_000, batch_size=64).lr
    assert settled(optimizer="sgd").lr > digits.lr > settled(optimizer="lion").lr


def test_the_model_s_own_configuration_counts():
    config = {
        "input_size": (3, 224, 224),
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
        "interpolation": "bilinear",
        "crop_pct": 0.95,
    }
    tuned = settled(size=(8, 8), config=config, pretrained=True)
    assert tuned.img_size == 224 and tuned.mean == [0.5] * 3 and tuned.interpolation == "bilinear"
    assert settled(config=config).img_size == 32
    assert settled(config=config | {"fixed_input_size": True}).img_size == 224
    assert settled(in_chans=1).mean == [0.449]
    assert settled(config=config, size=(400, 400)).crop_pct == 0.95


def test_lists_are_set_as_toml_or_as_names():
    assert Recipe().with_overrides(["corruptions=[]"]).corruptions == []
    assert Recipe().with_overrides(['corruptions=["contrast"]']).corruptions == ["contrast"]
    assert Recipe().with_overrides(["corruptions=contrast, haze"]).corruptions == ["contrast", "haze"]
