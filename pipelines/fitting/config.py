"""What `fit` is asked for; each option is a field that says what it decides."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from clip_adapter.adapters.hyper import Value
from clip_adapter.adapters.method import Method
from clip_adapter.errors import UserError
from clip_adapter.records import check_fields
from clip_adapter.words import dashed

Shots = int | Literal["all"]
Selection = Literal["few-shot-val", "full-val", "cv", "loo", "none"]

DEFAULT_CACHE = Path("features.h5")
# Options of a few words; each is a field of Plan too, as are all that decide a run's numbers.
CHOICES = (
    *("select", "validation", "score", "class_weight", "preset"),
    *("train_classes", "search", "placement"),
)


# What a field decides: the numbers of these methods, whose results pool over runs only where it is
# alike; or nothing of a run, so that it may stand beside --resume.
OF_ALL = {"numbers_of": lambda method: True}
OF_CHOSEN = {"numbers_of": lambda method: bool(method.hyper)}
OF_TRAINED = {"numbers_of": lambda method: method.is_trained}
OF_VIEWS = {"numbers_of": lambda method: method.uses_views}
NOTHING = {"with_resume": True}


@dataclass(frozen=True)
class FitConfig:
    """Fit classifiers on a feature cache, select on validation, test the selected ones once.

    Several values for a hyper-parameter make a grid. Where nothing is given for one, the preset
    decides, then the method's own table; what that says stands in square brackets.

    Attributes:
        cache: Feature cache that `extract` wrote. [features.h5]
        out: Run folder; by default a new one under runs/.
        method: What to fit: names, MODULE:NAME of your own, or `all`. Each brings its own options.
        baselines: Methods to run on the same tasks for comparison, with their own defaults; none
            after the option leaves them out.
        shots: Labelled images per class; `all` takes the whole train split.
        seeds: Seeds of the few-shot draws and of training.
        tasks: JSON file, or JSON lines, of the images of each task by their ids, instead of drawing
            them; it says the shots and seeds. A run's tasks.json is one.
        select: Validation data that choose the setting: min(shots, 4) images per class as in CoOp,
            the whole split, cross-validation on the support set, or none, which takes defaults.
            `loo` leaves out one support image of every class at a time (trained methods: `cv`).
            [few-shot-val, or cv where the cache has no validation split]
        validation: What the validation images of few-shot-val do under cv, loo and none: `join`
            adds them to the support set. Not beside numbers of the literature, which trains on none
            of them.
        score: How validation images count in the choice: all alike, or (balanced-accuracy) every
            class alike, so that one of few images counts as much as one of many.
        class_weight: How images count in the loss of methods that are trained step by step: all
            alike, or (balanced) every class alike, by N / (K n) of N images in K classes and n of
            its own. For unequal classes, as with --shots all.
        preset: How to train; `paper` does as a method's official implementation.
        repeat: Draw a class with too few images with repetition, as Tip-Adapter's and LP++'s code
            does, rather than take each of its images once.
        augment: Draw one of an image's stored views (`extract --views`) whenever it is trained on,
            rather than take view 0 always; for the methods that use views.
        train_classes: Classes to fit on; `base` takes the first half and tests on both halves.
        search: How far to train settings; `halving` gives each a tenth of the epochs and lets the
            best third go on, twice.
        ablate: Hyper-parameters to show the test accuracy of at every value, everything else
            selected on validation, or `method` for the methods named or else all: an analysis,
            which chooses nothing.
        refit: Fit the chosen setting once more on every labelled image of the cache, and keep that
            adapter; the accuracies shown are those of before.
        placement: How settings share a device: one after another, as auto does on a CPU, or side by
            side, and several seeds with them.
        unlabelled: Cache of images without labels (`extract`'s part of that name; it may be --cache
            itself), which refine each chosen classifier by StatA where labelled images that took no
            part say that this is no worse. None of them is one that fits, chooses or tests.
        from_run: Run folder, or that of one of its adapters, whose method and setting are taken for
            this cache, with no search: when a class or images have come since. What changed in
            accuracy for the classes of before is said. [its shots and seed]
        resume: Run folder of an interrupted `fit` to go on with, as it was begun: beside it stand
            --cache and --unlabelled, where those lie elsewhere now, and --method MODULE:NAME of
            your own.
        verbose: Print the settings that were chosen and the classes that do worst too; the report
            always has them.

    Examples:
        >>> from clip_adapter import FitConfig
        >>> FitConfig(method="tip-adapter", shots=(1, 16), hyper={"alpha": (0.5, 1.0)}).seeds
        (1,)
    """

    cache: Path | None = field(default=None, metadata=NOTHING)
    out: Path | None = None
    method: tuple[str, ...] = ("clip-adapter",)
    baselines: tuple[str, ...] = ("zero-shot", "linear-probe")
    shots: tuple[int | Literal["all"], ...] = (16,)
    seeds: tuple[int, ...] = (1,)
    select: Selection | None = field(default=None, metadata=OF_CHOSEN)
    tasks: Path | None = field(default=None, metadata=OF_CHOSEN)
    validation: Literal["keep", "join"] = field(default="keep", metadata=OF_CHOSEN)
    score: Literal["accuracy", "balanced-accuracy"] = field(default="accuracy", metadata=OF_CHOSEN)
    class_weight: Literal["none", "balanced"] = field(default="none", metadata=OF_TRAINED)
    preset: Literal["default", "paper"] = "default"
    repeat: bool = field(default=False, metadata=OF_CHOSEN)
    augment: bool = field(default=False, metadata=OF_VIEWS)
    train_classes: Literal["all", "base"] = field(default="all", metadata=OF_ALL)
    search: Literal["full", "halving"] = field(default="full", metadata=OF_TRAINED)
    ablate: tuple[str, ...] = ()
    refit: bool = False
    placement: Literal["auto", "sequential", "vectorised"] = "auto"
    unlabelled: Path | None = field(default=None, metadata=OF_ALL | NOTHING)
    from_run: Path | None = field(default=None, metadata={"flag": "from"})
    resume: Path | None = field(default=None, metadata=NOTHING)
    verbose: bool = field(default=False, metadata=NOTHING)
    hyper: Mapping[str, Any] = field(default_factory=dict, metadata={"option": False})
    """Values to try by the hyper-parameter's name (`alpha`), for each method that has it, or by
    method and name (`clap.learning_rate`)."""
    stated: frozenset[str] = field(
        default=frozenset(), repr=False, compare=False, metadata={"option": False}
    )
    """Names of fields that a command line gave, also where it gave what is the default."""

    def __post_init__(self) -> None:
        """Take what a person types: one value for several, strings for paths."""
        for name in ("cache", "out", "tasks", "unlabelled", "from_run", "resume"):
            value = getattr(self, name)
            if isinstance(value, str):
                object.__setattr__(self, name, Path(value).expanduser())
        for name in ("method", "baselines", "shots", "seeds", "ablate"):
            object.__setattr__(self, name, several(getattr(self, name)))
        if not isinstance(self.hyper, Mapping) or not all(isinstance(n, str) for n in self.hyper):
            raise UserError(f"hyper is {self.hyper!r}, not a mapping from names to values.")
        hyper = {name: several(values) for name, values in self.hyper.items()}
        object.__setattr__(self, "hyper", hyper)
        check_fields(self, but=(*CHOICES, "shots", "seeds"))

    @property
    def beside_resume(self) -> list[str]:
        """The flags that were given and have no place beside --resume."""
        plain = FitConfig()
        given = {f.name for f in fields(self) if f.compare and not f.metadata.get("with_resume")}
        given = {n for n in given if getattr(self, n) != getattr(plain, n)} | (given & self.stated)
        if all(":" in name for name in self.method):
            given.discard("method")  # named to make them known
        flags = {f.name: f.metadata.get("flag", f.name) for f in fields(self)}
        return [dashed(flags.get(name, name)) for name in (*sorted(given - {"hyper"}), *self.hyper)]


def words_of(name: str) -> tuple[str, ...]:
    """The words that a field of FitConfig takes."""
    hint = get_type_hints(FitConfig)[name]
    return next(get_args(one) for one in (hint, *get_args(hint)) if get_origin(one) is Literal)


def numbers_decided(method: Method) -> list[str]:
    """The fields, but for values of hyper-parameters, that decide the method's numbers."""
    deciding = [f for f in fields(FitConfig) if "numbers_of" in f.metadata]
    return [f.name for f in deciding if f.metadata["numbers_of"](method)]


def several(values: Any) -> tuple[Value, ...]:
    """One value, or some, as a tuple of plain Python values."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        values = (values,)
    return tuple(value.item() if hasattr(value, "item") else value for value in values)


def own_values(config: FitConfig, method: Method) -> dict[str, tuple[Value, ...]]:
    """What was given for the hyper-parameters of a method; its own words go before common ones."""
    common = {key: values for key, values in config.hyper.items() if key in method.hyper}
    prefix = f"{method.name}."
    own = {
        key.removeprefix(prefix): values
        for key, values in config.hyper.items()
        if key.startswith(prefix)
    }
    return common | own


def shots_words(shots: Shots) -> str:
    """`1 shot`, `4 shots`, `all shots`."""
    return f"{shots} shot{'s' * (shots != 1)}"
