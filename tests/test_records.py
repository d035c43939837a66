"""What a declaration takes of a file, and the sentence for what it does not."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypedDict

import numpy as np
import pytest

from clip_adapter.errors import Contradiction, UserError
from clip_adapter.extract.config import ExtractConfig
from clip_adapter.pipelines.fitting.config import FitConfig
from clip_adapter.records import Rule, between, from_document, from_json

Even = Annotated[int, Rule("that is even", lambda value: value % 2 == 0)]


class Backbone(TypedDict):
    name: str


@dataclass(frozen=True)
class Layer:
    width: Annotated[int, between(1, 4096)]
    norm: Literal["none", "layer", 2] = "none"


@dataclass(frozen=True)
class Model:
    scale: Annotated[float, between(0.01, 100)]
    layers: tuple[Layer, ...]
    backbone: Backbone
    size: Even | tuple[Even, Even] = 0
    note: str | None = None
    first: Layer | None = None
    free: bool = False
    shares: Mapping[str, list[float]] = field(default_factory=dict)
    rest: dict[str, Any] = field(default_factory=dict)
    learned: dict[str, int | float | str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.layers) > 2:
            raise Contradiction("it has more than two layers")


STATED: dict[str, Any] = {"scale": 1, "layers": [{"width": 8}], "backbone": {"name": "a", "x": [1]}}


def test_what_is_declared_comes_back() -> None:
    stated = STATED | {
        **{"size": [2, 4], "note": None, "first": {"width": 1, "norm": 2}, "free": True},
        **{"shares": {"a": [1, 0.5]}, "rest": {"b": [None]}, "learned": {"c": 1, "d": 1.0}},
    }
    model = from_document(Model, stated)
    assert model == Model(
        scale=1.0,
        layers=(Layer(8),),
        backbone={"name": "a", "x": [1]},  # type: ignore[typeddict-unknown-key]
        size=(2, 4),
        first=Layer(1, 2),
        free=True,
        shares={"a": [1.0, 0.5]},
        rest={"b": [None]},
        learned={"c": 1, "d": 1.0},
    )
    numbers = (model.scale, *model.shares["a"], *model.learned.values())
    assert [type(number) for number in numbers] == [float, float, float, int, float]
    assert from_document(Model, STATED) == Model(1.0, (Layer(8),), STATED["backbone"])


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"scale": "1"}, "scale is '1', not a number from 0.01 to 100"),
        ({"scale": 0}, "scale is 0, not a number from 0.01 to 100"),
        ({"scale": math.nan}, "scale is nan, not a number from 0.01 to 100"),
        ({"scale": True}, "scale is True, not a number from 0.01 to 100"),
        ({"layers": {}}, "layers is {}, not a list"),
        ({"layers": [{"width": 8}, 3]}, "layers[1] is 3, not an object"),
        ({"layers": [{"norm": 2}]}, "layers[0] lacks width"),
        ({"layers": [{"width": 8.0}]}, "layers[0].width is 8.0, not an integer from 1 to 4,096"),
        ({"layers": [{"width": 8, "depth": 1}]}, "layers[0] has 'depth', which is not known here"),
        ({"first": {"width": 8, "norm": 2.0}}, "first.norm is 2.0, not 'none' or 'layer' or 2"),
        ({"first": {"width": 8, "norm": []}}, "first.norm is [], not 'none' or 'layer' or 2"),
        ({"first": 3}, "first is 3, not an object or null"),
        ({"layers": [{"width": 8}] * 3}, "it has more than two layers"),
        ({"backbone": {}}, "backbone lacks name"),
        ({"backbone": {"name": None}}, "backbone.name is None, not a string"),
        ({"size": 3}, "size is 3, not an integer that is even or a list of 2"),
        ({"size": [2, 4, 6]}, "size is [2, 4, 6], not an integer that is even or a list of 2"),
        ({"note": 1}, "note is 1, not a string or null"),
        ({"free": 1}, "free is 1, not true or false"),
        ({"shares": {"a": [1, "b"]}}, "shares.a[1] is 'b', not a number"),
        ({"learned": {"c": None}}, "learned.c is None, not an integer or a number or a string"),
        ({"rest": "long" * 100}, f"rest is '{'long' * 39}lo…, not an object"),
        ({"x": 1}, "it has 'x', which is not known here"),
    ],
)
def test_what_is_not_declared_is_refused(changed: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Contradiction) as caught:
        from_document(Model, STATED | changed)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[]", "it is [], not an object"),
        ("{}", "it lacks width"),
        ('{"width": 1, "width": 2}', "names 'width' twice in one object; join the two"),
        ("[" * 50 + "]" * 50, "it is nested too deep"),
        ("{", "Expecting property name enclosed in double quotes"),
    ],
)
def test_a_document_is_read_as_json(text: str, sentence: str) -> None:
    assert from_json(Layer, b'{"width": 2}') == Layer(2)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        from_json(Layer, text)


def test_an_integer_that_is_no_number_is_refused() -> None:
    with pytest.raises(Contradiction, match="not a number"):
        from_document(float, 10**400)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"on_error": "x"}, "on_error is 'x', not 'fail' or 'skip'"),
        ({"with_projection": "no"}, "with_projection is 'no', not true or false"),
        ({"batch_size": 2.5}, "batch_size is 2.5, not an integer"),
        ({"workers": True}, "workers is True, not an integer"),
        ({"templates": 3}, "templates is 3, not a list"),
        ({"out": 3}, "out is 3, not a path"),
    ],
)
def test_a_config_takes_what_its_fields_declare(values: dict[str, Any], words: str):
    with pytest.raises(UserError, match=words):
        ExtractConfig(**values)
    assert ExtractConfig(val=0, batch_size=np.int64(8)).batch_size == 8
    with pytest.raises(UserError, match="repeat is 'no', not true or false"):
        FitConfig(repeat="no")
    with pytest.raises(UserError, match="method is"):
        FitConfig(method=None)
