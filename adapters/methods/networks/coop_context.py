"""CoOp's prompts (Zhou et al., IJCV 2022, arXiv 2109.01134): learned vectors before, within or
behind the class name, read by the frozen text tower.

    end     [start] v₁ … v_M NAME . [end]
    middle  [start] v₁ … v_⌊M/2⌋ NAME v_⌊M/2⌋+1 … v_M . [end]
    front   [start] NAME v₁ … v_M . [end]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx

from clip_adapter.adapters.formulas import cosine_logits
from clip_adapter.adapters.method import Setting, Task
from clip_adapter.adapters.methods.coop import BY_CLASS, GENERIC
from clip_adapter.adapters.methods.networks.text_transformer import (
    TowerShape,
    classes_at_once,
    in_chunks,
    text_features,
)

if TYPE_CHECKING:
    from jaxtyping import Float, Int

RANDOM = "random"
START, END, PAD = 0, 1, 2  # rows of Tower.vocabulary
OF_A_CLASS = ("sentences", "name_lengths", "sentence_lengths")


Array = jax.Array | npt.NDArray[Any]


class Tower(NamedTuple):
    """What CoOp needs of the text side, as a pytree.

    arrays: of the transformer. vocabulary: (U, E), embeddings of the tokens that occur.
    sentences: (C, N) rows of the vocabulary, `NAME.` of each class, filled up with PAD.
    name_lengths, sentence_lengths: (C,) int32. phrases: (T, E) embeddings to start from.
    """

    shape: TowerShape
    arrays: Mapping[str, Array]
    vocabulary: Array
    sentences: Array
    name_lengths: Array
    sentence_lengths: Array
    phrases: Mapping[str, Array]

    def of_classes(self, classes: Sequence[int]) -> Tower:
        """The same tower for some of the classes, in that order."""
        rows = np.asarray(classes)
        return self._replace(**{name: np.asarray(getattr(self, name))[rows] for name in OF_A_CLASS})


def prepare(config: Any, arrays: Mapping[str, np.ndarray]) -> Tower:
    """The tower of a cache for CoOp.

    config, arrays: as `read_text_tower` gives them. The vocabulary shrinks to what occurs; whole,
    it is two fifths of RN50's tower.
    """
    special = [config.start_id, config.end_id, config.pad_id]
    words = sorted({token for sentence in config.sentences for token in sentence})
    row = {token: len(special) + index for index, token in enumerate(words)}
    lengths = [len(sentence) for sentence in config.sentences]
    sentences = np.full((len(lengths), max(lengths)), PAD, np.int32)
    for index, sentence in enumerate(config.sentences):
        sentences[index, : len(sentence)] = [row[token] for token in sentence]
    embedding = arrays["token_embedding/embedding"]
    return Tower(
        TowerShape.of(config),
        {name: array for name, array in arrays.items() if name != "token_embedding/embedding"},
        embedding[special + words],
        sentences,
        np.array(config.name_lengths, np.int32),
        np.array(lengths, np.int32),
        {name: embedding[list(tokens)] for name, tokens in config.phrases.items()},
    )


def check_room(tower: Tower, context_length: int) -> None:
    """Raises ValueError where the longest class name and so many context vectors are too long for
    the tower."""
    longest = tower.sentences.shape[1]
    room = tower.shape.context_length - 2 - longest
    if context_length > room:
        allowed = f"at most {room}" if room > 0 else "none at all"
        raise ValueError(
            f"the text tower reads {tower.shape.context_length} tokens, which with the longest "
            f"class name ({longest} tokens) leaves room for {allowed} of {context_length} context "
            "vectors"
        )


def context_shape(setting: Mapping[str, Any], tower: Tower) -> tuple[int, ...]:
    """(M, E), or (C, M, E) where each class has its own.

    setting: context_length M, class_specific, position, initialisation: `random` or a phrase of the
    tower, whose tokens then say M.
    """
    start = setting["initialisation"]
    length = setting["context_length"] if start == RANDOM else len(tower.phrases[start])
    classes = (len(tower.sentences),) if setting["class_specific"] else ()
    return (*classes, length, tower.shape.width)


def initial_context(
    setting: Mapping[str, Any], key: jax.Array, tower: Tower
) -> Float[jax.Array, "*classes M E"]:
    """Where training starts: N(0, 0.02²), or the embeddings of a phrase (section 3.2.1).

    Raises what `check_room` raises.
    """
    shape = context_shape(setting, tower)
    check_room(tower, shape[-2])
    if setting["initialisation"] == RANDOM:
        return 0.02 * jax.random.normal(key, shape)
    return jnp.broadcast_to(jnp.asarray(tower.phrases[setting["initialisation"]]), shape)


def class_weights(
    context: Float[jax.Array, "*classes M E"], setting: Mapping[str, Any], tower: Tower
) -> Float[jax.Array, "C D"]:
    """The un-normalised text features of all classes with this context.

    context: (M, E) or (C, M, E), see `context_shape`. Differentiable in it; memory is bounded
    whatever C (`in_chunks`).
    """
    count = context.shape[-2]
    before = {"end": count, "middle": count // 2, "front": 0}[setting["position"]]
    shape = tower.shape
    longest = jnp.shape(tower.sentences)[1] + count + 2
    length = shape.context_length if shape.pooling == "last" else longest
    vocabulary = jnp.asarray(tower.vocabulary)

    def weights(chunk: Mapping[str, jax.Array]) -> Float[jax.Array, "B D"]:
        tokens, slots = _arranged(chunk, count, before, length)
        # 0 and 1 times a vector is exact, and its gradient is a product instead of a scatter.
        chosen = jax.nn.one_hot(slots, count, dtype=context.dtype)
        learned = jnp.matmul(chosen, chunk.get("context", context), precision="highest")
        embeddings = jnp.where((slots < 0)[..., None], vocabulary[tokens], learned)
        if shape.pooling == "last":
            pooled = jnp.full(len(tokens), length - 1)
        else:
            pooled = 1 + count + chunk["sentence_lengths"]
        return text_features(tower.arrays, shape, embeddings, pooled)

    inputs = {name: jnp.asarray(getattr(tower, name)) for name in OF_A_CLASS}
    if context.ndim == 3:
        inputs["context"] = context
    return in_chunks(weights, inputs, classes_at_once(shape, length))


@partial(jax.jit, static_argnums=1)
def compiled_weights(
    context: Float[jax.Array, "*classes M E"], position: str, tower: Tower
) -> Float[jax.Array, "C D"]:
    """`class_weights` outside of a program, compiled once for every shape."""
    return class_weights(context, {"position": position}, tower)


def _arranged(
    chunk: Mapping[str, jax.Array], count: int, before: int, length: int
) -> tuple[Int[jax.Array, "B L"], Int[jax.Array, "B L"]]:
    """What stands in each of (B, length) places: a row of the vocabulary, and which of `count`
    context vectors instead, −1 for none. before: so many of these come before the name."""
    name, sentence = chunk["name_lengths"][:, None], chunk["sentence_lengths"][:, None]
    place = jnp.arange(-1, length - 1)[None]  # behind the start
    of_sentence = place - jnp.where(place < before + name, before, count)
    last = chunk["sentences"].shape[1] - 1
    tokens = jnp.take_along_axis(chunk["sentences"], jnp.clip(of_sentence, 0, last), axis=1)
    behind = place - count - sentence  # the end is 0
    tokens = jnp.where(behind < 0, tokens, jnp.where(behind == 0, END, PAD))
    tokens = jnp.where(place < 0, START, tokens)
    between = (before + name <= place) & (place < count + name)
    slots = jnp.where(place < before, place, jnp.where(between, place - name, -1))
    return tokens, slots


class LearnedContext(nnx.Module):
    """Context vectors, (M, E) or (C, M, E).

    The tower is none of its attributes, but comes with the task: its parameters would be found
    among what is trained.
    """

    def __init__(self, setting: Setting, task: Task, *, rngs: nnx.Rngs) -> None:
        self.position = setting["position"]
        self.name = BY_CLASS if setting["class_specific"] else GENERIC
        start = initial_context(setting, rngs.params(), task.extra["tower"])
        setattr(self, self.name, nnx.Param(start))

    def __call__(self, features: Float[Array, "N D"], task: Task) -> Float[Array, "N C"]:
        context = getattr(self, self.name)[...]
        weights = class_weights(context, {"position": self.position}, task.extra["tower"])
        return cosine_logits(jnp, features, task.head._replace(weights=weights))
