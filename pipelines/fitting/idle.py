"""Options that were given and change nothing."""

from clip_adapter.pipelines.fitting.config import FitConfig, own_values
from clip_adapter.pipelines.fitting.plan import Plan
from clip_adapter.words import dashed


def without_effect(config: FitConfig, plan: Plan) -> list[str]:
    """A sentence for each option that was given and changes nothing."""
    idle = []
    for planned in plan.fitted:
        method = planned.method
        for name in own_values(config, method):
            if not method.hyper[name].when:
                continue
            if all(name not in setting for setting in method.settings(planned.values)):
                reasons = " or ".join(
                    f"--{dashed(other)} {' or '.join(map(str, values))}"
                    for other, values in method.hyper[name].when.items()
                )
                idle.append(f"--{dashed(method.flag(name))} has no effect without {reasons}.")
    trained = any(planned.method.is_trained for planned in plan.methods)
    if plan.search == "halving" and (plan.select == "none" or not trained):
        why = "with --select none" if trained else "where no method is trained step by step"
        idle.append(f"--search halving has no effect {why}.")
    if plan.score != "accuracy" and plan.select == "none":
        idle.append(f"--score {plan.score} has no effect with --select none.")
    given = [own_values(config, planned.method).get("epoch") for planned in plan.fitted]
    if plan.select == "none" and ("best",) in given:
        idle.append("--epoch best has no effect with --select none, where nothing is judged.")
    if plan.augment and not any(planned.method.uses_views for planned in plan.methods):
        idle.append("--augment has no effect: none of these methods uses views.")
    if plan.preset != "default" and not any(
        plan.preset in planned.method.presets for planned in plan.fitted
    ):
        idle.append(f"--preset {plan.preset} has no effect on these methods.")
    return list(dict.fromkeys(idle))
