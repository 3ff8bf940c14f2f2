"""Protects: resuming to the same weights, checkpoints that survive, helpful messages, untouched backbones."""

import errno
import os
import signal
import subprocess
import sys

import pytest
import small_run
import torch
from small_run import digits, mixed_run, recipe, tiny_vit
from torch import nn

from vitalloy.errors import CheckpointError, RecipeError, TrainingError
from vitalloy.training.checkpointing import read_checkpoint, save_atomically
from vitalloy.training.trainer import train


class Net(nn.Module):
    """A small convolutional net with batch norm and the classifier methods that timm models have."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1))
        self.norm = nn.BatchNorm2d(32)
        self.head = nn.Linear(32 * 16, 10)

    def get_classifier(self):
        return self.head

    def forward(self, x):
        return self.head(self.norm(self.body(x)).relu().flatten(1))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_very_same_weights(tmp_path):
    script = small_run.__file__
    killed = subprocess.run([sys.executable, script, "killed", str(tmp_path / "a")], timeout=300)
    assert killed.returncode == -signal.SIGKILL
    middle = read_checkpoint(tmp_path / "a/checkpoints/last.ckpt")
    assert [row["epoch"] for row in middle["history"]] == [0, 1]
    subprocess.run([sys.executable, script, "resumed", str(tmp_path / "a")], timeout=300, check=True)
    _, unbroken = mixed_run(tmp_path / "b")
    first, second = (read_checkpoint(tmp_path / f"{n}/checkpoints/last.ckpt") for n in "ab")
    assert any(k.startswith("average.") for k in first["state_dict"])
    assert same(first["state_dict"], second["state_dict"])
    timeless = [[{k: v for k, v in r.items() if k != "seconds"} for r in c["history"]] for c in (first, second)]
    assert timeless[0] == timeless[1] and len(timeless[0]) == 4
    best = [read_checkpoint(tmp_path / f"{n}/checkpoints/best.ckpt") for n in "ab"]
    assert same(best[0]["state_dict"], best[1]["state_dict"])
    assert best[0]["epoch"] == unbroken.best_epoch and best[0]["weights"] == unbroken.weights == "ema"


@pytest.mark.slow
def test_two_processes_share_the_work_and_end_alike(tmp_path):
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    subprocess.run([*start, small_run.__file__, "shared", str(tmp_path)], timeout=500, check=True)
    first, second = (torch.load(tmp_path / f"left.{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["strategy"] == "ddp" and same(first["state"], second["state"])
    assert [r["train_loss"] for r in first["history"]] == [r["train_loss"] for r in second["history"]]


def test_it_learns_and_leaves_the_best_weights_in_the_model(tmp_path):
    splits, model = digits(600, 200), net()
    result = train(model, splits, recipe(splits, epochs=4, ema=False), tmp_path, progress=False)
    assert result.best_top1 == max(r["val_top1"] for r in result.history) > 0.75
    assert {"epoch", "train_loss", "val_loss", "val_top1", "lr", "seconds"} <= result.history[0].keys()
    best = read_checkpoint(tmp_path / "checkpoints/best.ckpt")
    assert same(best["state_dict"], model.state_dict()) and not model.training
    again = net()
    assert train(again, splits, recipe(splits, epochs=4, ema=False), tmp_path, resume=True) == result
    assert same(again.state_dict(), model.state_dict())


def test_early_stopping_is_remembered(tmp_path):
    splits = digits()
    choices = recipe(splits, epochs=20, patience=1, lr=1e-9, ema=False)
    result = train(net(), splits, choices, tmp_path, progress=False)
    assert result.stopped_early and len(result.history) == 2
    assert train(net(), splits, choices, tmp_path, resume=True) == result


class Poisoned(Net):
    def forward(self, x):
        out = super().forward(x)
        self.steps = getattr(self, "steps", 0) + self.training
        return out * float("nan") if self.training and self.steps == 8 else out


def test_a_loss_that_is_no_number_names_the_step_and_the_images(tmp_path):
    splits, model = digits(), Poisoned()
    with pytest.raises(TrainingError) as caught:
        train(model, splits, recipe(splits, ema=False), tmp_path, progress=False)
    text = str(caught.value)
    assert "loss is nan in epoch 2, step 7" in text and "learning rate" in text
    assert sum(name in text for name in small_run.whole(splits.train)) >= 8 and "24 more" in text
    kept = read_checkpoint(tmp_path / "checkpoints/last.ckpt")
    assert [r["epoch"] for r in kept["history"]] == [0]
    assert all(v.isfinite().all() for v in kept["state_dict"].values())


def test_a_bad_image_is_singled_out(tmp_path):
    splits = digits()
    from vitalloy.training.trainer import transforms

    learning, _ = transforms(recipe(splits), splits.native_size)
    count = iter(range(10**6))
    spoil = lambda image: learning(image) / (0.0 if next(count) == 5 else 1.0)  # noqa: E731  a transform, inline
    splits = small_run.Splits(
        splits.name, splits.classes, splits.train.with_transform(spoil), splits.val, splits.test, (8, 8), False
    )
    with pytest.raises(TrainingError, match=r"no numbers: digits\[\d+\]\. Try"):
        train(net(), splits, recipe(splits), tmp_path, progress=False)


class FullAfter:
    """A file on a disk with room for so many bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            self.file.write(data[: self.room])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *about):
        self.file.close()


def test_a_full_disk_leaves_the_checkpoint_before_it(tmp_path, monkeypatch):
    import builtins

    from vitalloy.training import checkpointing

    path, real = tmp_path / "last.ckpt", builtins.open
    save_atomically({"state_dict": {"w": torch.ones(9)}}, path)
    monkeypatch.setattr(checkpointing, "open", lambda *a: FullAfter(real(*a), 50_000), raising=False)
    with pytest.raises(TrainingError, match="the disk is full") as caught:
        save_atomically({"state_dict": {"w": torch.zeros(100_000)}}, path)
    assert "before it is whole" in str(caught.value) and str(path) in str(caught.value)
    assert read_checkpoint(path)["state_dict"]["w"].sum() == 9
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_disk_that_fills_up_in_training_can_be_resumed(tmp_path, monkeypatch):
    import builtins

    from vitalloy.training import checkpointing

    splits, real, writes = digits(), builtins.open, []

    def fills_up(*arguments):
        writes.append(arguments[0])
        return FullAfter(real(*arguments), 10_000 if len(writes) > 3 else 10**9)

    monkeypatch.setattr(checkpointing, "open", fills_up, raising=False)
    with pytest.raises(TrainingError, match="the disk is full"):
        train(net(), splits, recipe(splits, ema=False), tmp_path, progress=False)
    monkeypatch.undo()
    before = len(read_checkpoint(tmp_path / "checkpoints/last.ckpt")["history"])
    assert 1 <= before < 4
    result = train(net(), splits, recipe(splits, ema=False), tmp_path, resume=True, progress=False)
    assert [row["epoch"] for row in result.history] == [0, 1, 2, 3]


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files by the kernel")
def test_a_write_that_the_kernel_refuses(tmp_path):
    import resource

    path = tmp_path / "last.ckpt"
    save_atomically({"w": torch.ones(9)}, path)
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(TrainingError, match="could not be written: File too large"):
            save_atomically({"w": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert read_checkpoint(path)["w"].sum() == 9


def test_a_damaged_checkpoint_is_named(tmp_path):
    path = tmp_path / "last.ckpt"
    save_atomically({"w": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(CheckpointError, match=r"last\.ckpt is damaged"):
        read_checkpoint(path)


def test_a_checkpoint_with_code_in_it_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({"state_dict": Trap()}, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / "last.ckpt")
    assert not (tmp_path / "sprung").exists()


def test_a_probe_leaves_the_backbone_and_its_statistics(tmp_path):
    splits, model = digits(), net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    train(model, splits, recipe(splits, probe=True), tmp_path, progress=False)
    after = model.state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed == {"head.weight", "head.bias"}


def test_a_probe_needs_a_classifier(tmp_path):
    model = net()
    model.head = nn.Identity()
    with pytest.raises(RecipeError, match="none: give it num_classes"):
        train(model, digits(), recipe(probe=True), tmp_path, progress=False)


def test_a_teacher_teaches_and_stays_out_of_the_checkpoint(tmp_path):
    splits, teacher = digits(), net()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    choices = recipe(splits, epochs=1, teacher="a run", distillation="soft", mixup=0.2, ema=False)
    model = tiny_vit()
    with pytest.raises(RecipeError, match="teacher module"):
        train(model, splits, choices, tmp_path, progress=False)
    train(model, splits, choices, tmp_path, progress=False, teacher=teacher)
    assert same(before, teacher.state_dict())
    kept = read_checkpoint(tmp_path / "checkpoints/last.ckpt")["state_dict"]
    assert {k.removeprefix("model.") for k in kept} == set(model.state_dict())


def test_interruption_says_how_to_go_on(tmp_path):
    class CtrlC(small_run.Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 1:
                signal.raise_signal(signal.SIGINT)

    before, splits = signal.getsignal(signal.SIGINT), digits()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite that runs in the background is deaf to Ctrl+C
    try:
        with pytest.raises(TrainingError, match=r"interrupted.*last\.ckpt is whole; resume"):
            train(net(), splits, recipe(splits, ema=False), tmp_path, progress=False, callbacks=[CtrlC()])
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(train(net(), splits, recipe(splits, ema=False), tmp_path, resume=True, progress=False).history) == 4


def test_a_machine_without_the_device_is_told_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(RecipeError, match="accelerator = 'gpu'"):
        train(net(), digits(), recipe(accelerator="gpu", devices=1), tmp_path, progress=False)


def test_accumulation_and_an_odd_batch(tmp_path):
    """Seven images a batch: mixing leaves the odd one alone; the average moves once a step, not once a batch."""
    splits, moves = digits(70, 30), []
    choices = recipe(splits, batch_size=7, accumulate=5, epochs=1, mixup=0.4, ema=True, channels_last=True)

    class Watch(small_run.Callback):
        def on_train_start(self, trainer, module):
            module.average.update = lambda model, step: moves.append(step)

    train(net(), splits, choices, tmp_path, progress=False, callbacks=[Watch()])
    assert moves == [1, 2]


def test_settings_of_the_process_come_back(tmp_path):
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    splits = digits()
    train(net(), splits, recipe(splits, epochs=1, threads=1), tmp_path, progress=False)
    assert before == (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())
