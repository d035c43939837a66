"""A record that somebody else wrote is checked as it is taken."""

import itertools
import re
import sys
from dataclasses import fields, replace
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from clip_adapter.adapters import registry as methods
from clip_adapter.adapters.hyper import Hyper
from clip_adapter.adapters.registry import METHODS, TAKEN, find_method
from clip_adapter.pipelines.console.running import run
from clip_adapter.pipelines.fitting.config import FitConfig
from clip_adapter.pipelines.fitting.options import parse
from clip_adapter.pipelines.fitting.record import TASK_COLUMNS
from clip_adapter.pipelines.fitting.run_folder import OUTCOME_COLUMNS
from tests.pipelines.toy_methods import WEIGHTED

NUMBER = itertools.count()
HALF = Hyper(0.5, "Half.", low=0, high=1)


def test_a_hyper_parameter_has_no_name_that_means_something_else() -> None:
    assert {*TASK_COLUMNS, *OUTCOME_COLUMNS, *(field.name for field in fields(FitConfig))} <= TAKEN


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        *(
            ({"name": name}, "its name is")
            for name in (
                *("../../escaped", "a/b", "/tmp/x", ".", "..", "", "a b", "a\nb", "\x1b[2J", "-x"),
                *("a\x00", "a:b", "all", "None", "method", "x" * 81, 7, None),
            )
        ),
        ({"logits": None}, "its logits is None and no function"),
        ({"fit": "closed"}, "its fit is 'closed' and no function"),
        ({"loss": 3}, "its loss is 3"),
        ({"source": None}, "its source is None"),
        ({"unseen_classes": "yes"}, "its unseen_classes is 'yes'"),
        ({"hyper": {"alpha": 0.5}}, "no table of Hyper"),
        ({"hyper": [HALF]}, "no table of Hyper"),
        ({"hyper": {"../x": HALF}}, "a hyper-parameter of the name '../x'"),
        ({"hyper": {"shots": HALF}}, "a hyper-parameter of the name 'shots'"),
        ({"hyper": {"_own": HALF}}, "a hyper-parameter of the name '_own'"),
        ({"hyper": {"a": replace(HALF, flag="--b")}}, "a cannot have the flag '--b'"),
        ({"hyper": {"a": replace(HALF, default=2.0)}}, "a is 2.0, not a number in"),
        ({"hyper": {"a": replace(HALF, tried=(0.1, float("nan")))}}, "a is nan, not a number in"),
        ({"hyper": {"a": replace(HALF, absent=1.5)}}, "a is 1.5, not a number in"),
        ({"hyper": {"a": replace(HALF, default=[1])}}, "a is [1], not a number or a word"),
        ({"hyper": {"a": replace(HALF, when={"b": (1,)})}}, "does not stand above"),
        ({"hyper": {"a": replace(HALF, needs="third")}}, "a needs 'third'; there is ['second']"),
        ({"presets": {"paper": {"beta": 1.0}}}, "has 'beta', which it has not"),
        ({"presets": {"paper": {"alpha": 99.0}}}, "alpha is 99.0, not"),
        ({"shapes": {"weight": 3}}, "no table of letters"),
        ({"shapes": {"weight": "classes"}}, "not letters like 'S D'"),
        ({"needs": ("money",)}, "it needs money"),
        ({"needs": "text"}, "not a tuple of names"),
        ({"needs": ("tower",)}, "it needs the tower and has no `prepare`"),
        ({"network": "../x:Y"}, "not MODULE:CLASS"),
        ({"trained": ("weight",)}, "lacks the hyper-parameter epochs, batch_size"),
        ({"after_training": ("alpha",)}, "lacks the hyper-parameter alpha_init"),
    ],
)
def test_what_cannot_be_is_named(
    changes: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = SimpleNamespace(METHOD=replace(WEIGHTED, **changes))
    monkeypatch.setitem(sys.modules, "their_module", module)  # type: ignore[arg-type]
    before = dict(METHODS)
    with pytest.raises(LookupError, match=f"'their_module:METHOD' is no .*{re.escape(words)}"):
        find_method("their_module:METHOD")
    assert before == METHODS


BROKEN = {
    "1 / 0": "ZeroDivisionError: division by zero",
    "raise SystemExit(3)": "SystemExit: 3",
    "import nowhere_at_all": "No module named 'nowhere_at_all'",
    "def broken(:": "SyntaxError: invalid syntax",
    "raise RuntimeError('two\\nlines \\x1b[2J')": r"RuntimeError: two\nlines \x1b[2J",
    "def again(): again()\nagain()": "RecursionError: maximum recursion depth exceeded",
}


@pytest.mark.parametrize("installed", [False, True])
@pytest.mark.parametrize("source", BROKEN)
def test_what_their_module_raises_is_a_sentence_above_their_traceback(
    source: str,
    installed: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = f"theirs_{next(NUMBER)}"
    (tmp_path / f"{module}.py").write_text(f"# their code\n{source}\n")
    monkeypatch.chdir(tmp_path)
    name = f"{module}:METHOD"
    if installed:
        monkeypatch.syspath_prepend(tmp_path)
        offered = [EntryPoint("theirs", f"{module}:METHOD", methods.GROUP)]
        monkeypatch.setattr(methods, "entry_points", lambda **_: offered)
        name = "theirs"
    with pytest.raises(SystemExit) as ended:
        run("fit", lambda: parse(["--method", name]))
    assert ended.value.code == 2
    sentence, *below = capsys.readouterr().err.splitlines()
    assert sentence.startswith(f"fit: The method '{name}' cannot be imported (")
    assert BROKEN[source] in sentence
    assert f'File "{tmp_path / module}.py", line ' in below[0] and len(below) < 20
    assert not any("adapters" in line or "\x1b" in line for line in below)
