"""`fit`: train on cached features, select on validation, test once, save the adapter."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from clip_adapter.cache.errors import UserError

if TYPE_CHECKING:
    from clip_adapter.adapters.method import Grid

Ratio = float | Literal["learned", "hypernet"]
LARGEST_SEED = 2**31 - 1  # JAX takes an int32
LARGEST_COUNT = 1_000_000  # of epochs and the like: steps are counted in int32 as well
PAPER = {"learning_rate": 0.002, "weight_decay": 5e-4}
ADAPTER_OPTIONS = (
    *("branch", "alpha", "beta", "alpha_init", "beta_init", "reduction", "lr", "weight_decay"),
    *("epochs", "batch_size", "evaluate_every", "preset", "augment", "search"),
)
MethodName = Literal["zero-shot", "linear-probe", "clip-adapter"]


@dataclass(frozen=True)
class FitConfig:
    """Fit a classifier on a feature cache, select on validation, test the selected one once.

    Several values for a hyper-parameter make a grid. Where nothing is given for one, the preset
    decides; its values stand in square brackets.

    Attributes:
        cache: Feature cache that `extract` wrote.
        out: Run folder; by default a new one under runs/.
        method: What to fit.
        baselines: Methods to run on the same tasks for comparison; none after the option leaves
            them out.
        branch: Where the adapter sits.
        alpha: Residual ratio of the image adapter in [0, 1]; `learned` trains one, `hypernet`
            predicts one for each image. [0.2 0.4 0.6 0.8; paper or --select none: 0.2]
        beta: Residual ratio of the text adapter, in the same forms; `hypernet` predicts one for
            each class.
        alpha_init: Where a learned or predicted alpha starts.
        beta_init: Where a learned or predicted beta starts.
        reduction: Bottleneck: the hidden width is D / reduction.
        lr: Peak learning rate. [0.001; paper: 0.002]
        weight_decay: Weight decay. [0.01, decoupled; paper: 0.0005, L2]
        epochs: Passes over the support set.
        batch_size: Images per step at most. [256; paper: 32]
        evaluate_every: Epochs between evaluations on the validation set.
        preset: How to train; `paper` does as the official implementation: SGD with momentum, a
            cosine schedule and one constant warm-up epoch.
        shots: Labelled images per class; `all` takes the whole train split.
        seeds: Seeds of the few-shot draws and of training.
        select: Validation data that choose setting and epoch: min(shots, 4) images per class as
            in CoOp, the whole split, cross-validation on the support set, or none, which takes
            one setting and its last epoch.
        augment: Draw one of an image's stored views (`extract --views`) whenever it is trained
            on, rather than take view 0 always. The baselines do not train on views.
        train_classes: Classes to fit on; `base` takes the first half and tests on both halves.
        search: How far to train settings; `halving` gives each a tenth of the epochs and lets
            the best third go on, twice.
        layout: How settings share a device: one after another, as auto does on a CPU, or side by
            side.
        resume: Run folder of an interrupted `fit` to go on with; takes its arguments from there.
    """

    cache: Path = Path("features.h5")
    out: Path | None = None
    method: MethodName = "clip-adapter"
    baselines: tuple[MethodName, ...] = ("zero-shot", "linear-probe")
    branch: Literal["image", "text", "both"] = "image"
    alpha: tuple[Ratio, ...] = ()
    beta: tuple[Ratio, ...] = (0.2,)
    alpha_init: float = 0.5
    beta_init: float = 0.5
    reduction: tuple[int, ...] = (4,)
    lr: tuple[float, ...] = ()
    weight_decay: tuple[float, ...] = ()
    epochs: int = 200
    batch_size: int | None = None
    evaluate_every: int = 5
    preset: Literal["default", "paper"] = "default"
    shots: tuple[int | Literal["all"], ...] = (16,)
    seeds: tuple[int, ...] = (1,)
    select: Literal["few-shot-val", "full-val", "cv", "none"] = "few-shot-val"
    augment: bool = False
    train_classes: Literal["all", "base"] = "all"
    search: Literal["full", "halving"] = "full"
    layout: Literal["auto", "sequential", "vectorised"] = "auto"
    resume: Path | None = None

    def arguments(self) -> dict[str, Any]:
        """What decides the results, as JSON; the values of alpha are spelled out."""
        values = asdict(self)
        for name in ("out", "resume"):
            del values[name]
        return values | {"cache": str(self.cache), "alpha": list(self.grid().alpha)}

    def grid(self) -> "Grid":
        """The grid that the arguments and the preset describe.

        Raises UserError for values out of range.
        """
        from clip_adapter.adapters.method import DEFAULTS, Grid
        from clip_adapter.adapters.training import Schedule

        paper = self.preset == "paper"
        defaults = DEFAULTS | (PAPER if paper else {})
        one_alpha = paper or self.select == "none"
        alpha = self.alpha or ((defaults["alpha"],) if one_alpha else Grid.alpha)
        rates = self.lr or (defaults["learning_rate"],)
        decays = self.weight_decay or (defaults["weight_decay"],)
        batch_size = 32 if paper else Schedule.batch_size
        schedule = Schedule(
            epochs=self.epochs,
            batch_size=batch_size if self.batch_size is None else self.batch_size,
            evaluate_every=self.evaluate_every,
            optimizer="sgd" if paper else "adamw",
            warmup="constant" if paper else "linear",
            drop_last=paper,
        )
        _check_ratios("--alpha", alpha)
        _check_ratios("--beta", self.beta)
        _check_ratios("--alpha-init", (self.alpha_init,))
        _check_ratios("--beta-init", (self.beta_init,))
        _check_positive("--lr", rates)
        _check_positive("--reduction", self.reduction)
        for name in ("epochs", "batch_size", "evaluate_every"):
            _check_count(f"--{name.replace('_', '-')}", getattr(schedule, name))
        if any(not 0 <= decay < float("inf") for decay in decays):
            raise UserError("--weight-decay must be a number ≥ 0.")
        return Grid(
            branch=self.branch,
            alpha=alpha,
            beta=self.beta,
            alpha_init=self.alpha_init,
            beta_init=self.beta_init,
            reduction=self.reduction,
            learning_rate=rates,
            weight_decay=decays,
            schedule=schedule,
            halving=self.search == "halving",
            defaults=defaults,
        )

    def without_effect(self) -> list[str]:
        """The options that were set and change nothing, each with what makes it idle."""
        idle = {}
        if not any(isinstance(ratio, str) for ratio in self.alpha):
            idle["alpha_init"] = "without --alpha learned or hypernet"
        if not any(isinstance(ratio, str) for ratio in self.beta):
            idle["beta_init"] = "without --beta learned or hypernet"
        if self.branch == "text":
            idle |= dict.fromkeys(("alpha", "alpha_init"), "with --branch text")
        if self.branch == "image":
            idle |= dict.fromkeys(("beta", "beta_init"), "with --branch image")
        if self.select == "none":
            idle["search"] = "with --select none"
        if "clip-adapter" not in {self.method, *self.baselines}:
            idle |= dict.fromkeys(ADAPTER_OPTIONS, f"with --method {self.method}")
        return [
            f"--{name.replace('_', '-')} has no effect {why}."
            for name, why in idle.items()
            if getattr(self, name) != getattr(FitConfig, name)
        ]


@dataclass(frozen=True)
class FitResult:
    """What a run found.

    run: its folder. selected: a row per (method, shots, seed) with the chosen setting, its
    validation metrics and its test accuracy (None without a test split). summary: a row per
    (method, shots) with mean and standard deviation over seeds. Accuracies lie in [0, 1].
    """

    run: Path
    selected: list[dict[str, Any]]
    summary: list[dict[str, Any]]


def fit(config: FitConfig) -> FitResult:
    """Run `fit`.

    Raises UserError for bad input, before anything is written; and where every setting of the task
    whose adapter is to be kept diverged, after everything else is.
    """
    from clip_adapter.pipelines.jax_setup import set_up_jax

    if config.resume and config.out:
        raise UserError("--resume goes on in its own folder; leave --out out.")
    set_up_jax()
    if config.resume:
        config = _resumed(config, config.resume)
    _check(config)
    grid = config.grid()
    for sentence in config.without_effect():
        print(f"fit: {sentence}", file=sys.stderr)
    from clip_adapter.pipelines.experiment import run_experiment

    return run_experiment(config, grid)


def _resumed(config: FitConfig, run: Path) -> FitConfig:
    """The configuration of the run; arguments given beside --resume must be the run's own, but for
    the cache, which may have moved.

    Raises UserError where they are not, or where there is no run.
    """
    import json

    from clip_adapter.pipelines.run_folder import read_arguments

    stated = read_arguments(run)
    stated.pop("cache_sha256", None)
    given = json.loads(json.dumps(config.arguments()))
    default = json.loads(json.dumps(FitConfig().arguments()))
    differing = [
        name
        for name in sorted(given.keys() - {"cache"})
        if given[name] != default[name] and given[name] != stated.get(name)
    ]
    if differing or stated.keys() != default.keys():
        raise UserError(
            f"{run} was started with other arguments ({', '.join(differing) or 'another version'});"
            " give --resume alone to go on with it."
        )
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in stated.items()
    }
    moved = config.cache != FitConfig.cache
    cache = config.cache if moved else Path(stated["cache"])
    return FitConfig(**values | {"cache": cache, "resume": run})


def _check(config: FitConfig) -> None:
    for name in ("shots", "seeds", "reduction", "beta"):
        if not getattr(config, name):
            raise UserError(f"--{name} needs at least one value.")
    for shots in config.shots:
        if isinstance(shots, int) and shots < 1:
            raise UserError(f"--shots {shots} is no number of images; give 1 or more, or `all`.")
    if min(config.seeds) < 0 or max(config.seeds) > LARGEST_SEED:
        raise UserError(f"--seeds must lie between 0 and {LARGEST_SEED}.")
    for name in ("baselines", "shots", "seeds", "alpha", "beta", "reduction", "lr", "weight_decay"):
        values = getattr(config, name)
        if len(set(values)) < len(values):
            raise UserError(f"--{name.replace('_', '-')} names a value twice.")


def _check_ratios(name: str, values: Sequence[Ratio]) -> None:
    for value in values:
        if not isinstance(value, str) and not 0 <= value <= 1:
            raise UserError(f"{name} {value} is outside [0, 1], where a residual ratio lies.")


def _check_positive(name: str, values: Sequence[float]) -> None:
    for value in values:
        if not 0 < value < float("inf"):
            raise UserError(f"{name} {value} must be a positive number.")


def _check_count(name: str, value: int) -> None:
    if not 0 < value <= LARGEST_COUNT:
        raise UserError(f"{name} {value} must lie between 1 and {LARGEST_COUNT}.")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The console script `fit`."""
    from clip_adapter.pipelines.command import run_command

    run_command(FitConfig, lambda config: fit(config) and None, "fit", arguments)
