"""What a method is: a record of pure functions and a table of its hyper-parameters.

Everything else that concerns a method (flags, ranges, columns, checks of saved adapters, the
estimator, the PyTorch module) is derived from its record. This module and the records import the
standard library only: the command line reads the tables, and needs no arrays for that.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from clip_adapter.adapters.hyper import Hyper, Value

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    from clip_adapter.adapters.engine.evaluation import Score

Array = Any
"""An array of NumPy, JAX or PyTorch; the formulas are written for all three."""
Setting = Mapping[str, Any]
"""A Value for each hyper-parameter that has an effect: one point of a grid, JSON-able. Inside a
compiled program its numbers are traced arrays."""
Arrays = Mapping[str, Array]
"""What was fitted, by name."""


class Head(NamedTuple):
    """The zero-shot classifier: what turns image features into logits without any labelled image.

    weights: unit rows. logit_scale: the multiplier. text: the un-normalised features of each
    prompt; None where no method needs them.
    """

    weights: Float[Array, "C D"]
    logit_scale: Float[Array, ""]
    logit_bias: Float[Array, ""]
    text: Float[Array, "C P D"] = None


class Task(NamedTuple):
    """The arrays of one (cache, shots, seed), which all settings share.

    features: float32, the support set; V > 1 draws a view per sample and step. labels: int32.
    seed: decides initialisation and batch order, alike for all settings. extra: what the method
    `needs` beyond that, as nested arrays by name; with features of a second encoder, which stand in
    E more columns behind the others, their `centre` (E,). validation_weights: how much each
    validation image counts; None for all alike. class_weights: how much an image of each class
    counts in the loss of trained methods, 1 on average over the support set; None for all alike.
    """

    features: Float[Array, "V S D"]
    labels: Int[Array, " S"]
    validation_features: Float[Array, "M D"]
    validation_labels: Int[Array, " M"]
    head: Head
    seed: Int[Array, ""]
    extra: Mapping[str, Any] = {}
    validation_weights: Float[Array, " M"] | None = None
    class_weights: Float[Array, " C"] | None = None


class Rounds(NamedTuple):
    """A support set in rounds: the first image of each class, the second, and so on.

    of_image: the round of each image; -1 of those that are never left out. place: where it stands
    in that round. members: each round's images, filled up with -1.
    """

    of_image: Int[Array, " S"]
    place: Int[Array, " S"]
    members: Int[Array, "R B"]


class Batch(NamedTuple):
    """Images of one training step.

    counts: how much each counts; 0 for rows that only fill the batch up. key: a random key of this
    step, for losses that draw.
    """

    features: Float[Array, "B D"]
    labels: Int[Array, " B"]
    counts: Bool[Array, " B"] | Float[Array, " B"]
    key: Array


Classify = Callable[[Array], Array]
"""(N, D) features → (N, C) logits."""
Solve = Callable[[Setting], Arrays]


def _nothing(xp: Any, task: Task, setting: Setting) -> Arrays:
    return {}


@dataclass(frozen=True, eq=False)
class Method:
    """One way to fit a classifier. A new one is a record, which a line in registry.py or
    `MODULE:NAME` makes known.

    name: as on the command line. source: where it is published. hyper: its hyper-parameters.

    logits(xp, arrays, setting, features, head) → (N, C): the formula, in the array library `xp`
        (numpy, jax.numpy or torch), for the arrays that were fitted.
    shapes: of the arrays that are saved, in letters, such as `"S D"`; C and D are those of the
        classifier weights, "" is a number; of a method that needs the projection, F is the width
        of the features before it, and of one that takes a second encoder, E is that one's.
    fit(xp, task, setting) → arrays: the closed form; of a trained method, where training starts.
    trained: names in them that the optimiser moves; the others are constants of the task.
    network: `"module:Class"` instead, a Flax module (setting, task, rngs=…) whose parameters are
        what is trained. One that can be called, with (features, task), gives logits in place of
        the formula as long as the method trains.
    loss(xp, classify, arrays, batch, setting, task) → (): None for mean cross-entropy.
    optimizer(setting, task, steps per epoch) → optax transformation: None for what the setting
        names (optimisation.py).
    near_zero_shot: hyper-parameters whose smaller values stay nearer to zero-shot, the first one
        deciding. Of the settings that validation cannot tell from the likeliest the nearest is then
        chosen; () for methods whose most accurate setting is, ties by likelihood.
    after_training: hyper-parameters that training does not see: it computes logits by `NAME_init`
        in their place, and settings that differ in them alone are judged on one run.
    finish(arrays, setting, task) → what is saved, where that is not what was fitted or trained.
    solver(task) → (setting → arrays): instead of fit, a solver on the host in NumPy; it is made
        once for a task, so that it may keep what serves every setting.
    propose(values): a generator that yields settings and is sent the score of each; None for the
        product of the table.
    for_classes(arrays, setting, task, head) → arrays that classify the classes of another head,
        where the fitted ones do not; None where this setting cannot. `extra` of the task is that of
        these classes.
    adapt(xp, arrays, setting, features, head) → (N, D): the image features that `logits` compares
        with the classes, un-normalised; None for methods that move none.
    left_out(xp, task, setting, rounds) → (S, C): of a closed form, the logits of each support image
        (its first view) by what the same setting gives without that image's round, exactly; of
        images that are never left out, anything. What a word in the setting stands for is taken
        from the whole support set. None where that takes a fit for each round.
    describe(xp, arrays, setting, features, head) → numbers by name whose mean and spread say what
        was learned, such as a predicted ratio for each image.
    note(task) → a sentence that whoever fits has to know, such as that something is approximated
        on this task, or takes long; "" where there is none. Its validation labels are then of all
        images that judge, those of the support set, too, where they are left out in turn.
    needs: `text` (the prompts' features), `tower` (the text tower and tokens), `projection` (the
        features before the last visual projection, and that projection).
    prepare(config, arrays) → `extra["tower"]` of a task, from a text tower as its file has it, for
        all its classes; its `of_classes(classes)` is the same for some of them.
    uses_views: whether augmented views of the support set take part where there are some.
    unseen_classes: whether `logits` can classify classes that had no support images.
    presets: values by hyper-parameter, by the preset's name.

    Examples:
        >>> from clip_adapter import METHODS
        >>> clip_adapter = METHODS["clip-adapter"]
        >>> clip_adapter.defaults()["alpha"], clip_adapter.needs
        (0.2, ())
    """

    name: str
    source: str
    hyper: Mapping[str, Hyper]
    logits: Callable[..., Array]
    shapes: Mapping[str, str] = field(default_factory=dict)
    fit: Callable[..., Arrays] = _nothing
    trained: tuple[str, ...] = ()
    network: str = ""
    loss: Callable[..., Array] | None = None
    optimizer: Callable[..., Any] | None = None
    near_zero_shot: tuple[str, ...] = ()
    after_training: tuple[str, ...] = ()
    finish: Callable[..., Arrays] | None = None
    solver: Callable[[Task], Solve] | None = None
    propose: Callable[..., Generator[Setting, Score, None]] | None = None
    for_classes: Callable[..., Arrays | None] | None = None
    adapt: Callable[..., Array] | None = None
    left_out: Callable[..., Array] | None = None
    describe: Callable[..., Mapping[str, Array]] | None = None
    note: Callable[[Task], str] | None = None
    needs: tuple[str, ...] = ()
    prepare: Callable[..., Any] | None = None
    uses_views: bool = False
    unseen_classes: bool = False
    presets: Mapping[str, Mapping[str, Value]] = field(default_factory=dict)

    @property
    def is_trained(self) -> bool:
        """Whether an optimiser moves something, step by step."""
        return bool(self.trained or self.network)

    @property
    def takes_second(self) -> bool:
        """Whether it works on features of a second encoder, too, where there are some."""
        return any(hyper.needs == "second" for hyper in self.hyper.values())

    def flag(self, name: str) -> str:
        """What a hyper-parameter is called on the command line, and where results are shown."""
        return self.hyper[name].flag or name if name in self.hyper else name

    def of_the_run(self, setting: Setting) -> dict[str, Any]:
        """What training sees of a setting."""
        return {name: value for name, value in setting.items() if name not in self.after_training}

    def during_training(self, setting: Setting) -> Setting:
        """The setting by which logits are computed as long as the method trains."""
        return {**setting, **{name: setting[f"{name}_init"] for name in self.after_training}}

    def defaults(self, preset: str = "") -> dict[str, Value]:
        """The value of each hyper-parameter where nothing is given and nothing chooses."""
        table = {name: hyper.default for name, hyper in self.hyper.items()}
        return table | dict(self.presets.get(preset, {}))

    def values(
        self,
        given: Mapping[str, Sequence[Value]],
        preset: str = "",
        *,
        one: bool = False,
        there: Collection[str] = (),
    ) -> dict[str, tuple[Value, ...]]:
        """The values to try of each hyper-parameter: those given, else the preset's, else the
        table's (with `one`, which says that nothing will choose, its default).

        there: what the cache has of what a hyper-parameter may need; others are left out.

        Raises ValueError, in a sentence, for names that the method does not have, values out of
        range, and several values where one holds for all settings.
        """
        if unknown := [name for name in given if name not in self.hyper]:
            raise ValueError(f"{self.name} has no {', '.join(unknown)}")
        defaults, of_preset = self.defaults(preset), self.presets.get(preset, {})
        found = {}
        for name, hyper in self.hyper.items():
            if hyper.needs and hyper.needs not in there:
                if name in given:
                    raise ValueError(f"{name} has no effect on features of one encoder")
                continue
            several = hyper.tried if not one and name not in of_preset else ()
            found[name] = hyper.checked_values(
                name, given.get(name) or several or (defaults[name],)
            )
        return found

    def settings(self, values: Mapping[str, Sequence[Value]]) -> list[dict[str, Value]]:
        """The product of the values; a hyper-parameter without effect in a setting is not in it."""
        found: list[dict[str, Value]] = [{}]
        for name, hyper in self.hyper.items():
            if hyper.needs and name not in values:
                continue
            found = [
                grown
                for setting in found
                for grown in (
                    [setting | {name: value} for value in values[name]]
                    if hyper.applies(setting)
                    else [setting]
                )
            ]
        return found

    def tried_at(
        self, shots: float, values: Mapping[str, Sequence[Value]]
    ) -> dict[str, Sequence[Value]]:
        """The values to try with so many images a class."""
        return {
            name: (hyper.default,)
            if shots < (hyper := self.hyper[name]).least_shots and tuple(some) == hyper.tried
            else some
            for name, some in values.items()
        }

    def default_setting(
        self, values: Mapping[str, Sequence[Value]], preset: str = ""
    ) -> dict[str, Value]:
        """The setting to take of these where nothing chooses: the most defaults, then the first.

        Where the values are those that the table says to try, it is the default, which need not be
        one of them.
        """
        defaults = self.defaults(preset)
        values = {
            name: (defaults[name],) if tuple(several) == self.hyper[name].tried else several
            for name, several in values.items()
        }

        def agreeing(setting: Setting) -> int:
            return sum(setting[name] == defaults[name] for name in setting)

        return max(self.settings(values), key=agreeing)

    def checked(self, setting: Mapping[str, Any], *, partial: bool = False) -> dict[str, Value]:
        """The setting of a file, with plain Python values; of rows that are younger than the file
        the value that it was made with (Hyper.absent).

        Raises ValueError, in a sentence, where a value is missing (unless `partial`) or out of
        range.
        """
        checked: dict[str, Value] = {}
        for name, hyper in self.hyper.items():
            if name in setting:
                checked[name] = hyper.checked(name, setting[name])
            elif hyper.needs:
                continue
            elif hyper.applies(checked) and hyper.absent is not None:
                checked[name] = hyper.absent
            elif hyper.applies(checked) and not partial:
                raise ValueError(f"{name} is missing")
        return checked

    def checked_values(self, stated: Mapping[str, Sequence[Any]]) -> dict[str, tuple[Value, ...]]:
        """The same for a file that states the values that were tried of each hyper-parameter."""
        younger = {n: (h.absent,) for n, h in self.hyper.items() if h.absent is not None}
        complete = younger | {name: tuple(values) for name, values in stated.items()}
        stated_by_all = [name for name, hyper in self.hyper.items() if not hyper.needs]
        if missing := [name for name in stated_by_all if not complete.get(name)]:
            raise ValueError(f"{', '.join(missing)} is missing")
        there = {hyper.needs for name, hyper in self.hyper.items() if name in complete}
        return self.values(complete, there=there)

    def split(self, setting: Setting) -> tuple[dict[str, Value], dict[str, float]]:
        """(what selects the compiled program, what it takes as numbers)."""
        static: dict[str, Value] = {}
        numbers: dict[str, float] = {}
        for name, value in setting.items():
            if self.hyper[name].static or isinstance(value, str | bool):
                static[name] = value
            else:
                numbers[name] = float(value)
        return static, numbers


def same_program(
    method: Method, settings: Sequence[Setting]
) -> Iterator[tuple[dict[str, Value], list[int]]]:
    """The settings in groups that share a compiled program: (static part, their indices)."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, setting in enumerate(settings):
        static, numbers = method.split(setting)
        groups.setdefault((*static.items(), *numbers), []).append(index)
    for members in groups.values():
        yield method.split(settings[members[0]])[0], members
