"""Prompts: templates filled with class names."""

from collections.abc import Sequence

from clip_adapter.cache.errors import UserError


def check_templates(templates: Sequence[str]) -> None:
    """Raises UserError for a template without its place for the class name."""
    for template in templates:
        if template.count("{}") != 1:
            raise UserError(
                f"The template {template!r} needs exactly one {{}} where the class name goes."
            )


def prompts(class_name: str, templates: Sequence[str]) -> list[str]:
    """The prompts of one class; underscores in its name become spaces (as in CoOp)."""
    return [template.replace("{}", class_name.replace("_", " ")) for template in templates]
